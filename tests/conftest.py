"""Every test runs on eight CPU devices, offline, strict about ranks."""

import itertools
import os
import pathlib

import emitters

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# A busy machine may keep one of eight devices waiting for a minute; the
# default ends the process after 40 s.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
emitters.choose()
os.environ.update(
  HF_HUB_OFFLINE="1",
  HF_DATASETS_OFFLINE="1",
  TRANSFORMERS_OFFLINE="1",
  TOKENIZERS_PARALLELISM="false",
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


MAPS = 30_000  # Linux ends a process at 65,530
_tests = itertools.count()


# Files of a few long tests, longest first: a worker that comes to one at the
# end leaves the other idle for minutes. (xdist's own order is by number.)
LONG = (
  "stories",
  "trl_trajectory",
  "gpu_script",
  "multiprocess",
  "encoder",
  "columns",
  "lora_job",
  "aot",
  "resume",
  "artifacts",
  "crossfit",
  "as_compiled",
  "evidence",
  "pipeline",
  "losses_step",
)


def pytest_collection_modifyitems(items):
  """Sorts by file, the LONG ones first."""
  place = {f"test_{name}": i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Thousands of compiled programs in one process exhaust its memory maps."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_programs_of_a_long_file():
  yield
  if next(_tests) % 10:  # counting takes a few milliseconds
    return
  try:
    with open("/proc/self/maps", "rb") as maps:
      many = sum(1 for _ in maps) > MAPS
  except OSError:
    return
  if many:
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compiles():
  """Machine code that no LLVM pass has polished compiles in two thirds."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def once_a_mesh(tmp_path_factory):
  """`once_a_mesh(mesh, make)`: `make(folder)`, once for each shape of mesh."""
  made = {}

  def get(mesh, make):
    key = tuple(mesh.shape.values())
    if key not in made:
      made[key] = make(tmp_path_factory.mktemp("whole"))
    return made[key]

  return get


@pytest.fixture
def shared():
  """The folder of real data beside the checkout; skips where it is absent."""
  if not (SHARED / "README.md").exists():
    pytest.skip("needs the real data in ../shared, which is not here")
  return SHARED


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
  """A folder for the files of a dataset; `datasets` caches it in another."""
  datasets = pytest.importorskip("datasets")
  datasets.disable_progress_bars()
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  (tmp_path / "data").mkdir()
  return tmp_path / "data"


@pytest.fixture(params=[(1, 1), (4, 2)], ids=["1x1", "4x2"])
def mesh(request):
  """The current mesh: one device, then eight; a test must agree on both."""
  from jaxalign.core import sharding

  fsdp, tensor = request.param
  devices = jax.devices()[: fsdp * tensor]
  m = sharding.make_mesh(dict(fsdp=fsdp, tensor=tensor), devices)
  with jax.set_mesh(m):
    yield m


@pytest.fixture
def alone():
  """The current mesh: one device."""
  from models import make_mesh

  mesh = make_mesh()
  with jax.set_mesh(mesh):
    yield mesh


def token_rows(tokens, mask):
  """[rows, R, L] arrays -> token rows, as the scoring pass takes them.

  A row ends with its response; what lies behind the mask is padding.
  """
  import numpy as np

  from jaxalign.data import tokens as tokens_lib

  length = tokens.shape[-1]
  flat, on = tokens.reshape(-1, length), mask.reshape(-1, length)
  sizes = length - on[:, ::-1].argmax(-1)
  return tokens_lib.TokenRows(
    np.concatenate([t[:s] for t, s in zip(flat, sizes)]),
    np.cumsum([0, *sizes]),
    on.argmax(-1).astype(np.int32),
    np.zeros(len(flat), np.int32),
  )
