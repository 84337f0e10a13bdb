"""Rows whose label simple heads predict that never saw it: our own sampler.

A margin says how surely a Bradley-Terry head, fitted to the rows of other
prompts, gives the row its label; a gate, fitted to how often heads and labels
agree and blind to the row's own label, says how far that margin can be
trusted. Wrong labels get a negative score, random words one near 0.

It reads every label: it saves training, not annotation. It also follows the
majority: what most annotators like, their habits too (length, style), scores
high.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.core import progress
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select.costs import Sizes, Work
from jaxalign.select.grams import WIDTH
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers.crossfit import heads, margins, near_copies, notes
from jaxalign.select.samplers.crossfit.features import (
  groups_of_prompts,
  read_features,
  typical,
)
from jaxalign.select.samplers.draws import apportion, place_in_group
from jaxalign.select.samplers.isa import top_with_quota
from jaxalign.select.samplers.values import (
  check_finite,
  column,
  is_count,
  quantiles,
  ranked,
  require,
)
from jaxalign.select.topk import id_hash, top, uniform

SENTENCE = "reads every label: saves training, not annotation"
UNLEARNABLE = ("random", "error")


class Keywords(NamedTuple):
  """Of both samplers, see `crossfit`."""

  label_quota: float | str | None
  unlearnable: str
  orthogonal: str | tuple[str, ...] | None
  slices: str | tuple[str, ...] | None
  copies: int | str | None


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


def _names(columns: str | Sequence[str] | None) -> tuple[str, ...]:
  """A keyword that is None, one column or several."""
  return (columns,) if isinstance(columns, str) else tuple(columns or ())


def _check_columns(
  pool: Pool, keyword: str, names: Sequence[str], shape: tuple[int, ...]
) -> None:
  """Raises ConfigError where a keyword names no column of a shape."""
  for name in names:
    rows = np.shape(pool.columns.get(name))  # () of no column
    single = len(rows) == 1 and shape in ((), (1,))
    if not single and (not rows or rows[1:] != shape):
      raise ConfigError(
        f"{keyword} names {name!r}, wanted a column {['N', *shape]} of the "
        f"pool, which has {', '.join(sorted(pool.columns))}; set "
        f"config.select.kwargs.{keyword}"
      )


def _slices(
  pool: Pool, names: Sequence[str]
) -> tuple[np.ndarray | None, list[str]]:
  """[N] int64 which combination of the columns' values a row has; names."""
  if not names:
    return None, []
  values = zip(*(np.asarray(pool.columns[n]).tolist() for n in names))
  text = np.asarray([", ".join(map(str, row)) for row in values], np.str_)
  found, code = np.unique(text, return_inverse=True)
  return code, found.tolist()


def _labelled(
  pool: Pool,
  parts: dict[str, np.ndarray],
  of_heads: tuple[tuple[str, ...], ...],
  k: Keywords,
) -> margins.Labelled:
  """The features with the labels, or an error where the pool has none."""
  r = parts["few"].shape[1]
  if r == 1 and "label" not in pool.columns:
    raise ConfigError(
      "crossfit reads the label of single responses, the pool has none; set "
      "config.select.sampler"
    )
  label = None if r == 2 else np.asarray(pool.label, bool)
  group = groups_of_prompts(pool)
  habits, habit = _names(k.orthogonal), None
  _check_columns(pool, "orthogonal", habits, (r,))
  if habits:
    value = np.stack([column(pool, name) for name in habits], axis=2)
    habit = np.float64(heads.scaled(heads.differences(value, group)))
  rows = np.arange(len(pool.ids))
  return margins.Labelled(parts, of_heads, group, rows, label, habit)


