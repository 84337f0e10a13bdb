"""Crossfit's whole score, on pools made by hand, against its equations in
NumPy float64 and scikit-learn's trees."""

import hashlib
import math

import numpy as np
from numpy.testing import assert_allclose
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
import threadpoolctl

from jaxalign.select import pool as pools
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.samplers.crossfit import margins as margins_lib

N, BUDGET, SEED = 480, 60, 3
RIDGES = (0.001, 0.004, 0.015, 0.06, 0.25, 1.0, 4.0)
SIGNS = (
  "length",
  "tokens",
  "pairs",
  "grams",
  "size",
  "embedding",
  "least",
  "logp",
  "log_likelihood",
)


def made(responses, seed=12, n=N, other=False):
  """Rows of few words, which decide the label, but where length does not let
  them: of long rows labels are random, of the shortest turned.

  Of this seed no two rows are so alike in what the gate reads that float32
  could rank them otherwise.

  Args:
    other: rows of the source "b" are labelled the other way.
  """
  rng = np.random.default_rng(seed)
  shape = (n, responses)
  taste = rng.normal(size=10)
  grams = rng.poisson(1.0, size=(*shape, 20)).astype(np.uint8)
  quality = grams[..., :10] @ taste
  length = rng.integers(3, 30, size=(n, 1)) + rng.integers(0, 3, size=shape)
  prompt = np.arange(n) // 5  # five rows each; two would be as far apart
  prompt[:40] = n + np.arange(40)  # of one row each
  group = np.array([f"prompt {i}" for i in prompt])
  noise = 0.4 * rng.normal(size=n)
  good = (
    quality[:, 0] - np.median(quality) > noise
    if responses == 1
    else quality[:, 0] - quality[:, 1] > noise
  )
  junk = length.mean(axis=1) > 22
  turn = np.where(
    length.mean(axis=1) < 6, rng.random(n) < 0.8, rng.random(n) < 0.1
  )
  good = np.where(junk, rng.random(n) < 0.5, good ^ turn)
  source = rng.random(2 * n)[prompt] < 0.35
  good ^= source & other
  low = rng.normal(size=(9, 300))  # 300 columns, of rank 9
  columns = dict(
    grams=grams,
    length=length.astype(np.int32),
    group=group,
    overlap=rng.integers(0, 6, size=(*shape, 2)).astype(np.float32),
    residual=np.float32(
      (grams[..., 3:12] + rng.normal(size=(*shape, 9))) @ low
    ),
    answer_embedding=np.float32(
      rng.normal(size=(*shape, 6)) + 1 + grams[..., 5:6] * [1, -1, 0, 0, 2, 0]
    ),
    least=-rng.gamma(2.0, 1.0, size=shape),
    logp=-rng.gamma(4.0, 9.0, size=shape),
    logp_count=rng.integers(5, 40, size=shape),
    log_likelihood=-90 - rng.gamma(2.0, 8.0, size=shape),
    source=np.where(source, "b", "a"),
  )
  if responses == 1:
    columns["label"] = good
  else:
    columns |= {
      k: np.where(good.reshape(-1, *[1] * (v.ndim - 1)), v, v[:, ::-1])
      for k, v in columns.items()
      if v.ndim > 1
    }
  return pools.make_pool([f"r{i:04d}" for i in rng.permutation(n)], columns)


# The equations.


def draws(names, purpose, seed=SEED):
  """blake2b of the name with a key of purpose and seed: from 0 to 1."""
  key = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=32).digest()
  bits = np.array(
    [
      int.from_bytes(
        hashlib.blake2b(str(x).encode(), digest_size=8, key=key).digest(), "big"
      )
      >> 11
      for x in names
    ]
  )
  return (bits + 0.5) / 2.0**53


def fold_of(group, count, purpose):
  return np.floor(draws(group, purpose) * count).astype(int)


def unit(x):
  """Each column of root mean square 1."""
  size = np.sqrt((x**2).mean(axis=0))
  return x / np.where(size > 0, size, 1)


def lengths_kept(x):
  """Wide rows of low rank in as few columns; a ridge sees no rotation."""
  if x.shape[1] <= 256:
    return x
  u, s, _ = np.linalg.svd(x, full_matrices=False)
  return (u * s)[:, s > 1e-4 * s[0]]


def differ(value, group):
  value = np.float64(value)
  if value.shape[1] == 2:
    return value[:, 0] - value[:, 1]
  out, alone = np.empty_like(value[:, 0]), []
  for name in dict.fromkeys(group):
    rows = np.flatnonzero(group == name)
    if len(rows) == 1:
      alone.append(rows[0])
    else:
      out[rows] = value[rows, 0] - value[rows, 0].mean(axis=0)
  if alone:
    out[alone] = value[alone, 0] - value[alone, 0].mean(axis=0)
  return out


