"""metrics.jsonl: read, written, and what a run is warned or stopped by.

Explosion, displacement and the end of improvement are read from its lines, so
a resumed run decides as an uninterrupted one.
"""

from collections.abc import Iterable, Sequence
import json
import math
import os
import statistics
from typing import Any, NamedTuple

from etils import epath
import jax

from jaxalign.core import disk
from jaxalign.core.errors import WriteError

Lines = Sequence[dict[str, Any]]

RECENT = 50  # updates that an exploding loss is compared with
FIRST = 10  # updates before it is compared at all
LEAST = 1.0  # nats that it is compared with at least: losses may be about 0
DRIFT_OVER = 20  # updates that a drift is averaged over
DRIFT = -0.1  # nats a chosen token: it has become a tenth less likely
WORSE = 0.1  # more answers without an end, or empty, than at first
# Measures, by their last name, of which less is better.
LOWER = ("loss", "ties", "malformed", "empty", "kl")


class Log:
  """The lines of a run, in memory and in its metrics.jsonl.

  A class because it knows how many of them the file has already.
  """

  def __init__(self, folder: epath.Path, until: int):
    """Reads the lines of steps before `until`: later ones are of lost steps."""
    self.path, self.lines = folder / "metrics.jsonl", []
    self.diverged = folder / "diverged.jsonl"
    self.written = 0  # lines that this run has put into the file
    text = self.path.read_text() if self.path.exists() else ""
    for line in text.splitlines():
      try:
        line = json.loads(line)
        if line["step"] < until:
          self.lines.append(line)
      except (ValueError, KeyError):
        break  # a torn last line of a killed run

  def write(self) -> None:
    """Writes the lines that are not in the file yet.

    The first time whole and atomic, which drops what lost steps and a torn line
    have left; then at the end, so that a save costs what is new. A kill may
    tear the last line; it belongs to a step that no checkpoint has.
    """
    new, done = self.lines[self.written :], self.written
    self.written = len(self.lines)
    if jax.process_index():
      return
    if not done or "://" in str(self.path):  # object stores cannot append
      disk.write_bytes(self.path, _text(self.lines))
    else:
      _append(self.path, _text(new))

  def write_diverged(self, since: int, last: dict[str, Any]) -> None:
    """Keeps how a run diverged in diverged.jsonl.

    Its lines from step `since` on and `last`, of the update that ended it; null
    where a number is not finite, which JSON cannot say.
    """
    bad = lambda x: isinstance(x, float) and not math.isfinite(x)
    last = {n: None if bad(x) else x for n, x in last.items()}
    kept = [x for x in self.lines if x["step"] >= since]
    if jax.process_index() == 0:
      disk.write_bytes(self.diverged, _text([*kept, last]))


def _append(path: epath.Path, data: bytes) -> None:
  """Writes at the end of a local file."""
  try:
    with open(os.fspath(path), "ab") as file:
      file.write(data)
  except OSError as error:
    raise WriteError(
      f"cannot write {path}: {error.strerror or error}; free space or "
      "permissions, or another --workdir"
    ) from error


def _text(lines: Iterable[dict[str, Any]]) -> bytes:
  return "".join(json.dumps(x, sort_keys=True) + "\n" for x in lines).encode()


def exploded(lines: Lines, loss: float, factor: float) -> float | None:
  """The bound that a loss is over, or None.

  The bound is `factor` times the largest of the first update's |loss|, the
  median |loss| of the last 50 updates, and a nat: a policy that fits its rows
  to 0.001 and meets a hard one has not exploded, and a loss that begins at 0
  or below has room. At 20, the default, a DPO run ends where the mean margin
  beta D of a batch is under -20.

  Args:
    lines: of the updates before.
    loss: of this update, finite.
    factor: more than 1; 0 turns it off.
  """
  if not factor or len(lines) < FIRST:
    return None
  recent = [abs(x["train/loss"]) for x in lines[-RECENT:]]
  bound = factor * max(
    abs(lines[0]["train/loss"]), LEAST, statistics.median(recent)
  )
  return bound if loss > bound else None


def displaced(lines: Lines) -> str:
  """Words for likelihood displacement in the newest updates; "" for none.

  The chosen answers lose probability against the reference while their margin
  over the rejected ones grows: what they lose goes to answers that are
  neither (Razin et al. 2024).
  """
  lines = [x for x in lines[-DRIFT_OVER:] if "drift/chosen" in x]
  if len(lines) < DRIFT_OVER or "drift/rejected" not in lines[-1]:
    return ""
  mean = lambda name: statistics.fmean(x[name] for x in lines if name in x)
  chosen, rejected = mean("drift/chosen"), mean("drift/rejected")
  each = chosen / max(mean("lengths/chosen"), 1.0)
  if each > DRIFT or chosen <= rejected:
    return ""
  return (
    f"the chosen answers are {-chosen:.1f} nats less likely than under "
    f"the reference ({-each:.2f} a token) while the margin grows to "
    f"{chosen - rejected:.1f}: likelihood displacement, their "
    "probability goes to answers that are neither. Look at generations "
    "(config.train.eval_sets), give config.loss.name a likelihood term "
    "('+0.2*sft') or a larger one, or raise beta"
  )


def collapsed(lines: Lines) -> str:
  """Words for answers that stop ending while pairs look better; "" for none."""
  seen = [x for x in lines if "eval/generations/ended" in x]
  if len(seen) < 2:
    return ""
  first, last = seen[0], seen[-1]
  bad = lambda x: 1 - x["eval/generations/ended"] + x["eval/generations/empty"]
  if bad(last) - bad(first) <= WORSE:
    return ""
  return (
    f"{bad(last):.0%} of the generated answers are empty or have no end "
    f"({bad(first):.0%} at the first evaluation); pair accuracy does not "
    "show this. Give config.loss.name a likelihood term ('+0.2*sft') or "
    "a larger one, raise beta, or stop earlier"
  )


class BestEvaluation(NamedTuple):
  """The best evaluation so far."""

  step: int  # updates done; 0: none
  value: float
  stale: int  # evaluations since


NONE = BestEvaluation(0, 0.0, 0)


def best_of(lines: Lines, name: str) -> BestEvaluation:
  """The first of the best values of a measure; one that is not finite is none.

  Args:
    lines: as they stand in metrics.jsonl.
    name: "held_out/accuracy"; of the last names in LOWER less is better.
  """
  sign = -1.0 if name.split("/")[-1] in LOWER else 1.0
  best = NONE
  for line in lines:
    value = line.get(f"eval/{name}")
    if value is None:
      continue
    finite = math.isfinite(value)
    if finite and (not best.step or sign * value > sign * best.value):
      best = BestEvaluation(line["step"] + 1, value, 0)
    elif best.step:
      best = best._replace(stale=best.stale + 1)
  return best
