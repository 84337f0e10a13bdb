"""Small policies tuned by DPO, that say how hard or how clear each pair is.

`proxy`: one, tuned on a few pairs; its log-ratios against what it was tuned
from are the implicit margin. `held_out`: several, each tuned on half of the
prompts; their losses on the other half are how hard a pair is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import disk, hub, processes
from jaxalign.core.artifacts import Cost
from jaxalign.core.checkpoints import restore_params
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.data import prepare, recipe
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.data.tokens import TokenRows
from jaxalign.embed import passes
from jaxalign.embed.over_pool import checkpoint_digest, over_shards
from jaxalign.embed.passes import PassOptions
from jaxalign.embed.store import ArraySpec
from jaxalign.model import adapters, decoder, hf
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Job, kernel_of, lora_of
from jaxalign.select import columns
from jaxalign.select.topk import uniform
from jaxalign.train import losses
from jaxalign.train.feed import TrainRows
from jaxalign.train.loop import TrainOptions
from jaxalign.train.sft import TRAINED
from jaxalign.train.trainer import begin_from, Recipe, train
from jaxalign.train.training_cost import row_passes, training_cost

BETA = 0.1
LOSS = losses.bind(losses.LOSSES["dpo"], "dpo", dict(beta=BETA))
KNOBS = (  # of config.train, for them too
  "batch_size",
  "accumulation",
  "warmup_ratio",
  "schedule",
  "clip",
  "weight_decay",
  "b2",
)


class Base(NamedTuple):
  """What the proxies are tuned from."""

  params: decoder.Params
  model: decoder.ModelConfig  # without adapters
  sums: np.ndarray  # [N, 2] float32 nats of every pool pair
  counts: np.ndarray  # [N, 2] float32
  cost: Cost  # of the pass that gave them; nothing where they were there


def config_of(c: Any, reference: decoder.ModelConfig) -> decoder.ModelConfig:
  """The sizes of what is tuned: config.proxy.checkpoint, or the reference.

  Raises:
    ConfigError: a checkpoint that cannot read the pool's tokens.
  """
  given = c.proxy.checkpoint
  if not given:
    return reference._replace(lora=None)
  m = hf.read_config(given, c.model.dtype, c.model.remat)
  wanted = prepare.requested_context(c)
  if wanted > m.context:
    raise ConfigError(
      f"config.proxy.checkpoint reads {m.context} tokens, "
      f"model.context={wanted}; set one of them"
    )
  return m._replace(
    context=min(wanted or reference.context, m.context), positions=m.context
  )


def check_proxies(c: Any) -> None:
  """Raises ConfigError for knobs of the proxies that cannot work."""
  if not c.proxy.models >= 2:
    raise ConfigError(
      f"proxy.models={c.proxy.models}, wanted 2 or more: one "
      "judges what the other has seen; set config.proxy.models"
    )
  if not c.proxy.checkpoint:
    return
  config_of(c, None)
  own = prepare.given_tokenizer(c)
  theirs = load_tokenizer(hub.resolve_settings(c.proxy.checkpoint))
  if own is None or own.pieces() != theirs.pieces():
    raise ConfigError(
      "config.proxy.checkpoint reads other tokens than the "
      "policy; wanted a small model of the same family, set "
      "config.proxy.checkpoint"
    )


def _base(job: Job) -> Base:
  """Loads what is tuned, and its own log-probabilities of the pool."""
  c = job.c
  m = config_of(c, job.model)
  if c.proxy.checkpoint:
    m = m._replace(attention=kernel_of(c, m, job.mesh))
    decoder.check_model(m, job.mesh)
    params = hf.load_folder(
      c.proxy.checkpoint, m, job.mesh, np.dtype(c.model.param_dtype)
    )
  else:
    params = job.reference
  if columns.tuned(c):
    # The reference's pass ran these very weights.
    table = columns.known(c)
    read = lambda name: np.asarray(table[name].make(job), np.float32)
    return Base(params, m, read("logp"), read("logp_count"), Cost())
  found, cost = _score(job, params, m, "proxy_ref")
  sums, counts = (x.reshape(-1, 2) for x in (found.logp, found.count))
  return Base(params, m, sums, counts, cost)


def _score(
  job: Job, params: Any, m: decoder.ModelConfig, label: str
) -> tuple[passes.RowScores, Cost]:
  """One pass over the pool, and what it cost."""
  rows, ids = job.tokens("pool"), job.column("pool", "id")
  tile, chunk = job.c.embed.tile, job.c.model.head_chunk
  how = PassOptions(tile, chunk, label=label, ids=ids)
  found = passes.score_rows(job.mesh, params, m, rows, how)
  return found, _pass_cost(m, rows)


def _pass_cost(m: decoder.ModelConfig, rows: TokenRows) -> Cost:
  return Cost(passes.pass_flops(m, rows), len(rows.ids))


class Tuning(NamedTuple):
  """How one proxy is tuned."""

  model: decoder.ModelConfig  # with the job's adapters
  rows: TrainRows
  recipe: Recipe

  @property
  def cost(self) -> Cost:
    m, rows, recipe = self
    return Cost(*training_cost(m, rows, recipe.batching(m), recipe.updates))


def _tuning(
  job: Job, base: Base, index: np.ndarray, updates: int, seed: int
) -> Tuning:
  """The tuning on the pairs `index`, with the job's adapters.

  Adapters with fixed bases are tuned as plain ones.
  """
  c, lora = job.c, lora_of(job.c)
  if lora and lora.variant == "lora_sb":
    lora = lora._replace(variant="lora")
  more = dict(updates=updates, seed=seed, head_chunk=c.model.head_chunk)
  more["lr"] = recipe.LORA_LR if lora else c.proxy.lr
  ids, sums = job.column("pool", "id"), (base.sums[index], base.counts[index])
  row_of = index[:, None] * 2 + np.arange(2)
  return Tuning(
    base.model._replace(lora=lora),
    TrainRows([ids[i] for i in index], job.tokens("pool"), row_of, *sums),
    Recipe(**{n: c.train[n] for n in KNOBS}, **more),
  )


def _tune(
  job: Job, folder: Any, label: str, base: Base, tuning: Tuning
) -> decoder.Params:
  """The tuned parameters; resumed from the folder's checkpoints."""
  t, (m, rows, how) = job.c.train, tuning
  options = TrainOptions(
    folder, label, how.updates, t.save_every, explode=t.explode
  )
  begin = lambda _: begin_from(dict(base.params), m, how.seed)
  train(job.mesh, m, begin, rows, LOSS, how, options)
  shapes = adapters.split(decoder.abstract(m, job.mesh), m.lora)[0]
  tuned = restore_params(folder / TRAINED[0], shapes)
  return tuned if m.lora is None else base.params | tuned


