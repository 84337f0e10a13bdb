"""The training loop: one step in flight, metrics of the one before."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
import math
import os
import tempfile
import time
from typing import Any

from etils import epath
import jax

from jaxalign.core import artifacts, interrupt, progress
from jaxalign.core.checkpoints import Checkpoints
from jaxalign.core.errors import ConfigError, NumericError, WriteError
from jaxalign.train import trackers as trackers_lib
from jaxalign.train import watch
from jaxalign.train.metrics import divide

DIVERGED = "diverged.jsonl"  # how a run came to an end that nobody wanted


def _read_log(path: epath.Path, until: int) -> list[dict[str, Any]]:
  """The lines of steps before `until`: later ones belong to lost steps."""
  if not path.exists():
    return []
  kept = []
  for text in path.read_text().splitlines():
    try:
      line = json.loads(text)
      if line["step"] < until:
        kept.append(line)
    except (ValueError, KeyError):
      break  # a torn last line of a killed run
  return kept


def _text(lines: Iterable[dict[str, Any]]) -> bytes:
  return "".join(json.dumps(x, sort_keys=True) + "\n" for x in lines).encode()


def _append(path: epath.Path, data: bytes) -> None:
  """Writes at the end of a local file."""
  try:
    with open(os.fspath(path), "ab") as file:
      file.write(data)
  except OSError as error:
    raise WriteError(
      f"cannot write {path}: {error.strerror or error}; free "
      "space or permissions, or another --workdir"
    ) from error


def _write_log(
  path: epath.Path, lines: list[dict[str, Any]], there: int
) -> None:
  """Writes the lines of a run, of which the first `there` are in the file.

  The first time whole and atomic, which drops what lost steps and a torn line
  have left; then at the end, so that a save costs what is new. A kill may tear
  the last line; it belongs to a step that no checkpoint has.
  """
  if not there or "://" in str(path):  # object stores cannot append
    artifacts.write_bytes(path, _text(lines))
  else:
    _append(path, _text(lines[there:]))


def _write_diverged(
  folder: epath.Path, lines: list[dict[str, Any]], last: dict[str, Any]
) -> epath.Path:
  """Keeps how a run diverged: its lines since the last save, as the log would
  have had them, and `last`, of the update that ended it; null where a number
  is not finite, which JSON cannot say."""
  path = folder / DIVERGED
  last = {
    n: None if isinstance(x, float) and not math.isfinite(x) else x
    for n, x in last.items()
  }
  if jax.process_index() == 0:
    artifacts.write_bytes(path, _text([*lines, last]))
  return path


def _items(state: Any) -> dict[str, Any]:
  """Parameters, their mean and the reference apart: evaluation restores one
  alone. What is empty is left out, as in checkpoints of before it was there."""
  return dict(
    params=state.params,
    rest=[state.opt_state, state.step, *([state.delta] if state.delta else [])],
    **{n: getattr(state, n) for n in ("ema", "ref") if getattr(state, n)},
  )


def _restore(checkpoints: Checkpoints, state: Any, step: int) -> Any:
  """The state of a step, laid as `state` is."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _items(state),
  )
  found = checkpoints.restore(step, shapes)
  fresh = type(state)(found.pop("params"), *found.pop("rest"))
  return fresh._replace(**found)


def _known_best(
  bests: Checkpoints,
  checkpoints: Checkpoints,
  state: Any,
  lines: list[dict[str, Any]],
  start: int,
  name: str,
) -> watch.Best:
  """The best evaluation that the log knows and whose weights are there."""
  for step in sorted(bests.manager.all_steps()):
    if step > start:  # of steps that were lost with a damaged checkpoint
      bests.delete(step)
  best, there = watch.best_of(lines, name), bests.latest()
  if best.step and best.step == start and there != start:
    bests.save(start, dict(params=state.ema or state.params))
    bests.finish()
    there = start
  if best.step and best.step != there:
    progress.say(
      f"  the weights of the best {name}, of step {best.step}, are "
      "gone; counting from here on"
    )
    lines[:] = [
      {n: x for n, x in line.items() if n != f"eval/{name}"} for line in lines
    ]
    best = watch.Best(0, 0.0, 0)
  return best


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


