"""What a selection looks like, and how far it can be trusted.

A card says how the chosen rows differ from the rest beside what chance would
do, why each was kept or left out, how near those left out are to a kept one,
whether another seed would have chosen others, and whether the mixture has
memorised its rows or has anything to do with the labels.
"""

from collections.abc import Sequence
import inspect
from typing import Any

import numpy as np
from scipy import stats

from jaxalign.errors import JaxalignError, NumericError
from jaxalign.select import mixture as mixtures
from jaxalign.select import neighbours
from jaxalign.select.card import geometry, shifts
from jaxalign.select.card import rows as rows_lib
from jaxalign.select.card.fits import (
  auc,
  component_labels,
  held_out,
  jaccard,
  mixture_summary,
  normalised_mutual_information,
)
from jaxalign.select.card.rows import ranks, reasons
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.samplers import combine, SAMPLERS
from jaxalign.select.topk import id_hash

__all__ = (
  "about",
  "alternatives",
  "auc",
  "component_labels",
  "examine",
  "held_out",
  "jaccard",
  "mixture_summary",
  "normalised_mutual_information",
  "overlaps",
  "ranks",
  "reasons",
  "selection_card",
)
ALTERNATIVES = ("random", "length", "stratified", "perplexity", "isa", "real")
EXAMPLES = 10  # of either end of the ranking, in words
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def lengths(pool: Pool, rows: np.ndarray) -> dict[str, Any]:
  """Quantiles of the response tokens, chosen rows beside the rest.

  A pair counts with the mean of its two sides.
  """
  length = np.asarray(pool.length, np.float64).reshape(len(pool.ids), -1)
  length = length.mean(axis=1)
  mask = np.zeros(len(length), bool)
  mask[rows] = True
  out = {"quantiles": list(QUANTILES)}
  for name, part in (("chosen", length[mask]), ("rest", length[~mask])):
    out[name] = (
      [float(q) for q in np.quantile(part, QUANTILES)] if part.size else None
    )
  return out


def topics(pool: Pool, rows: np.ndarray) -> dict[str, Any]:
  """How many topics the chosen rows cover, and how unevenly."""
  names, inverse = np.unique(np.asarray(pool.topic), return_inverse=True)
  everywhere = np.bincount(inverse, minlength=len(names)) / len(inverse)
  chosen = np.bincount(inverse[rows], minlength=len(names)) / max(1, len(rows))
  return {
    "topics": len(names),
    "covered": int((chosen > 0).sum()),
    "largest_share": float(chosen.max()),
    "largest_share_in_pool": float(everywhere.max()),
    "moved": float(np.abs(chosen - everywhere).sum() / 2),
  }


def label_share(pool: Pool, rows: np.ndarray) -> dict[str, float]:
  """Share of desirable rows among the chosen and in the pool (unpaired)."""
  label = np.asarray(pool.label, bool)
  return {
    "chosen": float(label[rows].mean()) if len(rows) else None,
    "pool": float(label.mean()),
  }


def _summary(pool, selection, mixture, diagnostics, sampler):
  """What a card says without an embedding."""
  n, rows = len(pool.ids), np.asarray(selection.rows)
  mask = np.zeros(n, bool)
  mask[rows] = True
  card = {
    "sampler": sampler,
    "about": about(sampler),
    "selected": len(rows),
    "pool": n,
    "share": len(rows) / n if n else 0.0,
  }
  score = np.asarray(selection.score, np.float64)
  for name, part in (("chosen", score[mask]), ("rest", score[~mask])):
    finite = part[np.isfinite(part)]
    card[f"mean_score_{name}"] = float(finite.mean()) if finite.size else None
  for name, column, describe in (
    ("length", "length", lengths),
    ("topic", "topic", topics),
    ("label_share", "label", label_share),
  ):
    if column in pool.columns:
      card[name] = describe(pool, rows)
  if mixture is not None:
    card["mixture"] = mixture_summary(mixture)
  card["diagnostics"] = dict(diagnostics or {})
  return card


def overlaps(selections: dict[str, np.ndarray], n: int) -> list[dict[str, Any]]:
  """Jaccard of every two selections, beside that of random subsets.

  Args:
    selections: name -> row numbers.
    n: rows of the pool; two random subsets of their sizes share a
      hypergeometric number of them.

  Returns:
    Of each two, their names `a` and `b`, `jaccard`, and the 95 % range of
    chance, `low` and `high`.
  """
  names, out = list(selections), []
  for i, a in enumerate(names):
    for b in names[i + 1 :]:
      one, other = (np.unique(selections[k]) for k in (a, b))
      both = len(one) + len(other)
      low, high = (
        float(stats.hypergeom.ppf(q, n, len(one), len(other)))
        for q in (0.025, 0.975)
      )
      out.append(
        dict(
          a=a,
          b=b,
          jaccard=jaccard(one, other),
          low=low / (both - low) if both > low else 1.0,
          high=high / (both - high) if both > high else 1.0,
        )
      )
  return out


def alternatives(
  pool: Pool, budget: int, sampler: str = "", seed: int = 0
) -> dict[str, np.ndarray]:
  """What the samplers that cost next to nothing would keep of this pool.

  Those of ALTERNATIVES that read nothing the pool has not, at their defaults.

  Args:
    pool: all columns at hand.
    budget: M.
    sampler: the one in use, or the chain; its samplers are left out.
    seed: of draws; the sampler's own plus one, so that `random` is another
      draw.
  """
  out, own = {}, combine.sampler_names(sampler)
  for name in ALTERNATIVES:
    one = SAMPLERS[name]
    if (
      name in own
      or not set(one.needs) <= set(pool.columns)
      or (
        one.pairs and np.ndim(pool.length) > 1 and np.shape(pool.length)[1] != 2
      )
    ):
      continue
    try:
      out[name] = one(seed + 1, pool, budget).rows
    except JaxalignError:  # a pool it cannot rank
      continue
  return out


