"""Neighbours, shifts, spectra and reasons against float64 by hand."""

import itertools
import json

import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from jaxalign.core import errors, intervals, sharding
from jaxalign.select import neighbours
from jaxalign.select import selection_report as report
from jaxalign.select.pool import make_pool, Pool, Selection
from jaxalign.select.selection_report import (
  neighbourhood,
  reasons,
  shifts,
  spectra,
)
from jaxalign.select.topk import id_hash


def brute(x, queries, targets):
  """(row, squared distance) of the nearest other target, in float64."""
  x, rows, squares = np.float64(x), [], []
  for q in queries:
    best = (np.inf, -1)
    for t in sorted(targets):
      if t != q:
        d = float(((x[q] - x[t]) ** 2).sum())
        if d < best[0] * (1 - 1e-15):
          best = (d, t)
    rows.append(best[1])
    squares.append(best[0])
  return np.array(rows), np.array(squares)


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("kind", ["plain", "twins", "tight", "far"])
def test_nearest_is_exact(monkeypatch, block, kind):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(150, 6)).astype(np.float32)
  if kind == "twins":
    x[50:] = x[:100]  # of three equal rows, too
  if kind == "tight":  # where float32 products cannot tell
    x = (1000 + 1e-3 * x).astype(np.float32)
  if kind == "far":
    x[0] = 1e6  # one row that makes the bound on the error wide
  monkeypatch.setattr(neighbours, "TARGETS", block)
  monkeypatch.setattr(neighbours, "QUERIES", 16)
  read = lambda rows: x[rows]
  targets = rng.permutation(150)[:60]
  every = np.arange(150)
  for queries in (np.setdiff1d(every, targets), targets, every):
    got = neighbours.nearest(read, queries, targets)
    rows, squares = brute(x, queries, targets)
    assert_array_equal(got.row, rows)
    assert_allclose(got.squared, squares, rtol=1e-12)


def test_nearest_of_nothing_and_of_copies():
  x = np.zeros((9000, 4), np.float32)
  read = lambda rows: x[rows]
  got = neighbours.nearest(read, np.arange(9000), np.arange(9000))
  assert got.row[0] == 1 and (got.row[1:] == 0).all() and not got.squared.any()
  got = neighbours.nearest(read, np.array([3]), np.array([3]))
  assert got.row[0] == -1 and got.squared[0] == np.inf
  got = neighbours.nearest(read, np.array([3]), np.empty(0, np.int64))
  assert got.row[0] == -1


def test_wilson_interval():
  # Of 10 in 50: by hand, with z = 1.96 to six digits.
  got = intervals.wilson(10, 50)
  z = 1.959963984540054
  roots = np.roots([1 + z * z / 50, -(0.4 + z * z / 50), 0.04])
  assert got["value"] == 0.2
  assert_allclose(sorted(roots), [got["low"], got["high"]])
  assert intervals.wilson(0, 9)["low"] == 0.0
  assert intervals.wilson(9, 9)["high"] == 1.0
  assert intervals.wilson(0, 0)["value"] is None


def unit(embedding):
  """[N, R, E] -> centred unit rows, from the words of the docstring."""
  x = np.float64(embedding).mean(axis=1)
  x = x - x.mean(axis=0)
  return x / np.sqrt((x**2).sum(axis=1))[:, None]


def test_unit_rows():
  rng = np.random.default_rng(1)
  pool = Pool(
    np.arange(40).astype(str),
    {"embedding": rng.normal(size=(40, 2, 5)).astype(np.float32) + 3},
  )
  read = neighbours.unit_rows(pool)
  some = np.array([5, 3, 39])
  assert_allclose(read(some), unit(pool.embedding)[some], atol=1e-6)
  flat = Pool(pool.ids, {"embedding": np.ones((40, 1, 5), np.float32)})
  with pytest.raises(errors.NumericError, match="no direction.*ids 7"):
    neighbours.unit_rows(flat)(np.array([7]))
  with pytest.raises(errors.ConfigError, match="shape"):
    neighbours.unit_rows(Pool(pool.ids, {"embedding": np.ones(40)}))


