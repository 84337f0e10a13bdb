"""Rows whose label simple heads predict that never saw it: our own sampler.

A margin says how surely a Bradley-Terry head, fitted to the rows of other
prompts, gives the row its label; a gate, fitted to how often heads and labels
agree and blind to the row's own label, says how far that margin can be
trusted. Wrong labels get a negative score, random words one near 0.

It reads every label: it saves training, not annotation. It also follows the
majority: what most annotators like, their habits too (length, style), scores
high.
"""

from typing import NamedTuple

import numpy as np

from jaxalign.core import progress
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select import grams as grams_lib
from jaxalign.select.costs import Sizes, Work
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers import alike, habits, heads
from jaxalign.select.samplers import bradley_terry as bt
from jaxalign.select.samplers.draws import place_in_group
from jaxalign.select.samplers.isa import top_with_quota
from jaxalign.select.samplers.values import column, finite, quantiles, ranked
from jaxalign.select.topk import id_hash, uniform

SENTENCE = "reads every label: saves training, not annotation"
UNLEARNABLE = ("random", "error")
COPIES = 2  # of a set of near-copies, before all others
ALL_ALIKE = 0.5  # share of rows with near-copies, above which nobody counts


class Sides(NamedTuple):
  """What is known of each response; R is 2 for pairs, 1 for unpaired rows."""

  blocks: list[list[np.ndarray]]  # of each head: parts [N, R, W]
  signs: dict[str, np.ndarray]  # [N, R] numbers that the gate reads


class Ways(NamedTuple):
  """Keywords of both samplers, see `crossfit`."""

  label_quota: float | str | None = None
  unlearnable: str = "random"
  orthogonal: str | tuple[str, ...] | None = None
  slices: str | tuple[str, ...] | None = None
  copies: int | str | None = "auto"


def filled(score: np.ndarray, q: np.ndarray) -> np.ndarray:
  """Scores [N] where too few are above 0: what comes after those.

  First the rows that the gate takes for no junk, q above 0.55, the least
  contradicted first, then the others. Not random ones of the former: where a
  trusted head contradicts a label it is right more often than not.
  """
  last = (score <= 0) & (q <= 0.55)
  return np.where(last, score + min(0.0, score.min()) - 1, score)


def drawn(seed: int, pool: Pool, signs: dict[str, np.ndarray]) -> np.ndarray:
  """Scores [N] that read no label: those of `random`.

  Where rows have a log-likelihood the least likely fifth, by the worse of two
  sides, comes last: that is where junk is.
  """
  score = uniform(seed, pool.ids, "random")
  if "log_likelihood" in signs:
    score -= quantiles(signs["log_likelihood"].min(axis=1)) < 0.2
  return score


