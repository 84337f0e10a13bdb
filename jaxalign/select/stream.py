"""Samplers over rows that come in tiles from disk; what is held stays flat.

Each is the sampler of its name: the same rows of the same numbers. One number
a row is written to a scratch file, mapped, and `threshold` finds the best M.
A sampler that reads all rows at once is refused before it starts, with what it
would hold, where that is much; `blocks.select` runs it block by block instead.
"""

from collections.abc import Callable, Iterator
import contextlib
import inspect
import math
import os
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import progress, sharding
from jaxalign.errors import ConfigError, NumericError
from jaxalign.select import threshold
from jaxalign.select.chunks import over_chunks
from jaxalign.select.pool import Pool
from jaxalign.select.samplers import density as densities
from jaxalign.select.samplers import isa as isa_lib
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.samplers import vectors as rows_lib
from jaxalign.select.samplers.values import from_middle, one_side
from jaxalign.select.sources import Source, TILE
from jaxalign.select.topk import gumbel, uniform

CHUNK = 2048  # rows of one program of `density`; part of the numbers
HELD = 2 << 30  # bytes of embeddings that a sampler may hold here
# A row's value is the row's own: top and low rank by it, middle by its rank.
BY_ROW = (
  "random",
  "length",
  "perplexity",
  "ifd",
  "ask_llm",
  "selective_dpo",
  "external_margin",
  "implicit_margin",
  "bees",
  "real",
)


class Chosen(NamedTuple):
  """M rows, best first."""

  rows: np.ndarray  # [M] int64, numbers in id order
  ids: np.ndarray  # [M] their record ids
  score: np.ndarray  # [M] float64, as of the sampler
  notes: tuple[str, ...] = ()


def select(
  name: str,
  source: Source,
  budget: int,
  *,
  seed: int = 0,
  scratch: Any = None,
  **kwargs: Any,
) -> Chosen:
  """The rows that the sampler of this name takes, without holding the pool.

  Args:
    name: a key of SAMPLERS.
    source: has the columns that the sampler needs.
    budget: M, at most N.
    seed: of the sampler.
    scratch: a folder on a local disk for 8 bytes a row; None: a temporary
      one. What a killed run left there is written over.
    **kwargs: of the sampler.

  Raises:
    ConfigError: the sampler reads all rows at once and the pool is too large
      to be held, or a keyword needs what one pass cannot know.
  """
  if name not in SAMPLERS:
    raise ConfigError(
      f"sampler {name!r} is unknown, wanted one of "
      f"{', '.join(SAMPLERS)}; set config.select.sampler"
    )
  known = {
    p.name
    for p in inspect.signature(SAMPLERS[name]).parameters.values()
    if p.kind == p.KEYWORD_ONLY
  }
  if unknown := sorted(set(kwargs) - known):
    raise ConfigError(
      f"sampler {name!r} takes no {unknown[0]!r}; it takes "
      f"{', '.join(sorted(known)) or 'no keywords'}; set "
      "config.select.kwargs"
    )
  if not 0 <= budget <= source.n:
    raise ConfigError(
      f"cannot take the best {budget} of {source.n} rows; set "
      "config.select.budget"
    )
  with contextlib.ExitStack() as stack:
    if scratch is None:
      scratch = stack.enter_context(tempfile.TemporaryDirectory())
    if name == "isa":
      return _isa(seed, source, budget, scratch, **kwargs)
    if name == "density":
      return _density(seed, source, budget, scratch, **kwargs)
    if name in BY_ROW:
      return _by_row(name, seed, source, budget, scratch, **kwargs)
  return _held(name, seed, source, budget, **kwargs)


