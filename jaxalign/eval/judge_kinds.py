"""The judges that a config can name: a model at an endpoint, a reward model.

A judge is made by `judge(job, folder)` and called as (rows, answers, others):
it gives what `winrate.both_orders` gives of the first answers, with
"verdicts" and, of an endpoint, "replies".
"""

from collections.abc import Sequence
import hashlib
import json
from typing import Any

import jax
import numpy as np

from jaxalign.core import artifacts, disk, hub
from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError
from jaxalign.data import prepare
from jaxalign.embed import questions, row_scores
from jaxalign.embed.embedder import token_rows_of
from jaxalign.embed.passes import PassOptions, sum_flops
from jaxalign.eval import held_out, judge_endpoint, winrate
from jaxalign.eval.judge_endpoint import Endpoint, Pair
from jaxalign.eval.verdict_cache import VerdictCache
from jaxalign.model import reward, weights
from jaxalign.model.flops import reward_flops
from jaxalign.model.job import Arm, arm_folder, Job, kernel_of
from jaxalign.model.parameters import check_mesh

CONTROLS = 20  # prompts of each control, see eval/judging.py
REFERENCE = "judged_reference"  # the stage that judges the reference
REWARDS = "rewards.json"  # of that stage: content digest -> reward


def kind_of(c: Any) -> str:
  """Who judges a job: "world", "reward_model", "endpoint" or "none"."""
  if c.judge.kind != "auto":
    return c.judge.kind
  return "world" if c.data.source == "world" else "none"


def name_of(c: Any) -> str:
  """The judge as reports call it."""
  kind = kind_of(c)
  if kind == "endpoint":
    return c.judge.model
  if kind == "reward_model":
    return str(c.judge.checkpoint).rstrip("/").rpartition("/")[2]
  return "true reward" if kind == "world" else ""


def page_fields(c: Any) -> dict[str, Any]:
  """The fields of a page that name its judge."""
  return dict(judge=kind_of(c), baseline=c.judge.baseline)


def endpoint_of(c: Any) -> Endpoint:
  """The endpoint of config.judge."""
  own = {n: c.judge[n] for n in Endpoint._fields if n in c.judge}
  return Endpoint(url=c.judge.endpoint, **own)


def _reward_config(c: Any) -> reward.RewardConfig:
  """The sizes of config.judge.checkpoint, with the context it is used at."""
  r = reward.read_reward_config(
    c.judge.checkpoint, c.model.dtype, "config.judge.checkpoint"
  )
  context = min(
    r.model.context, prepare.requested_context(c) or r.model.context
  )
  return r._replace(model=r.model._replace(context=context))


# Mistakes, before anything is computed.


def _mistakes(c: Any):
  """(holds, message) of knobs of config.judge that cannot work together."""
  j, kind = c.judge, kind_of(c)
  known = dict(kind=("auto", "world", "none", *JUDGES))
  for knob, names in (known | dict(baseline=winrate.BASELINES)).items():
    yield (
      j[knob] not in names,
      f"judge.{knob}={j[knob]!r} is unknown, wanted one of "
      f"{', '.join(names)}; set config.judge.{knob}",
    )
  one = "checkpoint" if j.checkpoint else "model"
  wanted = "reward_model" if j.checkpoint else "endpoint"
  yield (
    j.kind == "auto" and j[one],
    f"judge.{one}={j[one]!r} judges nothing while judge.kind is auto; set "
    f"config.judge.kind={wanted}",
  )
  yield (
    kind == "world" and c.data.source != "world",
    "judge.kind=world needs a source whose true reward is known, found "
    f"data.source={c.data.source!r}; set config.judge.kind=reward_model, "
    "endpoint or none",
  )
  yield (
    kind == "world" and j.baseline == "chosen",
    "the true reward is measured against the target and the reference; "
    "judge.baseline=chosen needs another judge: set config.judge.baseline",
  )
  yield (
    kind == "reward_model" and not j.checkpoint,
    "judge.kind=reward_model needs a reward model; set config.judge.checkpoint",
  )


