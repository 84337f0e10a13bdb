"""What choosing rows costs, told before anything runs: one function a sampler.

Operations are multiply-adds x 2, counted by the equations that the sampler's
docstring names, with its keywords; what is of lower order (scaling vectors,
sorting scores) is left out. Greedy methods that may stop early or look again
are counted as one whole sweep. Bytes are of the largest moment: tests compare
them with what was held.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from jaxalign.lookup import lookup
from jaxalign.select import exact, grams
from jaxalign.select.samplers import (
  bradley_terry,
  combine,
  dedup,
  geometric,
  heads,
  SAMPLERS,
  submodular,
)
from jaxalign.select.samplers import clusters as clusters_lib

ROW = 200  # bytes of a row's id while it is hashed
NEWTON = 5  # steps of a head's fit, which starts at another fold's


class Pool(NamedTuple):
  """Sizes of a pool, and how many of its rows are to be kept."""

  n: float  # N rows
  e: int  # E, width of an embedding
  budget: float  # M
  r: int = 2  # R responses a row
  d: int = 0  # D, width of a residual


class Work(NamedTuple):
  """What one step of a choice takes."""

  host: float  # flops on the host
  devices: float  # flops on the devices
  held: float  # bytes on the host beside the columns
  device: float  # bytes on all devices together


class Estimate(NamedTuple):
  """What a sampler takes beside the stages that make its columns."""

  flops: float
  read: int  # bytes of its columns, from disk
  held: int  # bytes on the host beside those columns
  device: int  # bytes on all devices together; 0: it runs on the host
  on_host: float = 0.0  # of the flops


# Bytes of a row of a column; what is not here is one number a response.
BYTES = {
  "embedding": lambda p: 4 * p.r * p.e,
  "answer_embedding": lambda p: 4 * p.r * p.e,
  "residual": lambda p: 4 * p.r * p.d,
  "grams": lambda p: p.r * grams.WIDTH,
  "overlap": lambda p: 8 * p.r,
  "held_out_loss": lambda p: 8 * 6,
  "group": lambda p: 64,
  "source": lambda p: 64,
  "topic": lambda p: 8,
  "label": lambda p: 1,
  "subset": lambda p: 1,
}


def _scores(p: Pool, **_) -> Work:
  """A few flops on each number; the score and its ranks."""
  return Work(8 * p.n * p.r, 0, 40 * p.r * p.n, 0)


def _few(p: Pool, **_) -> Work:
  """As `_scores`, of a column that is ranked as it is."""
  return Work(8 * p.n * p.r, 0, 12 * p.r * p.n, 0)


def _drawn(p: Pool, **_) -> Work:
  """As `_scores`, where every row's id is hashed."""
  return Work(8 * p.n * p.r, 0, ROW * p.n, 0)


def _width(p: Pool, pair: str = "mean") -> int:
  """Of the vector that stands for a pair."""
  return p.e * (2 if pair == "concat" and p.r == 2 else 1)


def _vectors(p: Pool, pair: str = "mean") -> float:
  return 4 * p.n * _width(p, pair)


def _bandwidth(p: Pool) -> float:
  """Of the distances between 512 rows, float64."""
  return 3 * 8 * min(p.n, 512) ** 2


def _k_means(p: Pool, k: int, pair: str) -> Work:
  """Ten steps on a sample, all rows once; its copies, and the means."""
  some, rows = min(p.n, max(20_000, 32 * k)), _vectors(p, pair)
  return Work(
    0,
    2 * k * _width(p, pair) * (10 * some + p.n),
    rows * max(1 + 5 * some / p.n, 2 + 2 * some / p.n) + ROW * p.n,
    rows,
  )


def _inside(
  p: Pool, part: Callable[[Pool], Work], blocks: int, pair: str
) -> Work:
  """A method on all rows, or inside clusters; the largest is held."""
  if not blocks:
    return part(p)
  first = _k_means(p, blocks, pair)
  most = min(p.n, clusters_lib.most_rows(p.n, blocks))
  mean = part(p._replace(n=p.n / blocks, budget=p.budget / blocks))
  large = part(p._replace(n=most, budget=math.ceil(p.budget * most / p.n)))
  return Work(
    first.host + blocks * mean.host,
    first.devices + blocks * mean.devices,
    max(first.held, _vectors(p, pair) + ROW * p.n + large.held),
    max(first.device, large.device),
  )


