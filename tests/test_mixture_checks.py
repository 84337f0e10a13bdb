"""The checks of a mixture: unseen rows, the labels, its summary."""

import json

import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.select import mixture, mixture_checks


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(dict(fsdp=4, tensor=2))


def two_clusters(n=600, width=6, apart=6.0, seed=0):
  rng = np.random.default_rng(seed)
  label = np.arange(n) % 2
  x = rng.normal(size=(n, width))
  x[:, 0] += apart * label
  return x.astype(np.float32), label


def test_components_against_labels(mesh):
  x, label = two_clusters()
  fitted = mixture.fit_mixture(mesh, x, mixture.MixtureOptions(starts=2))
  found = mixture_checks.component_labels(fitted, x, label)
  assert found["accuracy"] > 0.99 and found["nmi"] > 0.95
  assert found["majority"] == 0.5
  noise = np.random.default_rng(1).integers(0, 2, len(x))
  found = mixture_checks.component_labels(fitted, x, noise)
  assert 0.5 <= found["accuracy"] < 0.6 and found["nmi"] < 0.03


def test_held_out_notices_memorised_rows(mesh):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(400, 40)).astype(np.float32)
  x[:, :2] *= 3  # else PCA itself prefers directions where fitted rows vary
  close = mixture_checks.held_out(
    mesh, x, mixture.MixtureOptions(pca=40, starts=1), responses=2
  )
  assert close["auc"] > 0.75
  assert close["mean_fitted"] > close["mean_held_out"] + 5
  wide = mixture_checks.held_out(
    mesh, x, mixture.MixtureOptions(pca=2, starts=1), responses=2
  )
  assert abs(wide["auc"] - 0.5) < 0.08


def test_the_summary_of_a_fit_is_json(mesh):
  x, _ = two_clusters(n=80)
  fitted = mixture.fit_mixture(mesh, x, mixture.MixtureOptions(starts=2))
  summary = mixture_checks.mixture_summary(fitted)
  got = json.loads(json.dumps(summary, allow_nan=False))
  assert len(got["bounds"]) == 2 and len(got["trace"]) == len(fitted.trace)