def newton(x, y, ridge, offset):
  b = np.zeros(x.shape[1])
  for _ in range(60):
    p = 1 / (1 + np.exp(y * (x @ b + offset)))
    curve = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(b))
    step = np.linalg.solve(curve, x.T @ (y * p) - ridge * b)
    b = b + step
    if np.abs(step).max() < 1e-13:
      break
  assert (
    np.abs(x.T @ (y / (1 + np.exp(y * (x @ b + offset)))) - ridge * b).max()
    < 1e-8
  )
  return b


def held_out(x, y, fold, ridge, unread):
  """Margins y x.b and losses, b of the rows of the other folds."""
  margin, loss = np.empty(len(x)), np.empty(len(x))
  for k in range(fold.max() + 1):
    own, others = fold == k, fold != k
    share = (y[others] > 0).mean()
    offset = 0.0 if (y == 1).all() else math.log(share / (1 - share))
    b = newton(x[others], y[others], ridge * others.sum(), offset)
    read = x.shape[1] - unread
    margin[own] = y[own] * (x[own][:, :read] @ b[:read])
    loss[own] = np.log1p(np.exp(-margin[own] - y[own] * offset))
  return margin, loss


def margins(blocks, group, y, habit=None, few=None):
  fold = fold_of(group, 5, "crossfit")
  third = fold_of(group, 3, "crossfit ridge")
  few = np.arange(len(y)) if few is None else few
  share = (y > 0).mean()
  chance = (
    math.log(2)
    if share == 1
    else (-share * math.log(share) - (1 - share) * math.log(1 - share))
  )
  found, gain, losses = [], [], []
  for block in blocks:
    x = np.concatenate(
      [lengths_kept(unit(differ(part, group))) for part in block], axis=1
    )
    length = np.sqrt((x**2).sum(axis=1))
    x = x * np.minimum(1, 1.5 * np.median(length) / length)[:, None]
    unread = 0
    if habit is not None:
      h = unit(differ(habit, group))
      x = x - h @ np.linalg.inv(h.T @ h) @ h.T @ x
      x, unread = np.concatenate([x, 10 * h], axis=1), h.shape[1]
    tried = [
      held_out(x[few], y[few], third[few], r, unread)[1].mean() for r in RIDGES
    ]
    best = int(np.argmin(tried))
    assert np.diff(sorted(tried))[0] > 1e-6  # no tie that rounding decides
    for ridge in RIDGES[best : best + 2]:
      margin, loss = held_out(x, y, fold, ridge, unread)
      found.append(margin / np.median(abs(margin)))
      gain.append(max(0, chance - loss.mean()))
      losses.append(loss)
  weight = np.array(gain) if any(gain) else np.ones(len(gain))
  weight = weight / weight.sum()
  mean = sum(w * m for w, m in zip(weight, found))
  spread = np.sqrt(sum(w * (m - mean) ** 2 for w, m in zip(weight, found)))
  loss = losses[int(np.argmin([x.mean() for x in losses]))]
  return mean, spread / (abs(mean) + 0.3), loss, chance


def surprise(grams):
  out = []
  for part in np.split(np.float64(grams), 2, axis=-1):
    total = part.sum(axis=(0, 1))
    share = np.log((total + 1) / (total.sum() + len(total)))
    out.append((part * share).sum(axis=-1) / np.maximum(part.sum(axis=-1), 1))
  return out


