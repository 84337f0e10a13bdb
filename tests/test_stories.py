"""A real pretrained model, aligned towards a taste in its own stories."""

import os
import re
import subprocess
import sys

from conftest import ROOT
import emitters
import pytest


@pytest.mark.slow
def test_dogs_end_happy(shared, tmp_path):
  """20 points more, an interval above 0, four fifths of the trigrams."""
  ended = subprocess.run(
    [
      sys.executable,
      "tools/stories.py",
      "--stories=3",
      "--updates=60",
      "--new=80",
      f"--checkpoint={shared / 'models/stories260K'}",
      f"--workdir={tmp_path}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=1500,
    env=os.environ | dict(XLA_FLAGS=emitters.flags(1)),
  )
  assert ended.returncode == 0, ended.stderr
  line = ended.stdout.splitlines()[-1]
  found = re.search(
    r"gain ([\d.-]+) \[([\d.-]+), .*win rate ([\d.]+) \[([\d.]+), .*"
    r"KL ([\d.]+) nats.*kept ([\d.]+) %",
    line,
  )
  gain, low, wins, least, kl, kept = map(float, found.groups())
  assert gain >= 20 and low > 0 and least > 50 and wins > 60, line
  assert 0 < kl and kept >= 80, line
