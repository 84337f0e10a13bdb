"""The card's figures by hand and against scikit-learn."""

import json

import numpy as np
import pytest
from sklearn import metrics

from jaxalign import sharding
from jaxalign.select import card, mixture
from jaxalign.select.pool import Pool, Selection


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(dict(fsdp=4, tensor=2))


def two_clusters(n=600, width=6, apart=6.0, seed=0):
  rng = np.random.default_rng(seed)
  label = np.arange(n) % 2
  x = rng.normal(size=(n, width))
  x[:, 0] += apart * label
  return x.astype(np.float32), label


def test_auc_and_nmi_equal_scikit_learn():
  rng = np.random.default_rng(0)
  high, low = rng.integers(2, 9, 50) * 1.0, rng.integers(0, 7, 80) * 1.0
  truth = np.r_[np.ones(50), np.zeros(80)]
  np.testing.assert_allclose(
    card.auc(high, low), metrics.roc_auc_score(truth, np.r_[high, low])
  )
  a, b = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
  for first, second in ((a, b), (a, a), (a, a // 2), (0 * a, 0 * b)):
    np.testing.assert_allclose(
      card.normalised_mutual_information(first, second),
      metrics.normalized_mutual_info_score(first, second),
      atol=1e-12,
    )


def test_jaccard():
  assert card.jaccard(np.array([1, 2, 3]), np.array([3, 4])) == 0.25
  assert card.jaccard(np.array([]), np.array([])) == 1.0


def test_components_against_labels(mesh):
  x, label = two_clusters()
  fitted = mixture.fit(mesh, x, mixture.MixtureOptions(starts=2))
  found = card.component_labels(fitted, x, label)
  assert found["accuracy"] > 0.99 and found["nmi"] > 0.95
  assert found["majority"] == 0.5
  noise = np.random.default_rng(1).integers(0, 2, len(x))
  found = card.component_labels(fitted, x, noise)
  assert 0.5 <= found["accuracy"] < 0.6 and found["nmi"] < 0.03


def test_held_out_notices_memorised_rows(mesh):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(400, 40)).astype(np.float32)
  x[:, :2] *= 3  # else PCA itself prefers directions where fitted rows vary
  close = card.held_out(
    mesh, x, mixture.MixtureOptions(pca=40, starts=1), responses=2
  )
  assert close["auc"] > 0.75
  assert close["mean_fitted"] > close["mean_held_out"] + 5
  wide = card.held_out(
    mesh, x, mixture.MixtureOptions(pca=2, starts=1), responses=2
  )
  assert abs(wide["auc"] - 0.5) < 0.08


def test_selection_card_is_json(mesh):
  x, label = two_clusters(n=80)
  length = np.arange(80, dtype=np.int32)[:, None]
  pool = Pool(
    np.array([f"{i:03d}" for i in range(80)]),
    {"length": length, "label": label == 1, "topic": np.arange(80) % 8},
  )
  rows = np.arange(0, 32, 8)  # topic 0, undesirable, short
  score = np.where(np.isin(np.arange(80), rows), 2.0, -1.0)
  score[79] = -np.inf
  fitted = mixture.fit(mesh, x, mixture.MixtureOptions(starts=2))
  got = json.loads(
    json.dumps(
      card.selection_card(
        pool,
        Selection(rows, score),
        fitted,
        {"held_out": {"auc": 0.5}},
        sampler="isa",
      ),
      allow_nan=False,
    )
  )
  assert got["sampler"] == "isa" and got["share"] == 0.05
  assert (got["selected"], got["pool"]) == (4, 80)
  assert got["topic"] == {
    "topics": 8,
    "covered": 1,
    "largest_share": 1.0,
    "largest_share_in_pool": 0.125,
    "moved": 0.875,
  }
  assert got["label_share"] == {"chosen": 0.0, "pool": 0.5}
  assert got["length"]["chosen"][2] == 12.0
  rest = np.setdiff1d(np.arange(80), rows)
  assert got["length"]["rest"][2] == np.median(rest)
  assert (got["mean_score_chosen"], got["mean_score_rest"]) == (2.0, -1.0)
  assert len(got["mixture"]["bounds"]) == 2
  assert got["diagnostics"]["held_out"]["auc"] == 0.5
  assert len(got["mixture"]["trace"]) == len(fitted.trace)


def test_card_of_everything_and_of_nothing():
  pool = Pool(
    np.array(["a", "b"]),
    {"length": np.ones((2, 2)), "label": np.array([True, False])},
  )
  for rows in (np.arange(2), np.empty(0, np.int64)):
    got = card.selection_card(pool, Selection(rows, np.zeros(2)))
    json.dumps(got, allow_nan=False)
