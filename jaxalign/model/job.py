"""What every stage of a run shares, and one arm of it."""

from collections.abc import Callable, Sequence
import functools
import re
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from jaxalign.core import artifacts, disk, progress
from jaxalign.core.artifacts import Description
from jaxalign.core.checkpoints import restore_params
from jaxalign.core.stage import names_of, Stage
from jaxalign.data import prepare, tables
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.tokenizer import load_tokenizer, Tokenizer
from jaxalign.model import adapters, attention, decoder, hf

WHOLE = ("all", "all_short")  # names in c.compare that leave nothing out


class Arm(NamedTuple):
  """One sampler at one budget and seed, and where it lives."""

  sampler: str
  budget: float | int
  seed: int
  like: float | int = 0  # trained as long as this budget is; 0: as its own

  @property
  def label(self) -> str:
    """What its seeds share: "isa-0.1"; the whole pool is called "all"."""
    name = self.sampler.replace(":", ".").replace("|", "-then-")
    name = re.sub(r"[^\w.,=()+-]", "", name.replace("*", "-x-"))
    like = f"-as-{self.like:g}" if self.like else ""
    return f"{'all' if self.is_all else name}-{self.budget:g}{like}"

  @property
  def name(self) -> str:
    """ "isa-0.1-seed0", its folder."""
    return f"{self.label}-seed{self.seed}"

  @property
  def is_all(self) -> bool:
    """Whether nothing was left out."""
    return self.budget == 1.0 and isinstance(self.budget, float)


class Job:
  """What every stage of a run shares: config, mesh, folders, finished records.

  A class because it caches what is costly to load (tokens, the reference).
  """

  force = False  # whether a job that should not fit is tried anyway

  def __init__(
    self,
    c: Any,
    mesh: Any,
    workdir: Any,
    loss: Callable,
    stages: Sequence[Stage] = (),
    redo: bool = False,
  ):
    self.c, self.mesh, self.loss, self.redo = c, mesh, loss, redo
    self.workdir = epath.Path(workdir)
    self.shared = self.workdir / "shared"
    self.stages = {stage.name: stage for stage in stages}
    self.planned: frozenset[str] = frozenset()  # shared stages it will run
    self.records: dict[tuple[str, str], artifacts.Record] = {}
    self.described: dict[str, Description] = {}  # by stage, the last run
    self.kept: dict[str, Any] = {}  # what a room makes once a job

  def folder(self, stage: Stage, arm: Arm | None = None) -> epath.Path:
    """Where a stage leaves its files."""
    own = stage.kind.of_arm
    return arm_folder(self, arm) if own else self.shared / stage.name

  def describe(self, stage: Stage, arm: Arm | None = None) -> Description:
    """What a stage is made from."""
    fields, inputs, kind = {}, {}, stage.kind
    for need in names_of(stage.needs, self, arm):
      name, other = need if isinstance(need, tuple) else (need, arm)
      own = name in self.stages and self.stages[name].kind.of_arm
      label = f"{name} of {other.name}" if other is not arm else name
      record = self.records[other.name if own else "", name]
      # Another checkpoint is another config, to be refused; what a stage made
      # anew makes those below it stale.
      into = fields if artifacts.is_given(record) else inputs
      into[label] = record.content
    return Description(
      fields | stage.fields(self, arm),
      inputs,
      self.redo or kind.remakes,
      names_of(kind.resumes, self, arm),
      kind.repairs,
      tuple(kind.volatile.split()),
    )

  def run(
    self, stage: Stage | str, arm: Arm | None = None, folder: Any = None
  ) -> artifacts.Record:
    """Runs or skips a stage; its record is kept for the ledger."""
    stage = self.stages[stage] if isinstance(stage, str) else stage
    kind, name = stage.kind, stage.name

    def make(folder):
      if kind.alone and jax.process_index() != 0:
        return [], artifacts.Cost(), {}
      return stage.make(self, arm, folder)

    if digest := kind.given(self):
      record = artifacts.given(name, digest)
    else:
      folder = self.folder(stage, arm) if folder is None else folder
      how = self.described[name] = self.describe(stage, arm)
      record = artifacts.run_stage(folder, name, how, make)
    for warning in record.result.get("warnings", ()):
      progress.say(f"  warning: {warning}")
    self.records[arm.name if kind.of_arm else "", name] = record
    return record

  def begin(self, name: str, result: dict[str, Any]) -> bool:
    """Marks a shared stage as begun, see `artifacts.begin_stage`."""
    stage = self.stages[name]
    how = self.describe(stage)
    return artifacts.begin_stage(self.folder(stage), name, how, result)

  def made_of(self, name: str) -> dict[str, Any]:
    """The fields and inputs of a shared stage, flat."""
    # Not described twice: that may digest a whole checkpoint.
    how = self.described.get(name) or self.describe(self.stages[name])
    return how.fields | how.inputs

  @property
  def responses(self) -> int:
    """R, of a record of the pool: 2 of pairs, 1 of single answers."""
    return len(self.tokens("pool").start) // len(self.column("pool", "id"))

  @functools.cached_property
  def most(self) -> int:
    """The longest row that the model can take, in tokens."""
    own = self.c.model.context or prepare.own_context(self.c)
    if self.c.model.checkpoint:
      own = given_model(self.c).context
    prepare.context_of(self.c, own)
    return own

  @functools.cached_property
  def context(self) -> int:
    """The longest row of this job: configured, or the data stage's choice."""
    if context := prepare.context_of(self.c, self.most):
      return context
    return disk.read_json(self.shared / "data" / "data_summary.json")["context"]

  @property
  def kind(self) -> str:
    """ "pairs" or "unpaired": what the loss compares."""
    return "unpaired" if self.loss.kind == "unpaired" else "pairs"

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The data stage's tokenizer."""
    return load_tokenizer(self.shared / "data")

  @functools.cached_property
  def model(self) -> decoder.ModelConfig:
    """The sizes of the reference."""
    if self.c.model.checkpoint:
      m = given_model(self.c)
      m = m._replace(context=self.context, positions=m.context)
    else:
      m = sizes(self.c, self.tokenizer.vocab_size)
    m = m._replace(attention=kernel_of(self.c, m, self.mesh))
    decoder.check_model(m, self.mesh)
    return m

  @functools.cached_property
  def policy(self) -> decoder.ModelConfig:
    """The sizes of the policy: the reference's, with adapters or without."""
    m = self.model._replace(lora=lora_of(self.c))
    decoder.check_model(m, self.mesh)
    return m

  @functools.cache
  def column(self, split: str, name: str) -> list:
    """One column of a split's records, "id" for instance; no text is read."""
    return tables.read_column(self.shared / "data" / f"{split}.parquet", name)

  @functools.cache
  def rows(self, split: str) -> list[dict]:
    """The records of a split with their texts, in id order.

    Only where text is written or shown; of the pool, by process 0 alone.
    """
    return tables.read_table(self.shared / "data" / f"{split}.parquet")

  @functools.cache
  def tokens(self, split: str) -> tokens_lib.TokenRows:
    """The tokenized rows of a split; two a pair."""
    return tokens_lib.load_rows(self.shared / "data", split)

  @functools.cached_property
  def reference(self) -> decoder.Params:
    """The frozen reference's parameters, on the mesh."""
    c, dtype = self.c.model, np.dtype(self.c.model.param_dtype)
    if c.checkpoint:
      return hf.load_folder(c.checkpoint, self.model, self.mesh, dtype)
    abstract = decoder.abstract(self.model, self.mesh)
    params = restore_params(self.shared / "sft" / "checkpoints", abstract)
    return {n: x.astype(dtype) for n, x in params.items()}

  def release_reference(self) -> None:
    """Frees the reference's weights; they are read again when needed."""
    self.__dict__.pop("reference", None)


