"""The same bits on any mesh, compiled as users compile.

The other tests compile with XLA's older emitters for CPUs, which are quicker to
(see emitters): rounding is theirs. What is promised of bits, and one training
run on several meshes, are asked of the default ones too.
"""

import os
import subprocess
import sys

import jobs
import pytest

FILES = (
  "sharding",
  "mixture",
  "embed",
  "reference",
  "samplers_geometric",
  "step",
)


@pytest.mark.slow
def test_bits_are_the_same_on_any_mesh():
  ended = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-q",
      "-o",
      "addopts=",
      "-m",
      "not slow",
      "-p",
      "no:cacheprovider",
      "-p",
      "no:xdist",
      "-k",
      "bits or identical or every_mesh_and_cut",
      *(f"tests/test_{name}.py" for name in FILES),
    ],
    cwd=jobs.ROOT,
    env=os.environ | dict(JAXALIGN_TEST_EMITTERS="new"),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  assert ended.returncode == 0, ended.stdout[-3000:]
  passed = int(ended.stdout.split(" passed")[0].split()[-1])
  assert passed >= 15, ended.stdout[-1000:]