def proxy_needs(job: Job, arm: None) -> list[str]:
  c = job.c
  if c.proxy.checkpoint:  # where nothing else reads the reference it never ran
    return ["data"]
  tuned = columns.tuned(c)
  return ["data", "sft", *([tuned] if tuned else [])]


def proxy_fields(*proxy: str) -> Callable[[Job, None], dict[str, Any]]:
  """The fields of a stage that tunes proxies, config.proxy.`proxy` too."""

  def fields(job: Job, arm: None) -> dict[str, Any]:
    c, given = job.c, job.c.proxy.checkpoint
    knobs = pick(
      c,
      *(f"train.{n}" for n in (*KNOBS, "save_every")),
      *(f"proxy.{n}" for n in ("lr", "checkpoint", *proxy)),
      *("model", "embed.tile", "embed.shard"),
      *(["lora"] if c.lora.rank else []),
    )
    return knobs | (dict(proxy=checkpoint_digest(given)) if given else {})

  return fields


# One, for the implicit margin.


def drawn(ids: Any, pairs: float | int, seed: int) -> np.ndarray:
  """[M] row numbers, ascending, of the pairs that the proxy is tuned on.

  Args:
    ids: [N] record ids; a hash of each decides, so their order does not.
    pairs: a number, or a fraction below 1; at most half of the pool.
    seed: another seed draws others.
  """
  n = len(ids)
  wanted = round(pairs * n) if pairs < 1 else int(pairs)
  m = max(1, min(wanted, n // 2))
  return np.sort(
    np.argsort(-uniform(seed, np.asarray(ids), "proxy"), kind="stable")[:m]
  )


def make_proxy(job: Job, arm: None, folder: Any) -> Made:
  """A policy tuned by DPO on a few pairs, and what it says of the pool."""
  p, base = job.c.proxy, _base(job)
  rows, pair = job.tokens("pool"), ArraySpec((2,))
  index = drawn(job.column("pool", "id"), p.pairs, 0)
  tuning = _tuning(job, base, index, p.updates, 0)
  m, params = tuning.model, _tune(job, folder, "proxy", base, tuning)

  def score(options):
    found = passes.score_rows(job.mesh, params, m, rows, options)
    own = options.by_process[jax.process_index()]
    before = base.sums.reshape(-1)[own]
    return dict(proxy_logp=found.logp, proxy_ref_logp=before)

  arrays = dict(proxy_logp=pair, proxy_ref_logp=pair)
  files = over_shards(job, dict(proxy=arrays), score)
  say = f"tuned on {len(index):,} pairs"
  cost = base.cost + tuning.cost + _pass_cost(m, rows)
  return [*files, *TRAINED], cost, dict(rows=len(index), say=say)


# Several, for the held-out loss.


def halves(group: Any, models: int, seed: int) -> np.ndarray:
  """[N, S] bool, true where model s is tuned on the row.

  Models come in twos that see opposite halves, so that every row is new to
  half of them. A prompt's rows are all seen or all new: what one of them
  tells, it would tell of the others.

  Args:
    group: [N] str, alike for rows of one prompt.
    models: S, 2 or more.
    seed: of the halves.

  Raises:
    DataError: all rows have one prompt.
  """
  names, of, counts = np.unique(
    np.asarray(group, np.str_), return_inverse=True, return_counts=True
  )
  if len(names) < 2:
    raise DataError(
      "the pool has one prompt: it has no halves to tell how "
      "hard its pairs are; set config.select.sampler"
    )
  seen = np.zeros((len(of), models), bool)
  for s in range(0, models, 2):
    order = np.argsort(uniform(seed, names, f"half {s // 2}"), kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    first = np.zeros(len(names), bool)
    first[order] = before < len(of) / 2
    if first.all():  # one prompt is more than half of the pool
      first[order[-1]] = False
    seen[:, s] = first[of]
    if s + 1 < models:
      seen[:, s + 1] = ~first[of]
  return seen


def dpo_losses(policy: np.ndarray, ref: np.ndarray, beta: float) -> np.ndarray:
  """[N] float64 nats, -log sigmoid(beta (D_policy - D_ref)) of [N, 2] sums."""
  margin = (np.float64(policy) - np.float64(ref)) @ np.array([1.0, -1.0])
  return np.logaddexp(0.0, -beta * margin)


def loss_files(job: Job) -> list[str]:
  """The files of the models' losses."""
  return [f"loss{s}.npy" for s in range(job.c.proxy.models)]


def held_out_leaves(job: Job, arm: None) -> list[str]:
  """What `held_out` resumes."""
  return [*loss_files(job), *(f"model{s}" for s in range(job.c.proxy.models))]


def make_held_out(job: Job, arm: None, folder: Any) -> Made:
  """The DPO loss of every pair under models that have not seen its prompt."""
  c, p, names = job.c, job.c.proxy, loss_files(job)
  base, rows = _base(job), job.tokens("pool")
  seen = halves(job.column("pool", "group"), p.models, 0)
  cost, writes = base.cost, jax.process_index() == 0
  for s, name in enumerate(names):
    index = np.flatnonzero(seen[:, s])
    updates = -(-len(index) // c.train.batch_size)
    tuning = _tuning(job, base, index, updates, s)
    own, label = folder / f"model{s}", f"model {s + 1} of {p.models}"
    # Counted for every model: a resumed run has some of them already.
    cost += tuning.cost + _pass_cost(tuning.model, rows)
    done = processes.from_first(
      lambda path=folder / name: "done" if path.exists() else ""
    )
    if not done:
      params = _tune(job, own, label, base, tuning)
      found, _ = _score(job, params, tuning.model, label)
      loss = dpo_losses(found.logp.reshape(-1, 2), base.sums, BETA)
      if writes:
        loss = np.where(seen[:, s], np.nan, loss)
        disk.write_array(folder / name, loss)
    if writes and own.exists():
      own.rmtree()  # its losses are all that is read
  if writes:
    found = [disk.read_array(folder / name) for name in names]
    disk.write_array(folder / "held_out_loss.npy", np.stack(found, axis=1))
  return ["held_out_loss.npy", *names], cost, dict(say=f"{p.models} models")


def _price(z: JobSizes, models: int, updates: int) -> Price:
  """Three passes of every update, one over the pool for each model."""
  c, pairs, t = z.job.c, z.rows["pool"], int(z.tokens["pool"])
  proxy = config_of(c, z.model)._replace(lora=lora_of(c))
  row = decoder_flops(proxy, t)
  trained = decoder_flops(proxy, t, passes=row_passes(proxy))
  before = 0 if columns.tuned(c) else 2 * pairs * row
  tuning = pairs * row + updates * c.train.batch_size * trained
  return Price(pairs * z.responses, "rows", before + models * 2 * tuning)


def proxy_price(z: JobSizes, arm: None) -> Price:
  return _price(z, 1, z.job.c.proxy.updates)


def held_out_price(z: JobSizes, arm: None) -> Price:
  updates = -(-z.rows["pool"] // 2 // z.job.c.train.batch_size)
  return _price(z, z.job.c.proxy.models, updates)
