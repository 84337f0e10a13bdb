"""The columns of the pool that a job can make, and what each is read from.

A sampler declares what it reads; `gather` makes that and no more. A new
column is a function and a line in COLUMNS; one that costs a pass or a training
has a stage of its own, which runs where a sampler of the job reads it.
"""

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import disk
from jaxalign.core.errors import DataError
from jaxalign.data import prepare, tables
from jaxalign.data.tokens import row_lengths
from jaxalign.data.world import reward, topic
from jaxalign.embed import embedder, store
from jaxalign.model.job import Job
from jaxalign.select import grams
from jaxalign.select.samplers import chains

# Of what alone some columns can be made: name -> why of nothing else.
_ONLY = {
  "reference": "the reference must embed: set config.embed.checkpoint=''",
  "world": "only the built-in world has it",
  "records": "the built-in world is one source",
  "pairs": "DPO compares two answers",
  "unpaired": "a pair has no label",
}


class Column(NamedTuple):
  """How a column is made."""

  make: Callable[[Job], np.ndarray | None]  # None: the records have it not
  stage: str = ""  # whose files it is read from; "": of the data alone
  only: str = ""  # of what it can be made, a key of _ONLY
  oracle: str = ""  # what it knows and no real data has; never optional
  field: str = ""  # of the records, where some have it and others have not

  def lacks(self, c: Any, kind: str) -> str:
    """Why it cannot be made; "" where it can."""
    world, unpaired = c.data.source == "world", kind == "unpaired"
    found = dict(reference=embedder.by_reference(c), world=world)
    found |= {"": True, "unpaired": unpaired, "pairs": not unpaired}
    found["records"] = not world
    return "" if found[self.only] else _ONLY[self.only]


def _length(job: Job) -> np.ndarray:
  tokens = job.tokens("pool")
  lengths = row_lengths(tokens) - tokens.start
  return lengths.reshape(len(job.column("pool", "id")), -1).astype(np.int32)


def _of_rows(name: str) -> Callable[[Job], np.ndarray]:
  return lambda job: np.array(job.column("pool", name))


def _stored(stage: str, file: str, **more: str) -> Column:
  read = lambda job: store.read(job.shared / stage / "store", file)
  return Column(read, stage, **more)


def _held_out(job: Job) -> np.ndarray:
  return disk.read_array(job.shared / "held_out" / "held_out_loss.npy")


def _source(job: Job) -> np.ndarray | None:
  """[N] str, where each record says it came from; "" of those that do not."""
  path = job.shared / "data" / "pool.parquet"
  if "source" not in tables.column_names(path):
    return None
  return np.array([name or "" for name in job.column("pool", "source")])


def _topic(job: Job) -> np.ndarray:
  world, prompts = prepare.world_of(job.c), job.column("pool", "prompt")
  return np.array([topic(world, prompt) for prompt in prompts])


def _true_reward(job: Job) -> np.ndarray:
  """[N, R] of the built-in world: an oracle, which no real data has."""
  world, rows = prepare.world_of(job.c), job.rows("pool")
  sides = ("chosen", "rejected") if job.kind == "pairs" else ("completion",)
  score = lambda row, side: reward(world, row["prompt"], row[side])
  return np.array([[score(row, side) for side in sides] for row in rows])


def _of_tokens(make: Callable[[Any], np.ndarray]) -> Callable[[Job], Any]:
  """A column [N, R, ...] of what is made of every token row."""

  def by_record(job):
    made = make(job.tokens("pool"))
    return made.reshape(len(job.column("pool", "id")), -1, made.shape[1])

  return by_record


_TRUE = "the world's true reward"
COLUMNS = {
  "length": Column(_length),
  "label": Column(_of_rows("label"), only="unpaired"),
  "group": Column(_of_rows("group")),
  "topic": Column(_topic, only="world"),
  "grams": Column(_of_tokens(grams.counts)),
  "overlap": Column(_of_tokens(grams.overlap)),
  "embedding": _stored("embed", "embedding"),
  "answer_embedding": _stored("answer", "answer_embedding"),
  "logp": _stored("embed", "logp", only="reference"),
  "logp_count": _stored("embed", "count", only="reference"),
  "residual": _stored("residual", "residual"),
  "least": _stored("residual", "least"),
  "reward": Column(
    _true_reward, only="world", oracle="the world's true reward"
  ),
  "source": Column(_source, only="records", field="source"),
  "logp_alone": _stored("alone", "logp_alone"),
  "p_yes": _stored("ask", "p_yes"),
  "proxy_logp": _stored("proxy", "proxy_logp", only="pairs"),
  "proxy_ref_logp": _stored("proxy", "proxy_ref_logp", only="pairs"),
  "held_out_loss": Column(_held_out, "held_out", only="pairs"),
}
# Where embeddings are of the first layers, these have a store of their own.
_LAYERS = {
  "logp": _stored("logps", "logp"),
  "logp_count": _stored("logps", "count"),
}
# Where answers are what is embedded.
_ANSWERS = {"answer_embedding": COLUMNS["embedding"]}
# Given a reward model, `reward` is its score, and no oracle.
_JUDGED = {"reward": _stored("rewards", "reward")}
ALWAYS = ("length", "label", "topic")  # the selection report describes them
# Made by the select stage itself, from the mixture and from another arm.
MADE = ("log_likelihood", "subset")


