"""Crossfit equals its equations, reads no label of the row it judges, and
refuses what it cannot learn."""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from configs import common
from jaxalign import sharding
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.errors import ConfigError, NumericError
from jaxalign.model import decoder
from jaxalign.select import embed
from jaxalign.select import grams
from jaxalign.select import pool as pools
from jaxalign.select.samplers import SAMPLERS, crossfit, heads
import pools as tests_pools

N = 1500


@functools.lru_cache(maxsize=None)
def world(seed=3, n=N, thumbs=False, **knobs):
  """A pool of the built-in world, tokenised by words; reward [n, 2] beside."""
  k = common.base().data.world.to_dict() | dict(
      pool_rows=n, sft_rows=0, held_out_rows=1) | knobs
  made = world_lib.build(k, seed)
  rows = world_lib.generate(made, seed)["pool"]
  vocab, ids, start, offsets = {}, [], [], [0]
  for row in rows:
    for side in ("chosen", "rejected"):
      parts = [[vocab.setdefault(w, len(vocab) + 2) for w in text.split()]
               for text in (row["prompt"], row[side])]
      ids += [0, *parts[0], *parts[1], 1]
      start.append(1 + len(parts[0]))
      offsets.append(len(ids))
  tokens = tokens_lib.TokenRows(
      np.array(ids, np.int32), np.array(offsets), np.array(start, np.int32),
      np.zeros(len(start), np.int32))
  reward = np.array([[world_lib.reward(made, r["prompt"], r[s])
                      for s in ("chosen", "rejected")] for r in rows])
  group = np.array([r["prompt"] for r in rows])
  names = [f"{i * 7919 % n:05d}" for i in range(n)]
  length = (np.diff(tokens.offsets) - tokens.start).astype(np.int32)
  features = grams.columns(tokens, 1 if thumbs else 2)
  if thumbs:
    names = [f"{name}/{side}" for name in names for side in "cr"]
    columns = dict(length=length[:, None], group=np.repeat(group, 2),
                   label=np.tile([True, False], n), **features)
    reward = reward.reshape(-1, 1)
  else:
    columns = dict(length=length.reshape(n, 2), group=group, **features)
  # Embeddings of an untrained model are no more than a mix of the tokens.
  mix = np.random.default_rng(0).normal(size=(features["grams"].shape[2], 32))
  columns["embedding"] = np.float32(features["grams"] @ mix)
  columns["residual"] = np.float32(features["grams"] @ mix[:, ::-1])
  columns["least"] = np.float32(-features["grams"].max(axis=2))
  pool = pools.make_pool(names, columns | dict(reward=reward))
  return pools.Pool(pool.ids, {k: v for k, v in pool.columns.items()
                               if k != "reward"}), pool.reward


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


def signed_rows(seed=0, n=300, width=6):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, width)) * np.linspace(0.5, 2, width)
  y = np.where(rng.random(n) < 1 / (1 + np.exp(-x @ rng.normal(size=width))),
               1.0, -1.0)
  return x, y


def solve(x, y, ridge, offset=0.0):
  """Gradient descent to the stationary point of the penalised loss."""
  b = np.zeros(x.shape[1])
  rate = 1 / (0.25 * np.linalg.eigvalsh(x.T @ x)[-1] + ridge)
  for _ in range(20_000):
    p = 1 / (1 + np.exp(y * (x @ b + offset)))
    b = b + rate * (x.T @ (y * p) - ridge * b)
  return b


@pytest.mark.parametrize("ridge,offset", [(0.3, 0.0), (20.0, 0.0),
                                          (5.0, -0.7)])
def test_fit_is_where_the_slope_is_zero(ridge, offset):
  x, y = signed_rows()
  got = heads.fit(x, y, ridge, offset)
  np.testing.assert_allclose(got, solve(x, y, ridge, offset), atol=1e-6)
  # From a bad start too, where a whole step of Newton's would run away.
  far = heads.fit(x, y, ridge, offset, np.full(6, 8.0))
  np.testing.assert_allclose(far, got, atol=1e-6)


def test_fit_equals_scikit_learn_on_differences():
  x, y = signed_rows(1)
  d = x * y[:, None]  # of pairs: chosen minus rejected
  peer = LogisticRegression(C=1 / 3.0, fit_intercept=False, tol=1e-10,
                            max_iter=10_000)
  peer.fit(np.concatenate([d, -d]), np.repeat([1, 0], len(d)),
           sample_weight=np.full(2 * len(d), 0.5))
  got = heads.fit(d, np.ones(len(d)), 3.0)
  np.testing.assert_allclose(got, peer.coef_[0], rtol=1e-4, atol=1e-6)


