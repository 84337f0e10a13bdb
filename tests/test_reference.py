"""The reference's log-probabilities, once: the float64 Llama's, in any layout.

And the same bits on any mesh whose devices hold whole rows.
"""

import re

import jax
from models import put
import numpy as np
import oracle
import pytest
from test_layout import examples, make_mesh, MODEL, on_mesh, rows_of, SIZES
from test_layout import params as weights

from jaxalign.core.errors import DataError, NumericError
from jaxalign.train import reference
from jaxalign.train.reference import Reference, reference_logps

pytestmark = pytest.mark.usefixtures("quick_compiles")

LAYOUTS = ("packed", "packed_apart", "padded")


TOKEN = 5  # in few of the rows


def pairs_of(r, n=21):
  """21 rows: no whole number of bins, of 8 or of 4 responses, either way."""
  return examples(n, r, seed=5)


def run(
  r,
  *,
  mesh=None,
  layout="packed",
  tile=8,
  order=None,
  params=None,
  m=MODEL,
  ids=None,
  producer="chunked",
):
  pairs, mesh = pairs_of(r), mesh or make_mesh(1, 1)
  index = np.arange(len(pairs) * r).reshape(-1, r)
  if order is not None:
    index = index[order]
  with jax.set_mesh(mesh):
    params = on_mesh(mesh) if params is None else params
    frozen = Reference(mesh, params, m, tile, 5, producer)
    return reference_logps(frozen, rows_of(pairs), index, layout, ids)


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_the_float64_llama(layout, r):
  """1e-5 nat of up to 40: float32 products and a float32 sum of 8 terms."""
  total, count = run(r, layout=layout)
  for k, (prompt, *answers) in enumerate(pairs_of(r)):
    for side, answer in enumerate(answers):
      each = oracle.token_logps(weights(), prompt + answer, **SIZES)
      wanted = each[len(prompt) :].sum()
      assert total[k, side] == pytest.approx(wanted, abs=1e-5)
      assert count[k, side] == len(answer)
  assert total.dtype == count.dtype == np.float32


def test_any_head_has_the_same_sums():
  wanted = run(2)[0]
  for producer in ("vocab", "plain"):
    np.testing.assert_allclose(
      run(2, producer=producer)[0], wanted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("r", [1, 2])
def test_the_same_bits_on_one_device_and_on_eight(r):
  one = run(r)[0]
  np.testing.assert_array_equal(run(r, mesh=make_mesh(8, 1))[0], one)
  np.testing.assert_allclose(
    run(r, mesh=make_mesh(4, 2))[0], one, rtol=0, atol=1e-5
  )  # a head's products in two parts


def test_rows_come_back_in_the_order_asked_for():
  order = np.random.default_rng(2).permutation(21)
  np.testing.assert_allclose(
    run(2, order=order)[0], run(2)[0][order], rtol=0, atol=1e-5
  )


def test_fewer_rows_than_a_bin():
  wanted = run(2)[0]
  for rows in ([4], [9, 2, 11]):
    np.testing.assert_allclose(
      run(2, order=rows, tile=64, mesh=make_mesh(8, 1))[0],
      wanted[rows],
      rtol=0,
      atol=1e-5,
    )


def test_one_program_whatever_the_rows():
  call = reference._sums("chunked", MODEL, 5)
  call.clear_cache()
  run(2, tile=4)
  assert call._cache_size() == 1


def test_prompts_that_differ_are_named():
  rows = rows_of([([5, 6], [7]), ([5, 9], [8, 8])])
  mesh = make_mesh(1, 1)
  with jax.set_mesh(mesh):
    frozen = Reference(mesh, on_mesh(mesh), MODEL, 4, 5)
    score = lambda layout: reference_logps(
      frozen, rows, np.array([[0, 1]]), layout, ["b"]
    )
    with pytest.raises(DataError, match="row b: its responses have different"):
      score("packed")
    total, _ = score("packed_apart")
  assert np.isfinite(total).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_is_named_and_nothing_else(layout):
  """One token's embedding is broken, and the rows that hold it are named: not
  those packed with them, to which it spreads."""
  pairs, mesh, m = pairs_of(2), make_mesh(1, 1), MODEL._replace(tied=False)
  broken = dict(weights(m))
  broken["embed"] = np.where(
    np.arange(32)[:, None] == TOKEN, np.nan, broken["embed"]
  )
  # A response's last token is not read.
  holding = [
    i
    for i, (prompt, *answers) in enumerate(pairs)
    if any(TOKEN in [*prompt, *a[:-1]] for a in answers)
  ]
  assert 0 < len(holding) < 5  # an error names eight responses
  ids, params = [f"r{i}" for i in range(len(pairs))], put(mesh, m, broken)
  with pytest.raises(NumericError, match="ref_logps: .* not finite") as error:
    run(2, layout=layout, ids=ids, m=m, params=params)
  named = re.search(r"\(ids (.*?)\)", str(error.value))[1].split(", ")
  assert sorted(set(named)) == sorted(f"r{i}" for i in holding)
