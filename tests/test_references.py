"""What losses read of the kept rows, against a NumPy Llama and by hand."""

import numpy as np
import oracle
import pytest
from test_step import (
  LENGTH,
  MODEL,
  on_mesh,
  real_params,
  rows_of,
  SIZES,
  token_rows,
)

from jaxalign.core.errors import DataError
from jaxalign.embed import passes
from jaxalign.train import feed, row_columns
from jaxalign.train.reference import Reference

pytestmark = pytest.mark.usefixtures("quick_compiles")


def make(mesh, responses):
  """(the reference, rows in another order than their tokens, tokens and mask
  of those rows)."""
  tokens, mask = rows_of(8, responses, 7)
  order = np.array([5, 0, 7, 2, 3])
  frozen = Reference(mesh, on_mesh(mesh), MODEL, tile=2, chunk=5)
  tokens[:, :, 0] = 1
  all_rows = token_rows(tokens, mask)
  tokens, mask = tokens[order], mask[order]
  ref = np.zeros(mask.shape[:2])
  for i in np.ndindex(ref.shape):
    each = oracle.token_logps(real_params(), tokens[i], **SIZES)
    ref[i] = each[mask[i]].sum()
  rows = feed.TrainRows(
    [f"row-{i}" for i in order],
    all_rows,
    order[:, None] * responses + np.arange(responses),
    np.float32(ref),
    np.float32(mask.sum(-1)),
    np.array([True, False, True, False, False]),
  )
  return frozen, rows, tokens, mask


def test_common_prefix_sums_end_where_the_shorter_answer_does(mesh):
  frozen, rows, tokens, mask = make(mesh, 2)
  public, cost = row_columns.common_prefix(frozen, rows, 0)
  counts = mask.sum(-1)
  assert (
    (counts[:, 0] < counts[:, 1]).any()
    > 0
    < (counts[:, 0] > counts[:, 1]).any()
  )
  seen = 0
  for i in np.ndindex(public.shape):
    each = oracle.token_logps(real_params(), tokens[i], **SIZES)[mask[i]]
    shortest = counts[i[0]].min()
    assert public[i] == pytest.approx(each[:shortest].sum(), abs=1e-5)
    if counts[i] == shortest:
      assert public[i] == rows.ref_sum[i]
    else:
      assert abs(public[i] - rows.ref_sum[i]) > 0.1
      seen += mask[i].argmax() + shortest  # prompt and shared tokens
  assert cost.tokens == seen > 0 < cost.flops


def test_common_prefix_sums_of_equal_lengths_cost_nothing(mesh):
  frozen, rows, _, _ = make(mesh, 1)
  public, cost = row_columns.common_prefix(frozen, rows, 0)
  np.testing.assert_array_equal(public, rows.ref_sum)
  assert cost.flops == 0


def test_prompt_weights_see_no_answer(mesh):
  """Other answers to the same prompts leave the same weights."""
  frozen, rows, tokens, mask = make(mesh, 1)
  weights, cost = row_columns.prompt_weights(frozen, rows, 4)
  other = rows.tokens.ids.copy()
  for i, start in enumerate(rows.tokens.start):
    at = slice(rows.tokens.offsets[i] + start, rows.tokens.offsets[i + 1])
    other[at] = (other[at] + 7) % 32
  again, _ = row_columns.prompt_weights(
    frozen, rows._replace(tokens=rows.tokens._replace(ids=other)), 4
  )
  np.testing.assert_array_equal(weights, again)
  prompts = [tokens[i, 0, : mask[i, 0].argmax()] for i in range(5)]
  assert cost.tokens == sum(map(len, prompts))
  # The same prompts as rows of their own.
  flat = np.zeros((5, 1, LENGTH), np.int32)
  on = np.zeros((5, 1, LENGTH), bool)
  for i, p in enumerate(prompts):
    flat[i, 0, : len(p)], on[i, 0, len(p) - 1] = p, True
  prompts, how = token_rows(flat, on), passes.PassOptions(tile=2)
  x = passes.score_rows(mesh, frozen.params, MODEL, prompts, how).embedding
  np.testing.assert_allclose(
    weights, row_columns.density_ratios(x, rows.label), rtol=1e-4
  )
  assert (weights[rows.label] == 1).all()
  assert (weights[~rows.label] != 1).all()
  with pytest.raises(DataError, match="config.loss.name to 'bco'"):
    rows = rows._replace(label=np.full(5, True))
    row_columns.prompt_weights(frozen, rows, 4)
