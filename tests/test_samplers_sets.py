"""Facility location, DPP, SemDeDup and DEITA equal their loops in float64."""

import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as make_pools
from pools import clusters, copied, planted, vectors_of, with_columns
import pytest

from jaxalign.core.errors import ConfigError
from jaxalign.select import chunks, topk
from jaxalign.select.samplers import (
  chains,
  dedup,
  kmeans,
  SAMPLERS,
  submodular,
  vectors,
)

N = 240
GREEDY = ["k_center", "herding", "facility_location", "dpp", "deita"]


def test_assign_is_the_nearest_centre_over_chunks_of_centres():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(500, 6)).astype(np.float32)
  centres = rng.normal(size=(300, 6))  # more than one chunk
  wanted = ((np.float64(x)[:, None] - centres[None]) ** 2).sum(2).argmin(1)
  assert_array_equal(kmeans.assign(chunks.place(x), centres), wanted)


def test_k_means_finds_blobs_and_is_lloyds_fixed_point():
  rng = np.random.default_rng(1)
  middle = 10 * rng.normal(size=(4, 5))
  truth = rng.integers(0, 4, size=400)
  x = (middle[truth] + rng.normal(size=(400, 5))).astype(np.float32)
  ids = np.array([f"r{i:04d}" for i in range(400)])
  cost = []
  for seed in range(6):
    labels, centres = kmeans.k_means(x, ids, 4, seed)
    for k in range(4):
      assert_allclose(centres[k], np.float64(x[labels == k]).mean(0), atol=1e-5)
    cost.append(((x - centres[labels]) ** 2).sum())
  best = sum(
    400 * x[truth == k].var(0).sum() * (truth == k).mean() for k in range(4)
  )
  assert min(cost) == pytest.approx(best, rel=1e-4)
  with pytest.raises(ConfigError, match="401 clusters of 400"):
    kmeans.k_means(x, ids, 401, 0)


def least_hash(rows, ids):
  """Of rows that tie, the one whose id has the lowest hash."""
  return int(rows[topk.id_hash(ids[rows]).argmin()])


def naive_facility(x, m, ids):
  """Plain greedy over the whole matrix -> picks and their gains.

  Two rows that only cover each other add the same, as s is symmetric: gains
  within 1e-6 of the best are equal.
  """
  s = (1 + x @ x.T) / 2
  covered, chosen, gains = np.zeros(len(x)), [], []
  for _ in range(m):
    gain = np.maximum(s - covered, 0).sum(1)
    gain[chosen] = -np.inf
    ties = np.flatnonzero(gain >= gain.max() - 1e-6)
    chosen.append(least_hash(ties, ids))
    gains.append(gain.max())
    covered = np.maximum(covered, s[chosen[-1]])
  return chosen, gains


@pytest.mark.parametrize("cache", [2**26, 3000])
@pytest.mark.parametrize("metric", ["cosine", "centred"])
def test_facility_location_equals_plain_greedy(cache, metric, monkeypatch):
  monkeypatch.setattr(submodular, "_CACHE", cache)
  monkeypatch.setattr(submodular, "_TOGETHER", 40 if cache < 4000 else 256)
  pool = clusters(N)
  x = vectors_of(pool, "mean", metric)
  wanted, gains = naive_facility(x, 60, pool.ids)
  got = SAMPLERS["facility_location"](0, pool, 60, metric=metric)
  assert list(got.rows) == wanted
  _, gained = submodular.lazy_greedy(np.float32(x), pool.ids, 60)
  assert_allclose(gained, gains, rtol=1e-4, atol=1e-4)


