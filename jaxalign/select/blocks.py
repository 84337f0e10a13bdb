"""The blocked form of a sampler that holds what it compares.

A hash of the record id deals the rows into blocks, so that each is a fair
sample of the pool in any order of the input; every block gets its share of
the budget, and the sampler runs over one block after the other. Rows of two
blocks are never compared: a near copy in another block is not seen.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxalign import progress
from jaxalign.errors import ConfigError
from jaxalign.select import threshold
from jaxalign.select.pool import Pool
from jaxalign.select.samplers.draws import apportion
from jaxalign.select.sources import Source, TILE
from jaxalign.select.stream import Chosen
from jaxalign.select.topk import id_hash, uniform


def select(
  sampler: Callable,
  source: Source,
  budget: int,
  *,
  seed: int = 0,
  block_rows: int = 65536,
  **kwargs: Any,
) -> Chosen:
  """Rows of every block, by turns: the best of each, then the second of each.

  Args:
    sampler: of SAMPLERS, or one of your own.
    source: has the columns that it needs.
    budget: M, at most N.
    seed: of the sampler, and of which rows share a block.
    block_rows: rows of a block, about; what is held and what a greedy method
      costs is of these, not of N.
    **kwargs: of the sampler.
  """
  if block_rows < 1 or not 0 <= budget <= source.n:
    raise ConfigError(
      f"block_rows={block_rows} and a budget of {budget} of "
      f"{source.n} rows, wanted 1 or more and at most all; set "
      "config.select.budget"
    )
  count = -(-source.n // block_rows)
  block = np.empty(source.n, np.uint16 if count <= 1 << 16 else np.int64)
  for start in range(0, source.n, TILE):
    stop = min(source.n, start + TILE)
    block[start:stop] = np.minimum(
      count - 1, uniform(seed, source.ids(start, stop), "block") * count
    )
  sizes = np.bincount(block, minlength=count)
  share = apportion(sizes.astype(float), sizes, budget)
  names = [
    n
    for n in (*sampler.needs, *sampler.optional)
    if n in sampler.needs or n in source.columns
  ]
  rows, score, turn, ids, notes = [], [], [], [], []
  with progress.bar("blocks", count, "blocks") as tick:
    for at in np.flatnonzero(share):
      own = np.flatnonzero(block == at)
      pool = Pool(
        np.array(threshold.names(source.ids_at(own))),
        {name: _taken(source, name, own) for name in names},
      )
      found = sampler(seed, pool, int(share[at]), **kwargs)
      rows.append(own[found.rows])
      ids.append(pool.ids[found.rows])
      score.append(found.score[found.rows])
      turn.append((np.arange(share[at]) + 0.5) / share[at])
      notes += [note for note in found.notes if note not in notes]
      tick(1)
  if not rows:
    return Chosen(np.empty(0, np.int64), source.ids(0, 1)[:0], np.empty(0))
  rows, ids = np.concatenate(rows), np.concatenate(ids)
  order = np.lexsort((rows, id_hash(ids), np.concatenate(turn)))
  notes.append(
    f"in {count} blocks of about {block_rows} rows: rows of two "
    "blocks were never compared"
  )
  return Chosen(
    rows[order], ids[order], np.concatenate(score)[order], tuple(notes)
  )


def _taken(source: Source, name: str, rows: np.ndarray) -> np.ndarray:
  """A column at some rows, ascending, read in tiles."""
  read, parts = source.column(name), []
  step = max(256, min(TILE, (64 << 20) // max(1, read(0, 1).nbytes)))
  starts = np.arange(0, source.n, step)
  cuts = np.searchsorted(rows, np.append(starts, source.n))
  for start, a, b in zip(starts.tolist(), cuts, cuts[1:]):
    if b > a:
      parts.append(read(start, min(source.n, start + step))[rows[a:b] - start])
  return np.concatenate(parts)