def about(sampler: str) -> str:
  """The first sentence of what each sampler of a chain says of itself."""
  known = [SAMPLERS[n] for n in combine.sampler_names(sampler) if n in SAMPLERS]
  return " ".join((inspect.getdoc(x) or "").split("\n")[0] for x in known)


def examine(
  pool: Pool,
  selection: Selection,
  mixture: mixtures.Mixture | None = None,
  diagnostics: dict[str, Any] | None = None,
  sampler: str = "",
  *,
  texts: dict[str, Sequence[str]] | None = None,
  others: dict[str, np.ndarray] | None = None,
  limit: int = rows_lib.LIMIT,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The card of a selection, and the table of its rows for a page.

  Args:
    pool: what was chosen from. What it has is described: `length`, `label`,
      `source`, `topic`, and with `embedding` neighbours, near-duplicates,
      spectra and a map; rows without a topic are then given clusters.
    selection: the rows and the score of all.
    mixture: described where one was fitted.
    diagnostics: results of `held_out` and `component_labels` by name;
      stored as they are.
    sampler: its name.
    texts: name -> [N] str, shown on the page.
    others: name -> row numbers that other samplers kept of the same pool.
    limit: rows of the table at most; of a larger pool all kept rows (three
      quarters of the limit at most) and a uniform sample of the rest.

  Returns:
    The card, as JSON holds it, and a table of equally long columns: `row`,
    `id`, `kept`, `rank` (from 1), `score`, `why`, `near_code` and `tail`
    (parts of `rows.reasons`), and where known `near`, `cosine`, `x`, `y`,
    `length`, `label`, `source`, `topic` and the texts.
  """
  n, kept = len(pool.ids), np.asarray(selection.rows, np.int64)
  card = _summary(pool, selection, mixture, diagnostics, sampler)
  draw = id_hash(pool.ids, "card")
  mask = np.zeros(n, bool)
  mask[kept] = True
  shown = np.arange(n)
  if n > limit:
    some = neighbours.sample(draw, kept, limit * 3 // 4)
    rest = neighbours.sample(draw, np.flatnonzero(~mask), limit - len(some))
    shown = np.sort(np.concatenate([some, rest]))
  card["shown"] = dict(
    kept=int(mask[shown].sum()), left=int((~mask[shown]).sum())
  )
  score = np.asarray(selection.score, np.float64)
  good = score[mask & np.isfinite(score)]
  card["cut"] = float(good.min()) if good.size else None
  columns, places = dict(pool.columns), {}
  if "embedding" in columns and n:
    if "topic" not in columns and n >= 100:
      try:
        columns["topic"] = geometry.clusters(
          pool, draw, (texts or {}).get("prompt")
        )
        card["topics_are"] = "clusters"
      except NumericError:  # said by `look`
        pass
    seen, places = geometry.look(pool, kept, shown, draw)
    card["geometry"] = seen
    assign = mixture and (lambda x: mixtures.assign(mixture, x))
    card["spectra"] = geometry.spectra_of(
      Pool(pool.ids, columns), kept, draw, assign
    )
  card["shifts"] = shifts.describe(columns, kept)
  if others:
    card["overlaps"] = overlaps({sampler or "this": kept} | others, n)
  table = _table(pool, columns, selection, shown, mask, places, texts)
  said = rows_lib.reasons(card, table)
  order = np.argsort(table["rank"], kind="stable")
  ends = [*order[:EXAMPLES], *order[max(EXAMPLES, len(order) - EXAMPLES) :]]
  card["examples"] = [
    dict(
      id=str(table["id"][i]),
      rank=int(table["rank"][i]),
      score=rows_lib.figure(score[shown[i]]),
      kept=bool(mask[shown[i]]),
      reason=said[i],
    )
    for i in ends
  ]
  return card, table


def _table(pool, columns, selection, shown, mask, places, texts):
  """The columns of the shown rows; see `examine`."""
  count = len(shown)
  near = places.get("near", np.full(count, -1, np.int64))
  cosine = places.get("cosine", np.full(count, -np.inf))
  code = np.where(near < 0, 0, np.where(cosine >= geometry.ALIKE, 2, 1))
  code = np.where(mask[shown] & (code > 0), code + 2, code)
  out = dict(
    row=shown,
    id=np.asarray(pool.ids)[shown],
    kept=mask[shown],
    rank=rows_lib.ranks(pool, selection)[shown],
    score=np.asarray(selection.score, np.float64)[shown],
    why=rows_lib.why(selection, len(pool.ids))[shown],
    near_code=code,
    near=np.where(near < 0, "", np.asarray(pool.ids)[near]),
    cosine=cosine,
    tail=np.zeros(count, np.int64),
  )
  for name in ("x", "y"):
    if name in places:
      out[name] = places[name]
  if "length" in columns:
    length = np.float64(columns["length"]).reshape(len(pool.ids), -1).mean(1)
    out["length"] = length[shown]
    out["tail"] = rows_lib.tails(length)[shown]
  for name in ("label", "source", "topic"):
    if name in columns:
      out[name] = np.asarray(columns[name])[shown]
  out["texts"] = {
    name: [values[i] for i in shown] for name, values in (texts or {}).items()
  }
  return out


def selection_card(
  pool: Pool,
  selection: Selection,
  mixture: mixtures.Mixture | None = None,
  diagnostics: dict[str, Any] | None = None,
  sampler: str = "",
  **options: Any,
) -> dict[str, Any]:
  """The card of `examine`, without the table of its rows."""
  return examine(pool, selection, mixture, diagnostics, sampler, **options)[0]
