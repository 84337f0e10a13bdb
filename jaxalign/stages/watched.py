"""What alignment measures while it trains, and what it carries beside it."""

from typing import Any, Callable

import jax.numpy as jnp
import numpy as np

from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.errors import ConfigError
from jaxalign.eval import evaluate
from jaxalign.eval import winrate
from jaxalign.job import Arm, Job
from jaxalign.model import decode
from jaxalign.select import embed
from jaxalign.stages.select import selected_rows
from jaxalign.train import ema
from jaxalign.train import online
from jaxalign.train import trackers
from jaxalign.train.logps import PRODUCERS, Logps

SETS = ("held_out", "kept", "rest", "generations")
# Knobs of config.train that change no weights: no card names them.
BESIDE = ("keep", "async_save", "trackers", "explode", "peak")
# Knobs that came later, with the value at which a run is as it was before.
LATER = dict(optimizer="adamw", layout="padded", logps="chunked",
             reference="stored", ref_sync=0, ema=0.0, eval_every=0, best="",
             stop_after=0)
# Knobs that only another one gives a meaning.
UNDER = dict(ref_mix="ref_sync", eval_sets="eval_every",
             eval_rows="eval_every", eval_prompts="eval_every")


def card_fields(t: Any, fields: dict[str, Any]) -> dict[str, Any]:
  """What a card says of config.train: a run of before there was a choice, and
  one whose weights a knob does not touch, go on."""
  out = dict(fields)
  for name in (*BESIDE, *(n for n, v in LATER.items() if t[n] == v),
               *(n for n, by in UNDER.items() if not t[by])):
    for key in [k for k in out if k == f"train.{name}"
                or k.startswith(f"train.{name}.")]:
      del out[key]
  return out


def check(c: Any) -> None:
  """Raises ConfigError for knobs of config.train that cannot work together."""
  t = c.train
  trackers.check(t.trackers)
  if t.keep < 2:
    raise ConfigError(f"train.keep={t.keep}, wanted 2 or more: the newest may "
                      "be damaged; set config.train.keep")
  if not 0 <= t.ema < 1:
    raise ConfigError(f"train.ema={t.ema}, wanted a decay in [0, 1), 0 for "
                      "none; set config.train.ema")
  if not 0 < t.ref_mix <= 1:
    raise ConfigError(f"train.ref_mix={t.ref_mix}, wanted a share in (0, 1]; "
                      "set config.train.ref_mix")
  if 0 < t.explode <= 1:
    raise ConfigError(f"train.explode={t.explode}, wanted more than 1, or 0 "
                      "for none; set config.train.explode")
  if t.ref_sync and t.reference != "online":
    raise ConfigError(f"train.ref_sync={t.ref_sync} moves the reference, and "
                      "stored numbers cannot follow; set "
                      "config.train.reference=online")
  if t.ref_sync and c.lora.rank:
    raise ConfigError(f"train.ref_sync={t.ref_sync} with lora.rank="
                      f"{c.lora.rank}: the reference is the base, which is "
                      "frozen; set config.train.ref_sync=0 or config.lora.rank"
                      "=0")
  for name in t.eval_sets:
    if name not in SETS:
      raise ConfigError(f"unknown set {name!r}; known: {', '.join(SETS)}; set "
                        "config.train.eval_sets")
  if t.best and not t.eval_every:
    raise ConfigError(f"train.best={t.best!r} is measured by evaluations; set "
                      "config.train.eval_every")
  if t.best and t.best.split("/")[0] not in t.eval_sets:
    raise ConfigError(f"train.best={t.best!r} is of no set in train.eval_sets="
                      f"{tuple(t.eval_sets)}; set one of them")
  if t.stop_after and not t.best:
    raise ConfigError(f"train.stop_after={t.stop_after} evaluations without "
                      "what improvement; set config.train.best, "
                      "\"held_out/accuracy\" for instance")


def extend(job: Job) -> Callable[[Any, Callable], tuple[Any, Callable]]:
  """Returns `(state, train_step) -> (state, train_step)` with an online
  reference and a running mean of the weights, as config.train asks."""
  t, chunk = job.c.train, job.c.model.head_chunk
  make = PRODUCERS[t.logps]

  def extended(state, step):
    if t.ref_sync:
      state = online.begin(state)
      step = online.with_refresh(step, make(job.policy, chunk),
                                 every=t.ref_sync, mix=t.ref_mix)
    elif t.reference == "online":
      step = online.with_reference(step, make(job.model, chunk), job.reference)
    if t.ema:
      state, step = ema.begin(state), ema.keep(step, t.ema)
    return state, step

  return extended


