"""Which rows a step sees, KTO's mismatched rows, and the arrays of a batch."""

import collections

import flat
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_mesh, sized
import numpy as np
import pytest

from jaxalign.core.errors import ConfigError
from jaxalign.data import batches
from jaxalign.data import tokens as tokens_lib
from jaxalign.model.flops import decoder_flops
from jaxalign.train import feed
from jaxalign.train.training_cost import training_cost

sizes = st.integers(1, 40)


def rows_of_steps(steps, *how):
  return np.concatenate([batches.rows_at(s, *how) for s in steps])


@settings(max_examples=200, deadline=None)
@given(
  n=sizes, batch=sizes, seed=st.integers(0, 2**63), epochs=st.integers(1, 4)
)
def test_every_row_once_an_epoch_across_the_cuts(n, batch, seed, epochs):
  steps = batches.updates(n, batch, epochs)
  assert (steps - 1) * batch < epochs * n <= steps * batch
  seen = rows_of_steps(range(steps), n, batch, seed)
  assert len(seen) == steps * batch
  for e in range(epochs):
    assert sorted(seen[e * n : (e + 1) * n]) == list(range(n))
  # The rest opens the next epoch: no row twice.
  rest = seen[epochs * n :]
  assert len(set(rest[:n])) == min(len(rest), n)


def test_a_step_is_a_pure_function():
  first = [batches.rows_at(s, 23, 5, 7) for s in range(40)]
  batches._order.cache_clear()
  for s in np.random.default_rng(0).permutation(40):
    np.testing.assert_array_equal(batches.rows_at(int(s), 23, 5, 7), first[s])
  assert any((batches.rows_at(s, 23, 5, 8) != first[s]).any() for s in range(4))
  # Epochs are shuffled anew.
  order = np.concatenate(first)[:46].reshape(2, 23)
  assert (order[0] != order[1]).any()


def test_the_order_is_fair():
  """Over seeds, every row is equally often first: chi-square, 19 degrees."""
  first = [batches.rows_at(0, 20, 1, seed)[0] for seed in range(4000)]
  count = np.bincount(first, minlength=20)
  assert ((count - 200) ** 2 / 200).sum() < 43.8  # p = 0.001


@pytest.mark.parametrize(
  "n,batch,epochs,most,wanted",
  [(10, 5, 1, 0, 2), (11, 5, 1, 0, 3), (10, 4, 0.1, 0, 1), (3, 8, 1, 0, 1)]
  + [(100, 10, 2.5, 0, 25), (100, 10, 2.5, 7, 7), (100, 10, 0.5, 7, 5)],
)
def test_updates(n, batch, epochs, most, wanted):
  assert batches.updates(n, batch, epochs, most) == wanted
  # Few rows are passed over more often; a bound above is a bound.
  assert batches.updates(n, batch, epochs, most, least=6) == (
    max(wanted, 6) if most != 5 else 5
  )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=50, unique=True))
def test_a_rotation_leaves_no_fixed_point(rows):
  rows = np.array(rows)
  other = batches.rotation(rows, 10**6 + 1)
  np.testing.assert_array_equal(other, np.roll(rows, -1))
  assert (other != rows).all()


@settings(max_examples=200, deadline=None)
@given(n=st.integers(2, 12), extra=st.integers(0, 12), seed=sizes)
def test_a_batch_that_spans_two_epochs(n, extra, seed):
  """Rows that come twice never meet themselves, and are a rotation where one
  can be."""
  rows = batches.rows_at(0, n, n + extra, seed)
  other = batches.rotation(rows, n)
  assert (other != rows).all() and (other < n).all()
  shifts = [np.roll(rows, -k) for k in range(1, len(rows))]
  if any((s != rows).all() for s in shifts):
    assert sorted(other) == sorted(rows)


@pytest.mark.parametrize(
  "rows, n, wanted",
  [([4, 5, 6], 7, [5, 6, 4]), ([2, 2], 3, [0, 0]), ([0, 1, 0], 3, [1, 0, 1])],
)
def test_rotations_by_hand(rows, n, wanted):
  assert batches.rotation(np.array(rows), n).tolist() == wanted


# Mismatched rows.


def token_rows(rows):
  ids = [np.array(p + r, np.int32) for p, r in rows]
  return tokens_lib.TokenRows(
    np.concatenate(ids),
    np.cumsum([0] + [len(i) for i in ids]),
    np.array([len(p) for p, _ in rows], np.int32),
    np.zeros(len(rows), np.int32),
  )