def known(c: Any) -> dict[str, Column]:
  """COLUMNS as a config has them."""
  layers = embedder.alone(c) and embedder.by_reference(c)
  return (
    COLUMNS
    | (_JUDGED if c.rewards.checkpoint else {})
    | (_LAYERS if layers else {})
    | (_ANSWERS if c.embed.pooling == "response" else {})
  )


def _in_kwargs(c: Any, sampler: Callable) -> set[str]:
  """The columns that config.select.kwargs names to a sampler that takes them.

  What brackets bind, "dpp(quality=p_yes)", is in `sampler.needs` already.
  """
  parameters = inspect.signature(sampler).parameters.values()
  takes = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
  out = set()
  for key in takes - set(getattr(sampler, "keywords", ())):
    value = c.select.kwargs.get(key)
    names = [value] if isinstance(value, str) else value
    if isinstance(names, (tuple, list)):
      out |= {n for n in names if isinstance(n, str)} & COLUMNS.keys()
  return out


def wanted(c: Any, kind: str, sampler: Callable) -> list[str]:
  """The columns to make for a sampler, in the order of COLUMNS."""
  optional, named = {*sampler.optional, *ALWAYS}, _in_kwargs(c, sampler)
  return [
    n
    for n, column in known(c).items()
    if n in sampler.needs
    or (n in named or n in optional and not column.oracle)
    and not column.lacks(c, kind)
  ]


def lacking(c: Any, kind: str, sampler: Callable) -> dict[str, str]:
  """The columns that a sampler needs and no stage makes: name -> why."""
  table = known(c)
  why = {
    n: table[n].lacks(c, kind) if n in table else None
    for n in sampler.needs
    if n not in MADE
  }
  return {n: reason or "" for n, reason in why.items() if reason != ""}


def check_records(job: Job, name: str) -> None:
  """Refuses a sampler that reads what the records turned out to lack.

  Args:
    job: its data stage has run.
    name: of the sampler; config.select.kwargs are those of the chosen one.

  Raises:
    DataError: no record has a field; nothing has been embedded for it yet.
  """
  sampler, table = chains.find_sampler(name), known(job.c)
  read = {*sampler.needs}
  if name == job.c.select.sampler:
    read |= _in_kwargs(job.c, sampler)
  there = tables.column_names(job.shared / "data" / "pool.parquet")
  fields = {table[n].field for n in read if n in table} - {"", *there}
  if fields:
    raise DataError(
      f"the records have no {', '.join(sorted(fields))}, which sampler "
      f"{name!r} reads; set config.data.fields, or "
      "config.select.sampler and config.select.kwargs"
    )


def gather(job: Job, sampler: Callable) -> dict[str, np.ndarray]:
  """Name -> array of N rows in id order, of what `wanted` lists; fields that
  no record has are left out, see `check_records`."""
  table, names = known(job.c), wanted(job.c, job.kind, sampler)
  found = {n: table[n].make(job) for n in names}
  return {n: x for n, x in found.items() if x is not None}


def stages(c: Any, kind: str, sampler: Callable) -> list[str]:
  """The stages whose files a sampler's columns are read from."""
  table = known(c)
  read = {table[n].stage for n in wanted(c, kind, sampler)} - {""}
  return sorted(read | {"mixture"} if uses_mixture(sampler) else read)


def uses_mixture(sampler: Callable) -> bool:
  """Whether a mixture is fitted for a sampler."""
  return "log_likelihood" in sampler.needs


def tuned(c: Any) -> str:
  """The stage whose log-probs proxies start from; "": they run a pass."""
  column = known(c)["logp"]
  return "" if c.proxy.checkpoint or column.lacks(c, "") else column.stage


def exact(c: Any) -> bool:
  """Whether a row's log-prob is one number wherever it is computed.

  In bfloat16 it depends on the batch: a pass over the pool and training give a
  row different numbers.
  """
  return c.model.dtype == "float32"


def logps_stage(c: Any, kind: str, sampler: Callable) -> str:
  """The stage whose log-probs the rows of an arm come with; "": of none."""
  if not exact(c):
    return ""
  if not embedder.alone(c):
    return "embed"
  return "logps" if "logps" in before(c, stages(c, kind, sampler)) else ""


def before(c: Any, names: list[str]) -> list[str]:
  """These stages and those that they read themselves."""
  reads = {"mixture": "embed", "proxy": tuned(c), "held_out": tuned(c)}
  return sorted({*names, *(reads[n] for n in names if reads.get(n))})


def notes(c: Any, sampler: Callable) -> tuple[str, ...]:
  """A note for every column of a sampler that no real data has."""
  table = known(c)
  return tuple(
    f"it reads {table[n].oracle}: an upper bound, not a method"
    for n in (*sampler.needs, *sorted(_in_kwargs(c, sampler)))
    if n in table and table[n].oracle
  )
