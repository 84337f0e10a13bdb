"""The static sizes of packed rows: few of them, chosen from the data."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxalign.model.packed import TILE


class Shape(NamedTuple):
  """The static sizes of a dense row."""

  tokens: int  # T
  targets: int  # U
  rows: int  # a, of attention
  length: int  # l of each
  tiles: int  # n, of attention without copies; the array's room, no work


def shape_holds(shape: Shape, need: Shape) -> bool:
  """Whether a row of this shape has room for what is needed."""
  return all(a >= b for a, b in zip(shape, need))


def round_up(x: int, least: int = 16) -> int:
  """Rounded up: to `least`, from 1,024 on to 128, what a TPU multiplies at."""
  step = least if x <= 1024 else 128
  return max(step, -(-x // step) * step)


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


def needed_shape(prompt: np.ndarray, answers: np.ndarray, length: int) -> Shape:
  """The least shape that holds one device's rows.

  Args:
    prompt: [m] tokens of each prompt.
    answers: [m, R] tokens of each response.
    length: of an attention row.
  """
  rows = first_fit((prompt[:, None] + answers).reshape(-1), length)
  tiles = len(tiles_of(spans(prompt, answers)))
  return Shape(
    round_up(int(prompt.sum() + answers.sum()), TILE),
    round_up(int(answers.sum())),
    len(rows),
    length,
    -(-tiles // 16) * 16,
  )


def common_shape(needs: Iterable[Shape]) -> Shape:
  """The least shape that holds them all."""
  return Shape(*(max(sizes) for sizes in zip(*needs)))


def larger_shape(need: Shape) -> Shape:
  """A shape for what none holds: by steps of a quarter, so there are few."""

  def grown(x):
    size = 16
    while size < x:
      size = round_up(size * 5 // 4)
    return size

  return Shape(
    round_up(grown(need.tokens), TILE),
    grown(need.targets),
    -(-need.rows // 4) * 4,
    need.length,
    2 * grown(need.tiles),
  )


def shape_cost(shape: Shape) -> float:
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


def choose_shapes(needs: list[Shape], most: int) -> list[Shape]:
  """At most `most` shapes, cheapest first, that hold every need.

  Needs in the order of their cost are cut into runs, a shape each, so that
  the sum of the costs is least (dynamic programming).
  """
  needs = sorted(set(needs), key=shape_cost)
  n, most = len(needs), min(most, len(set(needs)))
  best = {(0, 0): (0.0, [])}
  for end in range(1, n + 1):
    run = None
    for start in range(end - 1, -1, -1):
      run = needs[start] if run is None else common_shape([run, needs[start]])
      price = shape_cost(run) * (end - start)
      for k in range(most):
        if (start, k) in best:
          total = best[start, k][0] + price
          if total < best.get((end, k + 1), (np.inf,))[0]:
            best[end, k + 1] = (total, best[start, k][1] + [run])
  found = [best[n, k] for k in range(1, most + 1) if (n, k) in best]
  _, shapes = min(found, key=lambda x: x[0])
  return sorted(shapes, key=shape_cost)
