"""Evaluations while a policy trains; its online reference, mean and cost."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world
from jaxalign.embed import passes
from jaxalign.eval import held_out, winrate
from jaxalign.model import decode, decoder
from jaxalign.model.job import Arm, Job, WHOLE
from jaxalign.select.choose import selected_rows
from jaxalign.train import align, online
from jaxalign.train.align import train_price, Watched
from jaxalign.train.batch import Logps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import loss_of
from jaxalign.train.trackers import check_trackers

SETS = ("held_out", "kept", "rest", "generations")
# Measured of answers that rows have, and of those that the policy writes; see
# `measured`.
ANSWERS = ("accuracy", "ties", "margin", "chosen_drift")
GENERATED = ("ended", "empty", "malformed", "length", "entropy", "kl")
# Statistics that have a value on a set: the others are of the batches of a run
# (z0, ranks) or of its past (a running mean).
OF_A_SET = ("label", "mean_count")
# Knobs of config.train that change no weights: no record names them.
IDLE = ("keep", "trackers", "explode")
# Knobs that only another one gives a meaning.
UNDER = {"ref_mix": "ref_sync"} | dict.fromkeys(
  ("eval_sets", "eval_rows", "eval_prompts"), "eval_every"
)


def record_fields(t: Any, fields: dict[str, Any]) -> dict[str, Any]:
  """`fields` without the knobs of config.train that touch no weights."""
  idle = (*IDLE, *(n for n, by in UNDER.items() if not t[by]))
  idle = {f"train.{n}" for n in idle}
  return {k: v for k, v in fields.items() if k not in idle}


def _mistakes(c: Any) -> Iterable[tuple[Any, str]]:
  """(holds, message) of knobs of config.train that cannot work together."""
  t = c.train
  for knob, good, wanted in (
    ("keep", t.keep >= 2, "2 or more: the newest may be damaged"),
    ("ema", 0 <= t.ema < 1, "a decay in [0, 1), 0 for none"),
    ("ref_mix", 0 < t.ref_mix <= 1, "a fraction in (0, 1]"),
    ("explode", not 0 < t.explode <= 1, "more than 1, or 0 for none"),
  ):
    yield (
      not good,
      f"train.{knob}={t[knob]}, wanted {wanted}; set config.train.{knob}",
    )
  yield (
    t.reference == "online" and not loss_of(c).reference,
    f"train.reference='online' runs a reference that {c.loss.name!r} does not "
    "read; set config.train.reference='stored'",
  )
  yield (
    t.ref_sync and t.reference != "online",
    f"train.ref_sync={t.ref_sync} moves the reference, and stored numbers "
    "cannot follow; set config.train.reference=online",
  )
  yield (
    t.ref_sync and c.lora.rank,
    f"train.ref_sync={t.ref_sync} with lora.rank={c.lora.rank}: the reference "
    "is the base, which is frozen; set config.train.ref_sync=0 or "
    "config.lora.rank=0",
  )
  yield (
    t.stop_after and not t.best,
    f"train.stop_after={t.stop_after} evaluations without what improvement; "
    'set config.train.best, "held_out/accuracy" for instance',
  )
  split = c.data.source == "world" or c.data.split.held_out
  for name in t.eval_sets:
    yield (
      name not in SETS,
      f"unknown set {name!r}; known: {', '.join(SETS)}; set "
      "config.train.eval_sets",
    )
    yield (
      t.eval_every and name in ("held_out", "generations") and not split,
      f"the set {name!r} has no rows: data.split.held_out=0; set "
      "config.data.split.held_out or config.train.eval_sets",
    )
  if t.best:
    yield from _best_mistakes(c)


def _best_mistakes(c: Any) -> Iterable[tuple[Any, str]]:
  """The same of config.train.best."""
  t = c.train
  name, _, value = t.best.partition("/")
  yield (
    not t.eval_every,
    f"train.best={t.best!r} is measured by evaluations; set "
    "config.train.eval_every",
  )
  yield (
    name not in t.eval_sets,
    f"train.best={t.best!r} is of no set in train.eval_sets="
    f"{tuple(t.eval_sets)}; set one of them",
  )
  whole = [x for x in c.compare if x in WHOLE]
  yield (
    name == "rest" and whole,
    f"train.best={t.best!r} is of rows that were left out, and "
    f"{''.join(whole[:1])!r} in config.compare leaves out none; set one of "
    "them",
  )
  known, why = measured(c).get(name, ()), ""
  if value == "loss":
    why = f" (the loss {c.loss.name!r} has no value on a set alone)"
  yield (
    value not in known,
    f"train.best={t.best!r} is measured by nothing{why}; of {name!r} there are "
    f"{', '.join(known)}; set config.train.best",
  )


def check_evaluations(c: Any) -> None:
  """Raises ConfigError for knobs of config.train that cannot work together."""
  check_trackers(c.train.trackers)
  for holds, message in _mistakes(c):
    if holds:
      raise ConfigError(message)


def measured(c: Any) -> dict[str, tuple[str, ...]]:
  """Set -> the names of what is measured on it, each a config.train.best."""
  answers = ANSWERS + ("loss",) * _has_value(loss_of(c))
  wins = ("win_vs_target",) if c.data.source == "world" else ()
  return dict.fromkeys(SETS[:3], answers) | dict(generations=GENERATED + wins)


def _has_value(loss: Callable) -> bool:
  """Whether a loss can be computed on a set of rows alone."""
  return set(loss.stats) <= set(OF_A_SET) and not loss.extras


def reads(t: Any) -> tuple[str, ...]:
  """Sections of a config that decide which weights are the best: that of
  generation, where generations are what they are best at."""
  return ("eval",) if t.eval_every and t.best.startswith("generations/") else ()


def _extend(job: Job) -> Callable[[Any, Callable], tuple[Any, Callable]]:
  """Returns `(state, train_step) -> (state, train_step)` with an online
  reference and a running mean of the weights, as in config.train."""
  t = job.c.train

  def producer(m):
    logps_fn = PRODUCERS[t.logps](m, job.c.model.head_chunk)
    return logps_fn, decoder.compiler_options(m)

  def extended(state, step):
    if t.ref_sync:
      state = online.begin_refresh(state)
      logps_fn, options = producer(job.policy)
      how = dict(every=t.ref_sync, mix=t.ref_mix, options=options)
      step = online.with_refresh(step, logps_fn, **how)
    elif t.reference == "online":
      logps_fn, options = producer(job.model)
      step = online.with_reference(step, logps_fn, job.reference, options)
    if t.ema:
      state, step = online.begin_ema(state), online.with_ema(step, t.ema)
    return state, step

  return extended


class Measure(NamedTuple):
  """What is measured on a set, and what that takes."""

  of: Callable[[Any], dict[str, float]]  # whole parameters -> {name: value}
  cost: Callable[[list[dict[str, float]]], Cost]  # of a run's evaluations


def evaluation_cost(
  measures: dict[str, Measure], lines: Iterable[dict[str, Any]]
) -> Cost:
  """The cost of the evaluations of a whole run, by the lines of its log: the
  same however often the run was stopped and resumed."""
  total, lines = Cost(), list(lines)
  for name, one in measures.items():
    prefix = f"eval/{name}/"
    values = [
      {n[len(prefix) :]: v for n, v in line.items() if n.startswith(prefix)}
      for line in lines
    ]
    total += one.cost([x for x in values if x])
  return total


def planned_rows(
  c: Any, updates: int, rows: dict[str, int], each: dict[str, int]
) -> dict[str, int]:
  """Split -> rows that pass through the model in the evaluations of a run.

  Args:
    c: the config.
    updates: of the run.
    rows: records of "held_out", "kept" and "rest".
    each: tokenized rows of a record of "held_out" and of "pool", which are two
      and one where pairs are split for the pool.
  """
  t, out = c.train, dict(held_out=0, pool=0)
  times = -(-updates // t.eval_every) if t.eval_every else 0
  for name in t.eval_sets if times else ():
    if name == "generations":
      prompts = min(t.eval_prompts, c.eval.prompts, rows["held_out"])
      out["held_out"] += 3 * times * prompts
    else:  # the reference once
      split = "held_out" if name == "held_out" else "pool"
      out[split] += (times + 1) * min(t.eval_rows, rows[name]) * each[split]
  return out


def measures_of(job: Job, arm: Arm) -> dict[str, Measure]:
  """Name of a set -> what is measured on it, see `measured`.

  "held_out", "kept" (what is trained on) and "rest" (what was left out): the
  first config.train.eval_rows of each, in id order; an arm of all rows has no
  "rest". "generations": answers to the first config.train.eval_prompts
  held-out prompts, always with one noise.
  """
  t = job.c.train
  if not t.eval_every:
    return {}
  kept = np.sort(selected_rows(job, arm))
  rest = np.setdiff1d(np.arange(len(job.column("pool", "id"))), kept)
  held_out = np.arange(len(job.column("held_out", "id")))
  index = dict(held_out=held_out, kept=kept, rest=rest, generations=held_out)
  out = {}
  for name in t.eval_sets:
    if name == "rest" and not len(rest) and not t.best.startswith("rest/"):
      continue
    if not len(index[name]):
      raise ConfigError(
        f"the set {name!r} has no rows; set config.data.split "
        "or config.train.eval_sets"
      )
    out[name] = (
      _generations(job)
      if name == "generations"
      else _answers(job, name, index[name][: t.eval_rows])
    )
  return out


def ordered(up: np.ndarray, down: np.ndarray) -> tuple[float, float]:
  """(fraction of pairs whose first is larger, of ties), over all pairs.

  Every one of [n] `up` with every one of [m] `down`, by ranks: the first
  fraction and half of the second are the area under the ROC curve.
  """
  below = np.sort(down)
  less, no_more = (
    np.searchsorted(below, up, side).sum() for side in ("left", "right")
  )
  pairs = len(up) * len(down)
  return float(less / pairs), float((no_more - less) / pairs)


def _loss_value(
  job: Job, policy: np.ndarray, ref: np.ndarray, count: np.ndarray, label: Any
) -> float:
  """The loss of rows [n, R] as one batch."""
  width = policy.shape[1]
  if width == 2 and job.kind == "unpaired":
    width, label = 1, np.tile([True, False], len(policy))
  shaped = lambda x: jnp.asarray(x.reshape(-1, width))
  as_logps = lambda x: Logps(shaped(x), shaped(count))
  label = None if label is None else jnp.asarray(label)
  stats = dict(label=label, mean_count=jnp.mean(jnp.asarray(count[:, 0])))
  return float(np.mean(job.loss(as_logps(policy), as_logps(ref), stats)[0]))


def _answers(job: Job, name: str, index: np.ndarray) -> Measure:
  """Measures the answers that rows have, against the reference.

  With r = policy - ref, nats: "chosen_drift", the mean r of chosen (unpaired:
  liked) answers; "accuracy", the fraction of pairs whose chosen one has the
  larger r, "ties" apart, as in training: 0 and 1 before the first update;
  "margin", the mean of r chosen - r rejected. Of unpaired rows a pair is any
  liked answer with any disliked one. "loss" is that of the rows as one batch.

  Raises:
    ConfigError: unpaired rows of one label where config.train.best needs both.
  """
  c, split = job.c, "held_out" if name == "held_out" else "pool"
  tokens, ids = job.tokens(split), job.column(split, "id")
  each = len(tokens.start) // len(ids)
  rows = tokens_lib.take_rows(
    tokens, (index[:, None] * each + np.arange(each)).reshape(-1)
  )
  label = None
  if each == 1:  # of pairs that were split for the pool these are still pairs
    label = np.array(job.column(split, "label"), bool)[index]
    needs_both = c.train.best in (f"{name}/{n}" for n in ANSWERS)
    if label.all() == label.any() and needs_both:
      raise ConfigError(
        f"train.best={c.train.best!r} compares liked with "
        f"disliked answers, and the set {name!r} has "
        f"{int(label.sum())} liked of {len(label)}; set "
        "config.train.best or config.train.eval_rows"
      )

  def score(params, m):
    tile, chunk, label = c.embed.tile, c.model.head_chunk, f"eval {name}"
    how = passes.PassOptions(tile, chunk, label=label)
    scored = passes.score_rows(job.mesh, params, m, rows, how)
    return scored.logp.reshape(-1, each), scored.count.reshape(-1, each)

  known = []  # of the reference: one pass, at the first evaluation

  def measure(params):
    if not known:
      known.append(score(job.reference, job.model)[0])
    (policy, count), ref = score(params, job.policy), known[0]
    out = {}
    if _has_value(job.loss):
      out["loss"] = _loss_value(job, policy, ref, count, label)
    r = np.float64(policy) - ref
    if label is None:
      up, down = r[:, 0], r[:, 1]
    else:
      up, down = r[label, 0], r[~label, 0]
    if len(up):
      out["chosen_drift"] = float(up.mean())
    if len(up) and len(down):
      paired = lambda x, y: (float(np.mean(x > y)), float(np.mean(x == y)))
      compare = paired if label is None else ordered
      out["accuracy"], out["ties"] = compare(up, down)
      out["margin"] = float(up.mean() - down.mean())
    return out

  def cost(values):  # of the policy each time, of the reference once
    times, flops = (
      len(values) + bool(values),
      passes.pass_flops(job.model, rows),
    )
    return Cost(times * flops, times * len(rows.ids))

  return Measure(measure, cost)


def _generations(job: Job) -> Measure:
  """Measures answers that the policy writes.

  Their health; "entropy", nats a token, and "kl" from the reference, nats an
  answer: means over the policy's own samples, so exact in expectation at
  temperature 1. In the built-in world "win_vs_target", by its true reward.
  "flops" is the cost, for the ledger: writing, and a pass of the policy and
  one of the reference over what was written.
  """
  c, what = job.c, held_out.eval_set(job)
  what = what._replace(prompt_rows=what.prompt_rows[: c.train.eval_prompts])
  tok = what.tokenizer
  prompts = [
    decode.fitting(p, job.policy, c.eval.new_tokens)
    for p in held_out.prompts_of(what)
  ]
  if what.world is not None:
    targets = [what.rows[i]["target"] for i in what.prompt_rows]
    target_reward = held_out.true_rewards(what, targets)

  def measure(params):
    label = "eval generations"
    answers = held_out.write_answers(what, params, job.policy, label=label)
    score = lambda params, m: np.float64(
      held_out.score_answers(what, params, m, answers)
    )
    own, malformed, wins = score(params, job.policy), None, {}
    if what.world is not None:
      texts = held_out.answer_texts(tok, answers)
      reward = held_out.true_rewards(what, texts)
      malformed = reward == world.MALFORMED
      outcomes = winrate.wins(reward, target_reward)
      wins = dict(win_vs_target=float(np.mean(outcomes)))
    health = held_out.generation_health(answers, tok.stops, malformed)
    out = {n: float(x["value"]) for n, x in health.items()}
    out["entropy"] = float(-own.sum() / max(sum(map(len, answers)), 1))
    out["kl"] = float(np.mean(own - score(job.reference, job.model)))
    rows = held_out.answer_rows(prompts, answers)
    return out | wins | dict(flops=3.0 * passes.pass_flops(job.model, rows))

  def cost(values):
    read = len(values) * sum(map(len, prompts))
    written = sum(round(x["length"] * len(prompts)) for x in values)
    return Cost(round(sum(x["flops"] for x in values)), 3 * (read + written))

  return Measure(measure, cost)


def make_aligned(job: Job, arm: Arm, folder: Any) -> Made:
  """The align stage: trains a policy, and evaluates it meanwhile."""
  measures = measures_of(job, arm)
  cost = lambda lines: evaluation_cost(measures, lines)
  watched = Watched(measures, _extend(job), cost)
  return align.make_policy(job, arm, folder, watched)


def align_fields(job: Job, arm: Arm) -> dict[str, Any]:
  """The fields of `align`, those that decide which weights are best too."""
  t = job.c.train
  fields = align.align_fields(job, arm) | pick(job.c, *reads(t))
  return record_fields(t, fields)


def align_price(z: JobSizes, arm: Arm) -> Price:
  """Training, and the evaluations while it runs."""
  held, pool = z.rows["held_out"], z.rows["pool"]

  def evaluated(kept, updates):
    rows = dict(held_out=held, kept=kept, rest=pool - kept)
    return planned_rows(
      z.job.c, updates, rows, dict(held_out=2, pool=z.responses)
    )

  return train_price(z, arm, evaluated)
