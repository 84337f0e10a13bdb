"""Crossfit equals its equations, reads no label of the row it judges, and
refuses what it cannot learn."""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as tests_pools
from pools import with_columns
import pytest
from sklearn.linear_model import LogisticRegression

from configs import common
from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.embed import passes
from jaxalign.model import decoder
from jaxalign.select import grams
from jaxalign.select import pool as pools
from jaxalign.select.samplers import crossfit, draws, SAMPLERS
from jaxalign.select.samplers.crossfit import (
  features,
  heads,
  margins,
  near_copies,
  notes,
)

N = 1500
lite = functools.partial(SAMPLERS["crossfit_lite"], 0)


@functools.cache
def world(seed=3, n=N, unpaired=False, **knobs):
  """A pool of the built-in world, tokenised by words; reward [n, 2] beside."""
  k = (
    common.base().data.world.to_dict()
    | dict(pool_rows=n, sft_rows=0, held_out_rows=1)
    | knobs
  )
  made = world_lib.build_world(k, seed)
  rows = world_lib.generate_rows(made, seed)["pool"]
  vocab, ids, start, offsets = {}, [], [], [0]
  for row in rows:
    for side in ("chosen", "rejected"):
      parts = [
        [vocab.setdefault(w, len(vocab) + 2) for w in text.split()]
        for text in (row["prompt"], row[side])
      ]
      ids += [0, *parts[0], *parts[1], 1]
      start.append(1 + len(parts[0]))
      offsets.append(len(ids))
  tokens = tokens_lib.TokenRows(
    np.array(ids, np.int32),
    np.array(offsets),
    np.array(start, np.int32),
    np.zeros(len(start), np.int32),
  )
  reward = np.array(
    [
      [
        world_lib.reward(made, r["prompt"], r[s])
        for s in ("chosen", "rejected")
      ]
      for r in rows
    ]
  )
  group = np.array([r["prompt"] for r in rows])
  names = [f"{i * 7919 % n:05d}" for i in range(n)]
  length = (np.diff(tokens.offsets) - tokens.start).astype(np.int32)
  counted = grams.columns(tokens, 1 if unpaired else 2)
  if unpaired:
    names = [f"{name}/{side}" for name in names for side in "cr"]
    columns = dict(
      length=length[:, None],
      group=np.repeat(group, 2),
      label=np.tile([True, False], n),
      **counted,
    )
    reward = reward.reshape(-1, 1)
  else:
    columns = dict(length=length.reshape(n, 2), group=group, **counted)
  # Embeddings of an untrained model are no more than a mix of the tokens.
  mix = np.random.default_rng(0).normal(size=(counted["grams"].shape[2], 32))
  columns["answer_embedding"] = np.float32(counted["grams"] @ mix)
  columns["residual"] = np.float32(counted["grams"] @ mix[:, ::-1])
  columns["least"] = np.float32(-counted["grams"].max(axis=2))
  pool = pools.make_pool(names, columns | dict(reward=reward))
  return pools.Pool(
    pool.ids, {k: v for k, v in pool.columns.items() if k != "reward"}
  ), pool.reward


def turned(pool, which):
  """The pool with the labels of some rows turned around."""
  columns = dict(pool.columns)
  for name, value in columns.items():
    if name == "label":
      columns[name] = value ^ which
    elif value.ndim > 1 and value.shape[1] == 2 and "label" not in columns:
      flip = which.reshape(-1, *[1] * (value.ndim - 1))
      columns[name] = np.where(flip, value[:, ::-1], value)
  return pools.Pool(pool.ids, columns)


def wrong_share(pool, reward, rows):
  good, bad = reward[rows].T
  junk = (good == world_lib.MALFORMED) & (bad == world_lib.MALFORMED)
  return ((good < bad) & ~junk).mean(), junk.mean()


# The heads.


def out_of_fold(x, y, fold, ridge, unread=0):
  """Margins and losses by heads of the other folds, and the last b."""
  found, b = heads.fit_folds(x, y, fold, ridge)
  return *found.judge(x, y, fold, unread), b


def signed_rows(seed=0, n=300, width=6):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, width)) * np.linspace(0.5, 2, width)
  y = np.where(
    rng.random(n) < 1 / (1 + np.exp(-x @ rng.normal(size=width))), 1.0, -1.0
  )
  return x, y


def solve(x, y, ridge, offset=0.0):
  """Gradient descent to the stationary point of the penalised loss."""
  b = np.zeros(x.shape[1])
  rate = 1 / (0.25 * np.linalg.eigvalsh(x.T @ x)[-1] + ridge)
  for _ in range(20_000):
    p = 1 / (1 + np.exp(y * (x @ b + offset)))
    b = b + rate * (x.T @ (y * p) - ridge * b)
  return b


@pytest.mark.parametrize("ridge,offset", [(0.3, 0.0), (20.0, 0.0), (5.0, -0.7)])
def test_fit_is_where_the_slope_is_zero(ridge, offset):
  x, y = signed_rows()
  got = heads.fit(x, y, ridge, offset)
  assert_allclose(got, solve(x, y, ridge, offset), atol=1e-6)
  # From a bad start too, where a whole step of Newton's would run away.
  far = heads.fit(x, y, ridge, offset, np.full(6, 8.0))
  assert_allclose(far, got, atol=1e-6)


def test_fit_equals_scikit_learn_on_differences():
  x, y = signed_rows(1)
  d = x * y[:, None]  # of pairs: chosen minus rejected
  peer = LogisticRegression(
    C=1 / 3.0, fit_intercept=False, tol=1e-10, max_iter=10_000
  )
  peer.fit(
    np.concatenate([d, -d]),
    np.repeat([1, 0], len(d)),
    sample_weight=np.full(2 * len(d), 0.5),
  )
  got = heads.fit(d, np.ones(len(d)), 3.0)
  assert_allclose(got, peer.coef_[0], rtol=1e-4, atol=1e-6)


def test_out_of_fold_margins_are_of_the_other_folds_solution():
  x, y = signed_rows(2)
  fold = np.arange(len(x)) % 4
  margin, loss, _ = out_of_fold(x, y, fold, 0.02)
  for k in range(4):
    others = fold != k
    share = (y[others] > 0).mean()
    offset = math.log(share / (1 - share))
    b = solve(x[others], y[others], 0.02 * others.sum(), offset)
    wanted = y[fold == k] * (x[fold == k] @ b)
    assert_allclose(margin[fold == k], wanted, atol=1e-6)
    assert_allclose(
      loss[fold == k],
      np.log1p(np.exp(-wanted - y[fold == k] * offset)),
      atol=1e-6,
    )


