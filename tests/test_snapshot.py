"""Three small jobs give the numbers that stand in tests/snapshot.json.

A rebuilt part must not change a kept id, a score, a loss, an evaluation, a
cost or a verdict. On the machine that wrote the file they are equal to the
bit; elsewhere XLA orders sums otherwise, so they are held to a tolerance.

  python tests/test_snapshot.py            # what differs, to the bit
  python tests/test_snapshot.py --write    # writes the file
"""

import json
import pathlib
import re
import sys
import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest

FILE = pathlib.Path(__file__).with_name("snapshot.json")
STUDY = (
  "compare=('random','length')",
  "seeds=2",
  "sft.updates=150",
  "train.max_updates=40",
  "data.world.sft_rows=4000",
  "data.world.pool_rows=2000",
)
CASES = {  # name: (config, knobs)
  "pairs": ("dpo_sub.py:tiny", ()),
  "unpaired": ("kto_sub.py:tiny", ("train.batch_size=8",)),
  "study": ("dpo_sub.py:smoke", STUDY),
}
CURVES = re.compile(r"(loss|rewards|logps|kl)\b")


def numbers(value) -> list[float]:
  """Every number in a JSON value, sorted: names may change."""
  if isinstance(value, dict):
    value = [v for k, v in value.items() if "seconds" not in k and k != "bytes"]
  if isinstance(value, list):
    return sorted(x for v in value for x in numbers(v))
  if isinstance(value, bool) or not isinstance(value, int | float):
    return []
  return [float(value)]


def snapshot(work: pathlib.Path) -> dict:
  """What a finished job leaves that a rebuild must not change."""
  out = {}
  for arm in sorted((work / "runs").iterdir()):
    scores = pq.read_table(arm / "scores.parquet").to_pydict()
    lines = map(json.loads, (arm / "metrics.jsonl").read_text().splitlines())
    out[arm.name] = dict(
      kept=pq.read_table(arm / "subset.parquet")["id"].to_pylist(),
      scores=scores["score"][::8],
      curves=[
        {k: v for k, v in line.items() if CURVES.match(k)} for line in lines
      ],
      evaluation=numbers(json.loads((arm / "eval.json").read_text())),
    )
  summary = json.loads((work / "summary.json").read_text())
  words = " ".join(summary["verdicts"])
  ledger = summary["ledger"]
  return dict(
    arms=out,
    baseline=numbers(
      json.loads((work / "shared/baseline/eval.json").read_text())
    ),
    costs=numbers([ledger["arms"], ledger["everything"], ledger["saved"]]),
    verdicts=[float(x) for x in re.findall(r"[-+]?\d+(?:\.\d+)?", words)],
  )


def made(name: str, work: pathlib.Path) -> dict:
  import jobs

  config, knobs = CASES[name]
  ended = jobs.run(work, *knobs, config=config)
  assert ended.code == 0, ended.err
  return snapshot(work)


def differences(was, now, close, at: str = "") -> list[str]:
  """Where two snapshots differ; `close(a, b)` compares arrays of numbers."""
  if isinstance(was, dict):
    return [
      line
      for k in sorted({*was, *now})
      for line in (
        differences(was[k], now[k], close, f"{at}/{k}")
        if k in was and k in now
        else [f"{at}/{k} is in one of them alone"]
      )
    ]
  if was and isinstance(was, list) and isinstance(was[0], dict):
    if len(was) != len(now):
      return [f"{at}: {len(was)} entries, now {len(now)}"]
    return [
      line
      for i, pair in enumerate(zip(was, now))
      for line in differences(*pair, close, f"{at}[{i}]")
    ]
  if was and isinstance(was, list) and isinstance(was[0], str):
    return [] if was == now else [f"{at}: other ids"]
  a, b = np.atleast_1d(was), np.atleast_1d(now)
  if a.shape != b.shape:
    return [f"{at}: {a.size} numbers, now {b.size}"]
  if close(a, b):
    return []
  i = int(np.argmax(np.abs(a - b)))
  return [f"{at}: {a.flat[i]!r}, now {b.flat[i]!r}"]


@pytest.mark.parametrize(
  "name",
  [
    "pairs",
    pytest.param("unpaired", marks=pytest.mark.slow),
    pytest.param("study", marks=pytest.mark.slow),
  ],
)
def test_a_job_gives_the_numbers_it_gave(name, tmp_path):
  close = lambda a, b: np.allclose(a, b, rtol=2e-3, atol=2e-3)
  was = json.loads(FILE.read_text())[name]
  assert not differences(was, made(name, tmp_path / "job"), close)


def main(argv: list[str]) -> int:
  sys.path[:0] = [str(FILE.parent), str(FILE.parent.parent)]
  import conftest  # noqa: F401  (eight devices, as in the tests)

  now = {}
  for name in CASES:
    with tempfile.TemporaryDirectory() as folder:
      now[name] = json.loads(json.dumps(made(name, pathlib.Path(folder) / "j")))
  if "--write" in argv:
    FILE.write_text(json.dumps(now) + "\n")
    return 0
  found = differences(json.loads(FILE.read_text()), now, np.array_equal)
  print("\n".join(found) or "equal to the bit")
  return bool(found)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
