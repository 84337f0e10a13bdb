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
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as world_lib
from jaxalign.embed import embedder, store
from jaxalign.model.job import Job
from jaxalign.select import grams
from jaxalign.select.samplers import chains


class Column(NamedTuple):
  """How a column is made."""

  make: Callable[[Job], np.ndarray | None]  # None: the records have it not
  stage: str = ""  # whose files it is read from; "": of the data alone
  lacks: Callable[[Any, str], str] = lambda c, kind: ""  # why not, in words
  oracle: str = ""  # what it knows that no real data tells; never optional
  field: str = ""  # of the records, where some have it and others have not


def _length(job: Job) -> np.ndarray:
  tokens = job.tokens("pool")
  lengths = tokens_lib.row_lengths(tokens) - tokens.start
  return lengths.reshape(len(job.column("pool", "id")), -1).astype(np.int32)


def _of_rows(name: str) -> Callable[[Job], np.ndarray]:
  return lambda job: np.array(job.column("pool", name))


def _stored(stage: str, file: str) -> Callable[[Job], np.ndarray]:
  return lambda job: store.read(job.shared / stage / "store", file)


def _file(stage: str, file: str) -> Callable[[Job], np.ndarray]:
  return lambda job: disk.read_array(job.shared / stage / f"{file}.npy")


def _source(job: Job) -> np.ndarray | None:
  """[N] str, where each record says it came from; "" of those that do not."""
  path = job.shared / "data" / "pool.parquet"
  if "source" not in tables.column_names(path):
    return None
  return np.array([name or "" for name in job.column("pool", "source")])


def _topic(job: Job) -> np.ndarray:
  world = prepare.world_of(job.c)
  return np.array(
    [world_lib.topic(world, prompt) for prompt in job.column("pool", "prompt")]
  )


def _true_reward(job: Job) -> np.ndarray:
  """[N, R] of the built-in world: an oracle, which no real data has."""
  world, rows = prepare.world_of(job.c), job.rows("pool")
  sides = ("chosen", "rejected") if job.kind == "pairs" else ("completion",)
  return np.array(
    [
      [world_lib.reward(world, row["prompt"], row[side]) for side in sides]
      for row in rows
    ]
  )


def _of_tokens(make: Callable[[Any], np.ndarray]) -> Callable[[Job], Any]:
  """A column [N, R, ...] of what is made of every token row."""

  def by_record(job):
    made = make(job.tokens("pool"))
    n = len(job.column("pool", "id"))
    return made.reshape(n, -1, made.shape[1])

  return by_record


def _by_reference(c: Any, kind: str) -> str:
  del kind
  return (
    "the reference must embed: set config.embed.checkpoint=''"
    if not embedder.by_reference(c)
    else ""
  )


def _of_world(c: Any, kind: str) -> str:
  del kind
  return "" if c.data.source == "world" else "only the built-in world has it"


def _of_records(c: Any, kind: str) -> str:
  del kind
  return "the built-in world is one source" if c.data.source == "world" else ""


def _of_pairs(c: Any, kind: str) -> str:
  del c
  return "DPO compares two answers" if kind == "unpaired" else ""


def _of_unpaired(c: Any, kind: str) -> str:
  del c
  return "" if kind == "unpaired" else "a pair has no label"


COLUMNS = {
  "length": Column(_length),
  "label": Column(_of_rows("label"), lacks=_of_unpaired),
  "group": Column(_of_rows("group")),
  "topic": Column(_topic, lacks=_of_world),
  "grams": Column(_of_tokens(grams.counts)),
  "overlap": Column(_of_tokens(grams.overlap)),
  "embedding": Column(_stored("embed", "embedding"), "embed"),
  "answer_embedding": Column(_stored("answer", "answer_embedding"), "answer"),
  "logp": Column(_stored("embed", "logp"), "embed", _by_reference),
  "logp_count": Column(_stored("embed", "count"), "embed", _by_reference),
  "residual": Column(_stored("residual", "residual"), "residual"),
  "least": Column(_stored("residual", "least"), "residual"),
  "reward": Column(
    _true_reward, lacks=_of_world, oracle="the world's true reward"
  ),
  "source": Column(_source, lacks=_of_records, field="source"),
  "logp_alone": Column(_stored("alone", "logp_alone"), "alone"),
  "p_yes": Column(_stored("ask", "p_yes"), "ask"),
  "proxy_logp": Column(_stored("proxy", "proxy_logp"), "proxy", _of_pairs),
  "proxy_ref_logp": Column(
    _stored("proxy", "proxy_ref_logp"), "proxy", _of_pairs
  ),
  "held_out_loss": Column(
    _file("held_out", "held_out_loss"), "held_out", _of_pairs
  ),
}
# Where embeddings are of the first layers, these have a store of their own.
_LAYERS = {
  "logp": Column(_stored("logps", "logp"), "logps"),
  "logp_count": Column(_stored("logps", "count"), "logps"),
}
# Where answers are what is embedded.
_ANSWERS = {"answer_embedding": COLUMNS["embedding"]}
# Given a reward model, `reward` is what it says, and no oracle.
_JUDGED = {"reward": Column(_stored("rewards", "reward"), "rewards")}
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


