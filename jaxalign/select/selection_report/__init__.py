"""What a selection looks like, and how far it can be trusted.

The report compares how the kept rows differ from the rest with what chance
would do, and gives why each was kept or left out, how near those left out are
to a kept one, and what other samplers would have kept.
"""

from collections.abc import Sequence
import functools
import inspect
import itertools
from typing import Any

import numpy as np
from scipy import stats

from jaxalign.core.errors import JaxalignError, NumericError
from jaxalign.select import neighbours
from jaxalign.select.mixture import assign, Mixture
from jaxalign.select.mixture_checks import mixture_summary
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.samplers import chains, SAMPLERS
from jaxalign.select.selection_report import neighbourhood, reasons, shifts
from jaxalign.select.selection_report.spectra import spectra_of
from jaxalign.select.topk import id_hash

CHEAP = ("random", "length", "stratified", "perplexity", "isa", "real")
EXAMPLES = 10  # of either end of the ranking, in words
LIMIT = 100_000  # rows that a page holds
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def describe(
  pool: Pool,
  selection: Selection,
  sampler: str = "",
  *,
  mixture: Mixture | None = None,
  diagnostics: dict[str, Any] | None = None,
  texts: dict[str, Sequence[str]] | None = None,
  others: dict[str, np.ndarray] | None = None,
  limit: int = LIMIT,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The report of a selection, and the table of its rows for a page.

  Args:
    pool: what was chosen from. What it has is described: `length`, `label`,
      `source`, `topic`, and with `embedding` neighbours, near-duplicates,
      spectra and a map; rows without a topic are then given clusters.
    selection: the rows and the score of all.
    sampler: its name.
    mixture: described where one was fitted.
    diagnostics: results of `mixture_checks` by name; stored as they are.
    texts: name -> [N] str, shown on the page.
    others: name -> row numbers that other samplers kept of the same pool.
    limit: rows of the table at most; of a larger pool all kept rows (three
      quarters of the limit at most) and a uniform sample of the rest.

  Returns:
    The report, as JSON holds it, and a table of equally long columns: `row`,
    `id`, `kept`, `rank` (from 1), `score`, `why`, `near_code` and `tail`
    (parts of `reasons.sentences`), and where known `near`, `cosine`, `x`, `y`,
    `length`, `label`, `source`, `topic` and the texts.
  """
  n, kept = len(pool.ids), np.asarray(selection.rows, np.int64)
  columns, texts = dict(pool.columns), texts or {}
  draw, mask = id_hash(pool.ids, "card"), np.isin(np.arange(n), kept)
  score = np.asarray(selection.score, np.float64)
  good = score[mask & np.isfinite(score)]
  shown = _shown(mask, draw, limit)
  report = dict(
    sampler=sampler,
    about=about(sampler),
    selected=len(kept),
    pool=n,
    fraction=len(kept) / n if n else 0.0,
    diagnostics=dict(diagnostics or {}),
    shown=dict(kept=int(mask[shown].sum()), left=int((~mask[shown]).sum())),
    cut=float(good.min()) if good.size else None,
    **_of_columns(columns, mask),
  )
  if mixture is not None:
    report["mixture"] = mixture_summary(mixture)
  places = {}
  if "embedding" in columns and n:
    if "topic" not in columns and n >= 100:
      try:
        columns["topic"] = neighbourhood.clusters(
          pool, draw, texts.get("prompt")
        )
        report["topics_are"] = "clusters"
      except NumericError:  # `look` says so
        pass
    report["geometry"], places = neighbourhood.look(pool, kept, shown, draw)
    groups = mixture and functools.partial(assign, mixture)
    whole = Pool(pool.ids, columns)
    report["spectra"] = spectra_of(whole, kept, draw, groups)
  report["shifts"] = shifts.all_shifts(columns, kept)
  if others:
    report["overlaps"] = overlaps({sampler or "this": kept} | others, n)
  table = _table(Pool(pool.ids, columns), selection, shown, places)
  table["texts"] = {k: [v[i] for i in shown] for k, v in texts.items()}
  report["examples"] = _examples(report, table)
  return report, table


def about(sampler: str) -> str:
  """The first sentence of the docstring of each sampler of a chain."""
  names = chains.sampler_names(sampler)
  docs = [inspect.getdoc(SAMPLERS[n]) or "" for n in names if n in SAMPLERS]
  return " ".join(doc.split("\n")[0] for doc in docs)


def _shown(mask: np.ndarray, draw: np.ndarray, limit: int) -> np.ndarray:
  """The row numbers of the page, sorted; see `describe`."""
  if len(mask) <= limit:
    return np.arange(len(mask))
  kept = neighbours.sample(draw, np.flatnonzero(mask), limit * 3 // 4)
  rest = neighbours.sample(draw, np.flatnonzero(~mask), limit - len(kept))
  return np.sort(np.concatenate([kept, rest]))


def _row_means(length: np.ndarray) -> np.ndarray:
  """[N, R] tokens -> [N]: a pair counts with the mean of its two sides."""
  return np.float64(length).reshape(len(length), -1).mean(axis=1)


def _of_columns(columns, mask):
  """Lengths and topics of the kept rows and of the others."""
  out = {}
  if "length" in columns:
    mean = _row_means(columns["length"])
    quantiles = lambda x: np.quantile(x, QUANTILES).tolist() if x.size else None
    found = dict(chosen=quantiles(mean[mask]), rest=quantiles(mean[~mask]))
    out["length"] = dict(quantiles=list(QUANTILES), **found)
  if "topic" in columns:
    topic = np.asarray(columns["topic"])
    sizes = len(np.unique(topic)), len(np.unique(topic[mask]))
    out["topic"] = dict(zip(("topics", "covered"), sizes))
  return out


def _table(pool, selection, shown, places):
  """The columns of the shown rows; see `describe`."""
  n, columns = len(pool.ids), pool.columns
  kept = np.isin(shown, selection.rows)
  near = places.get("near", np.full(len(shown), -1, np.int64))
  cosine = places.get("cosine", np.full(len(shown), -np.inf))
  code = np.where(cosine >= neighbourhood.ALIKE, 2, 1) + 2 * kept
  out = dict(
    row=shown,
    id=pool.ids[shown],
    kept=kept,
    rank=reasons.ranks(pool, selection)[shown],
    score=np.asarray(selection.score, np.float64)[shown],
    why=reasons.why(selection, n)[shown],
    near_code=np.where(near < 0, 0, code),
    near=np.where(near < 0, "", pool.ids[near]),
    cosine=cosine,
    tail=np.zeros(len(shown), np.int64),
    **{k: places[k] for k in ("x", "y") if k in places},
  )
  if "length" in columns:
    length = _row_means(columns["length"])
    out["length"] = length[shown]
    out["tail"] = reasons.tails(length)[shown]
  for name in ("label", "source", "topic"):
    if name in columns:
      out[name] = np.asarray(columns[name])[shown]
  return out


def _examples(report, table):
  """The first and the last rows of the ranking, with their reasons."""
  sentences = reasons.sentences(report, table)
  order = np.argsort(table["rank"], kind="stable")
  ends = [*order[:EXAMPLES], *order[max(EXAMPLES, len(order) - EXAMPLES) :]]
  return [
    dict(
      id=str(table["id"][i]),
      rank=int(table["rank"][i]),
      score=reasons.figure(table["score"][i]),
      kept=bool(table["kept"][i]),
      reason=sentences[i],
    )
    for i in ends
  ]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
  """Rows in both over rows in either; 1 where both are empty."""
  either = np.union1d(a, b).size
  return np.intersect1d(a, b).size / either if either else 1.0


def overlaps(selections: dict[str, np.ndarray], n: int) -> list[dict[str, Any]]:
  """Jaccard of every two selections, and that of random subsets.

  Args:
    selections: name -> row numbers.
    n: rows of the pool; two random subsets of their sizes share a
      hypergeometric number of them.

  Returns:
    Of each two, their names `a` and `b`, `jaccard`, and the 95 % range of
    chance, `low` and `high`.
  """
  out = []
  for a, b in itertools.combinations(selections, 2):
    one, other = np.unique(selections[a]), np.unique(selections[b])
    both = len(one) + len(other)
    shared = stats.hypergeom.ppf((0.025, 0.975), n, len(one), len(other))
    low, high = (float(s / (both - s)) if both > s else 1.0 for s in shared)
    row = dict(a=a, b=b, jaccard=jaccard(one, other), low=low, high=high)
    out.append(row)
  return out


def alternatives(
  pool: Pool, budget: int, sampler: str = "", seed: int = 0
) -> dict[str, np.ndarray]:
  """What the CHEAP samplers would keep of this pool, at their defaults.

  Those that read nothing the pool has not.

  Args:
    pool: all columns at hand.
    budget: M.
    sampler: the one in use, or the chain; its samplers are left out.
    seed: of draws; the sampler's own plus one, so that `random` is another
      draw.
  """
  out, own = {}, chains.sampler_names(sampler)
  single = np.ndim(pool.length) > 1 and np.shape(pool.length)[1] != 2
  for name in CHEAP:
    one = SAMPLERS[name]
    lacks = not set(one.needs) <= set(pool.columns) or (one.pairs and single)
    if name in own or lacks:
      continue
    try:
      out[name] = one(seed + 1, pool, budget).rows
    except JaxalignError:  # a pool it cannot rank
      continue
  return out