def measures(job: Job, arm: Arm) -> dict[str, Callable]:
  """Name of a set -> `measure(params)` -> {name: value}, of whole parameters.

  "held_out", "kept" (what is trained on) and "rest" (what was left out): the
  first config.train.eval_rows of each, in id order. "generations": answers to
  the first config.train.eval_prompts held-out prompts, always with one noise.
  """
  t = job.c.train
  if not t.eval_every:
    return {}
  kept = np.sort(selected_rows(job, arm))
  rest = np.setdiff1d(np.arange(len(job.column("pool", "id"))), kept)
  held_out = np.arange(len(job.column("held_out", "id")))
  found = dict(held_out=("held_out", held_out), kept=("pool", kept),
               rest=("pool", rest), generations=("held_out", held_out))
  out = {}
  for name in t.eval_sets:
    split, index = found[name]
    if not len(index):
      raise ConfigError(f"the set {name!r} has no rows; set config.data.split "
                        "or config.train.eval_sets")
    out[name] = (_generations(job) if name == "generations" else
                 _answers(job, name, split, index[:t.eval_rows]))
  return out


def _answers(job: Job, name: str, split: str, index: np.ndarray) -> Callable:
  """Measures the answers that rows have, against the reference."""
  c, tokens = job.c, job.tokens(split)
  each = len(tokens.start) // len(job.column(split, "id"))
  rows = tokens_lib.take(tokens, (
      index[:, None] * each + np.arange(each)).reshape(-1))
  label = None
  if job.kind == "thumbs":
    label = np.array(job.column(split, "label"), bool)[index]

  def score(params, m):
    found = embed.score_rows(job.mesh, params, m, rows, tile=c.eval.tile,
                             chunk=c.model.head_chunk, label=f"eval {name}")
    return found.logp.reshape(-1, each), found.count.reshape(-1, each)

  known = []  # of the reference: one pass, at the first evaluation

  def measure(params):
    if not known:
      known.append(score(job.reference, job.model)[0])
    (policy, count), ref = score(params, job.policy), known[0]
    out = {}
    if not job.loss.stats and not job.loss.extras:
      as_logps = lambda x: Logps(jnp.asarray(x), jnp.asarray(count))
      out["loss"] = float(np.mean(job.loss(as_logps(policy), as_logps(ref),
                                           {})[0]))
    r = np.float64(policy) - ref
    if label is None:
      up, down = r[:, 0], r[:, 1]
    else:
      up, down = r[label, 0], r[~label, 0]
    if len(up):
      out["chosen_drift"] = float(up.mean())
    n = min(len(up), len(down))  # thumbs: the i-th liked beside a disliked one
    if n:
      gap = up[:n] - down[:n]
      out["accuracy"] = float(np.mean((gap > 0) + 0.5 * (gap == 0)))
      out["margin"] = float(gap.mean())
    return out

  return measure


def _generations(job: Job) -> Callable:
  """Measures answers that the policy writes.

  Beside their health "entropy", nats a token, and "kl" from the reference,
  nats an answer: means over the policy's own samples, so exact in expectation
  at temperature 1. In the built-in world "win_vs_target", by its true reward.
  """
  c, what = job.c, job.examined
  what = what._replace(asked=what.asked[:c.train.eval_prompts])
  prompts, tok, k = evaluate.prompts_of(what), what.tokenizer, c.eval
  rows = [what.rows[i] for i in what.asked]

  def rewards(texts):
    return np.array([world_lib.reward(what.world, row["prompt"], text)
                     for row, text in zip(rows, texts)])

  if what.world is not None:
    target = rewards([row["target"] for row in rows])

  def measure(params):
    said = decode.generate(
        job.mesh, params, job.policy, prompts, new=k.new_tokens,
        eos=tok.stops, known=min(tok.vocab_size, job.policy.vocab),
        temperature=k.temperature, seed=k.seed, tile=k.tile,
        label="eval generations")
    score = lambda params, m: np.float64(evaluate.score_answers(
        job.mesh, params, m, what, said, new=k.new_tokens, tile=k.tile,
        chunk=c.model.head_chunk))
    own = score(params, job.policy)
    malformed = won = None
    if what.world is not None:
      texts = [tok.decode_response(
          s[:-1] if len(s) and s[-1] in tok.stops else s) for s in said]
      own_reward = rewards(texts)
      malformed = own_reward == world_lib.MALFORMED
      won = winrate.wins(own_reward, target)
    health = winrate.generation_health(said, tok.stops, malformed)
    out = {n: float(x["value"]) for n, x in health.items()}
    out["entropy"] = float(-own.sum() / max(sum(map(len, said)), 1))
    out["kl"] = float(np.mean(own - score(job.reference, job.model)))
    if won is not None:
      out["win_vs_target"] = float(np.mean(won))
    return out

  return measure