def row(rows, i):
  return rows.ids[rows.offsets[i] : rows.offsets[i + 1]].tolist()


# Long prompts have short answers here: joined, they are the longest rows.
EXAMPLE = [
  ([1] + [10 * i + k for k in range(p)], [100 + i] * r + [2])
  for i, (p, r) in enumerate(
    [(2, 9), (10, 1), (4, 4), (1, 11), (7, 2), (3, 3), (9, 2)]
  )
]


def test_mismatched_rows_are_prompt_and_other_answer_token_for_token():
  rows, n = token_rows(EXAMPLE), len(EXAMPLE)
  prompts, answers = np.arange(n), np.roll(np.arange(n), -1)
  out = batches.mismatched(rows, prompts, answers, context=64)
  for i in range(n):
    prompt, answer = EXAMPLE[i][0], EXAMPLE[(i + 1) % n][1]
    assert row(out, i) == prompt + answer
    assert out.start[i] == len(prompt) and out.cut[i] == 0
  assert out.ids.dtype == np.int32 and out.offsets.dtype == np.int64


def test_mismatched_rows_that_do_not_fit_lose_the_answer_s_end():
  rows = token_rows(EXAMPLE)
  out = batches.mismatched(rows, np.array([1, 6]), np.array([3, 0]), context=13)
  assert row(out, 0) == EXAMPLE[1][0] + EXAMPLE[3][1][:2]
  assert row(out, 1) == EXAMPLE[6][0] + EXAMPLE[0][1][:3]
  assert out.cut.tolist() == [10, 7]
  assert out.start.tolist() == [11, 10]
  # Even a prompt as long as the context leaves room for one token.
  tight = batches.mismatched(rows, np.array([1]), np.array([3]), context=11)
  assert row(tight, 0) == EXAMPLE[1][0][1:] + EXAMPLE[3][1][:1]
  assert len(row(tight, 0)) == 11 and tight.start[0] == 10


class Recorder(np.ndarray):
  """An array that notes what is read of it."""

  def __getitem__(self, where):
    self.read.append(np.arange(len(self))[where])
    return np.asarray(self)[where]


def test_mismatched_rows_read_no_token_before_they_are_padded():
  rows, n = token_rows(EXAMPLE), len(EXAMPLE)
  ids = rows.ids.view(Recorder)
  ids.read = []
  out = batches.mismatched(
    rows._replace(ids=ids), np.arange(n), np.roll(np.arange(n), -1), context=64
  )
  assert len(out.ids) == out.offsets[-1] == len(rows.ids) and not ids.read
  tokens, _ = tokens_lib.pad_rows(out, np.array([4, 2]), 24)
  # Row 4: the prompt of 4 and the answer of 5; row 2: of 2 and 3.
  parts = ((4, 0, 8), (5, 4, 8), (2, 0, 5), (3, 2, 14))
  wanted = [
    range(rows.offsets[i] + a, rows.offsets[i] + b) for i, a, b in parts
  ]
  np.testing.assert_array_equal(
    np.concatenate(ids.read), sum(map(list, wanted), [])
  )
  assert tokens[0].tolist() == EXAMPLE[4][0] + EXAMPLE[5][1] + [0] * 12
  assert tokens[1].tolist() == EXAMPLE[2][0] + EXAMPLE[3][1] + [0] * 7


def rows_of(label=None):
  total = np.float32(-np.arange(len(EXAMPLE)))[:, None]
  count = np.float32([[len(r)] for _, r in EXAMPLE])
  return flat.train_rows(token_rows(EXAMPLE), 1, total, count, label=label)


def test_the_mismatched_rows_of_every_step():
  """Prompt i with an answer j != i of the very same step (pitfalls 1, 4)."""
  rows = rows_of()
  out = feed.make_mismatched(rows, feed.Batching(3, 5, context=64), 4)
  assert len(out.start) == 12
  for step in range(4):
    own, answers = batches.rows_at(step, 7, 3, 5), []
    for k, i in enumerate(own, step * 3):
      got, start = row(out, k), out.start[k]
      assert got[:start] == EXAMPLE[i][0]
      j = got[start] - 100
      assert j != i and got[start:] == EXAMPLE[j][1]
      answers.append(j)
    assert sorted(answers) == sorted(own)


# The arrays of a batch.


