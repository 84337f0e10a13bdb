"""Density, k-center, herding and REAL equal their equations in float64."""

import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as make_pools
from pools import clusters, copied, vectors_of, with_columns
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select import topk
from jaxalign.select.samplers import density, geometric, SAMPLERS, vectors

N, W = 300, 12
GEOMETRIC = [
  n
  for n in SAMPLERS
  if {"embedding", "answer_embedding"} & {*SAMPLERS[n].needs}
]


@pytest.mark.parametrize("pair", vectors.PAIRS)
@pytest.mark.parametrize("metric", vectors.METRICS)
def test_vectors(pair, metric):
  pool = clusters()
  got = vectors.vectors(pool, pair, metric)
  assert got.dtype == np.float32
  assert_allclose(got, vectors_of(pool, pair, metric), rtol=1e-4, atol=1e-6)


def test_vectors_refused():
  pool = clusters()
  for knob in ("pair", "metric"):
    with pytest.raises(ConfigError, match=f"kwargs.{knob}"):
      SAMPLERS["k_center"](0, pool, 5, **{knob: "nonsense"})
  with pytest.raises(ConfigError, match="'difference' reads pairs"):
    SAMPLERS["k_center"](0, clusters(responses=1), 5, pair="difference")
  zero, broken = pool.embedding.copy(), pool.embedding.copy()
  zero[3] = 0
  bad = np.arange(7) * 5
  broken[bad, bad % 2, 3] = np.nan  # of one side
  few = ", ".join(pool.ids[bad[:5]])
  for x, match in (
    (zero, f"length 0.*{pool.ids[3]}"),
    (
      broken,
      f"7 of {N} rows have an embedding that is not finite .ids {few}, ...",
    ),
  ):
    with pytest.raises(NumericError, match=match):
      SAMPLERS["k_center"](0, with_columns(pool, embedding=x), 5)


def naive_density(x, h):
  square = ((x[:, None] - x[None]) ** 2).sum(2)
  return np.exp(-square / (2 * h * h)).mean(1)


def test_density_equals_the_double_sum_and_keeps_thin_rows():
  pool = clusters(n=150)
  f = naive_density(vectors_of(pool), 0.5)
  gumbel = -np.log(-np.log(topk.uniform(4, pool.ids, "density")))
  wanted = np.log(1 / f) + gumbel
  run = lambda s: SAMPLERS["density"](s, pool, 30, bandwidth=0.5, features=0)
  got = run(4)
  assert_allclose(got.score, wanted, rtol=1e-4, atol=1e-5)
  assert list(got.rows) == list(np.argsort(-wanted)[:30])
  # The published pseudo-code, S in place of 1 / S, would keep others.
  wrong = np.argsort(-(np.log(f) + gumbel))[:30]
  assert len(set(got.rows) & set(wrong)) < 25
  rank = f.argsort().argsort() / 150
  mean = np.mean([rank[run(s).rows].mean() for s in range(10)])
  assert mean < 0.45  # below the half that a fair draw has


def test_random_features_approach_the_exact_density():
  x = np.float32(vectors_of(clusters()))
  exact = density.kernel_density(x, 0.5, 0, 0)
  for features in (256, 4096):
    error = [
      density.kernel_density(x, 0.5, features, s) - exact for s in range(4)
    ]
    worst = np.sqrt(np.mean(np.square(error)))
    assert worst < 1 / np.sqrt(2 * features)  # the standard error's bound
  assert np.corrcoef(np.mean(error, 0) + exact, exact)[0, 1] > 0.999


def test_density_draws_by_one_over_the_density():
  """Over many seeds, a row comes first as often as its weight."""
  x = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [-1, 0]], np.float32)
  pool = with_columns(make_pools.make(1, 5), embedding=x[:, None])
  weight = 1 / naive_density(vectors_of(pool), 0.7)
  run = lambda s: SAMPLERS["density"](s, pool, 1, bandwidth=0.7, features=0)
  first = [run(s).rows[0] for s in range(400)]
  fraction = np.bincount(first, minlength=5) / 400
  assert abs(fraction - weight / weight.sum()).max() < 0.08