def _select(
  seed: int,
  pool: Pool,
  budget: int,
  data: margins.Labelled,
  signs: dict[str, np.ndarray],
  k: Keywords,
) -> Selection:
  """`crossfit`, with the features of either sampler."""
  known = k.unlearnable in UNLEARNABLE
  require(known, "unlearnable", k.unlearnable, UNLEARNABLE)
  known = k.copies in (None, "auto") or is_count(k.copies)
  require(known, "copies", k.copies, "'auto', None, or 1 or more")
  by = _names(k.slices)
  _check_columns(pool, "slices", by, ())
  shown = by or tuple(n for n in ("source",) if n in pool.columns)
  code, names = _slices(pool, shown)
  pairs = data.label is None
  most, near, all_alike = near_copies.to_limit(pool.grams, k.copies, pairs)
  if near is not None:  # heads never saw a copy of what they judge
    data = data._replace(group=near_copies.joined(data.group, near))
  lines, own = [f"crossfit {SENTENCE}"], set()
  if not (refused := _of_one_class(data.label)):
    found = shared = margins.margins(seed, data)
    if by:
      found, own = margins.with_own_heads(seed, shared, data, code)
    learnt, numbers = margins.predictable(found)
    if not learnt:
      refused = (
        f"no head predicts them ({numbers}); they look shuffled, or the "
        "features say nothing of them"
      )
  if refused:
    score, more = _refused(seed, pool, signs, refused, k.unlearnable)
  else:
    score, more = _trusted(seed, found, signs, data.group, budget, numbers)
  lines += more
  if near is not None:
    place = place_in_group(near, score, id_hash(pool.ids))
    score, line = near_copies.moved_last(score, place, most)
    lines.append(line)
  lines += all_alike
  kept = _kept(score, pool, budget, k, code if by else None)
  if not refused:
    lines += _length_notes(seed, pool, data, found, kept.rows, k)
    if len(names) > 1:
      agrees, title = shared.mean > 0, ", ".join(shown)
      lines += notes.slice_notes(
        code, names, title, agrees, kept.rows, own, bool(by)
      )
    drawn_rows = ranked(uniform(seed, pool.ids, "random"), pool, budget).rows
    lines += near_copies.copies_kept(pool.grams, kept.rows, drawn_rows)
  for line in lines:
    progress.say(f"  {line}")
  return kept._replace(notes=tuple(lines))


def _trusted(seed, found, signs, group, budget, numbers):
  """Scores [N] by margins and the gate, and what a person should know."""
  q = margins.trust(seed, found, signs, group)
  score = found.mean * np.maximum(0, 2 * q - 1)
  positive = int((score > 0).sum())
  lines = [
    f"heads agree with {100 * found.accuracy:.1f} % of labels ({numbers}), "
    f"the gate trusts them by {q.mean():.2f}; {positive:,} of {len(score):,} "
    "rows score above 0"
  ]
  if positive < budget:
    score = filled(score, q)
    lines.append(
      f"warning: the budget of {budget:,} is more than the {positive:,} rows "
      "that score above 0; of the rest more labels are wrong than of random "
      "rows; set config.select.budget"
    )
  return score, lines


def _refused(seed, pool, signs, why, unlearnable):
  """Scores [N] where labels teach nothing."""
  if unlearnable == "error":
    raise NumericError(
      f"crossfit refuses these labels: {why}; set config.select.sampler, or "
      "config.select.kwargs.unlearnable to 'random'"
    )
  likely = "log_likelihood" in signs
  last = ", the least likely fifth last" if likely else ""
  line = f"warning: crossfit refuses these labels: {why}."
  line += f" These rows are random ones{last}"
  return drawn(seed, pool, signs), [line]


def _of_one_class(label: np.ndarray | None) -> str:
  """Why labels [N] that are all alike teach nothing; "" of others."""
  if label is None or (label.any() and not label.all()):
    return ""
  return (
    f"all {len(label):,} rows are {'' if label.all() else 'un'}desirable,"
    " and heads learn what tells the two labels apart"
  )


def _kept(
  score: np.ndarray,
  pool: Pool,
  budget: int,
  k: Keywords,
  code: np.ndarray | None,
) -> Selection:
  """The best rows, of unpaired ones each label's, of slices each slice's."""
  pairs = pool.grams.shape[1] == 2
  if code is None and pairs:
    return ranked(score, pool, budget)
  if code is None:
    quota = "as_pool" if k.label_quota is None else k.label_quota
    rows = top_with_quota(score, pool, budget, quota)
  elif k.label_quota is not None:
    raise ConfigError(
      f"slices keeps labels of each slice as they are, and label_quota is "
      f"{k.label_quota!r}; set one of config.select.kwargs.slices and "
      "config.select.kwargs.label_quota"
    )
  else:
    label = 0 if pairs else np.asarray(pool.label, np.int64)
    rows = _best_of_each(score, pool, budget, 2 * code + label)
  return Selection(rows, _lowered(score, rows))