def lora_of(c: Any) -> adapters.Lora | None:
  """The adapters of a config; None: all weights are trained."""
  k = c.lora
  if not k.rank:
    return None
  rs, variant = k.variant == "rslora", k.variant.removeprefix("rs")
  return adapters.Lora(k.rank, float(k.alpha), tuple(k.targets), rs, variant)


def kernel_of(c: Any, m: decoder.ModelConfig, mesh: Any) -> str:
  """The attention kernel that config.model.attention means on a mesh."""
  return attention.resolve(
    c.model.attention,
    mesh.devices.flat[0].platform,
    head_size=m.head_size,
    dtype=m.dtype,
    softcap=m.softcap,
    length=m.context,
  )


def given_model(c: Any) -> decoder.ModelConfig:
  """The model of config.model.checkpoint, its own context."""
  return hf.read_config(c.model.checkpoint, c.model.dtype, c.model.remat)


def sizes(c: Any, vocab: int) -> decoder.ModelConfig:
  """The model that `sft` trains; its table is rounded up to 64 rows."""
  m = c.model
  return decoder.ModelConfig(
    layers=m.layers,
    width=m.width,
    heads=m.heads,
    kv_heads=m.heads,
    head_size=m.width // m.heads,
    ff=m.ff,
    vocab=-(-vocab // 64) * 64,
    context=m.context or prepare.own_context(c),
    tied=True,
    dtype=m.dtype,
    remat=m.remat,
  )


def budget_of(value: Any) -> float | int:
  """400.0 is 400 rows: a flag cannot say whether it means a float."""
  if isinstance(value, float) and value > 1 and value == int(value):
    return int(value)
  return value


def arm_folder(job: Job, arm: Arm) -> epath.Path:
  """runs/<sampler>-<budget>-seed<k> under the workdir."""
  return job.workdir / "runs" / arm.name