def test_a_shift_of_a_mean_beside_every_subset():
  values = np.array([1.0, 2, 2, 5, 9, 11, 30, 4])
  kept = np.array([6, 4, 5])
  means = [values[list(s)].mean() for s in itertools.combinations(range(8), 3)]
  got = shifts.number(values, kept)
  assert_allclose(np.mean(means), got["pool"])
  assert_allclose(got["high"], 1.959963984540054 * np.std(means))
  assert got["low"] == -got["high"]
  assert_allclose(got["shift"], values[kept].mean() - 8.0)
  assert_allclose(got["effect"], got["shift"] / values.std(ddof=1))
  sigma = got["shift"] / np.std(means)
  tail = np.exp(-(sigma**2) / 2) / (sigma * np.sqrt(2 * np.pi))  # its bounds
  assert 2 * tail * (1 - 1 / sigma**2) < got["p"] < 2 * tail


def test_what_is_said_of_a_shift():
  rng = np.random.default_rng(0)
  values = rng.normal(size=100_000)
  order = np.argsort(values + 8 * rng.normal(size=100_000))
  got = shifts.number(values, order[-20_000:])  # certain, and small
  assert got["p"] < 1e-12 and got["verdict"] == "slight"
  assert shifts.number(values, rng.permutation(100_000)[:99])["p"] > 1e-3
  assert shifts.number(values, np.argsort(values)[-9000:])["verdict"] == "large"
  for kept in (np.arange(100_000), np.empty(0, np.int64)):
    assert shifts.number(values, kept)["verdict"] == "nothing to compare"
  flat = shifts.number(np.full(50, 0.1), np.arange(7))
  assert flat["p"] == 1.0 and flat["verdict"] == "within chance"


def test_shares_beside_every_subset():
  label = np.array(list("aaaabbbccd"))
  kept = np.array([0, 1, 2, 7])  # a a a c
  got = shifts.fractions(label, kept)
  assert [r["value"] for r in got["rows"]] == ["a", "b", "c", "d"]
  assert (got["values"], got["covered"]) == (4, 2)
  subsets = list(itertools.combinations(range(10), 4))
  p = []
  for row in got["rows"]:
    counts = np.array([(label[list(s)] == row["value"]).sum() for s in subsets])
    seen = (label[kept] == row["value"]).sum()
    tails = (counts <= seen).mean(), (counts >= seen).mean()
    p.append(min(1.0, 2 * min(tails)))
    assert row["kept"] == seen / 4
    assert row["pool"] == (label == row["value"]).mean()
    counts = np.sort(counts)  # the least value that so many are not above
    for key, q in (("low", 0.025), ("high", 0.975)):
      least = next(k for k in range(5) if (counts <= k).mean() >= q - 1e-12)
      assert row[key] == least / 4, (row, key)
  order = np.argsort(p, kind="stable")
  high = 0.0
  for place, i in enumerate(order):  # Holm, step by step
    high = max(high, min(1.0, p[i] * (4 - place)))
    assert_allclose(got["rows"][i]["p"], high)
  pool = {k: (label == k).mean() for k in "abcd"}
  moved = lambda s: (
    sum(abs((label[list(s)] == k).mean() - pool[k]) for k in "abcd") / 2
  )
  assert_allclose(got["moved"], moved(kept))
  every = np.array([moved(s) for s in subsets])
  assert_allclose(got["moved_chance"], every.mean(), atol=0.01)
  above = (every >= moved(kept) - 1e-9).mean()
  assert_allclose(got["moved_p"], above, atol=0.04)
  h = got["rows"][0]["effect"]
  assert_allclose(np.sin(h / 2 + np.arcsin(np.sqrt(0.4))) ** 2, 0.75)


def test_many_values_are_gathered_and_the_least_p_is_of_the_draws():
  got = shifts.fractions(np.arange(200) < 100, np.arange(100))
  assert got["moved"] == 0.5 and got["moved_p"] == 1 / (1 + shifts.DRAWS)
  values = np.repeat(np.arange(40), np.arange(40, 0, -1))
  got = shifts.fractions(values, np.arange(0, len(values), 7))
  assert len(got["rows"]) == shifts.LISTED + 1
  assert got["rows"][-1]["value"] is None
  for key in ("pool", "kept"):
    assert_allclose(sum(r[key] for r in got["rows"]), 1.0)
  assert json.dumps(got, allow_nan=False)


