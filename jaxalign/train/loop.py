"""The training loop: one step in flight, metrics of the one before."""

from collections.abc import Callable, Mapping
import contextlib
import math
import time
from typing import Any, NamedTuple

from etils import epath
import jax

from jaxalign.core import interrupt, progress
from jaxalign.core.checkpoints import Checkpoints
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.train import log as logs
from jaxalign.train import trackers
from jaxalign.train.feed import Feed
from jaxalign.train.metrics import divide
from jaxalign.train.step import TrainState


class TrainOptions(NamedTuple):
  """How long a run is, what it keeps, and what it is watched by.

  Args:
    folder: gets `checkpoints/` and `metrics.jsonl`, `best/`, and where the
      run diverged `diverged.jsonl`.
    label: what the progress bar says.
    updates: updates in all.
    save_every: updates between checkpoints.
    keep: checkpoints that are left, see `Checkpoints`.
    explode: a loss over so many times what it was ends the run, see
      `log.exploded`; 0: only one that is not finite does.
    evaluations: name of a set -> `measure(params)` -> {name: value}, the same
      on every process; params are the running mean where there is one. Logged
      as "eval/<set>/<name>" in the line of the last update before.
    eval_every: updates between evaluations, and one at the end; 0: none.
    best: "<set>/<name>": the weights of its best evaluation are kept in
      `best/`; of the names in `log.LOWER` less is better.
    stop_after: evaluations without a better `best` after which the run ends;
      0: it runs to its end.
    trackers: keys of `trackers.TRACKERS`.
    trace: steps to profile, the first and the one after the last; a run that
      is resumed inside begins there. (0, 0): none.
  """

  folder: Any
  label: str
  updates: int
  save_every: int
  keep: int = 2
  explode: float = 0.0
  evaluations: Mapping[str, Callable[[Any], Mapping[str, float]]] = {}
  eval_every: int = 0
  best: str = ""
  stop_after: int = 0
  trackers: tuple[str, ...] = ()
  trace: tuple[int, int] = (0, 0)


APART = ("params", "ema", "ref")  # an evaluation restores one of them alone


def _items(state: TrainState) -> dict[str, Any]:
  """What a checkpoint holds of a state; what is empty is left out."""
  rest = dict(vars(state))
  apart = {n: rest.pop(n) for n in APART}
  return dict(rest=rest) | {n: x for n, x in apart.items() if x}