def _density(p: Pool, *, features: int = 1024, pair: str = "mean", **_) -> Work:
  rows = _vectors(p, pair)
  return Work(
    0,
    4 * p.n * features * _width(p, pair)
    if features
    else 2 * p.n**2 * _width(p, pair),
    max(3 * rows + ROW * p.n, rows + _bandwidth(p)),
    rows + 4 * p.n,
  )


def _k_center(p: Pool, *, pair: str = "mean", blocks: int = 0, **_) -> Work:
  def part(p):
    rows = _vectors(p, pair)
    return Work(
      0,
      2 * p.n * p.budget * _width(p, pair),
      3 * rows + 4 * p.budget * _width(p, pair) + ROW * p.n,
      rows + 4 * p.n,
    )

  return _inside(p, part, blocks, pair)


def _herding(
  p: Pool, *, pair: str = "mean", features: int = 0, blocks: int = 0, **_
) -> Work:
  width = 2 * features or _width(p, pair)

  def part(p):
    work, rows = 2 * p.n * p.budget * width, 4 * p.n * width
    # A kernel's angles are float64, with their cosines and sines beside.
    held = max(
      8 * rows if features else 2 * rows,
      rows + 4 * 65 * p.n,
      _bandwidth(p) if features else 0,
    )
    return (
      Work(work, 0, held, 0)
      if geometric._on_host()
      else Work(0, work, held + rows, rows)
    )

  return _inside(p, part, blocks, pair)


def _real(p: Pool, **_) -> Work:
  return Work(2 * p.n * p.e, 0, 6 * 4 * p.n * p.e, 0)