def with_spectrum(rng, n, values):
  """n rows whose covariance has just these eigenvalues."""
  q, _ = np.linalg.qr(np.c_[np.ones(n), rng.normal(size=(n, len(values)))])
  turn, _ = np.linalg.qr(rng.normal(size=(len(values),) * 2))
  return q[:, 1:] * np.sqrt(n * np.asarray(values)) @ turn + 5.0


def test_spectra_of_rows_made_with_them():
  rng = np.random.default_rng(0)
  values = np.arange(1, 41.0) ** -1.5
  for n in (41, 90):
    x = with_spectrum(rng, n, values)
    got = spectra.eigenvalues(x)
    assert_allclose(got[:40], values, rtol=1e-9)
    assert_allclose(spectra.decay(got), -1.5, rtol=1e-6)
    p = values / values.sum()
    rank = np.prod(p**-p)
    assert_allclose(spectra.effective_rank(got), rank)
    assert_allclose(spectra.participation(x @ x.T), 1 / (p**2).sum(), rtol=1e-9)
  even = spectra.eigenvalues(with_spectrum(rng, 50, np.ones(7)))
  assert_allclose(spectra.effective_rank(even), 7.0)
  short = spectra.eigenvalues(rng.normal(size=(5, 30)))  # fewer rows than E
  assert len(short) == 5 and short[-1] < 1e-12
  assert spectra.effective_rank(np.zeros(3)) == 0.0


@pytest.mark.parametrize("paired", [False, True])
def test_the_gap_of_groups(paired):
  rng = np.random.default_rng(0)
  n, narrow = 200, 3.0 ** -np.arange(12)
  a = rng.normal(size=(n, 12))
  x = np.stack([a, rng.normal(size=(n, 12)) * np.sqrt(narrow) + 4.0], axis=1)
  group, draw = np.tile([0, 1], n), rng.permutation(2 * n).astype(np.uint64)
  got = spectra.compare(x.reshape(-1, 12), group, draw, ["a", "b"], paired)
  assert [g["name"] for g in got["groups"]] == ["a", "b"]
  for k, one in enumerate(got["groups"]):
    rank = spectra.effective_rank(spectra.eigenvalues(x[:, k]))
    assert_allclose(one["effective_rank"], rank)
  values = [np.linalg.svd(x[:, k] - x[:, k].mean(0))[1] ** 2 for k in range(2)]
  rank = [v.sum() ** 2 / (v**2).sum() for v in values]
  assert_allclose(got["gap"], rank[0] / rank[1], rtol=1e-4)
  assert got["gap"] > 3 * got["gap_high"] and got["p"] == 1 / 40
  x[:, 1] = rng.normal(size=(n, 12)) + 4.0  # another mean, one spectrum
  same = spectra.compare(x.reshape(-1, 12), group, draw, ["a", "b"], paired)
  assert same["p"] > 0.025 and same["gap"] < 1.2
  assert "why" in spectra.compare(x.reshape(-1, 12), 0 * group, draw)


def test_kept_rows_in_one_direction_have_less_rank():
  rng = np.random.default_rng(0)
  pool = rng.normal(size=(800, 10))
  narrow = pool[np.argsort(-pool[:, 0])[:80]] * [9, *[1] * 9]
  got = spectra.kept_rank(narrow, pool)
  assert got["kept"] < got["low"] < got["chance"] < got["high"]
  fair = spectra.kept_rank(rng.normal(size=(80, 10)), pool)
  assert fair["low"] * 0.95 < fair["kept"] < fair["high"] * 1.05
  assert "why" in spectra.kept_rank(pool[:5], pool)


