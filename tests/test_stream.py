"""Samplers in tiles take the rows that the same samplers take of all rows."""

import jax
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign.errors import ConfigError, NumericError
from jaxalign.select import blocks, mixture, reservoir, sources, stream
from jaxalign.select import store as stores
from jaxalign.select.pool import make_pool, Pool
from jaxalign.select.samplers import SAMPLERS

N, WIDTH = 20_000, 8
BUDGET = N // 10


def made(n=N, responses=2, seed=0, ties=True):
  """A pool with planted near-ties: rows that are copies, or all but."""
  rng = np.random.default_rng(seed)
  centre = rng.normal(0, 3, (4, WIDTH))
  x = centre[rng.integers(4, size=(n, responses))] + rng.normal(
    size=(n, responses, WIDTH)
  )
  value = -0.5 * (x**2).sum(-1)
  if ties:
    copy = rng.integers(n, size=n // 3)
    x[: n // 3], value[: n // 3] = x[copy], value[copy]
    value[: n // 9] += 1e-13
  count = rng.integers(1, 20, (n, responses))
  ids = np.array([f"id-{i:07d}" for i in rng.permutation(n)])
  return make_pool(
    ids,
    dict(
      embedding=np.float32(x),
      answer_embedding=np.float32(x),
      log_likelihood=value,
      length=count,
      logp=np.round(rng.normal(-20, 5, (n, responses)), 1),
      logp_count=count.astype(np.float32),
      logp_alone=value - 3,
      p_yes=np.round(rng.uniform(size=(n, responses)), 2),
      reward=np.round(rng.normal(size=(n, responses)), 1),
      proxy_logp=value,
      proxy_ref_logp=value[:, ::-1],
      held_out_loss=np.round(rng.normal(size=(n, 3)), 1),
    ),
  )


@pytest.fixture(scope="module")
def pool():
  return made()


CASES = [
  ("random", {}),
  ("isa", {}),
  ("isa", dict(order="magnitude")),
  ("isa", dict(order="renormalised", pair_score="min")),
  ("isa", dict(soft=0.3)),
  ("isa", dict(order="soft")),
  ("length", {}),
  ("length", dict(direction="low")),
  ("length", dict(direction="middle")),
  ("perplexity", {}),
  ("perplexity", dict(direction="top", side="difference")),
  ("ifd", {}),
  ("ask_llm", {}),
  ("external_margin", {}),
  ("external_margin", dict(direction="middle")),
  ("implicit_margin", dict(direction="low")),
  ("selective_dpo", {}),
  ("bees", dict(high=2.0)),
  ("real", {}),
]


@pytest.mark.parametrize("name, kwargs", CASES)
def test_the_same_rows_in_the_same_order(pool, name, kwargs):
  for budget in (BUDGET, 7):
    wanted = SAMPLERS[name](3, pool, budget, **kwargs)
    found = stream.select(name, sources.of_pool(pool), budget, seed=3, **kwargs)
    np.testing.assert_array_equal(found.rows, wanted.rows)
    np.testing.assert_allclose(
      found.score, wanted.score[wanted.rows], rtol=1e-12, atol=1e-12
    )
    assert found.ids.tolist() == pool.ids[wanted.rows].tolist()


@pytest.mark.parametrize(
  "pair, metric",
  [("mean", "cosine"), ("concat", "centred"), ("difference", "euclidean")],
)
def test_density_is_that_of_all_rows_at_once(pair, metric):
  """The sums are added in other tiles: float32 rounding, no more."""
  pool = made(3000, ties=False)
  kwargs = dict(pair=pair, metric=metric, features=64)
  wanted = SAMPLERS["density"](5, pool, 300, **kwargs)
  found = stream.select("density", sources.of_pool(pool), 300, seed=5, **kwargs)
  assert len(np.intersect1d(found.rows, wanted.rows)) >= 299
  np.testing.assert_allclose(found.score, wanted.score[found.rows], atol=2e-3)


def test_density_in_float64_by_hand():
  """f_i = 1/N sum_j exp(-|x_i - x_j|^2 / 2h^2), in NumPy."""
  pool = made(1500, ties=False)
  found = stream.select(
    "density",
    sources.of_pool(pool),
    1500,
    seed=5,
    metric="euclidean",
    bandwidth=2.0,
    features=4096,
  )
  x = np.float64(pool.embedding).mean(axis=1)
  square = ((x[:, None] - x[None]) ** 2).sum(-1)
  f = np.exp(-square / (2 * 2.0**2)).mean(axis=1)
  from jaxalign.select.topk import gumbel

  key = found.score - gumbel(5, pool.ids, "density")[found.rows]
  error = np.exp(-key) - f[found.rows]
  assert abs(error).max() < 5 / np.sqrt(2 * 4096)


def test_middle_where_ties_reach_further_than_the_budget():
  for count in (
    np.repeat([1, 5, 9], [3000, 4000, 3000]),
    np.repeat([1, 5, 9], [4990, 5000, 10]),
    np.append(np.arange(1, 6001), np.repeat(6001, 4000)),
    np.append(np.arange(1, 4996), np.repeat(4996, 5005)),
  ):
    n = len(count)
    rng = np.random.default_rng(1)
    pool = make_pool(
      [f"x{i}" for i in range(n)], dict(length=rng.permutation(count)[:, None])
    )
    for budget in (1, 3, 400, n):
      wanted = SAMPLERS["length"](0, pool, budget, direction="middle")
      found = stream.select(
        "length", sources.of_pool(pool), budget, direction="middle"
      )
      np.testing.assert_array_equal(found.rows, wanted.rows)


def test_what_cannot_stream_is_refused_with_the_number(pool, monkeypatch):
  whole = sources.of_pool(pool)
  found = stream.select("k_center", whole, 5, seed=1)  # small: it is held
  wanted = SAMPLERS["k_center"](1, pool, 5)
  np.testing.assert_array_equal(found.rows, wanted.rows)
  monkeypatch.setattr(stream, "HELD", 1000)
  with pytest.raises(ConfigError, match="k_center.*20,000.*2.08e.06.*blocked"):
    stream.select("k_center", whole, 5)
  with pytest.raises(ConfigError, match="features"):
    stream.select("density", whole, 5, features=0)
  with pytest.raises(ConfigError, match="high to a number"):
    stream.select("bees", whole, 5)
  with pytest.raises(ConfigError, match="takes no 'colour'"):
    stream.select("isa", whole, 5, colour=1)
  with pytest.raises(ConfigError, match="no column 'reward'"):
    stream.select("external_margin", sources.of_pool(Pool(pool.ids, {})), 5)


def test_a_nan_is_named(pool):
  value = pool.logp.copy()
  value[77, 0] = np.nan
  bad = Pool(pool.ids, pool.columns | dict(logp=value))
  with pytest.raises(NumericError, match=str(pool.ids[77])):
    stream.select("perplexity", sources.of_pool(bad), 5)


def test_blocks_take_their_share_whatever_the_order(pool):
  small = Pool(pool.ids[:3000], {"embedding": pool.embedding[:3000]})
  found = blocks.select(
    SAMPLERS["k_center"], sources.of_pool(small), 300, block_rows=700, seed=2
  )
  assert len(set(found.rows.tolist())) == 300
  assert "in 5 blocks" in found.notes[-1]
  from jaxalign.select.topk import uniform

  block = (uniform(2, small.ids, "block") * 5).astype(int)
  shares = np.bincount(block[found.rows], minlength=5)
  assert abs(shares - 0.1 * np.bincount(block, minlength=5)).max() < 1
  own = np.flatnonzero(block == 3)  # one block is the sampler over its rows
  wanted = SAMPLERS["k_center"](
    2,
    Pool(small.ids[own], dict(embedding=small.embedding[own])),
    int(shares[3]),
  )
  here = block[found.rows] == 3
  assert found.rows[here].tolist() == own[wanted.rows].tolist()
  np.testing.assert_array_equal(found.score[here], wanted.score[wanted.rows])
  order = np.random.default_rng(0).permutation(3000)
  again = make_pool(small.ids[order], {"embedding": small.embedding[order]})
  assert blocks.select(
    SAMPLERS["k_center"], sources.of_pool(again), 300, block_rows=700, seed=2
  ).ids.tolist() == (found.ids.tolist())


# From a store on disk: the reservoir, the scores, the choice.


def stored(folder, pool, shard=512, dtype="bfloat16"):
  store = stores.create(
    folder,
    pool.ids,
    dict(embedding=stores.Column(pool.embedding.shape[1:], dtype)),
    fields=dict(model="x"),
    shard=shard,
  )
  ids = stores.encoded(pool.ids)
  for s in stores.pending(store, ids):
    start, stop = store.bounds(s)
    stores.write_shard(
      store, s, ids, dict(embedding=pool.embedding[start:stop])
    )
  return store


def mesh_of(devices):
  return sharding.make_mesh(
    dict(fsdp=devices, tensor=1), jax.devices()[:devices]
  )


def chosen(folder, store, devices, name="isa", **kwargs):
  """Fit on a reservoir, score, select: (ids, all scores)."""
  folder.mkdir(parents=True, exist_ok=True)
  mesh = mesh_of(devices)
  with jax.set_mesh(mesh):
    rows = reservoir.choose(store, 1000, folder)
    x = reservoir.gather(store, rows, folder / "x.npy")
    fit = mixture.fit(mesh, x, starts=1, max_iterations=8, pca=4)
    scores = reservoir.score(
      mesh, [fit], store, folder / "scores", fields=dict(fit="a"), tile=64
    )
    found = stream.select(
      name, sources.of_stores(store, scores), 400, scratch=folder, **kwargs
    )
  return found.ids.tolist(), stores.read(scores, "log_likelihood"), rows


@pytest.fixture(scope="module")
def small():
  return made(4000)


@pytest.fixture(scope="module")
def first(small, tmp_path_factory):
  """On one device, in shards of 512."""
  folder = tmp_path_factory.mktemp("first")
  store = stored(folder / "store", small)
  return store, chosen(folder / "work", store, 1)


def test_the_reservoir_is_the_least_hashes(first, small):
  from jaxalign.select.topk import id_hash

  hashes = id_hash(small.ids, "reservoir")
  wanted = np.sort(np.argsort(hashes, kind="stable")[:1000])
  np.testing.assert_array_equal(first[1][2], wanted)


def test_scores_are_the_mixtures(first, small, tmp_path):
  store, (ids, scores, rows) = first
  x = reservoir.gather(store, rows, tmp_path / "x.npy")
  exact = np.float32(np.asarray(small.embedding, jax.numpy.bfloat16))
  np.testing.assert_array_equal(x, exact[rows].reshape(-1, WIDTH))
  mesh = mesh_of(1)
  with jax.set_mesh(mesh):
    fit = mixture.fit(mesh, x, starts=1, max_iterations=8, pca=4)
  wanted = mixture.log_likelihood(fit, exact.reshape(-1, WIDTH))
  np.testing.assert_allclose(scores.reshape(-1), wanted, atol=2e-4)
  value = np.float64(scores[:, 0])
  pool = Pool(small.ids, dict(log_likelihood=value))
  assert small.ids[SAMPLERS["isa"](0, pool, 400).rows].tolist() == [
    i.decode() for i in ids
  ]


@pytest.mark.parametrize(
  "devices, shard", [(2, 512), (8, 512), (8, 100), (1, 4000)]
)
def test_the_same_ids_on_any_mesh_in_any_shards(
  first, small, tmp_path, devices, shard
):
  store = stored(tmp_path / "store", small, shard)
  ids, scores, _ = chosen(tmp_path / "work", store, devices)
  assert ids == first[1][0]
  np.testing.assert_array_equal(scores, first[1][1])


def test_the_same_ids_in_any_order_of_the_input(first, small, tmp_path):
  order = np.random.default_rng(3).permutation(len(small.ids))
  again = make_pool(small.ids[order], {"embedding": small.embedding[order]})
  ids, _, _ = chosen(tmp_path / "work", stored(tmp_path / "s", again, 333), 8)
  assert ids == first[1][0]


def test_density_from_a_store_is_the_same_on_any_mesh(first, tmp_path):
  found = []
  for devices in (1, 2, 8):
    with jax.set_mesh(mesh_of(devices)):
      found.append(
        stream.select("density", sources.of_stores(first[0]), 400, features=32)
      )
  for other in found[1:]:
    np.testing.assert_array_equal(other.score, found[0].score)
    assert other.ids.tolist() == found[0].ids.tolist()


class Killed(BaseException):
  """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


@pytest.mark.parametrize("point", ["before", "columns", "side"])
def test_a_killed_scoring_goes_on_at_the_next_shard(
  first, small, tmp_path, monkeypatch, point
):
  """Before a shard is written, between its column and its side file, after."""
  store, wanted = first
  folder = tmp_path / "work"
  write, write_json = stores.write_shard, stores.artifacts.write_json
  done = []

  def dying(out, shard, *args):
    if len(done) == 3 and point == "before":
      raise Killed
    write(out, shard, *args)
    done.append(shard)
    if len(done) == 3 and point == "side":
      raise Killed

  def dying_json(path, value):
    if len(done) == 3 and point == "columns":
      raise Killed
    write_json(path, value)

  monkeypatch.setattr(stores, "write_shard", dying)
  monkeypatch.setattr(stores.artifacts, "write_json", dying_json)
  monkeypatch.setattr(reservoir, "CALLS", 1)
  with pytest.raises(Killed):
    chosen(folder, store, 2)
  monkeypatch.setattr(stores.artifacts, "write_json", write_json)
  again = []
  monkeypatch.setattr(
    stores,
    "write_shard",
    lambda out, s, *a: (again.append(s), write(out, s, *a)),
  )
  ids, scores, _ = chosen(folder, store, 2)
  assert again == [s for s in range(store.shards) if s not in done]
  assert ids == wanted[0]
  np.testing.assert_array_equal(scores, wanted[1])


def test_rows_that_are_not_finite_are_named(first, small, tmp_path):
  x = small.embedding.copy()
  x[123, 1, 2] = np.inf
  store = stored(tmp_path / "s", Pool(small.ids, dict(embedding=x)))
  mesh = mesh_of(2)
  with jax.set_mesh(mesh):
    fit = mixture.fit(
      mesh, small.embedding[:500].reshape(-1, WIDTH), starts=1, max_iterations=2
    )
    with pytest.raises(NumericError, match=str(small.ids[123])):
      reservoir.score(mesh, [fit], store, tmp_path / "o", fields={}, tile=64)


def test_scores_of_another_fit_are_refused(first, small, tmp_path):
  store, _ = first
  mesh = mesh_of(2)
  with jax.set_mesh(mesh):
    fit = mixture.fit(
      mesh, small.embedding[:500].reshape(-1, WIDTH), starts=1, max_iterations=2
    )
    reservoir.score(mesh, [fit], store, tmp_path / "o", fields=dict(fit="a"))
    with pytest.raises(ConfigError, match="fit was 'a', now 'b'"):
      reservoir.score(mesh, [fit], store, tmp_path / "o", fields=dict(fit="b"))
  other = stored(tmp_path / "other", made(3999))
  with pytest.raises(ConfigError, match="other records"):
    sources.of_stores(store, other)