def check_judge(c: Any) -> None:
  """Raises ConfigError for a judge that can never work; nothing is sent."""
  for holds, message in _mistakes(c):
    if holds:
      raise ConfigError(message)
  if kind_of(c) == "reward_model":
    _reward_config(c)
  if kind_of(c) == "endpoint":
    judge_endpoint.check_settings(endpoint_of(c))


def check_ready(job: Job, arms: list[Arm]) -> None:
  """Raises ConfigError where a judge that will be needed cannot be reached.

  A job whose verdicts are all there needs neither key nor server.
  """
  if kind_of(job.c) != "endpoint":
    return
  if "://" in str(job.workdir):
    raise ConfigError(
      f"verdicts are kept in a local file, and {job.workdir} "
      "is none; choose a local --workdir"
    )
  records = [
    artifacts.read_record(job.shared / REFERENCE, REFERENCE),
    *(artifacts.read_record(arm_folder(job, a), "judge") for a in arms),
  ]
  done = all(record and record.finished for record in records)
  if not done and jax.process_index() == 0:
    judge_endpoint.check_key(endpoint_of(job.c))
    judge_endpoint.check_reachable(endpoint_of(job.c))


def check_enough(job: Job, arms: list[Arm]) -> None:
  """Raises ConfigError for caps that this job's prompts will pass; once the
  data is read, before anything is trained."""
  j = job.c.judge
  if kind_of(job.c) != "endpoint":
    return
  prompts = len(held_out.eval_set(job).prompt_rows)
  prompts = min(prompts, j.prompts or prompts)
  # In both orders: every policy, labelled pairs, and both controls.
  policies = len(arms) + (j.baseline != "reference")
  pairs = prompts * policies + j.labels + 2 * min(prompts, CONTROLS)
  if 2 * pairs > j.max_requests:
    raise ConfigError(
      f"judge.max_requests={j.max_requests:,}, and {len(arms)} "
      f"arms take up to {2 * pairs:,} requests (two a prompt and arm); set "
      "config.judge.max_requests, judge.prompts or judge.labels"
    )


# The judges.


class _Endpoint:
  """The judge behind an endpoint, which process 0 alone calls."""

  knobs = ("judge.endpoint", "judge.model")  # that its verdicts depend on
  on_mesh = False  # whether every process takes part
  model = ""  # the knob that names a checkpoint, whose bytes count

  def __init__(self, job: Job, folder: Any):
    del folder
    self.files: list[str] = []
    self.e = endpoint_of(job.c)
    self.cache = VerdictCache(str(job.shared / "verdicts.jsonl"))
    self.before = self.cache.requests, self.cache.tokens

  def __call__(
    self, rows: Sequence[dict], ours: Sequence[str], theirs: Sequence[str]
  ) -> dict[str, Any]:
    pairs = [
      Pair(row["prompt"], a.strip(), b.strip())
      for row, a, b in zip(rows, ours, theirs)
    ]
    return judge_endpoint.judge_both_orders(self.e, pairs, self.cache)

  def cost(self) -> tuple[Cost, dict[str, Any]]:
    requests, tokens = self.cache.requests, self.cache.tokens
    new = requests - self.before[0]
    facts = dict(requests=requests, tokens=tokens, new_requests=new)
    return Cost(0, tokens - self.before[1]), facts

  def keep(self) -> list[str]:
    """What later stages read of this one: nothing, the cache has it all."""
    return []