def test_stochastic_greedy_takes_the_best_of_its_candidates():
  pool = clusters(N)
  x = vectors_of(pool)
  s = (1 + x @ x.T) / 2
  m, epsilon = 30, 0.1
  rows, gains = submodular.stochastic_greedy(
    np.float32(x), pool.ids, m, 5, epsilon
  )
  few = int(np.ceil(N / m * np.log(1 / epsilon)))
  # The oracle walks the same order of hashes, with the matrix.
  covered, chosen, turn, queue = np.zeros(N), [], 0, []
  for _ in range(m):
    queue = [i for i in queue if i not in chosen]
    if len(queue) < min(few, N - len(chosen)):
      again = np.argsort(topk.id_hash(pool.ids, f"facility:5:{turn}"))
      queue += [i for i in again if i not in chosen and i not in queue]
      turn += 1
    candidates, queue = queue[:few], queue[few:]
    gain = [np.maximum(s[j] - covered, 0).sum() for j in candidates]
    chosen.append(int(candidates[int(np.argmax(gain))]))
    covered = np.maximum(covered, s[chosen[-1]])
  assert list(rows) == chosen
  exact = sum(naive_facility(x, m, pool.ids)[1])
  assert 0.97 * exact < gains.sum() <= exact + 1e-6
  got = SAMPLERS["facility_location"](5, pool, m, exact=False, epsilon=epsilon)
  assert list(got.rows) == chosen


@pytest.mark.parametrize("name", GREEDY)
def test_blocks_run_inside_clusters_with_their_share(name):
  pool = clusters(N)
  x = np.float32(vectors_of(pool))
  got = SAMPLERS[name](0, pool, 50, blocks=4)
  labels, _ = kmeans.k_means(x, pool.ids, 4, 0)
  kept = np.bincount(labels[got.rows], minlength=4)
  assert (abs(kept - np.bincount(labels) * 50 / N) < 1).all()
  # By turns: each pick stands in the middle of its place in a block's share.
  turn, when = np.zeros(4, int), []
  for k in labels[got.rows]:
    when.append((turn[k] + 0.5) / kept[k])
    turn[k] += 1
  order = np.lexsort((topk.id_hash(pool.ids[got.rows]), when))
  assert list(order) == list(range(50))
  assert_allclose(got.score[got.rows], 1 - np.arange(50) / 50)
  assert not np.delete(got.score, got.rows).any()
  more = dict(bandwidth=1.3) if name == "dpp" else {}
  got = SAMPLERS[name](0, pool, 50, blocks=4, **more)
  for k in range(4):  # what the method itself picks of the cluster alone
    rows = np.flatnonzero(labels == k)
    alone = SAMPLERS[name](0, chains.take(pool, rows), int(kept[k]), **more)
    assert [i for i in got.rows if labels[i] == k] == list(rows[alone.rows])