def test_bandwidth():
  pool = clusters()
  x = vectors_of(pool)
  distance = np.linalg.norm(x[:, None] - x[None], axis=2)
  median = np.median(distance[np.triu_indices(N, 1)])
  got = density.median_distance(np.float32(x), pool.ids)
  assert got == pytest.approx(median)
  for knob, bad in (
    *(("bandwidth", bad) for bad in (0.0, -1.0, "wide", float("nan"))),
    *(("features", bad) for bad in (-1, 0.5, True)),
  ):
    with pytest.raises(ConfigError, match=f"kwargs.{knob}"):
      SAMPLERS["density"](0, pool, 5, **{knob: bad})


def test_exact_density_says_that_it_cannot_scale(monkeypatch):
  monkeypatch.setattr(density, "EXACT_ROWS", 100)
  with pytest.raises(ConfigError, match="300, is above the 100.*features"):
    SAMPLERS["density"](0, clusters(), 5, features=0)


def naive_k_center(x, first, m):
  chosen, near = [first], ((x - x[first]) ** 2).sum(1)
  while len(chosen) < m:
    near[chosen] = -1
    chosen.append(int(near.argmax()))
    near = np.minimum(near, ((x - x[chosen[-1]]) ** 2).sum(1))
  return chosen


@pytest.mark.parametrize("active", [4, 32, 1024])
@pytest.mark.parametrize("pair", vectors.PAIRS)
def test_k_center_equals_the_loop(active, pair, monkeypatch):
  monkeypatch.setattr(geometric, "ACTIVE", active)
  pool = clusters()
  x = vectors_of(pool, pair)
  first = int(topk.uniform(3, pool.ids, "k_center").argmax())
  got = SAMPLERS["k_center"](3, pool, 120, pair=pair)
  wanted = naive_k_center(x, first, 120)
  assert list(got.rows) == wanted
  left = np.setdiff1d(np.arange(N), wanted)
  near = np.linalg.norm(x[left][:, None] - x[wanted][None], axis=2).min(1)
  assert_allclose(got.score[left], near, atol=2e-3)
  radius = [
    np.linalg.norm(x[wanted[:i]] - x[wanted[i]], axis=1).min()
    for i in range(1, 120)
  ]
  assert_allclose(got.score[wanted[1:]], radius, rtol=1e-5)


def test_k_center_tells_apart_what_float32_cannot():
  """Squares of 1 + k^2 / 2^32: the farthest is the last, whatever its id."""
  x = np.zeros((7, 4), np.float32)
  x[1:, 0] = 1
  x[1:, 1] = np.arange(6) / 2.0**16
  for turn in range(6):
    ids = np.array([f"r{(i * 5 + turn) % 7}" for i in range(7)])
    rows, score = geometric.farthest_first(x, ids, 2, 0)
    assert rows.tolist() == [0, 6]
    assert_allclose(score[6], np.sqrt(1 + 25 / 2.0**32), rtol=1e-15)