def _lowered(score: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Scores of rows that are not among `rows` moved to the lowest kept."""
  kept = np.zeros(len(score), bool)
  kept[rows] = True
  if kept.all():
    return score
  least = score[kept].min(initial=np.inf)
  above = max(0.0, score[~kept].max() - least)
  return np.where(kept, score, np.minimum(score - above, least))


def _chosen(
  score: np.ndarray,
  pool: Pool,
  budget: int,
  ways: Ways,
  pairs: bool,
  code: np.ndarray | None,
) -> Selection:
  """The best rows, of unpaired rows each label's, of slices each slice's."""
  if code is None and pairs:
    return ranked(score, pool, budget)
  if code is None:
    quota = "as_pool" if ways.label_quota is None else ways.label_quota
    rows = top_with_quota(score, pool, budget, quota)
  elif ways.label_quota is not None:
    raise ConfigError(
      f"slices keeps labels of each slice as they are, and label_quota is "
      f"{ways.label_quota!r}; set one of config.select.kwargs.slices and "
      "config.select.kwargs.label_quota"
    )
  else:
    label = 0 if pairs else np.asarray(pool.label, np.int64)
    rows = habits.by_share(score, pool, budget, 2 * code + label)
  return Selection(rows, _lowered(score, rows))


def _select(
  seed: int, pool: Pool, budget: int, sides: Sides, ways: Ways
) -> Selection:
  if ways.unlearnable not in UNLEARNABLE:
    raise ConfigError(
      f"unlearnable is {ways.unlearnable!r}, wanted one of "
      f"{', '.join(UNLEARNABLE)}; set "
      "config.select.kwargs.unlearnable"
    )
  if ways.copies not in (None, "auto") and (
    isinstance(ways.copies, (bool, str))
    or ways.copies != int(ways.copies)
    or ways.copies < 1
  ):
    raise ConfigError(
      f"copies is {ways.copies!r}, wanted 'auto', None, or 1 "
      "or more; set config.select.kwargs.copies"
    )
  pairs = sides.blocks[0][0].shape[1] == 2
  if not pairs and "label" not in pool.columns:
    raise ConfigError(
      "crossfit reads the label of single responses, the pool "
      "has none; set config.select.sampler"
    )
  group = pool.columns.get("group", pool.ids)
  label = None if pairs else np.asarray(pool.label, bool)
  without = habits.named(ways.orthogonal)
  habit = habits.columns(pool, without, group)
  by = habits.named(ways.slices)
  code = names = None
  if by or "source" in pool.columns:
    code, names = habits.slice_codes(pool, by or ("source",))
  most, like, all_alike = _copies(pool, ways.copies, pairs)
  if like is not None:
    group = alike.joined(group, like)
  own, notes = set(), [f"crossfit {SENTENCE}"]
  if refused := _of_one_class(label):
    learnt = False
  else:
    found = shared = bt.margins(seed, sides.blocks, group, label, habit)
    if by:
      found, own = bt.with_own_heads(
        seed, shared, sides.blocks, group, label, habit, code
      )
    learnt, said = bt.predictable(found)
    refused = (
      f"no head predicts them ({said}); they look shuffled, or the "
      "features say nothing of them"
    )
  if learnt:
    q = bt.trusted(seed, found, sides.signs, group)
    score = found.mean * np.maximum(0, 2 * q - 1)
    positive = int((score > 0).sum())
    notes.append(
      f"heads agree with {100 * found.accuracy:.1f} % of labels ({said}),"
      f" the gate trusts them by {q.mean():.2f}; {positive:,} of "
      f"{len(score):,} rows score above 0"
    )
    if positive < budget:
      score = filled(score, q)
      notes.append(
        f"warning: the budget of {budget:,} is more than the "
        f"{positive:,} rows that score above 0; of the rest more "
        "labels are wrong than of random rows; set "
        "config.select.budget"
      )
  elif ways.unlearnable == "error":
    raise NumericError(
      f"crossfit refuses these labels: {refused}; set "
      "config.select.sampler, or "
      "config.select.kwargs.unlearnable to 'random'"
    )
  else:
    score = drawn(seed, pool, sides.signs)
    notes.append(
      f"warning: crossfit refuses these labels: {refused}. These rows are "
      "random ones"
      + (
        ", the least likely fifth last"
        if "log_likelihood" in sides.signs
        else ""
      )
    )
  if like is not None:
    place = place_in_group(like, score, id_hash(pool.ids))
    spare = place >= most
    score = np.where(spare, score - np.ptp(score) - 1, score)
    notes.append(
      f"{int(spare.sum()):,} rows have {most} near-copies "
      "or more that score higher, and come last"
    )
  notes += all_alike
  selection = _chosen(score, pool, budget, ways, pairs, code if by else None)
  if not learnt:
    return _told(selection, *notes)
  kept = selection.rows
  length = column(pool, "length")
  fold = heads.folds(seed, group, bt.FOLDS, "crossfit")
  y = np.ones(len(pool.ids)) if pairs else np.where(label, 1.0, -1.0)
  lost = habits.alone(habits.columns(pool, ("length",), group), y, fold)
  whole = np.arange(len(pool.ids))
  notes.append(
    (
      "chosen answers are longer than rejected ones by "
      if pairs
      else "liked answers are longer than disliked ones by "
    )
    + f"{habits.gap(length, label, kept):+.2f} tokens among the kept, "
    f"{habits.gap(length, label, whole):+.2f} in the pool; length alone "
    f"predicts {100 * lost[1]:.1f} % of labels"
  )
  notes += habits.length_note(
    lost, found.loss.mean(), found.accuracy, found.chance, "length" in without
  )
  if code is not None and len(names) > 1:
    notes += habits.slice_notes(
      code,
      names,
      ", ".join(by or ("source",)),
      shared.mean > 0,
      kept,
      own,
      bool(by),
    )
  notes += alike.notes(
    pool, kept, ranked(uniform(seed, pool.ids, "random"), pool, len(kept)).rows
  )
  return _told(selection, *notes)


def _copies(
  pool: Pool, copies: int | str | None, pairs: bool
) -> tuple[int, np.ndarray | None, list[str]]:
  """How many near-copies may come first, which rows are some, and a note.

  None where nobody is to count them: texts of a few words are all alike, and
  so are the answers to one prompt, from which heads learn.
  """
  if copies is None or copies == "auto" and not pairs:
    return 0, None, []
  like = alike.copies(pool.grams)
  share = alike.in_copies(like)
  if copies != "auto":
    return int(copies), like, []
  if share <= ALL_ALIKE:
    return COPIES, like, []
  return (
    0,
    None,
    [
      f"{100 * share:.0f} % of the rows have near-copies, as "
      "texts of a few words do: copies come as other rows do"
    ],
  )


def _of_one_class(label: np.ndarray | None) -> str:
  """Why labels [N] that are all alike teach nothing; "" of others."""
  if label is None or (label.any() and not label.all()):
    return ""
  return (
    f"all {len(label):,} rows are {'' if label.all() else 'un'}desirable,"
    " and heads learn what tells the two labels apart"
  )


def _told(selection: Selection, *notes: str) -> Selection:
  for note in notes:
    progress.say(f"  {note}")
  return selection._replace(notes=notes)


def _read(pool: Pool) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """The tokens of each response, its few numbers, and what the gate reads."""
  grams = _counts(pool)
  half = grams.shape[2] // 2
  said = np.float32(grams[..., :half])
  length = column(pool, "length")
  few = np.concatenate(
    [finite(pool.overlap, pool.ids, "overlap"), length[..., None]], axis=2
  )
  n, r = said.shape[:2]
  common = grams_lib.surprise(grams.reshape(n * r, -1)).reshape(n, r, 2)
  signs = dict(
    length=length,
    tokens=common[..., 0],
    pairs=common[..., 1],
    grams=_typical(said),
    size=np.sqrt((said**2).sum(axis=2)),
  )
  return said, few, signs


def _counts(pool: Pool) -> np.ndarray:
  """`pool.grams`, not copied where they are whole numbers, which are finite."""
  grams = np.asarray(pool.grams)
  return (
    grams if grams.dtype.kind in "biu" else finite(grams, pool.ids, "grams")
  )


def _typical(x: np.ndarray) -> np.ndarray:
  """[N, R, W] -> [N, R]."""
  flat = np.asarray(x.reshape(-1, x.shape[2]), np.float32)
  return heads.typical(
    heads.scaled(flat, flat.mean(axis=0, dtype=np.float64))
  ).reshape(x.shape[:2])


def _lite_work(p: Sizes, **_) -> Work:
  return bt.heads_work(p, (grams_lib.WIDTH // 2,))


@needs(
  "grams",
  "overlap",
  "length",
  optional=("label", "group", "source"),
  cost=_lite_work,
)
def crossfit_lite(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  label_quota: float | str | None = None,
  unlearnable: str = "random",
  orthogonal: str | tuple[str, ...] | None = None,
  slices: str | tuple[str, ...] | None = None,
  copies: int | str | None = "auto",
) -> Selection:
  """`crossfit` without a model: one head on counts of tokens, no forward pass.

  Args:
    seed: of the folds, and of the rows where it falls back to random ones.
    pool: `grams` [N, R, W], `overlap` [N, R, 2], `length` [N, R]; `group` [N]
      where it has it (rows of one prompt share it), `label` [N] of unpaired.
    budget, and the keywords: as of `crossfit`.
  """
  said, few, signs = _read(pool)
  return _select(
    seed,
    pool,
    budget,
    Sides([[said, few]], signs),
    Ways(label_quota, unlearnable, orthogonal, slices, copies),
  )


def _crossfit_work(p: Sizes, **_) -> Work:
  tokens = grams_lib.WIDTH // 2
  return bt.heads_work(p, (tokens,), (p.d,), (tokens, p.d, p.e))


@needs(
  "answer_embedding",
  "residual",
  "least",
  "grams",
  "overlap",
  "length",
  optional=("logp", "logp_count", "log_likelihood", "label", "group", "source"),
  cost=_crossfit_work,
)
def crossfit(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  label_quota: float | str | None = None,
  unlearnable: str = "random",
  orthogonal: str | tuple[str, ...] | None = None,
  slices: str | tuple[str, ...] | None = None,
  copies: int | str | None = "auto",
) -> Selection:
  """Rows by out-of-fold margin times a label-blind gate; reads every label.

  score = m max(0, 2 q - 1): m the mean margin of three heads (counts of
  tokens; residuals; both and answers' means) from the rows of other prompts, q
  how often heads and labels agree on rows such as this. Wrong labels score
  below 0, random words near 0. The heads cost O(N P^2) on the host, P at most
  256 a part of the features, wider ones O(N E^2) on the mesh.

  Args:
    seed: of the folds, and of the rows where it falls back to random ones.
    pool: as of `crossfit_lite`, and `answer_embedding` [N, R, E] (means over
      the response's tokens), `residual` [N, R, D] and `least` [N, R], see
      `embed.pass_rows`; `logp` and `logp_count` [N, R], `log_likelihood`
      [N, R] where it has them.
    budget: M, at most N. Where fewer rows score above 0 a warning says so,
      and the others come as `filled` has them.
    label_quota: for unpaired, the share of desirable rows among those chosen;
      None: what it is in the pool.
    unlearnable: where no head predicts the labels better than chance (they
      may be shuffled, or all alike): "random" rows, see `drawn`, with a
      warning, which keep quotas, slices and copies as others do; or an
      "error".
    orthogonal: columns [N, R] that are no merit, "length" for instance: heads
      are fitted beside them and judge without them and without what they
      explain of the features.
    slices: columns [N], "source" for instance, whose rows may be labelled by
      another taste: each combination of values keeps its share of the pool,
      of unpaired of both labels, and is judged by heads of its own where those
      predict its labels better; see `with_own_heads`.
    copies: at most so many rows of a set of near-copies, see `alike.copies`,
      come before all others; and heads never saw a copy of what they judge.
      One pattern that is always labelled alike would fill the subset
      otherwise. "auto": 2 of pairs, and None of unpaired, and where more than
      half of the rows have copies, as texts of a few words do; None: copies
      are not looked for.

  Returns:
    Selection; the [N] score is as above, or as `filled` has it, or as `drawn`
    has it of labels that are refused; lower where a quota passes rows over.
  """
  said, few, signs = _read(pool)
  answer = finite(pool.answer_embedding, pool.ids, "answer_embedding")
  residual = finite(pool.residual, pool.ids, "residual")
  least = column(pool, "least")
  signs |= dict(embedding=_typical(answer), least=least)
  few = np.concatenate([few, least[..., None]], axis=2)
  if "logp" in pool.columns:
    total, count = column(pool, "logp"), column(pool, "logp_count")
    signs["logp"] = total / np.maximum(count, 1)
    few = np.concatenate(
      [few, total[..., None], signs["logp"][..., None]], axis=2
    )
  if "log_likelihood" in pool.columns:
    signs["log_likelihood"] = column(pool, "log_likelihood")
  return _select(
    seed,
    pool,
    budget,
    Sides([[said, few], [residual, few], [said, residual, answer, few]], signs),
    Ways(label_quota, unlearnable, orthogonal, slices, copies),
  )
