"""Batches packed tightly: the prompt of a pair once, hardly any padding.

The pairs of a micro-batch are dealt to the devices, the same number to each;
a device's tokens lie end to end in one dense row, [prompt | chosen |
rejected] and so on. A rejected answer's positions go on from the prompt's end,
and the prompt's last token predicts the first token of both answers. For
attention the sequences prompt + answer are packed by first-fit into rows as
long as the longest (`model.packed`), and the tiles of the dense row that
hold anything are listed (`model.packed`). All of it is NumPy, on lengths.

Shapes are static: a few are chosen from the data, and a step takes the first
that holds it.
"""

from collections.abc import Iterable
import heapq
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.core.errors import DataError
from jaxalign.data import tokens as tokens_lib
from jaxalign.model.packed import Copies, TILE, Tiles


class Packed(NamedTuple):
  """S dense rows, one a device; in a batch behind an axis of micro-batches.

  It stands where a padded batch has its token ids, and its "mask" is
  [.., b, R, 1]: the counts of response tokens.
  """

  tokens: jax.Array  # [S, T] int32 ids
  position: jax.Array  # [S, T] int32, in the sequence
  copies: Copies
  source: jax.Array  # [S, U] int32: the token that predicts a response token
  target: jax.Array  # [S, U] int32: the id to predict
  owner: jax.Array  # [S, U] int32: which of the row's responses; -1: none
  in_prefix: jax.Array  # [S, U] bool: of the first min(counts) of its response
  first: jax.Array  # [S, T] int32: which prediction a token makes; -1: none
  second: jax.Array  # [S, T] int32: its other one (a prompt's last token)


class Shape(NamedTuple):
  """The static sizes of a dense row."""

  tokens: int  # T
  targets: int  # U
  rows: int  # a, of attention
  length: int  # l of each
  tiles: int  # n, of attention without copies; the array's room, no work


def holds(shape: Shape, need: Shape) -> bool:
  """Whether a row of this shape has room for what is needed."""
  return all(a >= b for a, b in zip(shape, need))


def deal(sizes: np.ndarray, bins: int) -> np.ndarray:
  """Deals n rows to bins, as many to each, of sums as alike as can be.

  The longest first, each to the emptiest bin that has room; ties by number.

  Args:
    sizes: [n] tokens of each; n is a multiple of `bins`.
    bins: of n / bins rows each.

  Returns:
    [bins, n / bins] row numbers.
  """
  room = len(sizes) // bins
  taken, emptiest = [[] for _ in range(bins)], [(0, k) for k in range(bins)]
  for i in np.argsort(-sizes, kind="stable").tolist():
    total, k = heapq.heappop(emptiest)
    taken[k].append(i)
    if len(taken[k]) < room:
      heapq.heappush(emptiest, (total + int(sizes[i]), k))
  return np.array(taken, np.int64).reshape(bins, room)


def first_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
  """Packs sequences into rows of one length: of every row its sequences.

  The longest first, each into the first row that has room.

  Args:
    sizes: [n] slots of each sequence.
    length: of a row, at least the longest sequence.
  """
  rows, left = [], []
  for i in np.argsort(-sizes, kind="stable").tolist():
    size = int(sizes[i])
    k = next((k for k, free in enumerate(left) if free >= size), len(rows))
    if k == len(rows):
      rows.append([])
      left.append(length)
    rows[k].append(i)
    left[k] -= size
  return rows