@pytest.mark.parametrize("active", [8, 1024])
def test_k_center_takes_copies_last_and_by_their_hash(active, monkeypatch):
  monkeypatch.setattr(geometric, "ACTIVE", active)
  pool = copied(clusters(n=60), 20, 3)
  got = SAMPLERS["k_center"](0, pool, 40)
  assert len(set(got.rows[:20] // 3)) == 20
  hashes = topk.id_hash(pool.ids)
  rest = [i for i in np.argsort(hashes) if i not in set(got.rows[:20])]
  assert list(got.rows[20:]) == rest[:20]
  for i in got.rows[1:20]:  # of three copies, the one with the least hash
    assert hashes[i] == hashes[i // 3 * 3 : i // 3 * 3 + 3].min()


def naive_herding(x, m):
  mean = x.mean(0)
  w, chosen = mean.copy(), []
  for _ in range(m):
    value = x @ w
    value[chosen] = -np.inf
    chosen.append(int(value.argmax()))
    w += mean - x[chosen[-1]]
  return chosen


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("active", [4, 1024])
@pytest.mark.parametrize("metric", vectors.METRICS)
def test_herding_equals_the_loop(active, metric, on_host, monkeypatch):
  monkeypatch.setattr(geometric, "ACTIVE", active)
  monkeypatch.setattr(geometric, "_on_host", lambda: on_host)
  pool = clusters()
  x = vectors_of(pool, "mean", metric)
  got = SAMPLERS["herding"](0, pool, 150, metric=metric)
  assert list(got.rows) == naive_herding(x, 150)
  # What it is for: the mean of the chosen follows the mean of the pool.
  gap = lambda rows: np.linalg.norm(x[rows].mean(0) - x.mean(0))
  fair = [gap(SAMPLERS["random"](s, pool, 30).rows) for s in range(20)]
  assert gap(got.rows[:30]) < np.mean(fair) / 2


def test_herding_in_a_gaussian_kernel():
  pool = clusters()
  x = np.float32(vectors_of(pool))
  h = density.median_distance(x, pool.ids)
  angle = np.float64(x) @ density.frequencies(1, W, 64, h).T
  phi = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) / 8
  got = SAMPLERS["herding"](1, pool, 60, features=64)
  assert list(got.rows) == naive_herding(np.float64(np.float32(phi)), 60)


def test_herding_of_copies_follows_the_hash():
  pool = copied(clusters(n=40), 20, 2)
  got = SAMPLERS["herding"](0, pool, 12)
  hashes, seen = topk.id_hash(pool.ids), set()
  for i in got.rows:
    assert hashes[i] < hashes[i ^ 1] or i ^ 1 in seen
    seen.add(i)


def test_real_keeps_the_pairs_that_are_least_alike():
  pool = clusters()
  # The prompt's share in `embedding` is not looked at.
  pool = with_columns(
    pool, answer_embedding=pool.embedding, embedding=pool.answer_embedding
  )
  a, b = np.float64(pool.answer_embedding).transpose(1, 0, 2)
  cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
  got = SAMPLERS["real"](0, pool, 60)
  assert_allclose(got.score, 1 - cosine, rtol=1e-4, atol=1e-6)
  assert set(got.rows) == set(np.argsort(cosine)[:60])
  low = SAMPLERS["real"](0, pool, 60, direction="low")
  assert set(low.rows) == set(np.argsort(-cosine)[:60])
  far = SAMPLERS["real"](0, pool, 60, metric="euclidean")
  assert_allclose(far.score, np.linalg.norm(a - b, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
  "name,kwargs",
  [
    *((name, {}) for name in GEOMETRIC),
    ("density", {"features": 0}),
    ("facility_location", {"exact": False}),
    ("dpp", {"blocks": 3}),
    ("k_center", {"blocks": 3}),
    ("herding", {"blocks": 3}),
  ],
)
def test_any_mesh_gives_the_same_rows_and_the_same_bits(
  name, kwargs, monkeypatch
):
  monkeypatch.setattr(geometric, "_on_host", lambda: False)
  pool = clusters(n=400, width=32)
  got = []
  for fsdp, tensor in ((1, 1), (2, 1), (4, 2)):
    axes = dict(fsdp=fsdp, tensor=tensor)
    mesh = sharding.make_mesh(axes, jax.devices()[: fsdp * tensor])
    with jax.set_mesh(mesh):
      got.append(SAMPLERS[name](0, pool, 60, **kwargs))
  for other in got[1:]:
    assert_array_equal(other.rows, got[0].rows)
    assert_array_equal(other.score, got[0].score)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_copies_of_rows_are_chosen_by_the_hash_not_the_place(name):
  """The same embeddings under other ids: the picks move with the hashes."""
  got = SAMPLERS[name](0, copied(clusters(n=80), 10, 8), 40)
  kept = np.zeros(80, bool)
  kept[got.rows] = True
  # Were copies taken in their order, no later copy would be kept alone.
  groups = kept.reshape(10, 8)
  partly = groups[groups.any(1) & ~groups.all(1)]
  if len(partly):
    assert any((np.diff(one.astype(int)) > 0).any() for one in partly)