@pytest.mark.parametrize("as_pairs", [True, False])
def test_no_label_of_a_fold_reaches_its_own_margins(as_pairs):
  x, y = signed_rows(3)
  fold = np.arange(len(x)) % 5
  own = fold == 2
  if as_pairs:  # turned around, a pair is its negative
    x, y = x * y[:, None], np.ones(len(x))
    flipped = np.where(own[:, None], -x, x), y
  else:
    flipped = x, np.where(own, -y, y)
  before, _, _ = out_of_fold(x, y, fold, 0.1)
  after, _, _ = out_of_fold(*flipped, fold, 0.1)
  # The label's sign is the row's own; what the head says of it is not moved.
  # (A warm start leaves the last digits.)
  assert_allclose(after[own], -before[own], atol=1e-6)
  assert np.abs(after[~own] - before[~own]).max() > 0.1


def test_what_is_done_to_the_features_cannot_see_a_label():
  pool, _ = world(n=300)
  blocks = [pool.grams, pool.length[..., None]]

  def rows(blocks, group):
    parts = [heads.fit_view(block, group)[1] for block in blocks]
    x = np.concatenate(parts, axis=1)
    return heads.clipped(x, heads.longest(x))

  x = rows(blocks, pool.group)
  which = np.arange(300) % 3 == 0
  other = turned(pool, which)
  z = rows([other.grams, other.length[..., None]], other.group)
  assert_allclose(z, np.where(which[:, None], -x, x), atol=1e-9)


def test_folds_hold_whole_prompts_whatever_rows_come():
  group = np.array([f"p{i % 90}" for i in range(400)])
  fold = heads.folds(5, group, 5, "test")
  for name in set(group):
    assert len(set(fold[group == name])) == 1
  assert_array_equal(heads.folds(5, group[100:], 5, "test"), fold[100:])
  assert np.bincount(fold, minlength=5).min() > 30
  assert (heads.folds(6, group, 5, "test") != fold).mean() > 0.5


def test_the_ridge_with_the_least_loss_is_chosen():
  x, y = signed_rows(4, n=120, width=30)
  fold = np.arange(120) % 3
  i, losses = heads.choose_ridge(x, y, fold, margins.RIDGES)
  each = [out_of_fold(x, y, fold, r)[1].mean() for r in margins.RIDGES]
  assert_allclose(losses, each, atol=1e-6)
  assert i == int(np.argmin(each)) and 0 < i < len(each) - 1


@pytest.mark.parametrize("width", [40, 600])
def test_wide_rows_are_rotated_and_cut_on_any_mesh(width, mesh):
  """600 columns of rank 20 lose nothing; more columns than rows too."""
  rng = np.random.default_rng(0)
  low = rng.normal(size=(150, 20)) @ rng.normal(size=(20, width))
  x = heads.scaled(low)
  assert_allclose((np.float64(x) ** 2).mean(axis=0), 1, rtol=1e-5)
  got, value, _ = heads.principal(x)
  assert got.shape == (150, 20)
  assert_allclose(got @ got.T, np.float64(x) @ x.T, atol=width * 1e-5)
  u, s, _ = np.linalg.svd(np.float64(x), full_matrices=False)
  assert_allclose(value, s[:20] ** 2 / 150, rtol=1e-4)
  assert_allclose(np.abs(got[:, 0]), np.abs(u[:, 0] * s[0]), atol=1e-3 * s[0])
  assert heads.principal(x, 7)[0].shape == (150, 7)


def typical(x):
  return heads.fit_density(x)[1]


def without(x, habit):
  return x - habit @ heads.explained(x, habit)


def test_typical_is_the_density_of_a_gaussian():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(4000, 5))
  x = heads.scaled(x - x.mean(axis=0))
  wanted = -0.5 * (np.float64(x) @ np.linalg.inv(np.cov(x.T)) * x).sum(1)
  assert_allclose(typical(x), wanted, rtol=0.02, atol=0.02)
  far = np.concatenate([x, 6 * np.ones((5, 5), np.float32)])
  assert typical(far)[-5:].max() < typical(far)[:-5].min()


def test_what_few_directions_leave_over_shares_one_variance():
  """100 rows: two directions, and four that share what is left."""
  rng = np.random.default_rng(2)
  x = rng.normal(size=(100, 2)) @ rng.normal(size=(2, 6))
  x += 0.5 * rng.normal(size=(100, 6))
  x = heads.scaled(x - x.mean(axis=0))
  value, vector = np.linalg.eigh(np.float64(x).T @ x / 100)
  along = x @ vector[:, :-3:-1]
  floor = value[:4].sum() / 4
  rest = (np.float64(x) ** 2).sum(axis=1) - (along**2).sum(axis=1)
  wanted = -0.5 * (along**2 / (value[:-3:-1] + floor)).sum(axis=1) - (
    0.5 * rest / floor
  )
  assert_allclose(typical(x), wanted, rtol=1e-5)


def test_long_rows_are_shortened():
  x = np.eye(5) * np.array([1, 1, 1, 1, 10])
  assert_allclose(
    np.diag(heads.clipped(x, heads.longest(x))), [1, 1, 1, 1, 1.5]
  )


# Large pools.