def _held(name, seed, source, budget, **kwargs) -> Chosen:
  """A sampler that holds what it reads, where that is not too much."""
  sampler = SAMPLERS[name]
  names = [
    n for n in (*sampler.needs, *sampler.optional) if n in source.columns
  ]
  readers = [source.ids, *map(source.column, names)]
  held = source.n * sum(read(0, 1).nbytes for read in readers)
  rows_lib.refuse_above(
    held,
    HELD,
    f"{name} reads all {source.n:,} rows at once: the bytes",
    "use blocks.select(..., block_rows=), "
    "its blocked form, or a sampler that runs in one pass: isa, density, "
    f"{', '.join(BY_ROW)}",
  )
  ids = np.array(threshold.names(source.ids(0, source.n)))
  selection = sampler(
    seed,
    Pool(ids, {n: np.asarray(source.column(n)(0, source.n)) for n in names}),
    budget,
    **kwargs,
  )
  return Chosen(
    selection.rows,
    ids[selection.rows],
    selection.score[selection.rows],
    selection.notes,
  )


class _Scores:
  """One float64 a row in a mapped file, written once, read by tile."""

  def __init__(self, n: int, scratch: Any, name: str = "scores"):
    path = os.path.join(os.fspath(scratch), f"{name}.npy")
    self.x = np.lib.format.open_memmap(path, "w+", np.float64, (n,))
    os.unlink(path)  # it lives as long as it is mapped, and no longer

  def fill(self, parts: Iterator[tuple[int, np.ndarray]], label: str) -> None:
    """Writes every part at its first row."""
    with progress.bar(label, len(self.x)) as tick:
      for start, part in parts:
        self.x[start : start + len(part)] = part
        tick(len(part))

  def tiles(self) -> Iterator[np.ndarray]:
    """From the start, in tiles."""
    for start in range(0, len(self.x), TILE):
      yield self.x[start : start + TILE]


def _best(scores: _Scores, source: Source, budget: int) -> Chosen:
  found = threshold.best(scores.tiles, source.ids_at, budget)
  return _named(found.rows, found.score, source)


def _named(rows: np.ndarray, score: np.ndarray, source: Source) -> Chosen:
  order = np.argsort(rows)
  ids = source.ids_at(rows[order])
  back = np.empty(len(rows), np.int64)
  back[order] = np.arange(len(rows))
  return Chosen(rows, ids[back], score)


# A value of the row's own.


def _by_row(name, seed, source, budget, scratch, **kwargs) -> Chosen:
  sampler = SAMPLERS[name]
  known = inspect.signature(sampler).parameters
  direction = None
  if "direction" in known:
    direction = kwargs.get("direction", known["direction"].default)
    kwargs = kwargs | dict(
      direction=direction if direction != "middle" else "top"
    )
  if name == "bees" and isinstance(kwargs.get("high", "tail"), str):
    raise ConfigError(
      "bees in tiles cannot read a percentile of all margins; "
      "set config.select.kwargs.high to a number, the margin "
      "that counts as surely right"
    )
  if kwargs.get("metric") == "centred":
    raise ConfigError(
      f"{name} in tiles takes off no mean of all rows; set "
      "config.select.kwargs.metric to 'cosine'"
    )
  names = tuple(
    n
    for n in (*sampler.needs, *sampler.optional)
    if n in sampler.needs or n in source.columns
  )
  wide = {"embedding", "answer_embedding"} & {*names}
  tile = CHUNK if wide else TILE
  scores = _Scores(source.n, scratch)
  scores.fill(
    (
      (start, sampler(seed, part, 0, **kwargs).score)
      for start, part in source.pools(names, tile)
    ),
    name,
  )
  if direction == "middle":
    return _middle(scores, source, budget)
  return _best(scores, source, budget)