def _facility_location(
  p: Pool,
  *,
  pair: str = "mean",
  epsilon: float = 0.05,
  exact: bool | str = "auto",
  blocks: int = 0,
  **_,
) -> Work:
  def part(p):
    rows, work = _vectors(p, pair), 2 * p.n**2 * _width(p, pair)
    if exact is True or (exact == "auto" and p.n <= submodular.EXACT_ROWS):
      kept = 256 + min(submodular._CACHE // p.n, p.n) + submodular._STRIP
      return Work(work, 0, rows + 4 * p.n * kept, 0)
    return Work(
      0, work * math.log(1 / epsilon), 2 * rows + ROW * p.n, rows + 8 * p.n
    )

  return _inside(p, part, blocks, pair)


def _dpp(p: Pool, *, pair: str = "mean", blocks: int = 0, **_) -> Work:
  def part(p):
    return Work(
      p.n * p.budget**2 + 2 * p.n * p.budget * _width(p, pair),
      0,
      3 * _vectors(p, pair) + max(8 * p.n * p.budget, _bandwidth(p)),
      0,
    )

  return _inside(p, part, blocks, pair)


def _semdedup(
  p: Pool, *, clusters: int | str = "auto", pair: str = "mean", **_
) -> Work:
  k = dedup.cluster_count(clusters, int(p.n))
  first = _k_means(p, k, pair)
  return first._replace(
    host=p.n**2 * _width(p, pair) / k, held=first.held + 4 * 512**2
  )


def _diverse(p: Pool, *, pair: str = "mean", blocks: int = 0, **_) -> Work:
  def part(p):
    rows = _vectors(p, pair)
    return Work(
      2 * p.n * p.budget * _width(p, pair),
      0,
      max(2 * rows, rows * (1 + p.budget / p.n) + ROW * p.n),
      0,
    )

  return _inside(p, part, blocks, pair)


def _placed(n: float, width: int, columns: int) -> float:
  """Bytes that `heads.principal` puts on the devices: rows, and of half the
  products of columns two whole numbers each."""
  on_host = width <= columns or columns < n < width
  return 0 if on_host else 4 * n * width + 8 * width**2


def _rotated(n: float, width: int, columns: int) -> tuple[float, float]:
  """Operations of `heads.principal`, on the host and on the devices."""
  few = columns < n < width
  if not _placed(n, width, columns):
    return 2 * n * width * ((n if few else width) + columns), 0
  wide = sum(
    (end - start) * (width - start) for start, end in exact.panels(width)
  )
  return 0, 2 * n * (wide + width * columns)


def _heads(p: Pool, *widths: tuple[int, ...]) -> Work:
  """Heads, each on parts of these widths, which are rotated once.

  Then Newton steps of each head at two ridges in every fold; the search for
  the best ridge runs on some 4,000 rows.
  """
  bt, said = bradley_terry, grams.WIDTH // 2
  parts = {w for head in widths for w in head}
  sides, typical = p.n * p.r, [said, *{p.e} & parts]
  keep = max(1, min(64, int(sides) // 40))
  turned = [
    *((p.n, w, heads.COLUMNS) for w in parts if w > heads.COLUMNS),
    *((sides, w, keep) for w in typical if w > keep),
  ]
  work = [_rotated(*one) for one in turned]
  fits = 2 * bt.FOLDS * p.n * (1 - 1 / bt.FOLDS) + len(
    bt.RIDGES
  ) * bt.RIDGE_FOLDS * min(p.n, bt.RIDGE_ROWS) * (1 - 1 / bt.RIDGE_FOLDS)
  columns = [sum(min(w, heads.COLUMNS) for w in head) for head in widths]
  newton = sum(fits * NEWTON * 2 * c**2 for c in columns)
  # What is read: counts as float32, the others as float64.
  stored = sides * (4 * said + 8 * sum(parts - {said}))
  # Put together in float64, mirrored.
  sums = [40 * w**2 for n, w, c in turned if _placed(n, w, c)]
  held = stored + max(
    # Scaled, less their mean, laid out.
    3 * 4 * sides * max(typical) + max(sums, default=0),
    8 * p.n * (sum(min(w, heads.COLUMNS) for w in parts) + 4.5 * max(columns)),
  )  # side by side, shortened, a fold's
  return Work(
    newton + sum(w[0] for w in work),
    sum(w[1] for w in work),
    held,
    max(_placed(*one) for one in turned),
  )


def _crossfit(p: Pool, **_) -> Work:
  said = grams.WIDTH // 2
  return _heads(p, (said,), (p.d,), (said, p.d, p.e))


# What every key of SAMPLERS takes.
COSTS: dict[str, Callable[..., Work]] = {
  **dict.fromkeys(("random", "stratified", "length_matched"), _drawn),
  **dict.fromkeys(
    ("isa", "perplexity", "ifd", "selective_dpo", "bees"), _scores
  ),
  **dict.fromkeys(
    ("length", "ask_llm", "external_margin", "implicit_margin"), _few
  ),
  "real": _real,
  "density": _density,
  "k_center": _k_center,
  "herding": _herding,
  "facility_location": _facility_location,
  "dpp": _dpp,
  "semdedup": _semdedup,
  "deita": _diverse,
  "crossfit_lite": lambda p, **_: _heads(p, (grams.WIDTH // 2,)),
  "crossfit": _crossfit,
}
STEPS = {
  "gate": _scores,
  "quota": _scores,
  "dedup": _semdedup,
  "diverse": _diverse,
}
TAKES = ("gate", "quota", "dedup")  # steps that hand on a copy of some rows


def of(name: str, pool: Pool, **kwargs: Any) -> Estimate | None:
  """The cost of a sampler or a chain of them; None: it is not known here.

  Args:
    name: as `combine.named` takes it, with its keywords.
    pool: the sizes.
    **kwargs: of the sampler, beside those in its name.
  """
  steps, samplers = combine.links(name)
  bare = [text.partition("(")[0].strip() for text in samplers]
  if {*bare} - {*COSTS} or {s["name"] for s in steps} - {*STEPS}:
    return None
  bound = [
    getattr(lookup(SAMPLERS, text, "sampler", "select.sampler"), "keywords", {})
    for text in samplers
  ]
  found = [
    STEPS[s["name"]](pool, **{k: v for k, v in s.items() if k != "name"})
    for s in steps
  ]
  found += [
    COSTS[one](pool, **kwargs | words) for one, words in zip(bare, bound)
  ]
  read = pool.n * sum(
    BYTES.get(column, lambda p: 8 * p.r)(pool)
    for column in combine.named(name).needs
  )
  copied = read * any(s["name"] in TAKES for s in steps)
  host = sum(w.host for w in found)
  return Estimate(
    host + sum(w.devices for w in found),
    int(read),
    int(copied + max(w.held for w in found)),
    int(max(w.device for w in found)),
    host,
  )