def test_a_cluster_above_twice_the_mean_is_dealt_out_by_the_hash():
  ids = np.array([f"r{i:05d}" for i in range(9000)])
  labels = np.where(np.arange(9000) % 10 == 0, np.arange(9000) // 3000, 3)
  got = kmeans.split_large(labels, ids, kmeans.most_rows(9000, 4))
  assert kmeans.most_rows(9000, 4) == 4500
  assert kmeans.most_rows(9000, 90) == kmeans.SMALL
  # 8,100 rows become two times 4,050, by turns in the order of the hashes.
  assert_array_equal(got[labels < 3], labels[labels < 3])
  large = np.flatnonzero(labels == 3)
  turn = np.argsort(np.argsort(topk.id_hash(ids[large])))
  assert_array_equal(got[large], np.where(turn % 2, 4, 3))
  # 3 of 2,700 rows, and no label is used twice.
  small = kmeans.split_large(labels, ids, 2700)
  assert sorted(np.bincount(small)) == [300] * 3 + [2700] * 3
  both = kmeans.split_large(np.arange(9000) % 2, ids, 2000)  # two large ones
  assert (np.bincount(both) == 1500).all() and both.max() == 5
  mixed = np.random.default_rng(0).permutation(9000)
  again = kmeans.split_large(labels[mixed], ids[mixed], 2700)
  assert_array_equal(again, small[mixed])
  assert_array_equal(kmeans.split_large(labels, ids, 8100), labels)


def test_blocks_of_copies_stay_below_twice_the_mean(monkeypatch):
  """Four fifths of the rows are one: k-means puts them into one cluster."""
  monkeypatch.setattr(kmeans, "SMALL", 1)
  pool = clusters(N)
  x = pool.embedding.copy()
  x[np.arange(N) % 5 > 0] = x[1]
  pool = with_columns(pool, embedding=x)
  seen, greedy = [], submodular.lazy_greedy

  def counted(x, ids, m):
    seen.append(len(x))
    return greedy(x, ids, m)

  monkeypatch.setattr(submodular, "lazy_greedy", counted)
  got = SAMPLERS["facility_location"](0, pool, 60, blocks=8)
  assert max(seen) <= 60 and sum(seen) == N and len(set(got.rows)) == 60
  # The DPP's numbers are those of the largest block, a quarter of its rows
  # picked; not 240 x 60 / 64.
  most = max(seen) * round(max(seen) / 4)
  monkeypatch.setattr(submodular, "DPP_NUMBERS", most - 1)
  with pytest.raises(ConfigError, match=f"N x M, {most}, .*blocks"):
    SAMPLERS["dpp"](0, pool, 60, blocks=8, bandwidth=1.0)
  monkeypatch.setattr(submodular, "DPP_NUMBERS", most)
  SAMPLERS["dpp"](0, pool, 60, blocks=8, bandwidth=1.0)


@pytest.mark.parametrize(
  "name,kwargs,host,flops",  # of 5 picks of 240 rows of 12 numbers
  [
    ("k_center", {}, False, 2 * N * 5 * 12),
    ("herding", {}, True, 2 * N * 5 * 12),
    ("herding", dict(features=30), True, 2 * N * 5 * 60),
    ("deita", {}, True, 2 * N * 5 * 12),
    ("facility_location", {}, True, 2 * N * N * 12),
    (
      "facility_location",
      dict(exact=False, epsilon=0.5),
      False,
      2 * N * N * 12 * np.log(2),
    ),
    ("dpp", {}, True, N * 25 + 2 * N * 5 * 12),
    ("density", dict(features=0), False, 2 * N * N * 12),
    ("semdedup", dict(clusters=1), True, N * N * 12),
  ],
)
def test_what_takes_days_says_so_before_it_starts(
  name, kwargs, host, flops, monkeypatch
):
  pool = clusters(N)
  monkeypatch.setattr(vectors.devices, "CPU", 1000.0)
  hours = flops / (1000 * (1 if host else len(jax.devices()))) / 3600
  monkeypatch.setattr(vectors, "HOURS", hours * 1.001)
  SAMPLERS[name](0, pool, 5, **kwargs)
  monkeypatch.setattr(vectors, "HOURS", hours / 1.001)
  # Its blocked form is offered, and does with less.
  less = {"density": dict(features=4), "semdedup": dict(clusters=20)}.get(
    name, dict(blocks=6)
  )
  message = f"{hours:,.0f} hours, {flops:.3g} flops".replace("+", ".")
  with pytest.raises(ConfigError, match=f"{message}.*{next(iter(less))}"):
    SAMPLERS[name](0, pool, 5, **kwargs)
  SAMPLERS[name](0, pool, 5, **kwargs | less)


def test_what_runs_in_days_by_default():
  """30 GFLOP/s for a day: a million rows of 384 numbers, a tenth kept."""
  assert vectors.HOURS == 24
  check = kmeans.refuse_long_picks("k_center", 384, host=True)
  check(1_000_000, 100_000)
  with pytest.raises(
    ConfigError,
    match=(
      "k_center would take about 71 hours, 7.68e.15 flops at an assumed "
      "30 GFLOP/s, above the 24 hours .*blocks"
    ),
  ):
    check(10_000_000, 1_000_000)
  check(np.full(100, 100_000), np.full(100, 10_000))  # in blocks


def test_what_is_refused(monkeypatch):
  pool = clusters(N)
  monkeypatch.setattr(submodular, "DPP_NUMBERS", 1000)
  with pytest.raises(ConfigError, match="N x M, 1.2e.03, .*blocks"):
    SAMPLERS["dpp"](0, pool, 5)
  SAMPLERS["dpp"](0, pool, 5, blocks=3)
  for bad in (dict(metric="euclidean"), dict(epsilon=0.0), dict(exact="no")):
    with pytest.raises(ConfigError, match=f"kwargs.{next(iter(bad))}"):
      SAMPLERS["facility_location"](0, pool, 5, **bad)


@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize(
  "name,kwargs",
  [*((n, {}) for n in GREEDY), ("facility_location", dict(exact=False))],
)
def test_a_budget_of_nothing_is_an_empty_selection(name, kwargs, blocks):
  got = SAMPLERS[name](0, clusters(60), 0, blocks=blocks, **kwargs)
  assert got.rows.shape == (0,) and got.rows.dtype == np.int64
  assert got.score.shape == (60,) and np.isfinite(got.score).all()


def naive_dpp(kernel, m, ids):
  """Greedy over determinants, from the definition."""
  log_det = lambda rows: np.linalg.slogdet(kernel[np.ix_(rows, rows)])[1]
  chosen, gained = [], []
  for _ in range(m):
    before = log_det(chosen) if chosen else 0.0
    value = np.full(len(kernel), -np.inf)
    for i in np.setdiff1d(np.arange(len(kernel)), chosen):
      value[i] = log_det([*chosen, i])
    gained.append(np.exp(value.max() - before))
    chosen.append(least_hash(np.flatnonzero(value >= value.max() - 1e-9), ids))
  return chosen, gained


@pytest.mark.parametrize("quality", ["", "reward"])
def test_dpp_equals_greedy_over_determinants(quality):
  pool = clusters(60)
  x = vectors_of(pool)
  z = pool.reward[:, 0]
  q = np.exp(0.8 * (z - z.mean()) / z.std()) if quality else np.ones(60)
  distance = ((x[:, None] - x[None]) ** 2).sum(2)
  kernel = q[:, None] * q[None] * np.exp(-distance / (2 * 1.5**2))
  wanted, gained = naive_dpp(kernel, 15, pool.ids)
  got = SAMPLERS["dpp"](0, pool, 15, quality=quality, weight=0.8, bandwidth=1.5)
  assert list(got.rows) == wanted
  assert_allclose(got.score[wanted], gained, rtol=1e-4)
  # Of the others: what the picks leave of them, a Schur complement.
  rest = np.setdiff1d(np.arange(60), wanted)
  by, inside = kernel[np.ix_(rest, wanted)], kernel[np.ix_(wanted, wanted)]
  left = kernel[rest, rest] - (by * np.linalg.solve(inside, by.T).T).sum(1)
  assert_allclose(got.score[rest], left, rtol=1e-3, atol=1e-6)
  if quality:
    plain = SAMPLERS["dpp"](0, pool, 15, bandwidth=1.5)
    assert z[got.rows].mean() > z[plain.rows].mean() + 0.3


def test_dpp_goes_on_by_quality_where_nothing_is_left_to_explain():
  pool = copied(clusters(40), 8, 5)
  got = SAMPLERS["dpp"](0, pool, 20, quality="reward", bandwidth=0.3)
  assert len(set(got.rows[:8] // 5)) == 8
  reward = pool.reward[:, 0]
  for i in got.rows[:8]:  # of five copies the best
    assert reward[i] == reward[i // 5 * 5 : i // 5 * 5 + 5].max()
  rest = [i for i in np.argsort(-reward) if i not in set(got.rows[:8])]
  assert list(got.rows[8:]) == rest[:12]


def test_copies_beyond_a_clusters_size_are_all_found(monkeypatch, capsys):
  """Four fifths of the rows are copies of one, in a cluster of 400."""
  monkeypatch.setattr(kmeans, "SMALL", 1)
  monkeypatch.setattr(dedup, "_TILE", 8)
  n = 500
  pool = make_pools.make(2, n, width=16)
  x, copies = pool.embedding.copy(), np.arange(n) % 5 > 0
  x[copies] = x[1]
  unit = np.float32(vectors_of(with_columns(pool, embedding=x)))
  got = dedup.most_alike(unit, pool.ids, 10, 0)
  first = least_hash(np.flatnonzero(copies), pool.ids)
  dropped = np.setdiff1d(np.flatnonzero(copies), [first])
  assert (got[dropped] == 1).all() and (np.delete(got, dropped) < 0.999).all()
  # As if nothing had been cut: the loop over all rows of a cluster.
  assert "before it only" not in capsys.readouterr().out
  monkeypatch.setattr(kmeans, "SMALL", n)
  assert_array_equal(dedup.most_alike(unit, pool.ids, 10, 0), got)


def test_a_row_of_a_large_cluster_is_compared_with_those_before(
  monkeypatch, capsys
):
  pool = planted()
  x = vectors_of(pool)
  tile, most = 4, 12
  monkeypatch.setattr(dedup, "_TILE", tile)
  run = lambda: dedup.most_alike(np.float32(x), pool.ids, 3, 0)
  whole = run()
  monkeypatch.setattr(kmeans, "most_rows", lambda n, k: most)
  got = run()
  labels, centres = kmeans.k_means(np.float32(x), pool.ids, 3, 0)
  wanted = np.empty(N)
  for k in range(3):
    rows = np.flatnonzero(labels == k)
    rows = rows[np.argsort(x[rows] @ centres[k] / np.linalg.norm(centres[k]))]
    for place, i in enumerate(rows):
      first = max(0, place // tile * tile - most)
      wanted[i] = max([x[i] @ x[j] for j in rows[first:place]], default=-1)
  assert_allclose(got, wanted, atol=2e-6)
  assert (got <= whole).all() and (got < whole - 0.01).any()
  # Near-copies are as typical as each other: few are missed.
  near = whole > 0.99
  assert near.sum() > 60 and (got[near] > 0.99).mean() > 0.8
  assert "240 rows lie in clusters of more than 12:" in capsys.readouterr().out
  # And that is what the hours count: 240 rows with 12 before each.
  hours = 2 * 240 * 12 * x.shape[1] / 3600
  monkeypatch.setattr(vectors.devices, "CPU", 1.0)
  monkeypatch.setattr(vectors, "HOURS", hours * 1.001)
  run()
  monkeypatch.setattr(vectors, "HOURS", hours / 1.001)
  with pytest.raises(ConfigError, match="set clusters to 'auto'"):
    run()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("tile", [7, 512])
def test_semdedup_equals_the_loop(count, tile, monkeypatch):
  monkeypatch.setattr(dedup, "_TILE", tile)
  pool = planted()
  x = vectors_of(pool)
  labels, centres = kmeans.k_means(np.float32(x), pool.ids, count, 3)
  wanted = np.empty(N)
  for i in range(N):
    centre = centres[labels[i]] / np.linalg.norm(centres[labels[i]])
    typical = x @ centre
    earlier = (labels == labels[i]) & (typical < typical[i])
    wanted[i] = (x[earlier] @ x[i]).max(initial=-1)
  got = SAMPLERS["semdedup"](3, pool, 150, clusters=count)
  assert_allclose(got.score, -wanted, atol=2e-6)
  if count == 1:  # one of each planted two is dropped first
    kept = SAMPLERS["semdedup"](3, pool, 160, clusters=1).rows
    dropped = np.setdiff1d(np.arange(N), kept)
    assert len(dropped) == 80 and len(set(dropped // 3)) == 80
    assert (dropped % 3 != 0).all()


def test_semdedup_keeps_the_lowest_hash_of_exact_copies():
  pool = copied(make_pools.make(2, 60), 20, 3)
  got = SAMPLERS["semdedup"](0, pool, 20, clusters=1)
  hashes = topk.id_hash(pool.ids).reshape(20, 3)
  assert set(got.rows) == set(np.arange(20) * 3 + hashes.argmin(1))
  for bad in ("many", 0, 61):
    with pytest.raises(ConfigError, match="kwargs.clusters"):
      SAMPLERS["semdedup"](0, pool, 5, clusters=bad)


def naive_diverse(score, x, m, threshold):
  kept, passed = [], []
  for i in np.argsort(-score):
    if len(kept) == m:
      break
    alike = max([x[i] @ x[j] for j in kept], default=-1)
    (kept if alike < threshold else passed).append(int(i))
  return kept + passed[: m - len(kept)], len(kept)


@pytest.mark.parametrize("tile", [7, 512])
@pytest.mark.parametrize("threshold,m", [(0.9, 100), (0.4, 20), (0.4, 90)])
def test_deita_equals_the_loop(tile, threshold, m, monkeypatch):
  monkeypatch.setattr(dedup, "_TILE", tile)
  pool = planted()
  wanted, alone = naive_diverse(
    pool.reward[:, 0], vectors_of(pool), m, threshold
  )
  got = SAMPLERS["deita"](0, pool, m, threshold=threshold)
  assert list(got.rows) == wanted
  assert (alone < m) == (m == 90)  # the last case makes up the number
  with pytest.raises(ConfigError, match="kwargs.threshold"):
    SAMPLERS["deita"](0, pool, m, threshold=2.0)