def _middle(scores: _Scores, source: Source, budget: int) -> Chosen:
  """The rows whose rank is nearest to the median's, as `values.directed`.

  Only values around the median are gathered; twice as far on each side as
  without ties there would be need, and further where ties ask for it.
  """
  n = source.n
  if not budget:
    return Chosen(np.empty(0, np.int64), source.ids(0, 0), np.empty(0))
  images = lambda: map(threshold.image, scores.tiles())
  threshold.best(scores.tiles, source.ids_at, 0)  # refuses NaN
  reach = budget + 1
  while True:
    first, last = max(0, n // 2 - reach), min(n - 1, n // 2 + reach)
    low = threshold.cut(images, n - first)[0]
    high = threshold.cut(images, n - last)[0]
    rows, values, below, start = [], [], 0, 0
    for tile in scores.tiles():
      number = threshold.image(tile)
      below += int((number < low).sum())
      where = np.flatnonzero((number >= low) & (number <= high))
      rows.append(start + where)
      values.append(tile[where])
      start += len(tile)
    rows, values = np.concatenate(rows), np.concatenate(values)
    _, inverse, counts = np.unique(
      values, return_inverse=True, return_counts=True
    )
    score = from_middle(
      2 * below + (2 * np.cumsum(counts) - counts)[inverse], n
    )
    # Rows that were not gathered are at least so far from the middle.
    above = below + len(rows)
    outside = max(
      from_middle(2 * below - 1, n) if below else -np.inf,
      from_middle(2 * above + 1, n) if above < n else -np.inf,
    )
    worst = np.partition(score, len(score) - budget)[len(score) - budget]
    if worst > outside or len(rows) == n:
      found = threshold.best(
        lambda: [score], lambda at: source.ids_at(rows[at]), budget
      )
      return _named(rows[found.rows], found.score, source)
    reach *= 2


# What needs a few numbers of all rows.


def _isa(
  seed,
  source,
  budget,
  scratch,
  *,
  order="literal",
  pair_score="sum",
  soft=0.0,
  label_quota=None,
) -> Chosen:
  """Two passes over the log-likelihoods; three where renormalised or soft."""
  if label_quota is not None:
    raise ConfigError(
      "isa in tiles keeps no quota of labels; set "
      "config.select.label_quota to 0"
    )
  isa_lib.check_soft(order, soft)
  by = "magnitude" if order == isa_lib.SOFT else order

  def tiles():
    for _, pool in source.pools(("log_likelihood",), isa_lib.CHUNK):
      yield np.asarray(pool.log_likelihood, np.float64)

  entropy = isa_lib.entropy_of(tiles, by)
  scores = _Scores(source.n, scratch)
  scores.fill(
    (
      (
        at * isa_lib.CHUNK,
        one_side(
          isa_lib.change_of(value, entropy, by), pair_score, "pair_score", ""
        ),
      )
      for at, value in enumerate(tiles())
    ),
    "isa",
  )
  if order == isa_lib.SOFT:
    for at, x in enumerate(scores.tiles()):
      x[:] = isa_lib.drawn(
        x, seed, source.ids(at * TILE, at * TILE + len(x)), pair_score
      )
  if soft:
    mean = sum(float(x.sum()) for x in scores.tiles()) / source.n
    spread = math.sqrt(
      sum(float(((x - mean) ** 2).sum()) for x in scores.tiles()) / source.n
    )
    if not spread > 0:
      raise NumericError(
        "all changes of entropy are equal: there is nothing "
        "to weigh; set config.select.pair_score"
      )
    for at, x in enumerate(scores.tiles()):
      start = at * TILE
      x[:] = x / (soft * spread) + gumbel(
        seed, source.ids(start, start + len(x)), "isa"
      )
  return _best(scores, source, budget)


def _density(
  seed,
  source,
  budget,
  scratch,
  *,
  pair="mean",
  metric="cosine",
  bandwidth="median",
  features=1024,
) -> Chosen:
  """Two passes over the embeddings; see `samplers.density.kernel_density`."""
  if isinstance(features, bool) or int(features) != features or features < 1:
    raise ConfigError(
      f"features is {features!r}, wanted 1 or more: density in tiles sums no "
      "kernel over all pairs; set config.select.kwargs.features to 1024"
    )
  features = int(features)
  some = _some(source)
  centre = _mean(source, pair) if metric == "centred" else None
  x = _vectors(
    source.ids_at(some), source.at("embedding", some), pair, metric, centre
  )
  if bandwidth == "median":
    bandwidth = densities.median_distance(x, source.ids_at(some))
  if isinstance(bandwidth, (str, bool)) or not 0 < bandwidth < np.inf:
    raise ConfigError(
      f"bandwidth is {bandwidth!r}, wanted 'median' or a "
      "number above 0; set config.select.kwargs.bandwidth"
    )
  middle = np.float32(x.mean(axis=0, dtype=np.float64))  # any will do
  w = np.float32(densities.frequencies(seed, x.shape[1], features, bandwidth))
  mesh = rows_lib.own_mesh()

  def waves():
    wave = 2 * mesh.size  # chunks; never just one on a device
    for start, pool in source.pools(("embedding",), wave * CHUNK):
      part = _vectors(pool.ids, pool.embedding, pair, metric, centre) - middle
      tile = np.zeros((wave * CHUNK, part.shape[1]), np.float32)
      tile[: len(part)] = part
      real = (np.arange(len(tile)) < len(part)).astype(np.float32)
      yield (
        start,
        len(part),
        tuple(
          sharding.put(
            mesh, a.reshape(wave, CHUNK, *a.shape[1:]), "pool", *[None] * a.ndim
          )
          for a in (tile, real)
        ),
      )

  with jax.set_mesh(mesh):
    sums = np.zeros((2, *densities._blocks(w).shape[:2]))
    with progress.bar("density, sums", source.n) as tick:
      run = over_chunks(mesh, densities._feature_sums, 1)
      for count, out in _ahead(lambda p: run((w,), p), waves()):
        for one in out:  # by chunk, in order
          sums += one
        tick(count[1])
    means = np.float32(sums / source.n)
    run = over_chunks(mesh, densities._feature_scores, 2)

    def values():
      for (start, n), out in _ahead(lambda p: run((w, means), p), waves()):
        f = np.float64(out.reshape(-1)[:n]) / features
        yield (
          start,
          (
            -np.log(np.maximum(f, 1 / source.n))
            + gumbel(seed, source.ids(start, start + n), "density")
          ),
        )

    scores = _Scores(source.n, scratch)
    scores.fill(values(), "density")
  return _best(scores, source, budget)


def _ahead(run: Callable, waves: Iterator) -> Iterator:
  """((first row, rows), result) of every wave, one wave ahead."""
  waiting = None
  for start, n, placed in waves:
    now = (start, n), run(placed)
    if waiting:
      yield waiting[0], sharding.fetch(waiting[1])
    waiting = now
  if waiting:
    yield waiting[0], sharding.fetch(waiting[1])


def _some(source: Source) -> np.ndarray:
  """The 512 rows by which `densities.median_distance` measures, ascending."""
  best: list = [np.empty(0), np.empty(0, np.int64)]
  for start in range(0, source.n, TILE):
    stop = min(source.n, start + TILE)
    u = uniform(0, source.ids(start, stop), "bandwidth")
    u = np.append(best[0], u)
    rows = np.append(best[1], np.arange(start, stop))
    least = np.argsort(u, kind="stable")[:512]
    best = [u[least], rows[least]]
  return np.sort(best[1])


def _mean(source: Source, pair: str) -> np.ndarray:
  """[W] float64, of all vectors, added by tile."""
  total = 0.0
  for _, pool in source.pools(("embedding",), CHUNK):
    total = total + rows_lib.vectors(pool, pair, "euclidean").sum(
      axis=0, dtype=np.float64
    )
  return total / source.n


def _vectors(ids, embedding, pair, metric, centre) -> np.ndarray:
  """`rows.vectors` of a tile, with the mean of all where it is centred."""
  pool = Pool(ids, dict(embedding=embedding))
  if centre is None:
    return rows_lib.vectors(pool, pair, metric)
  x = (rows_lib.vectors(pool, pair, "euclidean") - centre).astype(np.float32)
  return rows_lib.vectors(Pool(ids, dict(embedding=x)), "mean", "cosine")
