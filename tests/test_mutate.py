"""The mutation tool: what it changes, and what it says of weak tests."""

import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).resolve().parent.parent / "tools" / "mutate.py"

SOURCE = '''"""A module."""

def gain(x, cost=0.5):
  """x - cost, a docstring with 1 + 1 in it."""
  if x < 0:
    raise ValueError(f"x={x + 1}, wanted more")
  return x - cost
'''

TESTS = """
import pytest
import gains

def test_gain():
  assert gains.gain(3, cost=1.0) == 2
  with pytest.raises(ValueError):
    gains.gain(-1)
"""


def mutate(folder, tests, *flags):
  (folder / "gains.py").write_text(SOURCE)
  (folder / "test_gains.py").write_text(tests)
  # Workers of their own, which no mutant would reach.
  (folder / "pyproject.toml").write_text(
    '[tool.pytest.ini_options]\naddopts = "-n 2"\n'
  )
  ended = subprocess.run(
    [
      sys.executable,
      TOOL,
      folder / "gains.py",
      folder / "test_gains.py",
      f"--root={folder}",
      "--preload=pytest",
      "--jobs=2",
      *flags,
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (folder / "gains.py").read_text() == SOURCE
  return ended


def test_each_change_is_listed_once_and_messages_are_let_be(tmp_path):
  said = mutate(tmp_path, TESTS, "--list").stdout.splitlines()
  changes = sorted(line.split("gain: ", 1)[1] for line in said)
  assert changes == sorted(
    [
      "0.5  ->  1.0",
      "if x < 0: raise ValueError(f'x={x + 1}, wanted more')"
      "  ->  if not x < 0: raise ValueError(f'x={x + 1}, wanted more')",
      "x < 0  ->  x <= 0",
      "x < 0  ->  x > 0",
      "0  ->  1",
      "x - cost  ->  x + cost",
      "x - cost  ->  cost - x",
      "x - cost  ->  x",
      "x - cost  ->  cost",
    ]
  )


@pytest.mark.slow
def test_survivors_are_named(tmp_path):
  """The default is never used, and 0 and 1 are not tried: three survive."""
  ended = mutate(tmp_path, TESTS)
  survived = [
    line.rsplit("gain: ")[1]
    for line in ended.stdout.splitlines()
    if line.startswith("SURVIVED")
  ]
  assert sorted(survived) == ["0  ->  1", "0.5  ->  1.0", "x < 0  ->  x <= 0"]
  assert "6 of 9 noticed" in ended.stdout and ended.returncode == 1


def test_tests_that_notice_all_end_with_0(tmp_path):
  more = (
    TESTS
    + """
def test_edges():
  assert gains.gain(0) == -0.5
"""
  )
  ended = mutate(tmp_path, more, "--sample=3", "--seed=1")
  assert "3 of 3 noticed" in ended.stdout and ended.returncode == 0


def test_the_unchanged_file_must_pass(tmp_path):
  ended = mutate(tmp_path, TESTS.replace("== 2", "== 3"))
  assert ended.returncode == 1
  assert "fails its tests" in ended.stderr and "test_gain" in ended.stderr