class _Rewards:
  """A reward model as a judge; the weights are read once a stage.

  Every answer is scored by itself, so the two orders are one.
  """

  _MODEL = ("context", "dtype", "param_dtype")
  knobs = ("judge.checkpoint", "embed.tile", *(f"model.{n}" for n in _MODEL))
  on_mesh, model = True, "checkpoint"

  def __init__(self, job: Job, folder: Any):
    self.job, self.folder, self.files = job, folder, []
    self.flops = self.tokens = 0
    r = _reward_config(job.c)
    if not r.encodes:
      kernel = kernel_of(job.c, r.model, job.mesh)
      r = r._replace(model=r.model._replace(attention=kernel))
    layout = reward.reward_layout(r)
    check_mesh(layout.rows, job.mesh)
    dtype = np.dtype(np.float32 if r.encodes else job.c.model.param_dtype)
    self.r, self.given = r, job.c.judge.checkpoint
    self.params = weights.load_weights(self.given, layout, job.mesh, dtype)
    # Of the reference, which every arm's answers are compared with.
    path = job.shared / REFERENCE / REWARDS
    stored = disk.read_json(path) if path.exists() else {}
    self.known = {k: np.nan if x is None else x for k, x in stored.items()}

  def __call__(
    self, rows: Sequence[dict], ours: Sequence[str], theirs: Sequence[str]
  ) -> dict[str, Any]:
    return of_scores(self._scores(rows, ours), self._scores(rows, theirs))

  def _scores(self, rows: Sequence[dict], answers: Sequence[str]) -> np.ndarray:
    """[n] float64 rewards; NaN where its tokenizer refuses the text."""
    digest = lambda row, answer: hashlib.sha256(
      json.dumps([row["prompt"], answer]).encode()
    ).hexdigest()
    keys = list(map(digest, rows, answers))
    new = {
      k: (row | {"answer": a}, "answer")
      for k, row, a in zip(keys, rows, answers)
      if k not in self.known
    }
    if new:
      self.known |= zip(new, self._run(list(new.values())).tolist())
    return np.array([self.known[k] for k in keys], np.float64)

  def _run(self, texts: list[tuple[dict, str]]) -> np.ndarray:
    """[n] rewards of texts; every process calls it, process 0 tokenizes."""
    folder = self.folder / f"rewarded_{len(self.files)}"

    def encoded():
      own, refused = hub.resolve_settings(self.given), {}
      if self.r.encodes:
        rows = questions.encode_two(own, self.r.model, texts)
      else:
        rows, refused = questions.readable(own, self.r.model, texts)
      disk.write_json(folder / "refused.json", sorted(refused))
      return rows

    rows = token_rows_of(folder, encoded)
    self.files.append(folder.name)
    refused = disk.read_json(folder / "refused.json")
    out = np.full(len(texts), np.nan)
    kept = np.setdiff1d(np.arange(len(texts)), refused)
    if len(kept):
      how = PassOptions(self.job.c.embed.tile, label="rewards")
      out[kept] = row_scores.reward_rows(
        self.job.mesh, self.params, self.r, rows, how
      )
    self.flops += sum_flops(rows, lambda n: reward_flops(self.r, n))
    self.tokens += len(rows.ids)
    return out

  def keep(self) -> list[str]:
    """Writes all rewards for the stages to come; returns the file's name."""
    stored = {k: None if np.isnan(x) else x for k, x in self.known.items()}
    disk.write_json(self.folder / REWARDS, stored)
    return [REWARDS]

  def cost(self) -> tuple[Cost, dict[str, Any]]:
    return Cost(self.flops, self.tokens), {}


# A judge is one entry: see `_Endpoint` for all that it has.
JUDGES = {"endpoint": _Endpoint, "reward_model": _Rewards}


def of_scores(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
  """The outcomes of [n] scores, NaN where there is none, against [n] others;
  as `winrate.both_orders` has them."""
  unread = np.isnan(ours) | np.isnan(theirs)
  outcomes = np.where(unread, np.nan, winrate.wins(ours, theirs))
  words = {1.0: ("first", "second"), 0.5: ("tie", "tie")}
  words[0.0] = ("second", "first")
  verdicts = [words.get(x, (None, None)) for x in outcomes.tolist()]
  result = winrate.both_orders(outcomes, outcomes)  # one at a time: no order
  return result | dict(verdicts=verdicts, bias=None, consistent=None)