def test_out_of_fold_margins_are_of_the_other_folds_solution():
  x, y = signed_rows(2)
  fold = np.arange(len(x)) % 4
  margin, loss, _ = heads.out_of_fold(x, y, fold, 0.02)
  for k in range(4):
    others = fold != k
    share = (y[others] > 0).mean()
    offset = math.log(share / (1 - share))
    b = solve(x[others], y[others], 0.02 * others.sum(), offset)
    wanted = y[fold == k] * (x[fold == k] @ b)
    np.testing.assert_allclose(margin[fold == k], wanted, atol=1e-6)
    np.testing.assert_allclose(
        loss[fold == k], np.log1p(np.exp(-wanted - y[fold == k] * offset)),
        atol=1e-6)


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
  before, _, _ = heads.out_of_fold(x, y, fold, 0.1)
  after, _, _ = heads.out_of_fold(*flipped, fold, 0.1)
  # The label's sign is the row's own; what the head says of it is not moved.
  # (A warm start leaves the last digits.)
  np.testing.assert_allclose(after[own], -before[own], atol=1e-6)
  assert np.abs(after[~own] - before[~own]).max() > 0.1


def test_what_is_done_to_the_features_cannot_see_a_label():
  pool, _ = world(n=300)
  blocks = [pool.grams, pool.length[..., None]]
  x, _ = crossfit.lessons(blocks, pool.group, None)
  which = np.arange(300) % 3 == 0
  other = turned(pool, which)
  z, _ = crossfit.lessons([other.grams, other.length[..., None]], other.group,
                          None)
  np.testing.assert_allclose(z, np.where(which[:, None], -x, x), atol=1e-9)


def test_folds_hold_whole_prompts_whatever_rows_come():
  group = np.array([f"p{i % 90}" for i in range(400)])
  fold = heads.folds(5, group, 5, "test")
  for name in set(group):
    assert len(set(fold[group == name])) == 1
  np.testing.assert_array_equal(heads.folds(5, group[100:], 5, "test"),
                                fold[100:])
  assert np.bincount(fold, minlength=5).min() > 30
  assert (heads.folds(6, group, 5, "test") != fold).mean() > 0.5


def test_the_ridge_with_the_least_loss_is_chosen():
  x, y = signed_rows(4, n=120, width=30)
  fold = np.arange(120) % 3
  i, losses = heads.choose_ridge(x, y, fold, crossfit.RIDGES)
  each = [heads.out_of_fold(x, y, fold, r)[1].mean() for r in crossfit.RIDGES]
  np.testing.assert_allclose(losses, each, atol=1e-6)
  assert i == int(np.argmin(each)) and 0 < i < len(each) - 1


@pytest.mark.parametrize("width", [40, 600])
def test_wide_rows_are_rotated_and_cut_on_any_mesh(width, mesh):
  """600 columns of rank 20 lose nothing; more columns than rows too."""
  rng = np.random.default_rng(0)
  low = rng.normal(size=(150, 20)) @ rng.normal(size=(20, width))
  x = heads.scaled(low)
  np.testing.assert_allclose((np.float64(x)**2).mean(axis=0), 1, rtol=1e-5)
  got, value = heads.principal(x)
  assert got.shape == (150, 20)
  np.testing.assert_allclose(got @ got.T, np.float64(x) @ x.T,
                             atol=width * 1e-5)
  u, s, _ = np.linalg.svd(np.float64(x), full_matrices=False)
  np.testing.assert_allclose(value, s[:20]**2 / 150, rtol=1e-4)
  np.testing.assert_allclose(np.abs(got[:, 0]), np.abs(u[:, 0] * s[0]),
                             atol=1e-3 * s[0])
  assert heads.principal(x, 7)[0].shape == (150, 7)


def test_typical_is_the_density_of_a_gaussian():
  rng = np.random.default_rng(1)
  x = heads.scaled(rng.normal(size=(4000, 5)))
  wanted = -0.5 * (np.float64(x) @ np.linalg.inv(np.cov(x.T)) * x).sum(1)
  np.testing.assert_allclose(heads.typical(x), wanted, rtol=0.02, atol=0.02)
  far = np.concatenate([x, 6 * np.ones((5, 5), np.float32)])
  assert heads.typical(far)[-5:].max() < heads.typical(far)[:-5].min()


