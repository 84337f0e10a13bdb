"""Of each row: its rank, and in words why it was kept or left out."""

from typing import Any

import numpy as np

from jaxalign.select.pool import Pool, Selection
from jaxalign.select.topk import top

TAIL = 0.05  # of the pool's lengths, at either end, that is called long, short

# The sentences of a reason. {rank}, {score}, {near} and {cosine} are the row's;
# the others are the same for all rows.
WHY = (
  "Kept at rank {rank}: its score, {score}, is among the {kept} highest of "
  "{pool}.",
  "Kept at rank {rank} with a score of {score}. Rows left out score higher: "
  "more than the score decided (spread, a quota, or chance).",
  "Left out at rank {rank}: its score, {score}, is below the lowest kept "
  "one, {cut}.",
  "Left out at rank {rank}: its score, {score}, is that of the last row "
  "kept; a hash of the id decided.",
  "Left out at rank {rank} although its score, {score}, is above the lowest "
  "kept one, {cut}: more than the score decided.",
  "Left out at rank {rank}: it has no finite score.",
)
KINDS = (
  "kept by its score",
  "kept for more than its score",
  "left out by its score",
  "left out at a tie",
  "left out despite its score",
  "no finite score",
)
NEAR = (
  "",
  " The nearest kept row is {near}, at a cosine of {cosine}.",
  " It nearly repeats the kept row {near} (cosine {cosine}).",
  " The nearest other kept row is {near}, at a cosine of {cosine}.",
  " It nearly repeats another kept row, {near} (cosine {cosine}).",
)
LENGTH = (
  "",
  " Its responses are among the {tail} longest of the pool.",
  " Its responses are among the {tail} shortest of the pool.",
)


def ranks(pool: Pool, selection: Selection) -> np.ndarray:
  """[N] int64 from 1: the kept rows as picked, then the others by score."""
  n, score = len(pool.ids), np.asarray(selection.score, np.float64)
  order = top(np.where(np.isnan(score), -np.inf, score), pool.ids, n)
  rest = order[~np.isin(order, selection.rows)]
  rank = np.empty(n, np.int64)
  rank[np.concatenate([selection.rows, rest])] = np.arange(1, n + 1)
  return rank


def why(selection: Selection, n: int) -> np.ndarray:
  """[N] places in WHY."""
  score = np.asarray(selection.score, np.float64)
  kept, finite = np.isin(np.arange(n), selection.rows), np.isfinite(score)
  cut = score[kept & finite].min(initial=np.inf)
  best_left = score[~kept & finite].max(initial=-np.inf)
  out = np.full(n, 2)
  out[~kept & (score == cut)] = 3
  out[~kept & (score > cut)] = 4
  out[~kept & ~finite] = 5
  out[kept] = np.where(score[kept] < best_left, 1, 0)
  return out


def tails(length: np.ndarray) -> np.ndarray:
  """[N] places in LENGTH of [N] lengths."""
  low, high = np.quantile(length, [TAIL, 1 - TAIL])
  out = np.zeros(len(length), np.int64)
  if high > low:
    out[length > high] = 1
    out[length < low] = 2
  return out


def figure(value: float) -> float | None:
  """A number to six digits, as the reasons and the page give it.

  With four, the last kept score and the first left out often look alike.
  """
  return float(f"{value:.6g}") if np.isfinite(value) else None


def rounded_cosine(cosine: float) -> float | None:
  """A cosine to four places; None of -inf."""
  return round(cosine, 4) if np.isfinite(cosine) else None


def in_script(value: float | None) -> str:
  """`figure` as text, in just the way that JavaScript writes it."""
  if value is None:
    return "none"
  if value and abs(value) < 1e-4:
    digits, _, power = f"{value:.5e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
  return str(int(value)) if value == int(value) else repr(float(value))


def shared_words(report: dict[str, Any]) -> dict[str, str]:
  """The words that are the same in all reasons of a report."""
  cut = None if report["cut"] is None else figure(report["cut"])
  return dict(
    kept=f"{report['selected']:,}",
    pool=f"{report['pool']:,}",
    cut=in_script(cut),
    tail=f"{100 * TAIL:.0f} %",
  )


def sentences(report: dict[str, Any], table: dict[str, Any]) -> list[str]:
  """The reason of every row of a table of `selection_report.describe`."""
  shared, out = shared_words(report), []
  names = ("why", "near_code", "tail", "rank", "score", "near", "cosine")
  columns = [np.asarray(table[name]).tolist() for name in names]
  for reason, near_code, tail, rank, score, near, cosine in zip(*columns):
    template = WHY[reason] + NEAR[near_code] + LENGTH[tail]
    own = dict(rank=f"{rank:,}", score=in_script(figure(score)), near=near)
    words = own | dict(cosine=in_script(rounded_cosine(cosine))) | shared
    out.append(template.format(**words))
  return out