def _restore(checkpoints: Checkpoints, state: TrainState, step: int):
  """The state of a step, laid as `state` is."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  found = checkpoints.restore(step, jax.tree.map(shape, _items(state)))
  return state.replace(**found.pop("rest"), **found)


class _Run:
  """A run between two of its steps.

  A class because it has a step in flight: the metrics of an update are read
  after the next one was sent off.
  """

  def __init__(self, stack, state, feed, options, ideal_seconds):
    self.o, self.feed, self.ideal_seconds = options, feed, ideal_seconds
    folder = epath.Path(options.folder)
    self.checkpoints = stack.enter_context(
      Checkpoints(folder / "checkpoints", options.keep)
    )
    self.start = self.checkpoints.latest() or 0
    if self.start:
      state = _restore(self.checkpoints, state, self.start)
      progress.say(f"  {options.label}: resumed from step {self.start}")
    self.state = state
    self.log = logs.Log(folder, self.start)
    self.record = logs.NONE
    if options.best:
      # Two: the older one is there while the newer one is written.
      self.bests = stack.enter_context(Checkpoints(folder / "best", 2))
      self.record = self._known_best()
    self.began = self.last = time.monotonic()
    self.flying = None  # (step, totals) whose metrics are not read yet
    self.warned = set()

  @property
  def weights(self):
    """What is evaluated: the running mean, where there is one."""
    return self.state.ema or self.state.params

  @property
  def ended(self):
    """Whether `best` has not been beaten for long enough."""
    return 0 < self.o.stop_after <= self.record.stale

  def _known_best(self):
    """The best evaluation that the log knows and whose weights are there."""
    name, log, start = self.o.best, self.log, self.start
    for step in sorted(self.bests.manager.all_steps()):
      if step > start:  # of steps that were lost with a damaged checkpoint
        self.bests.delete(step)
    best, there = logs.best_of(log.lines, name), self.bests.latest()
    if best.step and best.step == start and there != start:
      self.bests.save(start, dict(params=self.weights))
      self.bests.finish()
      there = start
    if best.step == (there or 0) or not best.step:
      return best
    progress.say(
      f"  the weights of the best {name}, of step {best.step}, are "
      "gone; counting from here on"
    )
    for line in log.lines:
      line.pop(f"eval/{name}", None)
    return logs.NONE

  def open_tracker(self, stack):
    """Opens the trackers, closed with the stack."""
    o = self.o
    self.tracker = trackers.open_all(o.trackers, o.folder, o.label, self.start)
    stack.callback(self.tracker.close)

  def _warn(self, kind, text):
    """Says a warning once; every line that has it is marked."""
    if text and kind not in self.warned:
      step = self.log.lines[-1]["step"]
      progress.say(f"  {self.o.label}, step {step}: {text}")
    if text:
      self.log.lines[-1][f"alarm/{kind}"] = 1.0
      self.warned.add(kind)

  def read(self):
    """Reads and logs the metrics of the step in flight; returns its loss."""
    if not self.flying:
      return None
    (step, totals), self.flying = self.flying, None
    values = divide(jax.device_get(totals))
    loss, norm = values["loss"], values["grad_norm"]
    named = {n if "/" in n else f"train/{n}": v for n, v in values.items()}
    if not (math.isfinite(loss) and math.isfinite(norm)):
      why = f"loss {loss}, gradient norm {norm} at step {step}"
      self._fail(step, named, why)
    if bound := logs.exploded(self.log.lines, loss, self.o.explode):
      self._fail(
        step,
        named,
        f"loss {loss:.4g} at step {step} is over {bound:.4g}, train.explode="
        f"{self.o.explode:g} times what it was (gradient norm {norm:.4g})",
      )
    line = {"step": step} | named | self._performance(step)
    self.log.lines.append(line)
    self._warn("displacement", logs.displaced(self.log.lines))
    self.tracker.log(step, line)
    return loss

  def _performance(self, step):
    now, feed = time.monotonic(), self.feed
    seconds, self.last = max(now - self.last, 1e-9), now
    out = {
      "perf/tokens_per_s": feed.tokens_at(step) / seconds,
      "perf/distinct_tokens_per_s": feed.distinct_at(step) / seconds,
      "perf/rows_per_s": len(feed.ids_at(step)) / seconds,
      "time": now - self.began,
    }
    if ideal := self.ideal_seconds(step):
      out["perf/mfu"] = ideal / seconds
    return out

  def _fail(self, step, named, why):
    """Keeps how the run diverged, and raises NumericError."""
    ids = self.feed.ids_at(step)
    self.checkpoints.finish()
    saved = self.checkpoints.manager.latest_step() or 0
    last = {"step": step} | named | dict(why=why, ids=ids)
    self.log.write_diverged(saved, last)
    self.tracker.log(step, named)
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    raise NumericError(
      f"{self.o.label}: {why}; nothing after step {saved} is saved. Rows of "
      f"the batch: {', '.join(ids[:8])}{more}; {self.log.diverged} has all of "
      "them and the updates before; lower the learning rate or look at these "
      "rows"
    )

  def save(self, step):
    """Saves the state, and the log first."""
    self.read()  # a state is saved only after its metrics were seen finite
    self.log.write()  # first: a resumed run drops lines too many
    self.checkpoints.save(step, _items(self.state))
    self.last = time.monotonic()  # the next update's time is its own

  def save_best(self, step):
    """Keeps the weights; after `save`: they are never ahead of the state."""
    self.bests.save(step, dict(params=self.weights))
    self.last = time.monotonic()

  def evaluate(self, done):
    """Measures on every set; whether the newest is the best."""
    self.read()
    found = {
      f"eval/{name}/{n}": float(v)
      for name, measure in self.o.evaluations.items()
      for n, v in measure(self.weights).items()
    }
    self.log.lines[-1] |= found
    self._warn("collapse", logs.collapsed(self.log.lines))
    self.tracker.log(done - 1, found)
    self.last = time.monotonic()
    best = self.o.best
    if not best:
      return False
    if f"eval/{best}" not in found:
      raise ConfigError(
        f"nothing measures {best!r}, known: "
        f"{', '.join(n.removeprefix('eval/') for n in found)}; set "
        "config.train.best"
      )
    self.record = logs.best_of(self.log.lines, best)
    return self.record.step == done


def run_updates(
  state: TrainState,
  train_step: Callable,
  feed: Feed,
  options: TrainOptions,
  ideal_seconds: Callable[[int], float] = lambda step: 0.0,
) -> TrainState:
  """Runs `options.updates` updates, or the rest of them; the last state.

  Args:
    state: a fresh one; replaced by the newest verified checkpoint.
    train_step: `(state, batch) -> (state, (sum, count) metrics)`; donates.
    feed: a pure function of the step, so that a resumed run sees the very
      batches of an uninterrupted one.
    options: see `TrainOptions`.
    ideal_seconds: of a step on devices at their peak, for "perf/mfu"; 0: not
      known.

  Raises:
    NumericError: a loss or gradient norm that is not finite, or a loss that
      exploded; names the ids of the batch, and nothing from that step on is
      saved. All ids, and the lines since the last save, are in
      `diverged.jsonl`. Or: no value of `best` was finite.
    RestartError: SIGTERM came (KeyboardInterrupt: SIGINT); the state is
      saved.
  """
  o = options
  with contextlib.ExitStack() as stack:
    run = _Run(stack, state, feed, o, ideal_seconds)
    if run.ended:
      return run.state
    run.open_tracker(stack)
    tracing = stack.enter_context(contextlib.ExitStack())
    with (
      interrupt.deferred() as requested,
      progress.bar(o.label, o.updates, "steps", run.start) as tick,
    ):
      for step in range(run.start, o.updates):
        if step == max(run.start, o.trace[0]) and step < o.trace[1]:
          profile = epath.Path(o.folder) / "profile"
          tracing.callback(trackers.start_profile(profile))
        run.state, totals = train_step(run.state, feed.batch_at(step))
        loss = run.read()
        run.flying = step, totals
        if step == o.trace[1] - 1:
          jax.block_until_ready(totals)
          tracing.close()  # as leaving does, wherever the run ends
        tick(1, f"loss {loss:.3f}" if loss is not None else "")
        done = step + 1
        last, better = done == o.updates, False
        if o.eval_every and (done % o.eval_every == 0 or last):
          better = run.evaluate(done)
        stop = requested() or run.ended
        if done % o.save_every == 0 or last or stop or better:
          run.save(done)
        if better:
          run.save_best(done)
        if run.ended:
          progress.say(
            f"  {o.label}: {o.best} was best at step {run.record.step} "
            f"({run.record.value:.4g}) and not in {run.record.stale} "
            f"evaluations since; ended at step {done}"
          )
        if stop:
          break  # leaving `deferred` raises
    if o.best and not run.record.step:
      raise NumericError(
        f"{o.label}: {o.best} was finite at no evaluation, so no "
        "weights are the best; set config.train.best"
      )
    if jax.process_index() == 0:  # of a run that this one has mended
      run.log.diverged.unlink(missing_ok=True)
  return run.state