def density(value):
  """A Gaussian of few directions of their own variance and one for the rest."""
  x = np.float64(value).reshape(-1, value.shape[2])
  x = unit(x - x.mean(axis=0))
  keep = max(1, min(64, len(x) // 40))
  variance, direction = np.linalg.eigh(x.T @ x / len(x))
  along = x @ direction[:, ::-1][:, :keep]
  variance = variance[::-1][:keep]
  rest = np.maximum((x**2).sum(axis=1) - (along**2).sum(axis=1), 0)
  floor = max(rest.mean() / max(1, x.shape[1] - keep), 1e-6)
  out = -0.5 * ((along**2 / (variance + floor)).sum(axis=1) + rest / floor)
  return out.reshape(value.shape[:2])


def gate(mean, spread, signs, group):
  z = [abs(mean), spread]
  for value in signs:
    value = np.float64(value)
    z += [value.min(axis=1)] + [value.max(axis=1)] * (value.shape[1] > 1)
  z, agrees = np.stack(z, axis=1), mean > 0
  fold, q = fold_of(group, 5, "crossfit gate"), np.empty(len(z))
  for k in range(5):
    trees = HistGradientBoostingClassifier(
      max_iter=80,
      learning_rate=0.08,
      max_leaf_nodes=8,
      min_samples_leaf=60,
      l2_regularization=5,
      early_stopping=False,
      monotonic_cst=[1] + [0] * (z.shape[1] - 1),
    )
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):  # none spins
      trees.fit(z[fold != k], agrees[fold != k])
      q[fold == k] = trees.predict_proba(z[fold == k])[:, 1]
  return q


def expected(pool, lite, orthogonal=None, sliced=False, few=None):
  """The score of all rows, and what it is made of."""
  said = np.float64(pool.grams[..., :10])
  surprised = surprise(pool.grams)
  small = [pool.overlap, pool.length[..., None]]
  signs = [
    pool.length,
    *surprised,
    density(said),
    np.sqrt((said**2).sum(axis=2)),
  ]
  if lite:
    blocks = [[said, *small]]
  else:
    per_token = pool.logp / pool.logp_count
    small += [v[..., None] for v in (pool.least, pool.logp, per_token)]
    signs += [
      density(pool.answer_embedding),
      pool.least,
      per_token,
      pool.log_likelihood,
    ]
    blocks = [
      [said, *small],
      [pool.residual, *small],
      [said, pool.residual, pool.answer_embedding, *small],
    ]
  y = (
    np.where(pool.label, 1, -1)
    if "label" in pool.columns
    else np.ones(len(said))
  )
  habit = (
    None
    if orthogonal is None
    else np.float64(pool.columns[orthogonal])[..., None]
  )
  mean, spread, loss, chance = margins(blocks, pool.group, y, habit, few)
  own = set()
  if sliced:
    shared = loss.copy()
    for name in "ab":
      rows = np.flatnonzero(pool.source == name)
      m, s, l, _ = margins(
        [[part[rows] for part in block] for block in blocks],
        pool.group[rows],
        y[rows],
      )
      gain = shared[rows] - l
      if gain.mean() > 0.003 + 2 * gain.std() / math.sqrt(len(rows)):
        own.add(name)
        mean[rows], spread[rows], loss[rows] = m, s, l
  assert chance - loss.mean() > 0.003 + 2 * loss.std() / math.sqrt(len(loss))
  q = gate(mean, spread, signs, pool.group)
  return mean * np.maximum(0, 2 * q - 1), mean, q, own


def best(score, pool, budget):
  """Each label's best, as many as it has of the pool; of pairs the best."""
  if "label" not in pool.columns:
    return np.argsort(-score, kind="stable")[:budget]
  liked = math.floor(pool.label.mean() * budget + 0.5)
  rows = [np.flatnonzero(pool.label), np.flatnonzero(~pool.label)]
  return np.concatenate(
    [
      r[np.argsort(-score[r], kind="stable")[:m]]
      for r, m in zip(rows, (liked, budget - liked))
    ]
  )


def check(got, pool, wanted, budget=BUDGET):
  score, mean, q, _ = wanted
  # The case tells apart what it should: the gate stops at a half for some
  # rows, and trusts others, but not wholly.
  assert (q < 0.5).sum() > 10 and ((q > 0.55) & (q < 0.9)).sum() > 50
  assert (score > 0).sum() >= budget and (mean < 0).sum() > 50
  rows = best(score, pool, budget)
  assert set(got.rows) == set(rows)
  kept = np.zeros(len(score), bool)
  kept[rows] = True
  if "label" not in pool.columns:
    kept[:] = True  # no row is passed over: every score is as it was
  assert_allclose(got.score[kept], score[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("name", ["crossfit", "crossfit_lite"])
def test_the_whole_score_is_that_of_its_equations(name, responses):
  pool = made(responses)
  got = SAMPLERS[name](SEED, pool, BUDGET)
  score, mean, q, _ = wanted = expected(pool, name == "crossfit_lite")
  check(got, pool, wanted)
  said = got.notes[1]
  assert f"agree with {100 * (mean > 0).mean():.1f} % of labels" in said
  assert f"trusts them by {q.mean():.2f}; {(score > 0).sum()} of" in said


@pytest.mark.parametrize("responses", [1, 2])
def test_the_score_of_heads_that_may_not_use_length(responses):
  pool = made(responses)
  check(
    SAMPLERS["crossfit_lite"](SEED, pool, BUDGET, orthogonal="length"),
    pool,
    expected(pool, True, orthogonal="length"),
  )


@pytest.mark.parametrize("responses", [1, 2])
def test_the_score_by_heads_of_slices_of_their_own(responses):
  pool = made(responses, seed=8, n=900, other=True)
  score, _, _, own = expected(pool, True, sliced=True)
  assert own
  got = SAMPLERS["crossfit_lite"](SEED, pool, BUDGET, slices="source")
  assert sum("heads of its own" in note for note in got.notes) == len(own)
  assert_allclose(got.score[got.rows], score[got.rows], rtol=1e-4, atol=1e-5)
  for name in "ab":  # the best of each, by its share
    rows = np.flatnonzero(pool.source == name)
    if responses == 2:
      count = round(BUDGET * len(rows) / 900)
      assert set(got.rows) & set(rows) == set(
        rows[np.argsort(-score[rows])[:count]]
      )


def test_the_ridge_is_chosen_on_some_of_many_rows(monkeypatch):
  pool = made(2)
  monkeypatch.setattr(margins_lib, "RIDGE_ROWS", 300)
  few = np.flatnonzero(draws(pool.group, "crossfit rows") < 300 / N)
  assert 200 < len(few) < 400
  check(
    SAMPLERS["crossfit_lite"](SEED, pool, BUDGET),
    pool,
    expected(pool, True, few=few),
  )
