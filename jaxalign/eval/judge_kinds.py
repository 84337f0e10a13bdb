"""The judges that a config can name: what each says of pairs of answers.

A judge is made by `judge(job, folder)` and called as (rows, answers, others):
it gives what `winrate.both_orders` gives of the first answers, with
"verdicts"and, of an endpoint, "replies".
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
from jaxalign.data import prepare, tokens
from jaxalign.embed import questions
from jaxalign.embed import row_scores as scores
from jaxalign.eval import held_out, judge_endpoint, winrate
from jaxalign.eval.judge_endpoint import Endpoint, Pair
from jaxalign.eval.verdict_cache import VerdictCache
from jaxalign.model import reward, weights
from jaxalign.model.flops import reward_flops
from jaxalign.model.job import Arm, arm_folder, Job, kernel_of
from jaxalign.model.parameters import check_mesh

CONTROLS = 20  # prompts of each control, see eval/judges/controls.py
REFERENCE = "judged_reference"  # the stage that judges the reference
REWARDS = "rewards.json"  # of the start's stage: content digest -> reward


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


def told(c: Any) -> dict[str, Any]:
  """What of the judge a page depends on beside its inputs: what is not the
  default, which the pages of older jobs were made with."""
  found = dict(judge=kind_of(c), baseline=c.judge.baseline)
  usual = kind_of(c) == ("world" if c.data.source == "world" else "none")
  if usual and c.judge.baseline == "target":
    return {}
  return found


def endpoint_of(c: Any) -> Endpoint:
  """The endpoint of config.judge."""
  j = c.judge
  return Endpoint(
    url=j.endpoint, **{n: j[n] for n in Endpoint._fields if n in j}
  )


def reward_config(c: Any) -> reward.RewardConfig:
  """The sizes of config.judge.checkpoint, with the context it is used at."""
  r = reward.read_reward_config(
    c.judge.checkpoint, c.model.dtype, "config.judge.checkpoint"
  )
  context = min(r.model.context, prepare.asked_context(c) or r.model.context)
  return r._replace(model=r.model._replace(context=context))


# Mistakes, before anything is computed.


def check(c: Any) -> None:
  """Raises ConfigError for a judge that can never work; nothing is sent."""
  j, kind = c.judge, kind_of(c)
  for knob, known in (
    ("kind", ("auto", "world", "none", *JUDGES)),
    ("baseline", winrate.BASELINES),
  ):
    if j[knob] not in known:
      raise ConfigError(
        f"judge.{knob}={j[knob]!r} is unknown, wanted one of "
        f"{', '.join(known)}; set config.judge.{knob}"
      )
  if j.kind == "auto" and (j.checkpoint or j.model):
    one = "checkpoint" if j.checkpoint else "model"
    raise ConfigError(
      f"judge.{one}={j[one]!r} judges nothing while judge.kind is auto; set "
      f"config.judge.kind={'reward_model' if j.checkpoint else 'endpoint'}"
    )
  if kind == "world":
    if c.data.source != "world":
      raise ConfigError(
        "judge.kind=world needs a source whose true reward is "
        f"known, found data.source={c.data.source!r}; set "
        "config.judge.kind=reward_model, endpoint or none"
      )
    if j.baseline == "chosen":
      raise ConfigError(
        "the true reward is measured against the target and "
        "the reference; judge.baseline=chosen needs another "
        "judge: set config.judge.baseline"
      )
  if kind == "reward_model":
    if not j.checkpoint:
      raise ConfigError(
        "judge.kind=reward_model needs a reward model; set "
        "config.judge.checkpoint"
      )
    reward_config(c)
  if kind == "endpoint":
    judge_endpoint.check_settings(endpoint_of(c))


def check_ready(job: Job, arms: list[Arm]) -> None:
  """Raises ConfigError where a judge that will be needed cannot be asked.

  A job whose verdicts are all there needs neither key nor server.
  """
  c = job.c
  if kind_of(c) != "endpoint":
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
  if any(record is None or not record.finished for record in records):
    if jax.process_index() == 0:
      judge_endpoint.check_key(endpoint_of(c))
      judge_endpoint.check_reachable(endpoint_of(c))


def requests_at_most(c: Any, prompts: int, arms: int) -> int:
  """Requests that an endpoint is sent at most, retries not counted.

  Args:
    c: the config.
    prompts: there are.
    arms: of the job.
  """
  own = 1 if c.judge.baseline == "reference" else 0  # the start is no arm
  judged = min(prompts, c.judge.prompts or prompts)
  return (
    2 * judged * (arms + 1 - own)
    + 2 * c.judge.labels
    + 4 * min(judged, CONTROLS)
  )


def check_enough(job: Job, arms: list[Arm]) -> None:
  """Raises ConfigError for caps that this job's prompts will pass; once the
  data is read, before anything is trained."""
  if kind_of(job.c) != "endpoint":
    return
  most = requests_at_most(
    job.c, len(held_out.eval_set(job).prompt_rows), len(arms)
  )
  if most > job.c.judge.max_requests:
    raise ConfigError(
      f"judge.max_requests={job.c.judge.max_requests:,}, and {len(arms)} "
      f"arms take up to {most:,} requests (two a prompt and arm); set "
      "config.judge.max_requests, judge.prompts or judge.labels"
    )


# The judges.


def cache_of(job: Job) -> str:
  """The file that keeps every verdict paid for."""
  return str(job.shared / "verdicts.jsonl")


class _Endpoint:
  """The judge behind an endpoint; process 0 alone asks it."""

  knobs = ("judge.endpoint", "judge.model")  # that its verdicts depend on
  on_mesh = False  # whether every process takes part
  model = ""  # the knob that names a checkpoint, whose bytes count

  def __init__(self, job: Job, folder: Any):
    del folder
    self.files: list[str] = []
    self.e, self.path = endpoint_of(job.c), cache_of(job)
    kept = VerdictCache(self.path)
    self.before = kept.requests, kept.tokens

  def __call__(
    self, rows: Sequence[dict], ours: Sequence[str], theirs: Sequence[str]
  ) -> dict[str, Any]:
    return self.pairs(
      [
        Pair(row["prompt"], a.strip(), b.strip())
        for row, a, b in zip(rows, ours, theirs)
      ]
    )

  def pairs(self, pairs: Sequence[Pair]) -> dict[str, Any]:
    return judge_endpoint.judge_both_orders(self.e, pairs, self.path)

  def cost(self) -> tuple[Cost, dict[str, Any]]:
    kept = VerdictCache(self.path)
    new = kept.requests - self.before[0], kept.tokens - self.before[1]
    return Cost(0, new[1]), dict(
      requests=kept.requests, tokens=kept.tokens, asked=new[0]
    )

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
    r = reward_config(job.c)
    if not r.encodes:
      r = r._replace(
        model=r.model._replace(attention=kernel_of(job.c, r.model, job.mesh))
      )
    layout = reward.reward_layout(r)
    check_mesh(layout.rows, job.mesh)
    self.r, self.given = r, job.c.judge.checkpoint
    dtype = np.dtype(np.float32 if r.encodes else job.c.model.param_dtype)
    self.params = weights.load(self.given, layout, job.mesh, dtype)
    # Of the start, which every arm's answers are compared with.
    found = job.shared / REFERENCE / REWARDS
    self.known: dict[str, float] = (
      {k: np.nan if x is None else x for k, x in disk.read_json(found).items()}
      if found.exists()
      else {}
    )

  def __call__(
    self, rows: Sequence[dict], ours: Sequence[str], theirs: Sequence[str]
  ) -> dict[str, Any]:
    return of_scores(self.scores(rows, ours), self.scores(rows, theirs))

  def pairs(self, pairs: Sequence[Pair]) -> dict[str, Any]:
    rows = [dict(id=str(i), prompt=p.question) for i, p in enumerate(pairs)]
    return self(rows, [p.first for p in pairs], [p.second for p in pairs])

  def scores(self, rows: Sequence[dict], said: Sequence[str]) -> np.ndarray:
    """[n] float64 rewards; NaN where its tokenizer refuses the text."""
    keys = [
      hashlib.sha256(json.dumps([row["prompt"], a]).encode()).hexdigest()
      for row, a in zip(rows, said)
    ]
    new = {
      k: (row | {"answer": a}, "answer")
      for k, row, a in zip(keys, rows, said)
      if k not in self.known
    }
    if new:
      self.known |= zip(new, self._run(list(new.values())).tolist())
    return np.array([self.known[k] for k in keys], np.float64)

  def _run(self, texts: list[tuple[dict, str]]) -> np.ndarray:
    """[n] rewards of texts; every process calls it, process 0 tokenizes."""
    at = self.folder / f"rewarded_{len(self.files)}"

    def encoded():
      own = hub.resolve_settings(self.given)
      made, lost = (
        (questions.encode_two(own, self.r.model, texts), {})
        if self.r.encodes
        else questions.readable(own, self.r.model, texts)
      )
      disk.write_json(at / "refused.json", sorted(lost))
      return made

    rows = scores.tokens_of(at, encoded)
    self.files.append(at.name)
    out = np.full(len(texts), np.nan)
    kept = np.setdiff1d(
      np.arange(len(texts)), disk.read_json(at / "refused.json")
    )
    if len(kept):
      out[kept] = scores.reward_rows(
        self.job.mesh, self.params, self.r, rows, tile=self.job.c.embed.tile
      )
    sizes, counts = np.unique(tokens.row_lengths(rows), return_counts=True)
    self.flops += sum(
      reward_flops(self.r, int(s)) * int(k) for s, k in zip(sizes, counts)
    )
    self.tokens += len(rows.ids)
    return out

  def keep(self) -> list[str]:
    """Writes all rewards for the stages to come; returns the file's name."""
    disk.write_json(
      self.folder / REWARDS,
      {k: None if np.isnan(x) else x for k, x in self.known.items()},
    )
    return [REWARDS]

  def cost(self) -> tuple[Cost, dict[str, Any]]:
    return Cost(self.flops, self.tokens), {}


# A judge is one entry: see `_Endpoint` for all that it has.
JUDGES = {"endpoint": _Endpoint, "reward_model": _Rewards}


def of_scores(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
  """What two rewards of each prompt say, as `winrate.both_orders` has it.

  Args:
    ours: [n]; NaN where there is none.
    theirs: [n].
  """
  lost = np.isnan(ours) | np.isnan(theirs)
  won = np.where(lost, np.nan, winrate.wins(ours, theirs))
  words = {
    1.0: ("first", "second"),
    0.5: ("tie", "tie"),
    0.0: ("second", "first"),
  }
  return winrate.both_orders(won, won) | dict(
    verdicts=[words.get(w, (None, None)) for w in won.tolist()],
    bias=None,
    consistent=None,
  )  # one at a time: there is no order