def make_feed(mesh, rows, batch=8, accumulation=1):
  batching = feed.Batching(batch, 5, accumulation, 64)
  return feed.Feed(mesh, rows, batching, lambda step: 0.5 + step)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_holds_the_rows_of_its_step(mesh, accumulation):
  label = np.arange(7) % 3 == 0
  rows, batching = rows_of(label), feed.Batching(8, 5, context=64)
  mismatched = feed.MismatchedRows(
    feed.make_mismatched(rows, batching, 3), np.float32(np.arange(24))
  )
  rows = rows._replace(mismatched=mismatched)
  fed = make_feed(mesh, rows, accumulation=accumulation)
  for step in (2, 0):
    own = batches.rows_at(step, 7, 8, 5)
    b = flat.arrays_of(fed.batch_at(step))
    assert b.pop("lr") == 0.5 + step
    assert fed.ids_at(step) == [f"r{i}" for i in own]
    assert fed.tokens_at(step) == sum(len(sum(EXAMPLE[i], [])) for i in own)
    for n, x in b.items():
      assert x.shape[:2] == (accumulation, 8 // accumulation), n
      assert x.sharding.spec[:2] == (None, "fsdp"), n
    names = ("tokens", "mask", "kl_tokens", "kl_mask")
    tokens, mask, kl, kl_mask = (np.asarray(b[n]).reshape(8, -1) for n in names)
    for k, i in enumerate(own):
      prompt, answer = EXAMPLE[i]
      whole = prompt + answer
      assert tokens[k, : len(whole)].tolist() == whole
      on = list(range(len(prompt), len(whole)))
      assert np.flatnonzero(mask[k]).tolist() == on
    for n, wanted in (
      ("ref_sum", -np.float32(own)),
      ("label", label[own]),
      ("kl_ref_sum", np.arange(8) + 8 * step),
    ):
      np.testing.assert_array_equal(np.ravel(b[n]), wanted)
    for k, i in enumerate(range(8 * step, 8 * step + 8)):
      wanted = row(mismatched.tokens, i)
      assert kl[k, : len(wanted)].tolist() == wanted
      assert kl_mask[k].sum() == len(wanted) - mismatched.tokens.start[i]


def test_mismatched_rows_longer_than_any_row_are_fed():
  """Prompt 1 (11 tokens) before answer 3 (12): no row has 23."""
  mesh = make_mesh()
  rows = rows_of()
  prompts, answers = np.array([1, 3]), np.array([3, 1])
  tokens = batches.mismatched(rows.tokens, prompts, answers, context=64)
  longest = tokens_lib.row_lengths(rows.tokens).max()
  assert tokens_lib.row_lengths(tokens).max() > longest
  mismatched = feed.MismatchedRows(tokens, np.zeros(2, np.float32))
  rows = rows._replace(mismatched=mismatched)
  kl = make_feed(mesh, rows, batch=2).batch_at(0).mismatched
  assert np.asarray(kl.tokens)[0, 0, 0, :23].tolist() == (
    EXAMPLE[1][0] + EXAMPLE[3][1]
  )


@pytest.mark.parametrize(
  "batch,accumulation,words",
  [
    (8, 3, "batch_size=8 does not divide into c.train.accumulation=3"),
    (0, 1, "c.train.batch_size=0"),
    (8, 0, "c.train.accumulation=0"),
    (8, 4, "a micro-batch of 2 rows .* does not divide over fsdp=4"),
  ],
)
def test_batches_that_cannot_be_cut(batch, accumulation, words):
  mesh = make_mesh(4, 2)
  with pytest.raises(ConfigError, match=words):
    feed.check_batch(batch, accumulation, mesh, "c.train")
  feed.check_batch(16, 4, mesh, "c.train")


def test_the_cost_counts_what_was_seen():
  rows = rows_of()
  m = sized(1, 4, 1, 1, 4, 4, 8, 64)
  batching = feed.Batching(3, 5, context=64)
  kl = feed.make_mismatched(rows, batching, 5)
  seen = collections.Counter(rows_of_steps(range(5), 7, 3, 5).tolist())
  size = [len(p + r) for p, r in EXAMPLE]
  rows = rows._replace(mismatched=feed.MismatchedRows(kl, None))
  total, tokens = training_cost(m, rows, batching, 5)
  other = np.diff(kl.offsets)
  assert tokens == sum(size[i] * k for i, k in seen.items()) + other.sum()
  assert total == (
    sum(3 * k * decoder_flops(m, size[i]) for i, k in seen.items())
    + sum(decoder_flops(m, int(x)) for x in other)
  )
