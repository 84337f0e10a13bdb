"""Batches packed tightly: the prompt of a pair once, hardly any padding.

The pairs of a micro-batch are dealt to the devices, the same number to each;
a device's tokens lie end to end in one dense row, [prompt | chosen |
rejected] and so on. A rejected answer's positions go on from the prompt's end,
and the prompt's last token predicts the first token of both answers. For
attention the sequences prompt + answer are packed by first-fit into rows as
long as the longest (`model.packed`), and the tiles of the dense row that
hold anything are listed (`model.packed`). All of it is NumPy, on lengths.

Shapes are static, see `train.packed_shapes`: a step takes the first that holds
it.
"""

from collections.abc import Iterable
import heapq
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.core.errors import DataError
from jaxalign.data import tokens as tokens_lib
from jaxalign.model.packed import Copies, Tiles
from jaxalign.train.packed_shapes import first_fit, Shape, spans, tiles_of


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