@pytest.mark.parametrize("unpaired", [False, True])
def test_a_large_pool_is_judged_in_chunks_by_heads_of_the_first(
  unpaired, monkeypatch
):
  pool, reward = world(flips=0.2, unpaired=unpaired)
  n, k = len(pool.ids), crossfit.Keywords(None, "random", None, None, None)
  monkeypatch.setattr(heads, "ROWS", n // 3)
  ridges = margins.RIDGES
  monkeypatch.setattr(margins, "RIDGES", (0.06,))
  tokens, few, signs = features.read_features(pool)
  parts, of_heads = dict(tokens=tokens, few=few), (("tokens", "few"),)
  data = crossfit._labelled(pool, parts, of_heads, k)
  chunks = heads.in_chunks(data.group)
  assert len(chunks) > 2
  assert_array_equal(np.sort(np.concatenate(chunks)), np.arange(n))
  prompts = [set(data.group[rows]) for rows in chunks]
  assert sum(map(len, prompts)) == len(set.union(*prompts))
  whole = margins.margins(0, data)
  # Of the first chunk as if there were no other rows, up to one factor.
  first = margins.margins(0, data.take(chunks[0]))
  if unpaired:  # log-odds too
    assert first.chance == pytest.approx(whole.chance, abs=0.01)
  assert_allclose(whole.loss[chunks[0]], first.loss)
  ratio = whole.mean[chunks[0]] / first.mean
  assert np.corrcoef(whole.mean[chunks[0]], first.mean)[0, 1] > 0.9999
  assert np.ptp(ratio[np.abs(first.mean) > 0.5]) < 0.1 * np.median(ratio)
  # Heads cannot have seen a label of another chunk.
  which = np.isin(np.arange(n), chunks[1])
  other = turned(pool, which)
  again = crossfit._labelled(other, *_features(other), k)
  assert_allclose(
    margins.margins(0, again).loss[chunks[0]], whole.loss[chunks[0]]
  )
  monkeypatch.setattr(margins, "RIDGES", ridges)
  got = lite(pool, n // 10)
  if not unpaired:
    wrong = wrong_share(pool, reward, got.rows)[0]
    assert wrong < wrong_share(pool, reward, np.arange(n))[0] / 2
  # How typical a response is: by the first chunk's density.
  density, score = heads.fit_density(
    tokens[chunks[0]].reshape(-1, tokens.shape[2])
  )
  r = tokens.shape[1]
  assert_array_equal(signs["grams"][chunks[0]], score.reshape(-1, r))
  assert_array_equal(
    signs["grams"][chunks[1]],
    density.of(tokens[chunks[1]].reshape(-1, tokens.shape[2])).reshape(-1, r),
  )
  same = density.of(tokens[chunks[0]].reshape(-1, tokens.shape[2]))
  assert_allclose(same, score, rtol=1e-6, atol=1e-6)


def _features(pool):
  tokens, few, _ = features.read_features(pool)
  return dict(tokens=tokens, few=few), (("tokens", "few"),)


def test_near_copies_are_the_same_in_chunks(monkeypatch):
  rng = np.random.default_rng(3)
  grams_ = rng.poisson(0.05, size=(300, 2, 512)).astype(np.uint8)
  grams_[200:250] = grams_[:50]
  wanted = near_copies.copies(grams_)
  monkeypatch.setattr(near_copies, "_ROWS", 64)
  assert_array_equal(near_copies.copies(grams_), wanted)
  assert_array_equal(wanted[200:250], wanted[:50])


# The features.


def test_grams_overlap_and_surprise_by_hand():
  ids = [0, 7, 8, 9, 8, 7, 7, 1, 0, 5, 5, 1]
  rows = tokens_lib.TokenRows(
    np.array(ids, np.int32),
    np.array([0, 8, 12]),
    np.array([4, 2], np.int32),
    np.zeros(2, int),
  )
  got = grams.counts(rows, 64)
  unit = np.zeros((2, 64), int)
  for i, said in enumerate(([8, 7, 7, 1], [5, 1])):
    for t in said:
      unit[i, grams.bucket(np.array([t]), 32)[0]] += 1
    for a, b in zip(said, said[1:]):
      key = np.array([(1 << 62) + a * (1 << 31) + b])
      unit[i, 32 + grams.bucket(key, 32)[0]] += 1
  assert_array_equal(got, unit)
  # 8, 7, 7 of the first are in its prompt, and (8, 7) is, turned around.
  assert_array_equal(grams.overlap(rows), [[3, 1], [1, 0]])
  counts = np.array([[2, 0, 1, 0], [1, 1, 0, 3]], np.uint8)
  a, b = np.log([(3 + 1) / 6, (1 + 1) / 6])
  assert_allclose(grams.surprise(counts)[:, 0], [a, (a + b) / 2])


def test_residual_rows_are_the_tokens_less_the_expected_ones(mesh):
  """Against softmax sums in float64 on the states of the same model."""
  m = decoder.ModelConfig(
    vocab=40,
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_size=8,
    ff=32,
    context=16,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied=True,
  )
  params = decoder.init(jax.random.key(0), m)
  params = {k: 3 * v for k, v in params.items()}
  rng = np.random.default_rng(0)
  sizes = np.array([9, 16, 6])
  rows = tokens_lib.TokenRows(
    rng.integers(0, 40, sizes.sum()).astype(np.int32),
    np.concatenate([[0], np.cumsum(sizes)]),
    np.array([3, 1, 5], np.int32),
    np.zeros(3, np.int32),
  )
  how, outputs = passes.PassOptions(2, 4), ("residual", "least")
  got = passes.pass_rows(mesh, params, m, rows, outputs, how)
  head = np.float64(sharding.fetch(params["embed"]))
  for i, size in enumerate(sizes):
    ids = rows.ids[rows.offsets[i] : rows.offsets[i + 1]]
    short = tokens_lib.TokenRows(  # what comes before each token
      np.concatenate([ids[:t] for t in range(1, size)]),
      np.concatenate([[0], np.cumsum(np.arange(1, size))]),
      np.zeros(size - 1, np.int32),
      np.zeros(size - 1, np.int32),
    )
    how = passes.PassOptions(tile=4, pooling="last")
    x = np.float64(passes.score_rows(mesh, params, m, short, how).embedding)
    wanted, least = np.zeros(16), 0.0
    for t in range(rows.start[i], size):
      scores = x[t - 1] @ head.T
      p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
      wanted += head[ids[t]] - p @ head
      least = min(least, math.log(p[ids[t]]))
    assert_allclose(got["residual"][i], wanted, atol=2e-4)
    assert_allclose(got["least"][i], least, atol=1e-4)


# The sampler.


@pytest.mark.parametrize("name", ["crossfit", "crossfit_lite"])
def test_flipped_labels_and_junk_stay_out(name):
  pool, reward = world(flips=0.2, junk=0.15)
  budget = N // 10
  got = SAMPLERS[name](0, pool, budget)
  wrong, junk = wrong_share(pool, reward, got.rows)
  random_wrong, random_junk = wrong_share(pool, reward, np.arange(N))
  assert random_wrong > 0.2 and random_junk > 0.1
  assert wrong < 0.1 and junk < 0.05
  worst = np.argsort(got.score)[:budget]  # at the other end: wrong labels
  assert wrong_share(pool, reward, worst)[0] > 0.55
  assert any(crossfit.SENTENCE in note for note in got.notes)


@pytest.mark.slow
def test_a_label_turned_around_changes_only_the_sign_of_its_score():
  """But for what one label of 1,500 does to ridge and gate."""
  pool, _ = world()
  before = lite(pool, 150)
  best = before.rows[0]
  which = np.arange(N) == best
  after = lite(turned(pool, which), 150)
  assert before.score[best] > 0
  assert_allclose(after.score[best], -before.score[best], rtol=0.2)
  assert best not in after.rows
  assert np.corrcoef(before.score[~which], after.score[~which])[0, 1] > 0.99


@pytest.mark.parametrize("unpaired", [False, True])
def test_shuffled_labels_are_refused(unpaired):
  pool, _ = world(unpaired=unpaired)
  n = len(pool.ids)
  for seed in range(2):
    which = np.random.default_rng(seed).random(n) < 0.5
    shuffled = turned(pool, which)
    with pytest.raises(NumericError, match="refuses these labels.*shuffled"):
      SAMPLERS["crossfit_lite"](seed, shuffled, 100, unlearnable="error")
    got = SAMPLERS["crossfit_lite"](seed, shuffled, 100)
    assert got.notes[0] == f"crossfit {crossfit.SENTENCE}"
    assert got.notes[1].startswith("warning: crossfit refuses these labels")
    drawn = SAMPLERS["random"](seed, pool, n).rows
    if unpaired:  # as in the pool
      label = shuffled.label[drawn]
      liked = round(100 * label.mean())
      drawn = np.concatenate(
        [drawn[label][:liked], drawn[~label][: 100 - liked]]
      )
      assert set(got.rows) == set(drawn)
    else:
      assert_array_equal(got.rows, drawn[:100])
  learnt = lite(pool, 100, unlearnable="error")
  assert not any("refuses" in note for note in learnt.notes)


def refused(responses=1, **columns):
  """A pool of made-up numbers, 1,000 rows, whose labels say nothing."""
  pool = tests_pools.make(responses, n=1000)
  rng = np.random.default_rng(0)
  return with_columns(
    pool,
    group=pool.ids,
    source=rng.choice(["a", "b", "c"], 1000, p=[0.6, 0.3, 0.1]),
    **columns,
  )


@pytest.mark.parametrize("name", ["crossfit", "crossfit_lite"])
def test_random_rows_of_refused_labels_keep_what_was_asked_for(name):
  pool = refused()
  sampler = functools.partial(SAMPLERS[name], 0, pool)
  got = sampler(100)
  assert "refuses these labels" in got.notes[1]
  assert pool.label[got.rows].sum() == round(100 * pool.label.mean())
  liked = sampler(100, label_quota=0.8)
  assert pool.label[liked.rows].sum() == 80
  even = sampler(100, slices="source")
  for source in "abc":
    for label in (True, False):
      of = (pool.source == source) & (pool.label == label)
      assert abs(of[even.rows].sum() - 100 * of.mean()) < 1
  for found in (got, liked, even):
    assert np.delete(found.score, found.rows).max() <= (
      found.score[found.rows].min()
    )
    assert (np.diff(found.score[found.rows]) <= 0).all()
  copied = np.repeat(pool.grams[:100], 10, axis=0)  # ten of each
  many = refused(grams=copied)
  once = SAMPLERS[name](0, many, 100, copies=1, slices=None)
  assert any("refuses" in note for note in once.notes)
  code = near_copies.copies(copied)
  assert len(set(code[once.rows])) >= min(len(set(code)), 100) - 5
  assert len(set(code[SAMPLERS[name](0, many, 100).rows])) < 75


def test_random_rows_of_refused_labels_are_of_the_likelier_four_fifths():
  for responses in (1, 2):
    pool = refused(responses)
    got = SAMPLERS["crossfit"](0, pool, 300)
    assert "the least likely fifth last" in got.notes[1]
    drawn = SAMPLERS["random"](0, pool, 1000).rows
    worst = pool.log_likelihood.min(axis=1)
    likely = drawn[np.argsort(np.argsort(worst))[drawn] >= 200]
    if responses == 2:
      assert_array_equal(got.rows, likely[:300])
      whole = SAMPLERS["crossfit"](0, pool, 1000)
      assert_array_equal(whole.rows[:800], likely)
      other = SAMPLERS["crossfit"](1, pool, 300)
      assert set(other.rows) != set(got.rows)
    else:
      count = round(300 * pool.label.mean())
      assert set(got.rows) == {
        *likely[pool.label[likely]][:count],
        *likely[~pool.label[likely]][: 300 - count],
      }
    # Without one there is nothing to leave out.
    bare = lite(pool, 1000)
    assert "These rows are random ones" in bare.notes[1]
    assert "fifth" not in bare.notes[1]
    assert_array_equal(bare.rows, drawn)


@pytest.mark.parametrize("liked", [True, False])
def test_labels_of_one_class_are_told_as_such(liked):
  pool = refused(label=np.full(1000, liked))
  name = "desirable" if liked else "undesirable"
  said = (
    f"crossfit refuses these labels: all 1,000 rows are {name}, and "
    "heads learn what tells the two labels apart"
  )
  got = lite(pool, 100)
  assert got.notes[0] == f"crossfit {crossfit.SENTENCE}"
  assert got.notes[1] == f"warning: {said}. These rows are random ones"
  assert_array_equal(got.rows, SAMPLERS["random"](0, pool, 100).rows)
  with pytest.raises(NumericError, match=said):
    lite(pool, 100, unlearnable="error")
  few = pool._replace(columns=pool.columns | dict(label=np.arange(1000) < 20))
  assert "no head predicts them" in lite(few, 100).notes[1]


def test_counts_are_read_without_a_copy_in_float64():
  pool = tests_pools.make(2, 100)
  assert pool.grams.dtype == np.uint8
  assert np.shares_memory(features.read_features(pool)[0], pool.grams)
  as_float = with_columns(pool, grams=np.float64(pool.grams))
  got, wanted = features.read_features(pool), features.read_features(as_float)
  for a, b in zip(got[:2], wanted[:2]):
    assert_array_equal(a, b)
  for key, value in got[2].items():
    assert_allclose(value, wanted[2][key], rtol=1e-9)
  as_float.grams[3, 1, 5] = np.nan
  with pytest.raises(NumericError, match=f"{pool.ids[3]}.*grams"):
    lite(as_float, 10)


def test_too_few_positive_scores_are_said_and_filled():
  pool, reward = world(flips=0.2, junk=0.15)
  small = lite(pool, 300)
  positive = int((small.score > 0).sum())
  assert 300 < positive < 1300
  got = lite(pool, positive + 100)
  assert any(
    n.startswith("warning: the budget of") and "more than the" in n
    for n in got.notes
  )
  assert set(got.rows[:positive]) == set(np.flatnonzero(small.score > 0))
  assert_array_equal(
    got.score[got.rows[:positive]], small.score[got.rows[:positive]]
  )
  score, q = np.array([2, -1, 0, -3, 0.0]), np.array([0.9, 0.8, 0.5, 0.9, 0.2])
  # The least contradicted of what is no junk, then the rest.
  assert list(np.argsort(-crossfit.filled(score, q), kind="stable")) == [
    0,
    1,
    3,
    2,
    4,
  ]


@pytest.mark.slow
def test_unpaired_keep_their_ratio_and_wrong_labels_stay_out():
  pool, reward = world(unpaired=True)
  turn = np.random.default_rng(0).random(2 * N) < 0.2
  noisy = turned(pool, turn)
  got = lite(noisy, 300)
  assert noisy.label[got.rows].sum() == round(300 * noisy.label.mean())
  assert turn[got.rows].mean() < 0.07
  for quota, wanted in ((0.8, 240), (0.0, 0)):
    kept = lite(noisy, 300, label_quota=quota)
    assert noisy.label[kept.rows].sum() == wanted
    assert np.delete(kept.score, kept.rows).max() <= kept.score[kept.rows].min()
  bare = pools.Pool(
    pool.ids, {k: v for k, v in pool.columns.items() if k != "label"}
  )
  with pytest.raises(ConfigError, match="label"):
    lite(bare, 300)


@pytest.mark.slow
@pytest.mark.parametrize("unpaired", [False, True])
def test_the_order_of_the_rows_and_the_devices_change_nothing(unpaired):
  pool, _ = world(n=400, unpaired=unpaired)
  n = len(pool.ids)
  order = np.random.default_rng(1).permutation(n)
  again = pools.make_pool(
    pool.ids[order], {k: v[order] for k, v in pool.columns.items()}
  )
  runs = []
  for fsdp, tensor, which in ((1, 1, pool), (4, 2, again)):
    mesh = sharding.make_mesh(
      dict(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]
    )
    with jax.set_mesh(mesh):
      runs.append(SAMPLERS["crossfit"](2, which, 60))
  for other in runs[1:]:
    assert_array_equal(runs[0].rows, other.rows)
    assert_array_equal(runs[0].score, other.score)
  other = SAMPLERS["crossfit"](3, pool, 60)
  assert set(other.rows) != set(runs[0].rows)


@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("n", [1, 30])
def test_few_rows_and_embeddings_wider_than_their_number(responses, n):
  pool = tests_pools.make(responses, n=60, width=700)
  part = pools.Pool(pool.ids[:n], {k: v[:n] for k, v in pool.columns.items()})
  got = SAMPLERS["crossfit"](0, part, n)
  assert sorted(got.rows) == list(range(n)) and np.isfinite(got.score).all()


def test_knobs_and_a_missing_library_are_told():
  pool, _ = world()
  with pytest.raises(ConfigError, match="unlearnable is 'maybe'"):
    lite(pool, 10, unlearnable="maybe")
  # Nothing but the gate imports scikit-learn.
  code = (
    "import sys; sys.modules['sklearn'] = None; import jaxalign.select.samplers"
  )
  assert not subprocess.run([sys.executable, "-c", code]).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
  "config,name",
  [("dpo_sub.py:tiny", "crossfit"), ("kto_sub.py:tiny", "crossfit_lite")],
)
def test_a_job_says_what_it_read_beside_its_verdicts(tmp_path, config, name):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "jaxalign.main",
      f"--config=configs/{config}",
      f"--workdir={tmp_path}",
      f"--config.select.sampler={name}",
      "--config.select.budget=0.3",
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  summary = json.loads((tmp_path / "summary.json").read_text())
  notes = json.loads(
    next(tmp_path.glob(f"**/{name}-*/selection.json")).read_text()
  )["diagnostics"]["notes"]
  refused = any("refuses these labels" in note for note in notes)
  assert any(crossfit.SENTENCE in line for line in summary["verdicts"])
  assert refused == any(
    "refuses these labels" in line for line in summary["warnings"]
  )
  assert any(
    notes[-1].removeprefix("warning: ") in line
    for line in summary["warnings"] + summary["verdicts"]
  ), done.stdout


# What breaks it, and what is done about that.


def truth_of(pool, reward, rows):
  return wrong_share(pool, reward, rows)[0]


def relabelled(pool, reward, added, seed=0):
  """Labels drawn anew from the reward and what a habit adds [N, 2]; truth."""
  seen = reward + added
  first = np.random.default_rng(seed).random(len(seen)) < 1 / (
    1 + np.exp(-(seen[:, 0] - seen[:, 1]) / 0.5)
  )
  columns = {
    k: np.where((~first).reshape(-1, *[1] * (v.ndim - 1)), v[:, ::-1], v)
    if v.ndim > 1
    else v
    for k, v in pool.columns.items()
  }
  return (
    pools.Pool(pool.ids, columns),
    np.where(first[:, None], reward, reward[:, ::-1]),
  )


def minority(n=N, seed=0):
  """A fifth of rows, of a source of their own, are labelled the other way."""
  pool, reward = world(n=n)
  few = np.random.default_rng(seed).random(n) < 0.25
  turned_pool = turned(pool, few)
  reward = np.where(few[:, None], -reward[:, ::-1], reward)
  return with_columns(turned_pool, source=np.where(few, "few", "many")), reward


def test_without_leaves_nothing_that_follows_a_habit():
  rng = np.random.default_rng(0)
  h, x = rng.normal(size=(200, 2)), rng.normal(size=(200, 5))
  x[:, 0] += 3 * h[:, 1]
  got = without(x, h)
  # By the normal equations: (I - h (h'h)^-1 h') x.
  wanted = x - h @ np.linalg.inv(h.T @ h) @ h.T @ x
  assert_allclose(got, wanted, atol=1e-12)
  assert_allclose(h.T @ got, 0, atol=1e-10)
  turn = np.where(rng.random(200) < 0.5, -1.0, 1.0)[:, None]
  assert_allclose(without(turn * x, turn * h), turn * got, atol=1e-12)


def test_unread_columns_are_fitted_and_do_not_count():
  x, y = signed_rows(5, width=5)
  fold = np.arange(len(x)) % 3
  got, loss, _ = out_of_fold(x, y, fold, 0.02, unread=2)
  for k in range(3):
    others = fold != k
    share = (y[others] > 0).mean()
    offset = math.log(share / (1 - share))
    b = solve(x[others], y[others], 0.02 * others.sum(), offset)
    wanted = y[fold == k] * (x[fold == k, :3] @ b[:3])
    assert_allclose(got[fold == k], wanted, atol=1e-6)
    assert_allclose(
      loss[fold == k],
      np.log1p(np.exp(-wanted - y[fold == k] * offset)),
      atol=1e-6,
    )


def test_heads_orthogonal_to_length_do_not_follow_it():
  pool, reward = world()
  short, truth = relabelled(pool, reward, 0.75 * pool.length)
  plain = lite(short, 150)
  cut = lite(short, 150, orthogonal="length")
  gap = lambda rows: np.subtract(*short.length[rows].T).mean()
  assert gap(plain.rows) > gap(np.arange(N)) + 0.8
  assert gap(cut.rows) < gap(np.arange(N)) + 0.3
  assert truth_of(short, truth, cut.rows) < (
    truth_of(short, truth, plain.rows) / 1.5
  )
  said = next(n for n in plain.notes if "longer than rejected" in n)
  assert f"by {gap(plain.rows):+.2f} tokens among the kept" in said
  assert f"{gap(np.arange(N)):+.2f} in the pool" in said
  warned = lambda got: any(
    n.startswith("warning: length alone predicts") for n in got.notes
  )
  assert warned(plain) and not warned(cut)
  assert not warned(lite(pool, 150))


def test_orthogonal_takes_any_column_of_the_responses():
  pool, reward = world()
  says = pool.grams[..., :512] > 0  # a word that one side of many pairs has
  word = (says[:, 0] != says[:, 1]).mean(axis=0).argmax()
  style = np.float64(says[..., word])
  odd, truth = relabelled(with_columns(pool, style=style), reward, 3 * style)
  plain = lite(odd, 150)
  cut = lite(odd, 150, orthogonal=("style", "length"))
  gap = lambda got: abs(np.subtract(*odd.style[got.rows].T).mean())
  assert gap(plain) > 0.6 and gap(cut) < gap(plain) / 2
  for columns, names, said in (
    (odd, "opener", "names 'opener', wanted a column .*which has"),
    (
      with_columns(odd, topic=np.zeros(N)),
      "topic",
      "names 'topic', wanted a column .'N', 2.",
    ),
  ):
    with pytest.raises(ConfigError, match=said):
      lite(columns, 150, orthogonal=names)


def test_a_minority_is_told_and_keeps_its_share_by_slices():
  pool, reward = minority()
  share = (pool.source == "few").mean()
  plain = lite(pool, 150)
  kept = (pool.source[plain.rows] == "few").mean()
  assert kept < share / 2
  said = next(n for n in plain.notes if "'few'" in n)
  assert said.startswith("warning: source 'few'")
  assert f"it is {100 * kept:.1f} % of what is kept" in said
  assert said.endswith("set config.select.kwargs.slices to 'source'")
  even = lite(pool, 150, slices="source")
  assert (pool.source[even.rows] == "few").sum() == round(150 * share)
  assert truth_of(pool, reward, even.rows) <= truth_of(pool, reward, plain.rows)
  assert any(
    "heads of its own judge it" in n and "'few'" in n for n in even.notes
  )
  assert np.delete(even.score, even.rows).max() <= even.score[even.rows].min()
  whole, _ = world()
  same = with_columns(whole, source=pool.source)  # no taste of its own
  assert not any("'few'" in n for n in lite(same, 150).notes)
  with pytest.raises(ConfigError, match="slices names 'mood'"):
    lite(pool, 150, slices="mood")


@pytest.mark.slow
def test_slices_keep_both_labels_of_unpaired():
  pool, _ = world(unpaired=True)
  few = np.random.default_rng(0).random(2 * N) < 0.3
  pool = with_columns(turned(pool, few), source=np.where(few, "few", "many"))
  got = lite(pool, 300, slices="source")
  for name in ("few", "many"):
    for label in (True, False):
      of = (pool.source == name) & (pool.label == label)
      assert abs(of[got.rows].sum() - 300 * of.mean()) < 1
  with pytest.raises(ConfigError, match="label_quota is 0.5"):
    lite(pool, 300, slices="source", label_quota=0.5)


def sets_of(grams):
  return [
    set(np.flatnonzero(row))
    for row in grams.reshape(len(grams), -1, grams.shape[-1]).any(axis=1)
  ]


def test_copies_are_the_rows_that_share_half_their_words():
  rng = np.random.default_rng(0)
  base = rng.random((40, 2, 256)) < 0.08
  grams = np.concatenate([base, base[:10], base[:10], base[10:15]])
  for i in range(40, 65):  # one word less, or two
    grams[i, 0, rng.choice(np.flatnonzero(grams[i, 0]), 2)] = False
  grams = np.uint8(grams)
  code = near_copies.copies(grams)
  sets = sets_of(grams)
  near = np.array(
    [[len(a & b) >= 0.5 * len(a | b) for b in sets] for a in sets]
  )
  for _ in range(6):
    near = near @ near  # chains
  assert_array_equal(code[:, None] == code[None], near)
  assert_array_equal(  # whichever answer is chosen
    near_copies.copies(grams[:, ::-1]), code
  )
  assert near_copies.in_copies(code) == 40 / 65
  lone = np.eye(7, dtype=np.int32)[:, None]  # none meets another
  assert near_copies.copies(lone).tolist() == list(range(7))
  group = np.array([f"p{i}" for i in range(65)])
  group[20] = group[0]
  both = near_copies.joined(group, code)
  assert both[0] == both[20] == both[40] == both[50]
  assert len(set(both)) == 65 - 25 - 1
  place = draws.place_in_group(
    np.array([0, 1, 0, 0]), np.array([1.0, 5, 3, 1]), np.array([7, 7, 7, 2])
  )
  assert_array_equal(place, [2, 0, 0, 1])


@pytest.mark.slow
def test_one_pattern_labelled_alike_is_told_and_kept_out_by_copies():
  pool, reward = world()
  bad = np.random.default_rng(1).random(N) < 0.15
  columns = {k: pool.columns[k].copy() for k in ("grams", "length", "overlap")}
  pattern = np.zeros((2, 1024), np.uint8)
  pattern[0, 500:506] = pattern[1, 506:512] = 1  # the same words, always
  pattern[0, 900:905] = pattern[1, 905:910] = 1
  columns["grams"][bad] = pattern
  for row in np.flatnonzero(bad):  # but for one
    columns["grams"][row, row % 2, row % 500] += 1
  for name in ("length", "overlap"):
    columns[name][bad] = columns[name][np.flatnonzero(bad)[0]]
  fixed = with_columns(pool, **columns)
  plain = lite(fixed, 150, copies=None)
  assert bad[plain.rows].mean() > 0.5
  share = near_copies.in_copies(
    near_copies.copies(fixed.grams[np.sort(plain.rows)])
  )
  assert any(
    f"warning: {100 * share:.1f} % of the kept rows have a near-copy" in n
    for n in plain.notes
  )
  few = lite(fixed, 150)
  again = lite(fixed, 150, copies=2)
  assert_array_equal(few.score, again.score)
  assert bad[few.rows].sum() <= 2
  assert not any("near-copy" in n for n in few.notes)
  assert any(
    f"{bad.sum() - 2:,} rows have 2 near-copies" in n for n in few.notes
  )
  assert lite(fixed, N, copies=2).rows.size == N
  for wrong in (0, 1.5, True, "many"):
    with pytest.raises(ConfigError, match="copies is"):
      lite(fixed, 150, copies=wrong)


@pytest.mark.parametrize("name", ["crossfit", "crossfit_lite"])
def test_copies_are_counted_by_themselves_but_where_all_rows_are_alike(name):
  pool, _ = world(n=400)
  grams_ = pool.grams.copy()
  sampler = lambda **kwargs: SAMPLERS[name](
    0, with_columns(pool, grams=grams_), 40, **kwargs
  )
  share = lambda: near_copies.in_copies(near_copies.copies(grams_))
  grams_[:120] = np.repeat(grams_[:30], 4, axis=0)
  assert 0.25 < share() <= 0.5
  assert_array_equal(sampler().score, sampler(copies=2).score)
  assert not np.array_equal(sampler().score, sampler(copies=None).score)
  grams_[:240] = np.repeat(grams_[:60], 4, axis=0)
  assert share() > 0.5
  got = sampler()
  assert_array_equal(got.score, sampler(copies=None).score)
  assert (
    f"{100 * share():.0f} % of the rows have near-copies, as texts of a "
    "few words do: copies come as other rows do" in got.notes
  )
  # Of unpaired rows nobody counts by himself.
  liked, _ = world(n=200, unpaired=True)
  grams_ = np.asarray(liked.grams).copy()
  grams_[:100] = np.repeat(grams_[:25], 4, axis=0)
  unpaired = lambda **kwargs: (
    SAMPLERS[name](0, with_columns(liked, grams=grams_), 40, **kwargs).score
  )
  assert_array_equal(unpaired(), unpaired(copies=None))
  assert not np.array_equal(unpaired(), unpaired(copies=2))


def test_a_head_never_saw_a_near_copy():
  """Labels of a set of copies are turned: their margins' size stays."""
  pool, _ = world(n=400)
  grams_ = pool.grams.copy()
  grams_[:40] = grams_[0]
  group = near_copies.joined(pool.group, near_copies.copies(grams_))
  assert len(set(heads.folds(0, group, 5, "crossfit")[:40])) == 1


@pytest.mark.slow
def test_shuffled_labels_are_refused_in_slices_too():
  pool, _ = world()
  rng = np.random.default_rng(0)
  shuffled = with_columns(
    turned(pool, rng.random(N) < 0.5), source=rng.choice(["a", "b", "c"], N)
  )
  for kwargs in (
    dict(slices="source"),
    dict(orthogonal="length"),
    dict(copies=1),
  ):
    with pytest.raises(NumericError, match="refuses these labels.*shuffled"):
      lite(shuffled, 100, unlearnable="error", **kwargs)


def test_fewer_rows_than_columns_lose_nothing(mesh):
  """By way of the products of rows, against a singular value decomposition."""
  rng = np.random.default_rng(0)
  x = heads.scaled(rng.normal(size=(300, 30)) @ rng.normal(size=(30, 700)))
  got, value, _ = heads.principal(x)
  assert got.shape == (300, 30)
  assert_allclose(got @ got.T, np.float64(x) @ x.T, atol=1e-2)
  u, s, _ = np.linalg.svd(np.float64(x), full_matrices=False)
  assert_allclose(value, s[:30] ** 2 / 300, rtol=1e-5)
  assert_allclose(np.abs(got), np.abs(u[:, :30] * s[:30]), atol=1e-3 * s[0])


# What is said of habits, by hand.


def test_a_slice_is_told_at_two_standard_errors_and_at_half_its_share():
  """Of 100 rows of "a" the heads agree with `right`, `got` of 50 are kept."""
  code = np.repeat([0, 1, 2], [100, 260, 40])  # the last has too few for a note

  def told(right, got, **kwargs):
    agrees = np.ones(400, bool)
    agrees[right:100] = False
    kept = np.r_[:got, 100 : 150 - got]
    return notes.slice_notes(
      code,
      ["a", "b", "c"],
      "source",
      agrees,
      kept,
      **dict(own=set(), proportional=False) | kwargs,
    )

  # 0.40 is 2.04 standard errors below a half, 0.41 is 1.83.
  assert told(41, 13) == [] and len(told(40, 13)) == 1
  assert told(39, 13) == [
    "warning: source 'a' (25.0 % of rows): shared heads agree with 39.0 % of "
    "its labels, and it is 26.0 % of what is kept: it may prefer otherwise, "
    "and the majority is followed; set config.select.kwargs.slices to "
    "'source'"
  ]
  assert told(39, 13, proportional=True)[0].endswith("majority is followed")
  # A quarter of the rows: 6 of 50 is less than half of that, 7 is not.
  assert told(90, 7) == [] and len(told(90, 6)) == 1
  assert told(90, 6, proportional=True) == []
  assert told(39, 10, own={0}) == [
    "source 'a' (25.0 % of rows): shared heads agree with 39.0 % of its "
    "labels, heads of its own judge it; 20.0 % of what is kept"
  ]
  assert all("'a'" in note for note in told(39, 13, own={2}))
  many = np.arange(1000) // 50
  assert (
    len(
      notes.slice_notes(
        many,
        list("abcdefghijklmnopqrst"),
        "x",
        np.zeros(1000, bool),
        np.arange(50),
        set(),
        True,
      )
    )
    == 8
  )


def test_length_is_warned_of_from_a_fifth_of_the_gain():
  warned = lambda alone, loss: notes.length_warning(
    (alone, 0.6), loss, 0.7, 0.69
  )
  assert warned(0.651, 0.49) == []  # 0.039 of 0.2
  assert warned(0.649, 0.49)[0].startswith(
    "warning: length alone predicts 60.0 % of labels, the heads 70.0 % "
    "(0.041 of 0.200 nats below chance)"
  )
  # Of heads that gain little too, but not of a chance finding.
  assert warned(0.688, 0.685) == [] and warned(0.686, 0.685)


def test_gaps_in_length_and_equal_lengths():
  value = np.array([[5.0, 2], [1, 4], [9, 1]])
  assert notes.length_gap(value, None, np.array([0, 1])) == 0.0
  assert notes.length_gap(value, None, np.array([0, 2])) == 5.5
  label, one = np.array([True, False, True]), value[:, :1]
  assert notes.length_gap(one, label, np.arange(3)) == 7 - 1
  assert notes.length_gap(one, label, np.array([1, 2])) == 8
  for rows in ([0, 2], [1]):
    assert math.isnan(notes.length_gap(one, label, np.array(rows)))
  # Half of the pairs are as long; of the others longer ones are chosen.
  x = np.repeat([0.0, 1.0], 50)[:, None]
  loss, right = notes.predicts_alone(x, np.ones(100), np.arange(100) % 5)
  assert right == 0.75 and loss < 0.5


def test_single_responses_differ_from_their_prompt_or_from_the_lone():
  value = np.array([[[1.0]], [[3.0]], [[5.0]], [[7.0]], [[10.0]], [[4.0]]])
  group = np.array(["p", "lone", "p", "alone", "q", "q"])
  got = heads.differences(value, group)
  assert_array_equal(got[:, 0], [-2, -2, 2, 2, 3, -3])
  assert got.dtype == np.float32
  pairs = heads.differences(
    np.array([[[3.0], [1.0]], [[2.0], [9.0]]]), np.array(["p", "p"])
  )
  assert_array_equal(pairs, [[2], [-7]])


def test_rows_that_a_quota_passes_over_come_down_to_the_lowest_kept():
  score = np.array([5.0, 1.0, 4.0, 0.5, 3.0])
  got = crossfit._lowered(score, np.array([1, 3, 4]))
  # 5 comes down to 0.5, and the rest of what is left out with it.
  assert_array_equal(got, [0.5, 1, -0.5, 0.5, 3])
  high = crossfit._lowered(score, np.array([0, 2, 4]))  # nothing to lower
  assert_array_equal(high, score)
  assert_array_equal(crossfit._lowered(score, np.arange(5)), score)


def test_unpaired_and_a_lone_source_are_spoken_of_as_such():
  pool, _ = world(unpaired=True)
  one = with_columns(pool, source=np.full(len(pool.ids), "web"))
  got = lite(one, 300)
  liked = pool.label[got.rows]
  length = pool.length[got.rows, 0]
  by = length[liked].mean() - length[~liked].mean()
  assert any(
    n.startswith(
      "liked answers are longer than disliked ones by "
      f"{by:+.2f} tokens among the kept, "
    )
    for n in got.notes
  )
  assert not any("source" in note for note in got.notes)


def test_more_copies_than_are_wanted_come_after_all_others():
  pool, _ = world(n=400)
  grams_ = pool.grams.copy()
  grams_[:200] = np.repeat(grams_[:200:4], 4, axis=0)
  copied = with_columns(pool, grams=grams_)
  plain = lite(copied, 400)
  got = lite(copied, 400, copies=2)
  code = near_copies.copies(grams_)
  place = np.zeros(400, int)  # among the copies of a row, in order of choice
  seen = {}
  for row in got.rows:
    place[row] = seen[code[row]] = seen.get(code[row], -1) + 1
  later = place[got.rows] >= 2
  assert later.sum() >= 100 and not later[: 400 - later.sum()].any()
  assert got.score[place >= 2].max() < got.score[place < 2].min()
  assert plain.rows.size == got.rows.size
  assert any(
    f"{later.sum()} rows have 2 near-copies or more" in n for n in got.notes
  )


# What has nothing in it.


def test_heads_of_no_columns_rows_or_folds():
  for width in (0, 3):
    got, value, _ = heads.principal(np.zeros((4, width), np.float32))
    assert got.shape == (4, 0) and value.shape == (0,)
  one = heads.scaled(np.array([[1.0], [-2.0], [3.0]]))
  got, value, _ = heads.principal(one)
  assert_allclose(np.abs(got), np.abs(one), rtol=1e-6)
  assert_allclose(value, [1], rtol=1e-6)
  # Rows whose fold has no others: no margin, and the loss of knowing nothing.
  x, y = signed_rows(6, n=20)
  margin, loss, b = out_of_fold(x, y, np.zeros(20, int), 0.1)
  assert not margin.any() and b is None
  assert_allclose(loss, math.log(2))
  # A single class in the other folds: log-odds of 999 to one.
  y = np.where(np.arange(20) < 10, 1.0, -1.0)
  _, loss, _ = out_of_fold(np.zeros((20, 2)), y, np.arange(20) // 10, 1.0)
  assert_allclose(loss, math.log(1000), rtol=1e-6)
  # Columns of zeros stay that; the others have root mean square 1.
  assert_array_equal(heads.scaled(np.array([[0.0, 3], [0, 4]]))[:, 0], [0, 0])


def test_rows_without_words_are_copies_and_links_are_named_by_the_first():
  grams_ = np.zeros((5, 1, 64), np.uint8)
  grams_[1, 0, :6] = grams_[3, 0, 2:10] = 1  # 4 of 10 shared
  grams_[4, 0, :9] = 1  # 6 of 9 with the one, 7 of 10 with the other
  code = near_copies.copies(grams_[[0, 1, 2, 3]])
  assert code[0] == code[2] and len(set(code)) == 3
  assert near_copies.copies(grams_[:0]).shape == (0,)
  assert near_copies.in_copies(np.zeros(0, np.int64)) == 0.0
  # Two of four words shared is just alike enough, where two rows meet.
  half = np.zeros((60, 1, 120), np.uint8)
  for i in range(30):
    half[2 * i, 0, 4 * i : 4 * i + 3] = 1
    half[2 * i + 1, 0, 4 * i + 1 : 4 * i + 4] = 1
  assert 30 <= len(set(near_copies.copies(half))) < 50
  assert len(set(near_copies.copies(half, alike=0.51))) == 60
  name = np.array(["d", "b", "c", "a", "e"])
  assert_array_equal(
    near_copies.joined(name, np.array([0, 0, 1, 2, 2])),
    ["b", "b", "c", "a", "a"],
  )


def test_copies_among_many_rows_are_found():
  rng = np.random.default_rng(0)
  base = rng.random((3000, 1, 256)) < 0.05
  code = near_copies.copies(np.uint8(np.concatenate([base, base[::10]])))
  assert_array_equal(code[3000:], code[:3000:10])
  assert len(set(code)) > 2990
  same = np.zeros((20_000, 1, 8), np.uint8)  # more than are compared at once
  same[:, 0, 3] = 1
  assert len(set(near_copies.copies(same))) == 1


def test_copies_among_the_kept_are_told_above_a_fifth_and_twice_the_usual():
  grams_ = np.eye(40, 64, dtype=np.uint8)[:, None].repeat(1, axis=1)
  grams_[1:9] = grams_[0]  # rows 0 to 8 are copies
  kept = lambda k: np.r_[:k, 20 : 40 - k]  # of 20 rows
  alone = np.arange(20, 40)
  assert near_copies.copies_kept(grams_, kept(4), alone) == []  # a fifth
  assert near_copies.copies_kept(grams_, kept(5), alone)[0].startswith(
    "warning: 25.0 % of the kept rows have a near-copy among them, of random "
    "rows 0.0 %"
  )
  assert near_copies.copies_kept(grams_, kept(8)[::-1], kept(4)) == []  # twice
  assert near_copies.copies_kept(grams_, kept(9)[::-1], kept(4))
