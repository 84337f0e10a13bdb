"""The training loop: one step in flight, metrics of the one before."""

import json
import math
import tempfile
import time
from typing import Any, Callable

from etils import epath
import jax

from jaxalign import artifacts
from jaxalign import interrupt
from jaxalign import progress
from jaxalign.checkpoints import Checkpoints
from jaxalign.errors import NumericError
from jaxalign.train.metrics import divide


def _read_log(path: epath.Path, until: int) -> list[str]:
  """The lines of steps before `until`: later ones belong to lost steps."""
  if not path.exists():
    return []
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] < until:
        kept.append(line)
    except (ValueError, KeyError):
      break  # a torn last line of a killed run
  return kept


def _items(state: Any) -> dict[str, Any]:
  """Parameters apart: evaluation restores them alone. What is empty is left
  out, as in the checkpoints of before there was a delta."""
  return dict(params=state.params, rest=[
      state.opt_state, state.step, *([state.delta] if state.delta else [])])


def _trace(folder: epath.Path) -> Callable[[], None]:
  """Starts a profile; the function returned ends it, and it is in `folder`.

  The profiler writes local files alone: for gs:// it writes into a temporary
  folder, which is then copied.
  """
  if "://" not in str(folder):
    jax.profiler.start_trace(str(folder))
    return jax.profiler.stop_trace
  local = epath.Path(tempfile.mkdtemp(prefix="jaxalign_profile_"))
  jax.profiler.start_trace(str(local))

  def stop():
    jax.profiler.stop_trace()
    for root, _, names in local.walk():
      for name in names:
        at = epath.Path(root) / name
        artifacts.write_bytes(folder / at.relative_to(local), at.read_bytes())
    local.rmtree()

  return stop


def fit(state: Any, train_step: Callable, batch_at: Callable[[int], Any],
        ids_at: Callable[[int], list[str]], *, folder: Any, label: str,
        updates: int, save_every: int, tokens_at: Callable[[int], int],
        trace: tuple[int, int] = (0, 0),
        useful_at: Callable[[int], int] | None = None,
        peak: float = 0.0) -> Any:
  """Runs `updates` updates, or the rest of them, and returns the last state.

  Args:
    state: a fresh TrainState; replaced by the newest verified checkpoint.
    train_step: `(state, batch) -> (state, (sum, count) metrics)`; donates.
    batch_at: a pure function of the step, so that a resumed run sees the very
      batches of an uninterrupted one.
    ids_at: record ids of a step's batch, to name them in an error.
    folder: gets `checkpoints/` and `metrics.jsonl`.
    label: what the progress bar says.
    updates: updates in all.
    save_every: updates between checkpoints.
    tokens_at: non-padding tokens of a step's batch.
    trace: (first, last) steps to profile; (0, 0) for none.
    useful_at: operations of a step, for "perf/mfu".
    peak: FLOP/s of all devices together; 0: not known, no "perf/mfu".

  Raises:
    NumericError: a loss or gradient norm that is not finite; names the ids
      of the batch, and nothing from that step on is saved.
    RestartError: SIGTERM came (KeyboardInterrupt: SIGINT); the state is
      saved.
  """
  folder = epath.Path(folder)
  log_path = folder / "metrics.jsonl"
  with Checkpoints(folder / "checkpoints") as checkpoints:
    start = checkpoints.latest() or 0
    if start:
      shapes = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
          _items(state))
      found = checkpoints.restore(start, shapes)
      state = type(state)(found["params"], *found["rest"])
      progress.say(f"  {label}: going on from step {start}")
    lines = _read_log(log_path, start)
    began = last = time.monotonic()
    flying = None  # (step, totals) whose metrics are not read yet

    def read():
      nonlocal flying, last
      step, totals = flying
      values = divide(jax.device_get(totals))
      if not (math.isfinite(values["loss"])
              and math.isfinite(values["grad_norm"])):
        ids = ids_at(step)
        raise NumericError(
            f"{label}: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']} at step {step}; nothing after step "
            f"{checkpoints.manager.latest_step() or 0} is saved. Rows of the "
            f"batch: {', '.join(ids[:8])}"
            f"{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}; lower "
            "the learning rate or look at these rows")
      now = time.monotonic()
      seconds = max(now - last, 1e-9)
      perf = {"perf/tokens_per_s": tokens_at(step) / seconds,
              "time": now - began}
      if useful_at and peak:
        perf["perf/mfu"] = useful_at(step) / (seconds * peak)
      last = now
      named = {f"train/{n}" if "/" not in n else n: v
               for n, v in values.items()}
      lines.append(json.dumps({"step": step} | named | perf, sort_keys=True))
      flying = None
      return values["loss"]

    def save(step):
      if flying:
        read()  # a state is saved only after its metrics were seen finite
      if jax.process_index() == 0:  # first: a resumed run drops lines too many
        artifacts.write_bytes(log_path, ("\n".join(lines) + "\n").encode())
      checkpoints.save(step, _items(state))

    with interrupt.deferred() as requested, progress.bar(
        label, updates, "steps", start) as tick:
      for step in range(start, updates):
        if trace[1] > trace[0] and step == trace[0]:
          tracing = _trace(folder / "profile")
        state, totals = train_step(state, batch_at(step))
        loss = read() if flying else None
        flying = (step, totals)
        if trace[1] > trace[0] and step == trace[1] - 1:
          jax.block_until_ready(totals)
          tracing()
        tick(1, f"loss {loss:.3f}" if loss is not None else "")
        stop = requested()
        if (step + 1) % save_every == 0 or step + 1 == updates or stop:
          save(step + 1)
        if stop:
          break  # leaving `deferred` raises
  return state