def _best_of_each(
  score: np.ndarray, pool: Pool, budget: int, code: np.ndarray
) -> np.ndarray:
  """The best rows, as many of each code as its share of the pool."""
  room = np.bincount(code)
  rows = []
  for k, count in enumerate(apportion(np.float64(room), room, budget)):
    own = np.flatnonzero(code == k)
    rows.append(own[top(score[own], pool.ids[own], int(count))])
  rows = np.sort(np.concatenate(rows))
  return rows[top(score[rows], pool.ids[rows], rows.size)]


def _length_notes(seed, pool, data, found, kept, k):
  """How far the labels, and what is kept, follow length."""
  length = column(pool, "length")
  fold = heads.folds(seed, data.group, margins.FOLDS, "crossfit")
  x = heads.differences(length[..., None], data.group)
  x = np.float64(heads.scaled(x))
  alone = notes.predicts_alone(x, data.signs(), fold)
  lines = [notes.gap_note(length, data.label, kept, alone[1])]
  if "length" in _names(k.orthogonal):
    return lines
  loss = float(found.loss.mean())
  return lines + notes.length_warning(alone, loss, found.accuracy, found.chance)


def _lite_work(p: Sizes, **_) -> Work:
  return margins.heads_work(p, (WIDTH // 2,))


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

  Args: as of `crossfit`, whose other columns are not read.
  """
  tokens, few, signs = read_features(pool)
  parts, of_heads = dict(tokens=tokens, few=few), (("tokens", "few"),)
  k = Keywords(label_quota, unlearnable, orthogonal, slices, copies)
  data = _labelled(pool, parts, of_heads, k)
  return _select(seed, pool, budget, data, signs, k)


def _crossfit_work(p: Sizes, **_) -> Work:
  tokens = WIDTH // 2
  return margins.heads_work(p, (tokens,), (p.d,), (tokens, p.d, p.e))


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
    pool: `grams` [N, R, W], `overlap` [N, R, 2], `length` [N, R];
      `answer_embedding` [N, R, E] (means over the response's tokens),
      `residual` [N, R, D] and `least` [N, R], see `passes.pass_rows`; where it
      has them `logp`, `logp_count` and `log_likelihood` [N, R], `group` [N]
      (rows of one prompt share it) and `label` [N] of unpaired rows.
    budget: M, at most N. Where fewer rows score above 0 a warning says so,
      and the others come as `filled` has them.
    label_quota: of unpaired rows, the fraction of desirable ones among those
      kept; None: what it is in the pool.
    unlearnable: where no head predicts the labels better than chance (they
      may be shuffled, or all alike): "random" rows, see `drawn`, with a
      warning, which keep quotas, slices and copies; or an "error".
    orthogonal: columns [N, R] that are no merit, "length" for instance: heads
      judge without them and without what they explain of the features.
    slices: columns [N], "source" for instance, whose rows may be labelled by
      another taste: each combination of values keeps its share of the pool,
      of unpaired rows of both labels, and is judged by heads of its own where
      those predict its labels better; see `margins.with_own_heads`.
    copies: at most so many rows of a set of near-copies come before all
      others; else one pattern that is always labelled alike would fill the
      subset. "auto": 2 of pairs, but none is counted where more than half of
      the rows have copies, or of unpaired rows. None: copies are not looked
      for. Heads never saw a copy of what they judge.

  Returns:
    Selection; the [N] score is as above, or as `filled` or, of labels that
    are refused, `drawn` has it; lower where a quota passes rows over.
  """
  tokens, few, signs = read_features(pool)
  answer = np.asarray(pool.answer_embedding)
  residual = np.asarray(pool.residual)
  check_finite(answer, pool.ids, "answer_embedding")
  check_finite(residual, pool.ids, "residual")
  least = column(pool, "least")
  signs |= dict(embedding=typical(answer, groups_of_prompts(pool)), least=least)
  more = [least]
  if "logp" in pool.columns:
    total, count = column(pool, "logp"), column(pool, "logp_count")
    signs["logp"] = total / np.maximum(count, 1)
    more += [total, signs["logp"]]
  if "log_likelihood" in pool.columns:
    signs["log_likelihood"] = column(pool, "log_likelihood")
  few = np.concatenate([few, np.stack(more, axis=2)], axis=2)
  parts = dict(tokens=tokens, residual=residual, answer=answer, few=few)
  of_heads = (
    ("tokens", "few"),
    ("residual", "few"),
    ("tokens", "residual", "answer", "few"),
  )
  k = Keywords(label_quota, unlearnable, orthogonal, slices, copies)
  data = _labelled(pool, parts, of_heads, k)
  return _select(seed, pool, budget, data, signs, k)