def test_long_rows_are_shortened():
  x = np.eye(5) * np.array([1, 1, 1, 1, 10])
  np.testing.assert_allclose(np.diag(heads.shortened(x)), [1, 1, 1, 1, 1.5])


# The features.


def test_grams_overlap_and_surprise_by_hand():
  ids = [0, 7, 8, 9, 8, 7, 7, 1,   0, 5, 5, 1]
  rows = tokens_lib.TokenRows(np.array(ids, np.int32), np.array([0, 8, 12]),
                              np.array([4, 2], np.int32), np.zeros(2, int))
  got = grams.counts(rows, 64)
  unit = np.zeros((2, 64), int)
  for i, said in enumerate(([8, 7, 7, 1], [5, 1])):
    for t in said:
      unit[i, grams.bucket(np.array([t]), 32)[0]] += 1
    for a, b in zip(said, said[1:]):
      key = np.array([(1 << 62) + a * (1 << 31) + b])
      unit[i, 32 + grams.bucket(key, 32)[0]] += 1
  np.testing.assert_array_equal(got, unit)
  # 8, 7, 7 of the first are in its prompt, and (8, 7) is, turned around.
  np.testing.assert_array_equal(grams.overlap(rows), [[3, 1], [1, 0]])
  counts = np.array([[2, 0, 1, 0], [1, 1, 0, 3]], np.uint8)
  a, b = np.log([(3 + 1) / 6, (1 + 1) / 6])
  np.testing.assert_allclose(grams.surprise(counts)[:, 0], [a, (a + b) / 2])


def test_residual_rows_are_the_tokens_less_the_expected_ones(mesh):
  """Against softmax sums in float64 on the states of the same model."""
  m = decoder.ModelConfig(vocab=40, width=16, layers=1, heads=2, kv_heads=2,
                          head_size=8, ff=32, context=16, rope_theta=1e4,
                          norm_eps=1e-5, tied=True)
  params = decoder.init(jax.random.key(0), m, mesh)
  params = {k: 3 * v for k, v in params.items()}
  rng = np.random.default_rng(0)
  sizes = np.array([9, 16, 6])
  rows = tokens_lib.TokenRows(
      rng.integers(0, 40, sizes.sum()).astype(np.int32),
      np.concatenate([[0], np.cumsum(sizes)]),
      np.array([3, 1, 5], np.int32), np.zeros(3, np.int32))
  got = embed.residual_rows(mesh, params, m, rows, tile=2, chunk=4)
  head = np.float64(sharding.fetch(params["embed"]))
  for i, size in enumerate(sizes):
    ids = rows.ids[rows.offsets[i]:rows.offsets[i + 1]]
    short = tokens_lib.TokenRows(  # what comes before each token
        np.concatenate([ids[:t] for t in range(1, size)]),
        np.concatenate([[0], np.cumsum(np.arange(1, size))]),
        np.zeros(size - 1, np.int32), np.zeros(size - 1, np.int32))
    x = np.float64(embed.pool_rows(mesh, params, m, short, pooling="last",
                                   tile=4))
    wanted, least = np.zeros(16), 0.0
    for t in range(rows.start[i], size):
      scores = x[t - 1] @ head.T
      p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
      wanted += head[ids[t]] - p @ head
      least = min(least, math.log(p[ids[t]]))
    np.testing.assert_allclose(got["residual"][i], wanted, atol=2e-4)
    np.testing.assert_allclose(got["least"][i], least, atol=1e-4)


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
  before = SAMPLERS["crossfit_lite"](0, pool, 150)
  best = before.rows[0]
  which = np.arange(N) == best
  after = SAMPLERS["crossfit_lite"](0, turned(pool, which), 150)
  assert before.score[best] > 0
  np.testing.assert_allclose(after.score[best], -before.score[best], rtol=0.2)
  assert best not in after.rows
  assert np.corrcoef(before.score[~which], after.score[~which])[0, 1] > 0.99


@pytest.mark.parametrize("thumbs", [False, True])
def test_shuffled_labels_are_refused(thumbs):
  pool, _ = world(thumbs=thumbs)
  n = len(pool.ids)
  for seed in range(2):
    which = np.random.default_rng(seed).random(n) < 0.5
    shuffled = turned(pool, which)
    with pytest.raises(NumericError, match="refuses these labels.*shuffled"):
      SAMPLERS["crossfit_lite"](seed, shuffled, 100, unlearnable="error")
    got = SAMPLERS["crossfit_lite"](seed, shuffled, 100)
    assert "refuses these labels" in got.notes[0]
    np.testing.assert_array_equal(
        got.rows, SAMPLERS["random"](seed, pool, 100).rows)
  learnt = SAMPLERS["crossfit_lite"](0, pool, 100, unlearnable="error")
  assert not any("refuses" in note for note in learnt.notes)