def named(c: Any, sampler: Callable) -> set[str]:
  """The columns that config.select.kwargs names to one that takes them.

  What brackets bind, "dpp(quality=p_yes)", is in `sampler.needs` already.
  """
  parameters = inspect.signature(sampler).parameters.values()
  takes = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY} - set(
    getattr(sampler, "keywords", ())
  )
  found = (value for key, value in c.select.kwargs.items() if key in takes)
  return {
    name
    for value in found
    if isinstance(value, (str, tuple, list))
    for name in ((value,) if isinstance(value, str) else value)
    if isinstance(name, str) and name in COLUMNS
  }


def wanted(c: Any, kind: str, sampler: Callable) -> list[str]:
  """The columns to make for a sampler, in the order of COLUMNS."""
  asked, said = {*sampler.optional, *ALWAYS}, named(c, sampler)
  return [
    n
    for n, column in known(c).items()
    if n in sampler.needs
    or (n in said or n in asked and not column.oracle)
    and not column.lacks(c, kind)
  ]


def lacking(c: Any, kind: str, sampler: Callable) -> dict[str, str]:
  """The columns that a sampler needs and no stage makes: name -> why."""
  table = known(c)
  return {
    n: table[n].lacks(c, kind) if n in table else ""
    for n in sampler.needs
    if n not in MADE and (n not in table or table[n].lacks(c, kind))
  }


def check_records(job: Job, name: str) -> None:
  """Refuses a sampler that reads what the records turned out to lack.

  Args:
    job: its data stage has run.
    name: of the sampler; config.select.kwargs are those of the chosen one.

  Raises:
    DataError: no record has a field; nothing has been embedded for it yet.
  """
  sampler = chains.find_sampler(name)
  read = {
    *sampler.needs,
    *(named(job.c, sampler) if name == job.c.select.sampler else ()),
  }
  there = tables.column_names(job.shared / "data" / "pool.parquet")
  fields = {known(job.c)[n].field for n in read if n in known(job.c)} - {""}
  if absent := sorted(fields - {*there}):
    raise DataError(
      f"the records have no {', '.join(absent)}, which sampler "
      f"{name!r} reads; set config.data.fields, or "
      "config.select.sampler and config.select.kwargs"
    )


def gather(job: Job, sampler: Callable) -> dict[str, np.ndarray]:
  """Name -> array of N rows in id order, of what `wanted` lists; fields that
  no record has are left out, see `check_records`."""
  found = {
    n: known(job.c)[n].make(job) for n in wanted(job.c, job.kind, sampler)
  }
  return {n: x for n, x in found.items() if x is not None}


def stages(c: Any, kind: str, sampler: Callable) -> list[str]:
  """The stages whose files a sampler's columns are read from."""
  found = [known(c)[n].stage for n in wanted(c, kind, sampler)]
  return sorted({s for s in found if s})


def tuned(c: Any) -> str:
  """The stage whose log-probs proxies start from; "": they run a pass."""
  column = known(c)["logp"]
  return "" if c.proxy.checkpoint or column.lacks(c, "") else column.stage


def exact(c: Any) -> bool:
  """Whether a row's log-prob is one number wherever it is computed.

  In bfloat16 it depends on what is computed beside it: what a pass over the
  pool says of a row is not what training says of it.
  """
  return c.model.dtype == "float32"


def sums(c: Any, kind: str, sampler: Callable) -> str:
  """The stage whose log-probs the rows of an arm come with; "": of none."""
  if not exact(c):
    return ""
  if not embedder.alone(c):
    return "embed"
  read = before(c, stages(c, kind, sampler))
  return "logps" if "logps" in read else ""


def before(c: Any, names: list[str]) -> list[str]:
  """These stages and those that they read themselves."""
  reads = {"mixture": "embed", "proxy": tuned(c), "held_out": tuned(c)}
  return sorted({*names, *(reads[n] for n in names if reads.get(n))})


def notes(c: Any, sampler: Callable) -> tuple[str, ...]:
  """What stands beside a selection that read what no real data tells."""
  table = known(c)
  return tuple(
    f"it reads {table[n].oracle}: an upper bound, not a method"
    for n in (*sampler.needs, *sorted(named(c, sampler)))
    if n in table and table[n].oracle
  )