@pytest.mark.parametrize("n,width", [(60, 9), (9, 60)])
def test_the_plane_of_the_map(n, width):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, width)) * (1 + np.arange(width))
  got = spectra.principal_plane(x)
  _, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
  assert_allclose(np.abs((got.components_ * v[:2]).sum(1)), 1.0)
  explained = got.explained_variance_ratio_
  assert_allclose(explained, s[:2] ** 2 / (s**2).sum())
  peak = np.abs(got.components_).argmax(axis=1)
  assert (got.components_[[0, 1], peak] > 0).all()


# The whole report.


def make(n=160, seed=0, sides=2):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, sides, 8)).astype(np.float32)
  x[n // 2 : n // 2 + 20] = x[:20] + 0.01  # near-duplicates
  ids = [f"r{i:04d}" for i in rng.permutation(n)]
  length = rng.integers(3, 200, (n, sides))
  source = rng.choice(["web", "chat"], n)
  return make_pool(ids, dict(embedding=x, length=length, source=source))


def test_a_report_beside_float64():
  pool = make()
  score = np.random.default_rng(1).normal(size=160)
  kept = np.argsort(-score)[:40]
  got, table = report.describe(pool, Selection(kept, score), "random")
  json.dumps(got, allow_nan=False)
  x, mask = unit(pool.embedding), np.isin(np.arange(160), kept)
  cosine = x @ x.T
  np.fill_diagonal(cosine, -2)
  inside = np.where(mask[None], cosine, -2)
  assert_array_equal(table["near"], pool.ids[inside.argmax(1)])
  best, quantiles = inside.max(1), (0.05, 0.25, 0.5, 0.75, 0.95)
  assert_allclose(table["cosine"], best, atol=1e-6)
  code = np.where(mask, 2, 0) + 1 + (best >= 0.95)
  assert_array_equal(table["near_code"], code)
  near = got["geometry"]["neighbours"]
  assert near["compared"] == near["of"] == 120
  wanted = np.quantile(best[~mask], quantiles)
  assert_allclose(near["quantiles"], wanted, atol=1e-6)
  assert near["near_copy"]["value"] == (best[~mask] >= 0.95).mean()
  drawn = np.argsort(id_hash(pool.ids, "card"), kind="stable")
  chance = cosine[np.ix_(drawn[40:], drawn[:40])].max(1)
  assert_allclose(near["random"], np.quantile(chance, quantiles), atol=1e-6)
  copies = got["geometry"]["near_duplicates"]
  assert copies["kept"]["value"] == (best[mask] >= 0.95).mean()
  assert copies["pool"]["value"] == (cosine.max(1) >= 0.95).mean() >= 0.25
  assert copies["random"]["n"] == 40
  order = np.argsort(-score)
  assert_array_equal(table["rank"][order], np.arange(1, 161))
  assert got["cut"] == score[kept].min()
  assert got["shown"] == {"kept": 40, "left": 120}
  words, i = reasons.sentences(got, table), int(order[40])
  figure = reasons.in_script(reasons.figure(score[i]))
  start = f"Left out at rank 41: its score, {figure}, is below"
  assert words[i].startswith(start) and str(table["near"][i]) in words[i]
  assert all(("Kept at" in s) == k for s, k in zip(words, mask))
  assert sum("nearly repeats" in s for s in words) == (best >= 0.95).sum()
  length = pool.length.mean(1)
  low, high = np.quantile(length, [0.05, 0.95])
  for s, value in zip(words, length):
    assert ("5 % longest" in s) == (value > high)
    assert ("5 % shortest" in s) == (value < low)
  lengths = ["response length", "chosen minus rejected length"]
  assert [s["name"] for s in got["shifts"]] == [*lengths, "source", "topic"]
  assert got["topics_are"] == "clusters"
  assert_allclose(got["shifts"][0]["kept"], length[kept].mean())
  gap = np.float64(pool.length[:, 0] - pool.length[:, 1])
  assert_allclose(got["shifts"][1]["shift"], gap[kept].mean() - gap.mean())
  assert len(got["examples"]) == 20 and got["examples"][0]["rank"] == 1


def test_the_report_of_rows_in_another_order_is_the_same():
  pool = make()
  score = np.round(np.random.default_rng(1).normal(size=160), 1)  # ties
  kept = np.argsort(-score, kind="stable")[:40]
  turn = np.random.default_rng(2).permutation(160)
  columns = {k: v[turn] for k, v in pool.columns.items()}
  again = make_pool(pool.ids[turn], columns)
  one = report.describe(pool, Selection(kept, score))
  two = report.describe(again, Selection(kept, score))
  assert json.dumps(one[0]) == json.dumps(two[0])
  assert_array_equal(one[1]["x"], two[1]["x"])


def test_the_report_is_the_same_on_any_mesh(mesh):
  pool, score = make(), np.random.default_rng(1).normal(size=160)
  del mesh  # it is the current one; the other report is made on all devices
  picked = Selection(np.argsort(-score)[:40], score)
  here = report.describe(pool, picked)
  with jax.set_mesh(sharding.make_mesh(dict(fsdp=8, tensor=1))):
    there = report.describe(pool, picked)
  assert json.dumps(here[0]) == json.dumps(there[0])


def test_the_reasons():
  pool = Pool(np.array(list("abcdefg")), {})
  score = np.array([5.0, 4, 3, 3, 6, -np.inf, 1e-5])
  why = reasons.why(Selection(np.array([0, 2]), score), 7)
  assert_array_equal(why, [1, 4, 1, 3, 4, 5, 2])
  why = reasons.why(Selection(np.array([4, 0, 1]), score), 7)
  assert_array_equal(why, [0, 0, 2, 2, 0, 5, 2])
  rank = reasons.ranks(pool, Selection(np.array([2, 0]), score))
  assert_array_equal(rank[[2, 0, 4, 1, 3, 6, 5]], np.arange(1, 8))
  words = {1e-5: "1e-5", 1.2345678e-7: "1.23457e-7", 3.0: "3", -0.25: "-0.25"}
  words |= {1234567: "1234570", 0.0: "0", -1.34087125: "-1.34087"}
  for value, text in (words | {np.nan: "none"}).items():
    assert reasons.in_script(reasons.figure(value)) == text


def test_a_large_pool_is_sampled():
  pool, score, kept = make(), np.arange(160.0), np.arange(159, 39, -1)
  show = lambda rows: report.describe(pool, Selection(rows, score), limit=60)
  got, table = show(kept)
  assert got["shown"] == {"kept": 45, "left": 15}
  assert table["kept"].sum() == 45 and len(table["kept"]) == 60
  assert_array_equal(table["id"], show(kept)[1]["id"])
  assert got["geometry"]["neighbours"]["compared"] == 15
  assert show(kept[:10])[0]["shown"] == {"kept": 10, "left": 50}


def test_neighbours_stay_within_their_flops(monkeypatch):
  monkeypatch.setattr(neighbourhood, "WORK", 2.0 * 40 * 8 * 50)  # 50 of 120
  selection = Selection(np.arange(40), np.arange(160.0))
  got, table = report.describe(make(), selection)
  near = got["geometry"]["neighbours"]
  assert (near["compared"], near["of"]) == (50, 120)
  assert (table["near"][~table["kept"]] != "").sum() == 50


@pytest.mark.parametrize("kind", ["constant", "nan"])
def test_an_embedding_without_directions_is_reported(kind):
  pool = make()
  x = np.ones_like(pool.embedding)
  if kind == "nan":
    x = pool.embedding.copy()
    x[3, 0, 0] = np.nan
  pool = Pool(pool.ids, pool.columns | {"embedding": x})
  got, table = report.describe(pool, Selection(np.arange(9), np.zeros(160)))
  assert "no direction" in got["geometry"]["why"]
  assert not any(table["near"]) and "x" not in table
  json.dumps(got, allow_nan=False)


def test_clusters_are_named_by_their_words():
  rng = np.random.default_rng(0)
  kind = np.arange(400) % 2
  x = rng.normal(size=(400, 1, 6)) * 0.1
  x[:, 0, 0] += 3 * kind
  words = ("volcano", "violin")
  texts = [f"the {words[k]} is number {i}" for i, k in enumerate(kind)]
  ids = np.array([f"{i:03d}" for i in range(400)])
  pool = Pool(ids, {"embedding": x.astype(np.float32)})
  names = neighbourhood.clusters(pool, np.arange(400, dtype=np.uint64), texts)
  for k, word in enumerate(words):
    assert {word in n for n in names[kind == k]} == {True}
  assert any(n.startswith("cluster 1: ") for n in names)


def test_overlaps_and_alternatives():
  a, b = np.arange(10), np.arange(5, 15)
  (got,) = report.overlaps({"a": a, "b": b}, 100)
  assert (got["a"], got["b"], got["jaccard"]) == ("a", "b", 5 / 15)
  # Of 10 and 10 in 100, no shared row has a chance of 0.33, at most 3 of 0.99
  # and at most 2 of 0.94.
  assert (got["low"], got["high"]) == (0.0, 3 / 17)
  sets = {"a": np.arange(60), "b": np.arange(30, 90)}
  wide = report.overlaps(sets, 100)[0]
  shared = np.array([wide["low"], wide["high"]])
  shared = 120 * shared / (1 + shared)  # of 120 - k, k are shared
  assert_allclose(shared, np.round(shared))
  assert 0 < wide["low"] < 36 / 84 < wide["high"] < 1
  rng = np.random.default_rng(0)
  draw = lambda: rng.choice(100, 10, False)
  drawn = np.array([report.jaccard(draw(), draw()) for _ in range(4000)])
  assert (drawn < got["low"]).mean() <= 0.025 + 0.01
  assert (drawn > got["high"]).mean() <= 0.025 + 0.01
  assert report.jaccard(np.array([1, 2, 3]), np.array([3, 4])) == 0.25
  assert report.jaccard(np.array([]), np.array([])) == 1.0
  pool = make()
  found = report.alternatives(pool, 20, "length")
  assert set(found) == {"random", "stratified"}
  pool.columns["answer_embedding"] = pool.embedding
  found = report.alternatives(pool, 20, "length")
  assert set(found) == {"random", "stratified", "real"}
  assert all(len(rows) == 20 for rows in found.values())
  chain = "dedup(threshold=0.9) | length(direction=low) * random"
  assert "length" not in report.alternatives(pool, 20, chain)
  for name in ("random", "gate(column=reward) | random() * mine:own"):
    assert report.about(name).startswith("Uniformly drawn rows")
  assert report.about("mine:own") == ""


def test_a_report_is_json_and_counts_lengths_topics_and_labels():
  n = np.arange(80)
  columns = dict(length=n[:, None], label=n % 2 == 1, topic=n % 8)
  pool = Pool(np.array([f"{i:03d}" for i in n]), columns)
  rows = np.arange(0, 32, 8)  # topic 0, undesirable, short
  score = np.where(np.isin(np.arange(80), rows), 2.0, -1.0)
  score[79] = -np.inf
  checks = {"held_out": {"auc": 0.5}}
  selection = Selection(rows, score)
  got, _ = report.describe(pool, selection, "isa", diagnostics=checks)
  got = json.loads(json.dumps(got, allow_nan=False))
  assert got["sampler"] == "isa" and got["fraction"] == 0.05
  assert (got["selected"], got["pool"], got["cut"]) == (4, 80, 2.0)
  assert got["topic"] == {"topics": 8, "covered": 1}
  topic = next(s for s in got["shifts"] if s["name"] == "topic")
  assert topic["moved"] == 0.875 and topic["rows"][0]["pool"] == 0.125
  assert got["length"]["chosen"][2] == 12.0
  rest = np.setdiff1d(np.arange(80), rows)
  assert got["length"]["rest"][2] == np.median(rest)
  assert got["diagnostics"]["held_out"]["auc"] == 0.5


@pytest.mark.parametrize("rows", [np.arange(2), np.empty(0, np.int64)])
def test_a_report_of_everything_and_of_nothing(rows):
  columns = {"length": np.ones((2, 2)), "label": np.array([True, False])}
  pool = Pool(np.array(["a", "b"]), columns)
  got, _ = report.describe(pool, Selection(rows, np.zeros(2)))
  json.dumps(got, allow_nan=False)
