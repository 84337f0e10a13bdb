"""Muon against float64, on every mesh; which parameters are its matrices."""

import jax
from models import make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.model import adapters, decoder
from jaxalign.train import optim

MODEL = sized(2, 16, 8, 4, 4, 24, 32, 12, tied=False, qkv_bias=True)
B2 = 0.98

pytestmark = pytest.mark.usefixtures("quick_compiles")

# (stack axis, in axes, out axes) of every matrix, by hand.
MATRICES = {
  "layers/wq": ((1,), (2, 3, 4)),
  "layers/wk": ((1,), (2, 3)),
  "layers/wv": ((1,), (2, 3)),
  "layers/wo": ((1, 2, 3), (4,)),
  "layers/w_gate": ((1,), (2,)),
  "layers/w_up": ((1,), (2,)),
  "layers/w_down": ((1,), (2,)),
}


def orthogonal(x):
  """Five steps of Jordan's quintic on [rows, columns], float64."""
  wide = x if x.shape[0] <= x.shape[1] else x.T
  y = wide / (np.linalg.norm(wide) + 1e-8)
  for _ in range(5):
    a = y @ y.T
    y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
  return y if wide is x else y.T


def by_muon(gradients, fan):
  """Updates of one [rows, columns] matrix at each step, Nesterov's 0.95."""
  m, out = 0.0, []
  for t, g in enumerate(gradients, 1):
    m = 0.95 * m + 0.05 * g
    ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    out.append(-0.2 * np.sqrt(fan) * orthogonal(ahead))
  return out


def by_adamw(gradients):
  m = v = 0.0
  out = []
  for t, g in enumerate(gradients, 1):
    m, v = 0.9 * m + 0.1 * g, B2 * v + (1 - B2) * g * g
    out.append(-(m / (1 - 0.9**t)) / (np.sqrt(v / (1 - B2**t)) + 1e-8))
  return out


@pytest.mark.parametrize("lora", [None, adapters.Lora(2)], ids=["full", "lora"])
def test_muon_is_the_equations_on_every_mesh(mesh, lora):
  m = MODEL._replace(lora=lora)
  table = decoder.table(m)
  if lora:
    table = {n: p for n, p in table.items() if ":" in n}
  rng = np.random.default_rng(3)
  host = [
    {n: np.float32(rng.normal(size=p.shape)) for n, p in table.items()}
    for _ in range(4)
  ]
  tx = optim.make_optimizer(clip=0.0, weight_decay=0.0, b2=B2, name="muon")
  params = put(mesh, m, host[0])
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  got = []
  for gradient in host[1:]:
    updates, state = update(put(mesh, m, gradient), state, params)
    assert all(updates[n].sharding == params[n].sharding for n in table)
    got.append(jax.device_get(updates))
  for name, p in table.items():
    each = [np.float64(h[name]) for h in host[1:]]
    base, _, part = name.partition(":")
    if base not in MATRICES:
      wanted = by_adamw(each)
    else:
      into, _ = MATRICES[base]
      if part:
        into = into if part == "a" else (1,)
      rows = int(np.prod([p.shape[i] for i in into]))
      flat = [g.reshape(p.shape[0], rows, -1) for g in each]
      by_layer = [
        by_muon([g[t] for g in flat], max(flat[0].shape[1:]))
        for t in range(p.shape[0])
      ]
      wanted = [
        np.stack([layer[k] for layer in by_layer]).reshape(p.shape)
        for k in range(len(each))
      ]
    for k, w in enumerate(wanted):
      np.testing.assert_allclose(
        got[k][name], w, rtol=0, atol=2e-4, err_msg=f"{name} at update {k}"
      )


def test_an_update_moves_as_far_as_adamw_s():
  """Root mean squares about 0.2: the factor's purpose."""
  rng = np.random.default_rng(0)
  w = {"layers/w_up": np.float32(rng.normal(size=(1, 48, 96)))}
  tx = optim.make_optimizer(clip=0.0, weight_decay=0.0, b2=B2, name="muon")
  with jax.set_mesh(make_mesh()):
    updates, _ = jax.jit(tx.update)(w, tx.init(w), w)
  size = float(np.sqrt(np.mean(np.square(updates["layers/w_up"]))))
  assert 0.12 < size < 0.28


def test_no_table_row_of_words_is_a_matrix():
  for name, p in decoder.table(MODEL).items():
    found = optim.matrix_axes(name, p.shape)
    assert (found is None) == (name not in MATRICES), name
    if found:
      assert tuple(found) == MATRICES[name]
