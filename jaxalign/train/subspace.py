"""LoRA-SB's fixed bases: where the first step of full training would go.

Ponkshe et al. 2024: with G [in, out] the gradient of a weight, averaged over
a few batches of the very loss that is trained, A and B are its first r
singular vectors on either side, and only R of W + scale * A R B is trained.
Two things differ from the paper. R starts at 0 and not at the singular
values, so that the policy begins as the reference (loss ln 2, reward 0) and
not one step away from it. And G is the gradient itself, the step of plain
gradient descent, where the paper takes its sign, AdamW's first step: a sign
needs all of G, while singular vectors need no more than its products with
narrow matrices (Halko et al. 2011). Those are gradients of adapters: of
x W + (x A) B, at B = 0, dB = A^T G, and at A = 0, dA = G B^T. So no full
gradient is ever held, only [in, k] and [k, out].
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import sharding
from jaxalign.core.errors import NumericError
from jaxalign.model import adapters, decoder
from jaxalign.model.parameters import Params

SPARE = 8  # directions more than the r wanted, as Halko et al. advise
POWERS = 2  # times that the range is multiplied by G G^T


def bases(
  key: jax.Array,
  m: decoder.ModelConfig,
  mesh: jax.sharding.Mesh,
  reference: Params,
  make_gradients: Callable[..., Callable],
  batches: Sequence[Any],
) -> Params:
  """The "...:a" and "...:b" of a model with LoRA-SB, orthonormal, in float32.

  Args:
    key: of the first, random directions.
    m: the policy's sizes, with `lora`.
    mesh: to lay them on.
    reference: the base's parameters.
    make_gradients: `(sizes) -> step.make_gradients(...)` of the loss.
    batches: as the train step takes them; the gradient is their mean.

  Raises:
    NumericError: a gradient that is not finite.
  """
  table = decoder.table(m)
  names = adapters.targets(m.lora, decoder.table(m._replace(lora=None)))
  k = min(m.lora.rank + SPARE, *(_least(table[n].shape, n) for n in names))
  sketch = m._replace(lora=adapters.Lora(k, float(k), m.lora.targets))
  wide = decoder.table(sketch)
  gradients = jax.jit(make_gradients(sketch))

  def put(p, x):
    return sharding.put(mesh, np.float32(x).reshape(p.shape), *p.axes)

  def products(side, other):
    """Mean gradients of one side at 0, the other side given; [T, in, k] of
    "a", [T, out, k] of "b", float64 on every host."""
    zeros = lambda p: put(p, np.zeros(p.shape, np.float32))
    zero = {n: zeros(p) for n, p in wide.items() if n.endswith(side)}
    frozen, total = reference | other, None
    for batch in batches:
      grads = gradients(zero, batch, frozen)[0]
      total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    out = {}
    for name, g in total.items():
      g = sharding.fetch(g).astype(np.float64) / len(batches)
      if not np.isfinite(g).all():
        raise NumericError(
          f"{name}: the gradient that LoRA-SB begins with is "
          "not finite; look at the first rows of the subset"
        )
      columns_first = side == ":a"
      g = g.reshape((len(g), -1, k) if columns_first else (len(g), k, -1))
      out[name[:-2]] = g if columns_first else g.swapaxes(1, 2)
    return out

  def across(side, found):
    """Orthonormal columns [T, n, k] of each, as that side of the adapters."""
    q = {n: np.linalg.qr(x)[0] for n, x in found.items()}
    laid = lambda x: x if side == ":a" else x.swapaxes(1, 2)
    return q, {n + side: put(wide[n + side], laid(x)) for n, x in q.items()}

  drawn = adapters.init(key, wide)
  drawn = {n: x for n, x in drawn.items() if n.endswith(":a")}
  for _ in range(POWERS):
    _, right = across(":b", products(":b", drawn))
    _, drawn = across(":a", products(":a", right))
  q, right = across(":b", products(":b", drawn))
  out = {}
  for name, x in products(":a", right).items():  # G Q, [T, in, k]
    left, _, turn = np.linalg.svd(x, full_matrices=False)
    a = left[..., : m.lora.rank]
    b = turn[:, : m.lora.rank] @ q[name].swapaxes(1, 2)
    # Singular vectors come in pairs up to a sign: the largest of A is plus.
    at = np.abs(a).argmax(1, keepdims=True)
    sign = np.sign(np.take_along_axis(a, at, 1))
    out[f"{name}:a"] = put(table[f"{name}:a"], a * sign)
    out[f"{name}:b"] = put(table[f"{name}:b"], b * sign.swapaxes(1, 2))
  return out


def _least(shape: tuple[int, ...], name: str) -> int:
  """The smaller side of a weight as a matrix."""
  return min(int(np.prod(side)) for side in adapters.sides(name, shape))