def test_too_few_positive_scores_are_said_and_filled():
  pool, reward = world(flips=0.2, junk=0.15)
  small = SAMPLERS["crossfit_lite"](0, pool, 300)
  positive = int((small.score > 0).sum())
  assert 300 < positive < 1300
  got = SAMPLERS["crossfit_lite"](0, pool, positive + 100)
  assert "more than the" in got.notes[-1] and "warning" in got.notes[-1]
  assert set(got.rows[:positive]) == set(np.flatnonzero(small.score > 0))
  np.testing.assert_array_equal(got.score[got.rows[:positive]],
                                small.score[got.rows[:positive]])
  score, q = np.array([2, -1, 0, -3, 0.]), np.array([.9, .8, .5, .9, .2])
  # The least contradicted of what is no junk, then the rest.
  assert list(np.argsort(-crossfit.filled(score, q), kind="stable")) == [
      0, 1, 3, 2, 4]


@pytest.mark.slow
def test_thumbs_keep_their_ratio_and_wrong_labels_stay_out():
  pool, reward = world(thumbs=True)
  turn = np.random.default_rng(0).random(2 * N) < 0.2
  noisy = turned(pool, turn)
  got = SAMPLERS["crossfit_lite"](0, noisy, 300)
  assert noisy.label[got.rows].sum() == round(300 * noisy.label.mean())
  assert turn[got.rows].mean() < 0.07
  for quota, wanted in ((0.8, 240), (0.0, 0)):
    kept = SAMPLERS["crossfit_lite"](0, noisy, 300, label_quota=quota)
    assert noisy.label[kept.rows].sum() == wanted
    assert np.delete(kept.score, kept.rows).max() <= kept.score[kept.rows].min()
  bare = pools.Pool(pool.ids, {k: v for k, v in pool.columns.items()
                               if k != "label"})
  with pytest.raises(ConfigError, match="label"):
    SAMPLERS["crossfit_lite"](0, bare, 300)


@pytest.mark.slow
@pytest.mark.parametrize("thumbs", [False, True])
def test_the_order_of_the_rows_and_the_devices_change_nothing(thumbs):
  pool, _ = world(n=400, thumbs=thumbs)
  n = len(pool.ids)
  order = np.random.default_rng(1).permutation(n)
  again = pools.make_pool(pool.ids[order],
                          {k: v[order] for k, v in pool.columns.items()})
  runs = []
  for fsdp, tensor, which in ((1, 1, pool), (4, 2, again)):
    mesh = sharding.make_mesh(dict(fsdp=fsdp, tensor=tensor),
                              jax.devices()[:fsdp * tensor])
    with jax.set_mesh(mesh):
      runs.append(SAMPLERS["crossfit"](2, which, 60))
  for other in runs[1:]:
    np.testing.assert_array_equal(runs[0].rows, other.rows)
    np.testing.assert_array_equal(runs[0].score, other.score)
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
    SAMPLERS["crossfit_lite"](0, pool, 10, unlearnable="maybe")
  # Nothing but the gate imports scikit-learn.
  code = ("import sys; sys.modules['sklearn'] = None; "
          "import jaxalign.select.samplers")
  assert not subprocess.run([sys.executable, "-c", code]).returncode


@pytest.mark.slow
@pytest.mark.parametrize("config,name", [("dpo_sub.py:tiny", "crossfit"),
                                         ("kto_sub.py:tiny", "crossfit_lite")])
def test_a_job_says_what_it_read_beside_its_verdicts(tmp_path, config, name):
  done = subprocess.run(
      [sys.executable, "-m", "jaxalign.main", f"--config=configs/{config}",
       f"--workdir={tmp_path}", f"--config.select.sampler={name}",
       "--config.select.budget=0.3"],
      capture_output=True, text=True, check=True)
  summary = json.loads((tmp_path / "summary.json").read_text())
  notes = json.loads(next(tmp_path.glob(f"**/{name}-*/selection.json"))
                     .read_text())["diagnostics"]["notes"]
  refused = any("refuses these labels" in note for note in notes)
  told = summary["warnings"] if refused else summary["verdicts"]
  assert refused or any(crossfit.SENTENCE in line for line in told)
  assert any(notes[-1].removeprefix("warning: ") in line for line in
             summary["warnings"] + summary["verdicts"]), done.stdout