def up(x: int, least: int = 16) -> int:
  """Rounded up: to `least`, from 1,024 on to 128, what a TPU multiplies at."""
  step = least if x <= 1024 else 128
  return max(step, -(-x // step) * step)


def spans(prompt: np.ndarray, answers: np.ndarray) -> np.ndarray:
  """[m, 1 + R, 2] first token and end of every prompt and answer."""
  sizes = np.concatenate([prompt[:, None], answers], 1)
  ends = np.cumsum(sizes.reshape(-1)).reshape(sizes.shape)
  return np.stack([ends - sizes, ends], -1)


def tiles_of(where: np.ndarray) -> np.ndarray:
  """[n, 2] query and key blocks that see each other, in order, each once.

  Args:
    where: as from `spans`.
  """
  found = set()
  for parts in where:
    blocks = [range(a // TILE, -(-b // TILE)) for a, b in parts if b > a]
    for own in blocks:
      for i in own:
        found.update(
          (i, j) for keys in (blocks[0], own) for j in keys if j <= i
        )
  return np.array(sorted(found), np.int32).reshape(-1, 2)


def need(prompt: np.ndarray, answers: np.ndarray, length: int) -> Shape:
  """The least shape that holds one device's rows.

  Args:
    prompt: [m] tokens of each prompt.
    answers: [m, R] tokens of each response.
    length: of an attention row.
  """
  rows = first_fit((prompt[:, None] + answers).reshape(-1), length)
  tiles = len(tiles_of(spans(prompt, answers)))
  return Shape(
    up(int(prompt.sum() + answers.sum()), TILE),
    up(int(answers.sum())),
    len(rows),
    length,
    -(-tiles // 16) * 16,
  )


def largest(needs: list[Shape]) -> Shape:
  """The least shape that holds them all."""
  return Shape(*(max(sizes) for sizes in zip(*needs)))


def larger(need: Shape) -> Shape:
  """A shape for what none holds: by steps of a quarter, so there are few."""

  def grown(x):
    size = 16
    while size < x:
      size = up(size * 5 // 4)
    return size

  return Shape(
    up(grown(need.tokens), TILE),
    grown(need.targets),
    -(-need.rows // 4) * 4,
    need.length,
    2 * grown(need.tiles),
  )


def cost(shape: Shape) -> float:
  """A measure to choose shapes by: slots, and attention by the square.

  A pair of attention slots counts as 1 / 4,096 of a dense token: about what it
  is of a Llama of width 512 (a layer multiplies 12 D^2 a token, 2 D a pair, of
  which half is not seen).
  """
  return (
    shape.tokens
    + 0.5 * shape.targets
    + shape.rows * shape.length * (0.05 + shape.length / 4096)
  )


def choose(needs: list[Shape], most: int) -> list[Shape]:
  """At most `most` shapes, cheapest first, that hold every need.

  Needs in the order of their cost are cut into runs, a shape each, so that
  the sum of the costs is least (dynamic programming).
  """
  needs = sorted(set(needs), key=cost)
  n, most = len(needs), min(most, len(set(needs)))
  best = {(0, 0): (0.0, [])}
  for end in range(1, n + 1):
    run = None
    for start in range(end - 1, -1, -1):
      run = needs[start] if run is None else largest([run, needs[start]])
      price = cost(run) * (end - start)
      for k in range(most):
        if (start, k) in best:
          total = best[start, k][0] + price
          if total < best.get((end, k + 1), (np.inf,))[0]:
            best[end, k + 1] = (total, best[start, k][1] + [run])
  found = [best[n, k] for k in range(1, most + 1) if (n, k) in best]
  _, shapes = min(found, key=lambda x: x[0])
  return sorted(shapes, key=cost)


def stack(rows: Iterable[Packed]) -> Packed:
  """Dense rows, as from `pack`, behind an axis S."""
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def pack(
  shape: Shape,
  rows: tokens_lib.TokenRows,
  index: np.ndarray,
  least: np.ndarray,
  ids: list[str] | None = None,
) -> Packed:
  """One device's rows, packed; arrays without the axis S.

  Args:
    shape: holds them.
    rows: the tokenized rows.
    index: [m, R] which row each response is; R is 1 or 2.
    least: [m, R] how many tokens of a response are `in_prefix`.
    ids: names of the m rows, for an error.

  Raises:
    DataError: two responses of one row have different prompts.
  """
  prompt = np.asarray(rows.start)[index[:, 0]].astype(np.int64)
  begin, end = (np.asarray(rows.offsets)[i] for i in (index, index + 1))
  _check_prompts(rows, index, begin, ids)
  answers = end - begin - prompt[:, None]
  where = spans(prompt, answers)  # slots of every prompt and answer
  sizes = where[..., 1] - where[..., 0]
  # Of every token its row, whether of the prompt (0) or which answer's, and
  # its place there.
  row, branch = np.divmod(
    np.repeat(np.arange(sizes.size), sizes.flat), sizes.shape[1]
  )
  place = np.arange(len(row)) - where[row, branch, 0]
  first = np.concatenate([begin[:, :1], begin + prompt[:, None]], 1)
  tokens = np.asarray(rows.ids[first[row, branch] + place], np.int32)
  answered = np.flatnonzero(branch)
  k, side, nth = row[answered], branch[answered] - 1, place[answered]
  source = np.where(nth == 0, where[k, 0, 1] - 1, answered - 1)
  # A prompt's last token predicts the first token of the second answer too.
  again = (nth == 0) & (side > 0) & (answers[k, 0] > 0)
  uses = np.full((2, shape.tokens), -1, np.int32)
  uses[again.astype(int), source] = np.arange(len(source))

  def filled(x, size, value=0):
    x = x if x.dtype == bool else np.int32(x)
    return np.pad(x, (0, size - len(x)), constant_values=value)

  listed = tiles_of(where)
  tiles = Tiles(
    filled(row + 1, shape.tokens),
    filled(branch, shape.tokens),
    *(filled(x, shape.tiles) for x in listed.T),
    np.array([len(listed)], np.int32),
  )
  places = [
    np.concatenate([np.arange(*own[0]), np.arange(*answer)])
    for own in where
    for answer in own[1:]
  ]
  return Packed(
    filled(tokens, shape.tokens),
    filled(place + prompt[row] * (branch > 0), shape.tokens),
    _copies(shape, places, tiles),
    filled(source, shape.targets),
    filled(tokens[answered], shape.targets),
    filled(k * index.shape[1] + side, shape.targets, -1),
    filled(nth < least[k, side], shape.targets),
    *uses,
  )


def _check_prompts(rows, index, begin, ids):
  """Checks that all responses of a row have its prompt, token for token."""
  for k, (own, *others) in enumerate(index):
    size = rows.start[own]
    prompt = lambda at: rows.ids[at : at + size]
    for other, at in zip(others, begin[k, 1:]):
      if rows.start[other] != size or not np.array_equal(
        prompt(at), prompt(begin[k, 0])
      ):
        raise DataError(
          f"row {ids[k] if ids else k}: its responses have different prompts, "
          "which cannot be computed once; set config.train.layout='padded'"
        )


def _copies(shape, places, tiles):
  """The attention rows of sequences whose tokens lie at `places`."""
  token = np.zeros((shape.rows, shape.length), np.int32)
  segment = np.zeros_like(token)
  where = np.full((2, shape.tokens), -1, np.int32)
  packed = first_fit(np.array([len(x) for x in places]), shape.length)
  for k, row in enumerate(packed):
    at = 0
    for number, i in enumerate(row):
      own = places[i]
      now = slice(at, at + len(own))
      token[k, now], segment[k, now] = own, number + 1
      where[np.where(where[0, own] < 0, 0, 1), own] = (
        k * shape.length + np.arange(now.start, now.stop)
      )
      at = now.stop
  return Copies(token, segment, *where, tiles)