def fit(
  state: Any,
  train_step: Callable,
  batch_at: Callable[[int], Any],
  ids_at: Callable[[int], list[str]],
  *,
  folder: Any,
  label: str,
  updates: int,
  save_every: int,
  tokens_at: Callable[[int], int],
  trace: tuple[int, int] = (0, 0),
  distinct_at: Callable[[int], int] | None = None,
  useful_at: Callable[[int], int] | None = None,
  peak: float = 0.0,
  keep: int = 2,
  background: bool = False,
  explode: float = 0.0,
  evaluations: Mapping[str, Callable[[Any], Mapping[str, float]]] = {},
  eval_every: int = 0,
  best: str = "",
  stop_after: int = 0,
  trackers: tuple[str, ...] = (),
) -> Any:
  """Runs `updates` updates, or the rest of them, and returns the last state.

  Args:
    state: a fresh TrainState; replaced by the newest verified checkpoint.
    train_step: `(state, batch) -> (state, (sum, count) metrics)`; donates.
    batch_at: a pure function of the step, so that a resumed run sees the very
      batches of an uninterrupted one.
    ids_at: record ids of a step's batch, to name them in an error.
    folder: gets `checkpoints/` and `metrics.jsonl`, `best/`, and where the
      run diverged `diverged.jsonl`.
    label: what the progress bar says.
    updates: updates in all.
    save_every: updates between checkpoints.
    tokens_at: non-padding tokens of a step's batch, a pair's prompt counted
      with each of its answers, for "perf/tokens_per_s".
    trace: steps to profile, the first and the one after the last; a run that
      goes on inside begins there. (0, 0): none.
    distinct_at: the same with a pair's prompt counted once, as packed rows
      compute it, for "perf/distinct_tokens_per_s".
    useful_at: flops of a step, for "perf/mfu".
    peak: FLOP/s of all devices together; 0: not known, no "perf/mfu".
    keep: checkpoints that are left, see `Checkpoints`.
    background: whether they are written while training goes on.
    explode: a loss over so many times what it was ends the run, see
      `watch.exploded`; 0: only one that is not finite does.
    evaluations: name of a set -> `measure(params)` -> {name: value}, the same
      on every process; params are the running mean where there is one. Logged
      as "eval/<set>/<name>" in the line of the last update before.
    eval_every: updates between evaluations, and one at the end; 0: none.
    best: "<set>/<name>": the weights of its best evaluation are kept in
      `best/`; of the names in `watch.LOWER` less is better.
    stop_after: evaluations without a better `best` after which the run ends;
      0: it runs to its end.
    trackers: keys of `trackers.TRACKERS`.

  Raises:
    NumericError: a loss or gradient norm that is not finite, or a loss that
      exploded; names the ids of the batch, and nothing from that step on is
      saved. All ids, and the lines since the last save, are in
      `diverged.jsonl`. Or: no value of `best` was finite.
    RestartError: SIGTERM came (KeyboardInterrupt: SIGINT); the state is
      saved.
  """
  folder = epath.Path(folder)
  log_path = folder / "metrics.jsonl"
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      Checkpoints(folder / "checkpoints", keep, background)
    )
    start = checkpoints.latest() or 0
    if start:
      state = _restore(checkpoints, state, start)
      progress.say(f"  {label}: going on from step {start}")
    lines = _read_log(log_path, start)
    record = watch.Best(0, 0.0, 0)
    if best:
      # Two: the older one is there while the newer one is written.
      bests = stack.enter_context(Checkpoints(folder / "best", 2, background))
      record = _known_best(bests, checkpoints, state, lines, start, best)
    if stop_after and record.stale >= stop_after:
      return state
    tracker = trackers_lib.open_all(trackers, folder, label, start)
    stack.callback(tracker.close)
    tracing = stack.enter_context(contextlib.ExitStack())
    traced = False
    began = last = time.monotonic()
    flying = None  # (step, totals) whose metrics are not read yet
    written = 0  # lines that this run has put into the log
    warned = set()

    def alarm(kind, text):
      if text and kind not in warned:
        progress.say(f"  {label}, step {lines[-1]['step']}: {text}")
      if text:
        lines[-1][f"alarm/{kind}"] = 1.0
        warned.add(kind)

    def read():
      nonlocal flying, last
      step, totals = flying
      values = divide(jax.device_get(totals))
      loss, norm = values["loss"], values["grad_norm"]
      wrong = ""
      if not (math.isfinite(loss) and math.isfinite(norm)):
        wrong = f"loss {loss}, gradient norm {norm} at step {step}"
      elif bound := watch.exploded(lines, loss, explode):
        wrong = (
          f"loss {loss:.4g} at step {step} is over {bound:.4g}, "
          f"train.explode={explode:g} times what it was (gradient norm "
          f"{norm:.4g})"
        )
      named = {"step": step} | {
        f"train/{n}" if "/" not in n else n: v for n, v in values.items()
      }
      if wrong:
        ids = ids_at(step)
        checkpoints.finish()
        saved = checkpoints.manager.latest_step() or 0
        path = _write_diverged(
          folder,
          [x for x in lines if x["step"] >= saved],
          named | dict(why=wrong, ids=ids),
        )
        tracker.log(step, {n: v for n, v in named.items() if n != "step"})
        raise NumericError(
          f"{label}: {wrong}; nothing after step {saved} is saved. Rows of "
          f"the batch: {', '.join(ids[:8])}"
          f"{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}; {path} "
          "has all of them and the updates before; lower the learning rate "
          "or look at these rows"
        )
      now = time.monotonic()
      seconds = max(now - last, 1e-9)
      perf = {
        "perf/tokens_per_s": tokens_at(step) / seconds,
        "perf/rows_per_s": len(ids_at(step)) / seconds,
        "time": now - began,
      }
      if distinct_at:
        perf["perf/distinct_tokens_per_s"] = distinct_at(step) / seconds
      if useful_at and peak:
        perf["perf/mfu"] = useful_at(step) / (seconds * peak)
      last = now
      lines.append(named | perf)
      alarm("displacement", watch.displaced(lines))
      tracker.log(step, lines[-1])
      flying = None
      return loss

    def save(step):
      nonlocal last, written
      if flying:
        read()  # a state is saved only after its metrics were seen finite
      if jax.process_index() == 0:  # first: a resumed run drops lines too many
        _write_log(log_path, lines, written)
      written = len(lines)
      checkpoints.save(step, _items(state))
      last = time.monotonic()  # the next update's time is its own

    def evaluate(step):
      """Measures on every set; the record afterwards."""
      nonlocal last
      if flying:
        read()
      weights = state.ema or state.params
      found = {
        f"eval/{name}/{n}": float(v)
        for name, measure in evaluations.items()
        for n, v in measure(weights).items()
      }
      lines[-1] |= found
      alarm("collapse", watch.collapsed(lines))
      tracker.log(step - 1, found)
      if best and f"eval/{best}" not in found:
        raise ConfigError(
          f"nothing measures {best!r}, known: "
          f"{', '.join(n.removeprefix('eval/') for n in found)}; set "
          "config.train.best"
        )
      last = time.monotonic()
      return watch.best_of(lines, best) if best else record

    with (
      interrupt.deferred() as requested,
      progress.bar(label, updates, "steps", start) as tick,
    ):
      for step in range(start, updates):
        if trace[0] <= step < trace[1] and not traced:
          tracing.callback(_trace(folder / "profile"))
          traced = True
        state, totals = train_step(state, batch_at(step))
        loss = read() if flying else None
        flying = (step, totals)
        if step == trace[1] - 1:
          jax.block_until_ready(totals)
          tracing.close()  # as leaving does, wherever the run ends
        tick(1, f"loss {loss:.3f}" if loss is not None else "")
        done, better = step + 1, False
        if eval_every and (done % eval_every == 0 or done == updates):
          record = evaluate(done)
          better = record.step == done
        enough = stop_after and record.stale >= stop_after
        stop = requested()
        if (
          done % save_every == 0 or done == updates or stop or better or enough
        ):
          save(done)
        if better:  # behind the state: it is never ahead of what is resumed
          bests.save(done, dict(params=state.ema or state.params))
          last = time.monotonic()
        if enough:
          progress.say(
            f"  {label}: {best} was best at step {record.step} "
            f"({record.value:.4g}) and not in {record.stale} "
            f"evaluations since; ended at step {done}"
          )
        if stop or enough:
          break  # leaving `deferred` raises
    if best and not record.step:
      raise NumericError(
        f"{label}: {best} was finite at no evaluation, so no "
        "weights are the best; set config.train.best"
      )
    if jax.process_index() == 0:  # of a run that this one has mended
      (folder / DIVERGED).unlink(missing_ok=True)
  return state
