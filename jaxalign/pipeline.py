"""One job's stages in order; the only file that knows the order.

data -> sft -> embed -> mixture -> (baseline), shared by all arms, then for
each arm select -> ref_logps -> align -> evaluate -> export. Rooms meet here,
through files: `select` and `train` never import each other.
"""

import functools
import json
from typing import Any, Callable

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import artifacts
from jaxalign import embedder
from jaxalign import progress
from jaxalign import references
from jaxalign.artifacts import Cost, pick
from jaxalign.checkpoints import Checkpoints, restore_params
from jaxalign.data import prepare
from jaxalign.data import records
from jaxalign.data import tokens as tokens_lib
from jaxalign.errors import DataError
from jaxalign.eval import evaluate
from jaxalign.job import (Arm, Job, arm_folder, lora_of, sampler_kwargs,
                          updates_of)
from jaxalign.lookup import lookup
from jaxalign.model import adapters
from jaxalign.model import decoder
from jaxalign import hub
from jaxalign.model import peft_folder
from jaxalign.model import weights
from jaxalign.select import card as cards
from jaxalign.select import embed
from jaxalign.select import grams
from jaxalign.select import mixture as mixtures
from jaxalign.select.pool import Pool
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.topk import budget_rows
from jaxalign.train import feed
from jaxalign.train import loop
from jaxalign.train import optim
from jaxalign.train import stats
from jaxalign.train import step as steps
from jaxalign.train import subspace
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES


TRAINED = ("checkpoints", "metrics.jsonl")  # what a training stage leaves
BASES = "bases"  # and LoRA-SB's fixed matrices


# Shared stages.


def run_data(job: Job) -> None:
  """Reads, checks, splits and tokenizes the source."""
  c = job.c
  fields = pick(c, "data", "model.checkpoint", "model.tokenizer",
                "model.vocab_size", "model.context")
  fields |= dict(kind=job.kind, source_digest=artifacts.told(
      lambda: prepare.fingerprint(c)))
  job.run(job.shared / "data", "data", fields=fields, inputs={},
          make=lambda folder: prepare.make(
              c, folder, context=c.model.context, wanted=job.kind,
              writes=jax.process_index() == 0))
  progress.say(f"  mesh {dict(job.mesh.shape)} on {job.mesh.size} x "
               f"{job.mesh.devices.flat[0].device_kind}; model of "
               f"{decoder.parameter_count(job.model):,} parameters")


def run_sft(job: Job) -> None:
  """Trains the reference, where no checkpoint is given."""
  c, m, mesh = job.c, job.model, job.mesh
  if c.model.checkpoint:
    given = c.model.checkpoint
    key = artifacts.told(lambda: artifacts.key_of(
        "checkpoint", artifacts.digest_tree(
            hub.resolve(given), weights.digest_names(given)), {}))
    job.cards["", "sft"] = artifacts.Card("sft", key, {}, {}, {}, Cost(), {},
                                          skipped=True)
    return

  def make(folder):
    tokens = job.tokens("sft")
    n = len(tokens.start)
    rows = feed.Rows(job.column("sft", "id"), tokens,
                     np.arange(n)[:, None], np.zeros((n, 1), np.float32),
                     np.ones((n, 1), np.float32))
    params = decoder.init(jax.random.key(c.sft.seed), m, mesh)
    cost = _train(job, folder, "sft", m, lambda _: (params, {}), rows,
                  LOSSES["sft"], c.sft, lr=c.sft.lr, updates=c.sft.updates,
                  seed=c.sft.seed, sft_weight=0.0)
    return list(TRAINED), cost, {}

  job.run(job.shared / "sft", "sft", make=make, resumes=TRAINED,
          fields=pick(c, "sft", "model"), inputs=dict(data=job.key("data")))


def _train(job: Job, folder: Any, label: str, m: decoder.ModelConfig,
           begin: Callable, rows: feed.Rows, loss: Callable, knobs: Any, *,
           lr: float, updates: int, seed: int, sft_weight: float,
           optimizer: str = "adamw",
           mismatched: feed.Mismatched | None = None,
           trace: tuple[int, int] = (0, 0)) -> Cost:
  """Trains in `folder`; `begin(batch_at)` returns the parameters to train and
  those beside them that stay. Shared by sft and align."""
  c, mesh = job.c, job.mesh
  tx = optim.make_optimizer(clip=knobs.clip, b2=knobs.b2,
                            weight_decay=knobs.weight_decay, name=optimizer)
  if m.lora and m.lora.variant == "allora":
    tx = optim.allora(tx, c.lora.eta)
  rate = optim.make_schedule(lr=lr, updates=updates,
                             warmup_ratio=knobs.warmup_ratio,
                             schedule=knobs.schedule)
  batch_at, ids_at, tokens_at = feed.make_feed(
      mesh, rows, batch=knobs.batch_size, accumulation=knobs.accumulation,
      seed=seed, context=m.context, rate=rate, mismatched=mismatched)
  train_step = steps.make_train_step(
      PRODUCERS["chunked"](m, c.model.head_chunk), loss, tx,
      sft_weight=sft_weight)
  params, frozen = begin(batch_at)
  loop.fit(steps.init_state(params, tx, loss),
           lambda state, batch: train_step(state, batch, frozen), batch_at,
           ids_at, folder=folder, label=label, updates=updates,
           save_every=knobs.save_every, tokens_at=tokens_at, trace=trace)
  operations, tokens = feed.training_cost(
      m, rows, updates=updates, batch=knobs.batch_size, seed=seed,
      mismatched=mismatched.tokens if mismatched else None,
      ahead=stats.looks_ahead(loss))
  return Cost(operations, tokens)


def run_embed(job: Job) -> None:
  """Embeds every pool row; by the reference, its log-probs come with it."""
  c, m = job.c, job.model
  chosen = embedder.choose(c, m)
  inputs = dict(data=job.key("data"), sft=job.key("sft"))
  if chosen.folder:
    inputs = dict(data=job.key("data"), model=artifacts.told(
        lambda: artifacts.key_of("embedder", artifacts.digest_tree(
            hub.resolve(chosen.folder), embedder.digest_names(chosen)), {})))

  def make_alone(folder):
    x, operations, tokens = embedder.run(job, chosen, folder)
    if jax.process_index() == 0:
      artifacts.write_array(folder / "embedding.npy", x.reshape(
          len(job.column("pool", "id")), -1, x.shape[1]))
    return (["embedding.npy", *embedder.files(chosen)],
            Cost(operations, tokens), dict(say=f"{len(x):,} rows"))

  def make(folder):
    rows = job.tokens("pool")
    ids = job.column("pool", "id")
    n = len(ids)
    scores = embed.score_rows(
        job.mesh, job.reference, m, rows, pooling=c.embed.pooling,
        tile=c.embed.tile, chunk=c.model.head_chunk, ids=ids)
    if jax.process_index() == 0:
      artifacts.write_array(folder / "embedding.npy",
                            scores.embedding.reshape(n, -1, m.width))
      artifacts.write_array(folder / "logp.npy", scores.logp.reshape(n, -1))
      artifacts.write_array(folder / "count.npy", scores.count.reshape(n, -1))
    return (["embedding.npy", "logp.npy", "count.npy"],
            Cost(embed.operations(m, rows), len(rows.ids)),
            dict(say=f"{len(rows.start):,} rows"))

  job.run(job.shared / "embed", "embed", inputs=inputs,
          make=make_alone if chosen.alone else make,
          fields=pick(c, "embed", "model"))


def run_residual(job: Job) -> None:
  """What the pool's responses say beyond what the reference expected."""
  c, m = job.c, job.model

  def make(folder):
    rows, ids = job.tokens("pool"), job.column("pool", "id")
    found = embed.residual_rows(job.mesh, job.reference, m, rows,
                                tile=c.embed.tile, chunk=c.model.head_chunk,
                                ids=ids)
    for name, x in found.items():
      if jax.process_index() == 0:
        artifacts.write_array(folder / f"{name}.npy",
                              x.reshape(len(ids), -1, *x.shape[1:]))
    return ([f"{name}.npy" for name in found],
            Cost(embed.operations(m, rows)  # the head again, and its slope
                 + 4 * m.vocab * m.width * len(rows.ids), len(rows.ids)), {})

  job.run(job.shared / "residual", "residual", make=make,
          fields=pick(c, "embed.tile", "model"),
          inputs=dict(data=job.key("data"), sft=job.key("sft")))


def run_mixture(job: Job) -> None:
  """Fits the mixture, and what the card needs to know of it."""
  c = job.c
  knobs = c.select.mixture.to_dict()
  seed = knobs.pop("seed")
  if str(knobs["pca"]).isdigit():  # a flag gives text, as the default is text
    knobs["pca"] = int(knobs["pca"])

  def make(folder):
    stored = artifacts.read_array(job.shared / "embed" / "embedding.npy")
    n, r = stored.shape[:2]
    x = np.ascontiguousarray(stored.reshape(n * r, -1))
    space = mixtures.prepare(job.mesh, x, pca=knobs["pca"],
                             covariance=knobs["covariance"],
                             components=knobs["components"])
    extra = list(range(seed + 1, seed + 1 + c.select.stability_seeds))
    with progress.bar("mixture", knobs["starts"] * (2 + len(extra)),
                      "starts") as tick:
      fitted = [mixtures.fit(job.mesh, x, seed=s, space=space, progress=tick,
                             **knobs) for s in [seed, *extra]]
      halves = cards.held_out(job.mesh, x, seed=seed, responses=r,
                              progress=tick, **knobs)
    values = np.stack([mixtures.log_likelihood(f, x).reshape(n, r)
                       for f in fitted])
    diagnostics = dict(held_out=halves)
    if r == 2:
      diagnostics["labels"] = cards.component_labels(
          fitted[0], x, np.tile([1, 0], n))
    else:
      label = np.array(job.column("pool", "label"))
      diagnostics["labels"] = cards.component_labels(fitted[0], x, label)
    if jax.process_index() == 0:
      mixtures.save(fitted[0], folder / "mixture.npz")
      artifacts.write_array(folder / "log_likelihood.npy", values)
      artifacts.write_json(folder / "diagnostics.json", diagnostics)
    width = fitted[0].means.shape[1]
    # All fits that ran, the one on half the rows too; a start is taken to need
    # as many sweeps as the one that was kept.
    sweeps = knobs["starts"] * (sum(len(f.trace) for f in fitted)
                                + len(fitted[0].trace) // 2)
    operations = (2 * n * r * stored.shape[2] ** 2  # the covariance
                  + sweeps * 4 * n * r * knobs["components"] * width ** 2)
    return (["mixture.npz", "log_likelihood.npy", "diagnostics.json"],
            Cost(operations), dict(warnings=fitted[0].warnings))

  card = job.run(job.shared / "mixture", "mixture", make=make,
                 fields=pick(c, "select.mixture", "select.stability_seeds"),
                 inputs=dict(embed=job.key("embed")))
  for warning in card.result["warnings"]:
    progress.say(f"  warning: {warning}")


def _save_outcome(folder: epath.Path, what: evaluate.Examined,
                  outcome: evaluate.Outcome) -> list[str]:
  """The raw numbers of a policy, so that arms can be compared later."""
  if jax.process_index() == 0:
    artifacts.write_array(folder / "held_out_logp.npy", outcome.logp)
    lines = []
    for k, i in enumerate(what.asked):
      row = what.rows[i]
      lines.append(json.dumps(dict(
          id=row["id"], prompt=row["prompt"], target=row["target"],
          said=outcome.texts[k], ids=outcome.said[k].tolist(),
          logp=float(outcome.own_logp[k]),
          reward=(None if outcome.reward is None
                  else float(outcome.reward[k])))) + "\n")
    artifacts.write_bytes(folder / "samples.jsonl", "".join(lines).encode())
  return ["held_out_logp.npy", "samples.jsonl"]


def read_samples(folder: Any) -> list[dict[str, Any]]:
  """What `evaluate` generated in a folder, one dict a prompt."""
  text = (epath.Path(folder) / "samples.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _load_outcome(folder: Any) -> evaluate.Outcome:
  samples = read_samples(folder)
  reward = np.array([s["reward"] for s in samples], object)
  return evaluate.Outcome(
      artifacts.read_array(epath.Path(folder) / "held_out_logp.npy"),
      [np.array(s["ids"], np.int32) for s in samples],
      [s["said"] for s in samples], np.array([s["logp"] for s in samples]),
      None if None in reward else reward.astype(float), 0, 0)


def _examine(job: Job, params: Any, m: decoder.ModelConfig, seed: int = 0
             ) -> evaluate.Outcome:
  c = job.c.eval
  return evaluate.examine(
      job.mesh, params, m, job.examined, new=c.new_tokens,
      temperature=c.temperature, seed=c.seed + seed, tile=c.tile,
      chunk=job.c.model.head_chunk)


def run_baseline(job: Job) -> None:
  """Measures the reference itself, once for all arms."""
  def make(folder):
    outcome = _examine(job, job.reference, job.model)
    files = _save_outcome(folder, job.examined, outcome)
    metrics = evaluate.measure(job.examined, outcome, outcome,
                               outcome.own_logp)
    if jax.process_index() == 0:
      artifacts.write_json(folder / "eval.json", metrics)
    return [*files, "eval.json"], Cost(outcome.operations, outcome.tokens), {}

  job.run(job.shared / "baseline", "baseline", make=make,
          fields=pick(job.c, "eval"),
          inputs=dict(data=job.key("data"), sft=job.key("sft")))


# Stages of one arm.


def run_select(job: Job, arm: Arm) -> None:
  """Scores the pool, keeps the budget, says how the kept rows differ."""
  c, folder = job.c, arm_folder(job, arm)
  sampler = lookup(SAMPLERS, arm.sampler, "sampler", "select.sampler")
  kwargs = sampler_kwargs(c, sampler) if arm.sampler == c.select.sampler else {}
  uses_mixture = "log_likelihood" in sampler.needs
  chosen_arm = arm._replace(sampler=c.select.sampler)  # it ran before this one

  budget = budget_rows(arm.budget, len(job.column("pool", "id")),
                       c.train.batch_size)
  files = ["scores.parquet", "subset.parquet", "selection.json", "config.json"]

  def make(folder):
    if jax.process_index() != 0:  # what follows reads the texts of the pool
      return files, Cost(), {}
    rows, tokens = job.rows("pool"), job.tokens("pool")
    n = len(rows)
    lengths = tokens_lib.lengths(tokens) - tokens.start
    columns = dict(length=lengths.reshape(n, -1).astype(np.int32))
    if job.kind == "thumbs":
      columns["label"] = np.array([r["label"] for r in rows])
    world = prepare.world_of(c)
    if world is not None:
      from jaxalign.data import world as world_lib
      columns["topic"] = np.array([world_lib.topic(world, r["prompt"])
                                   for r in rows])
    if "embedding" in sampler.needs:
      columns["embedding"] = artifacts.read_array(
          job.shared / "embed" / "embedding.npy")
    if "logp" in sampler.needs + sampler.optional and not embedder.alone(c):
      for name, file in (("logp", "logp"), ("logp_count", "count")):
        columns[name] = artifacts.read_array(
            job.shared / "embed" / f"{file}.npy")
    if "residual" in sampler.needs:
      for name in ("residual", "least"):
        columns[name] = artifacts.read_array(
            job.shared / "residual" / f"{name}.npy")
    if "grams" in sampler.needs:
      columns |= grams.columns(tokens, len(tokens.start) // n)
    if "group" in sampler.optional:
      columns["group"] = np.array([r["group"] for r in rows])
    if "subset" in sampler.needs:
      columns["subset"] = np.isin(np.arange(n), selected_rows(job, chosen_arm))
    ids = np.array([r["id"] for r in rows])
    fits = [None]
    if uses_mixture:
      fits = artifacts.read_array(job.shared / "mixture" / "log_likelihood.npy")
    chosen = []
    for values in fits:
      extra = {} if values is None else dict(log_likelihood=values)
      chosen.append(sampler(arm.seed, Pool(ids, columns | extra), budget,
                            **kwargs))
    selection, diagnostics, mixture = chosen[0], {}, None
    if uses_mixture:
      mixture = mixtures.load(job.shared / "mixture" / "mixture.npz")
      diagnostics = artifacts.read_json(
          job.shared / "mixture" / "diagnostics.json")
      overlaps = [cards.jaccard(selection.rows, other.rows)
                  for other in chosen[1:]]
      diagnostics["stability"] = dict(
          jaccard=overlaps, mean=float(np.mean(overlaps)) if overlaps else None)
    if selection.notes:
      diagnostics["notes"] = list(selection.notes)
    card = cards.selection_card(Pool(ids, columns), selection, mixture,
                                diagnostics, arm.sampler)
    _write_selection(folder, rows, selection, card, fits[0])
    artifacts.write_json(folder / "config.json", json.loads(
        c.to_json_best_effort()) | dict(arm=arm._asdict()))
    return files, Cost(), dict(say=f"{budget:,} of {n:,} rows")

  fields = dict(sampler=arm.sampler, budget=arm.budget, seed=arm.seed,
                batch_size=c.train.batch_size, **kwargs)
  inputs = dict(data=job.key("data"))
  if uses_mixture:
    inputs["mixture"] = job.key("mixture")
  if {"embedding", "logp"} & {*sampler.needs, *sampler.optional}:
    inputs["embed"] = job.key("embed")
  if "subset" in sampler.needs:
    inputs["subset"] = job.key("select", chosen_arm.name)
  if "residual" in sampler.needs:
    inputs["residual"] = job.key("residual")
  job.run(folder, "select", arm.name, fields=fields, inputs=inputs, make=make)


def _write_selection(folder, rows, selection, card, likelihood) -> None:
  """scores.parquet of all rows, subset.parquet of the kept ones, the card."""
  rank = np.empty(len(rows), np.int64)
  order = np.argsort(-selection.score, kind="stable")
  rank[order] = np.arange(len(rows))
  rank[selection.rows] = np.arange(len(selection.rows))
  kept = np.zeros(len(rows), bool)
  kept[selection.rows] = True
  scores = []
  for i, row in enumerate(rows):
    line = dict(id=row["id"], row=i, score=float(selection.score[i]),
                rank=int(rank[i]), selected=bool(kept[i]))
    if likelihood is not None:
      for side, value in enumerate(likelihood[i]):
        line[f"log_likelihood_{side}"] = float(value)
    scores.append(line)
  records.write_rows(folder / "scores.parquet", scores)
  subset = []
  for place, i in enumerate(selection.rows):
    row = {k: v for k, v in rows[i].items() if k != "group"}
    subset.append(row | dict(score=float(selection.score[i]), rank=place))
  records.write_rows(folder / "subset.parquet", subset)
  artifacts.write_json(folder / "selection.json", card)


def selected_rows(job: Job, arm: Arm) -> np.ndarray:
  """Row numbers of the pool that an arm kept, best first."""
  where = {name: i for i, name in enumerate(job.column("pool", "id"))}
  kept = records.read_column(arm_folder(job, arm) / "subset.parquet", "id")
  return np.array([where[name] for name in kept])


def _updates(job: Job, arm: Arm, n: int) -> int:
  return updates_of(job.c, arm, n, len(job.column("pool", "id")))


def _like(arm: Arm) -> dict[str, Any]:
  """What a card says of an arm trained as long as another budget."""
  return dict(like=arm.like) if arm.like else {}


def run_ref_logps(job: Job, arm: Arm) -> None:
  """The reference's (sum, count) of the kept rows, by id.

  Where the embedding pass ran the same weights over the same rows its numbers
  are looked up; KTO's mismatched rows always need a pass of their own, and so
  does what `references` adds. A loss that reads no reference is given zeros
  where numbers would cost a pass.
  """
  c, m = job.c, job.model

  def kept(index):
    """(sum, count) [M, R] of the kept rows, and what they cost."""
    base = job.shared / "embed"
    if not embedder.alone(c):
      return (artifacts.read_array(base / "logp.npy")[index],
              artifacts.read_array(base / "count.npy")[index], Cost())
    tokens = job.tokens("pool")
    responses = len(tokens.start) // len(job.column("pool", "id"))
    rows = tokens_lib.take(tokens, (
        index[:, None] * responses + np.arange(responses)).reshape(-1))
    if not job.loss.reference:
      counts = tokens_lib.lengths(rows) - rows.start
      counts = np.float32(counts.reshape(len(index), -1))
      return np.zeros_like(counts), counts, Cost()
    scores = embed.score_rows(
        job.mesh, job.reference, m, rows, tile=c.embed.tile,
        chunk=c.model.head_chunk, label="ref_logps",
        ids=[job.column("pool", "id")[i] for i in index])
    return (scores.logp.reshape(len(index), -1),
            scores.count.reshape(len(index), -1),
            Cost(embed.operations(m, rows), len(rows.ids)))

  def make(folder):
    index = selected_rows(job, arm)
    total, count, cost = kept(index)
    arrays = dict(ref_sum=total, ref_count=count)
    rows = _rows(job, arm, total, count)

    def spent(more):
      nonlocal cost
      cost = Cost(cost.operations + more.operations, cost.tokens + more.tokens)

    if "public" in job.loss.extras:
      arrays["ref_public"], more = references.public_sums(job, rows)
      spent(more)
    if "weights" in job.loss.stats:
      arrays["weights"], more = references.prompt_weights(job, rows, arm.seed)
      spent(more)
    if "z0" in job.loss.stats:
      tokens = feed.make_mismatched(
          rows, updates=_updates(job, arm, len(index)), batch=c.train.batch_size,
          seed=arm.seed, context=m.context)
      arrays["mismatched_sum"] = embed.score_rows(
          job.mesh, job.reference, m, tokens, tile=c.embed.tile,
          chunk=c.model.head_chunk, label="ref_logps").logp
      spent(Cost(embed.operations(m, tokens), len(tokens.ids)))
    if jax.process_index() == 0:
      for name, x in arrays.items():
        artifacts.write_array(folder / f"{name}.npy", x)
      artifacts.write_json(folder / "ref_ids.json",
                           [job.column("pool", "id")[i] for i in index])
    return [*(f"{n}.npy" for n in arrays), "ref_ids.json"], cost, {}

  fields = dict(loss=c.loss.name)
  if "z0" in job.loss.stats:
    fields |= pick(c, "train.batch_size", "train.epochs", "train.max_updates",
                   "train.min_updates") | _like(arm)
  job.run(arm_folder(job, arm), "ref_logps", arm.name, fields=fields,
          make=make, inputs=dict(select=job.key("select", arm.name),
                                 embed=job.key("embed")))


def _rows(job: Job, arm: Arm, total: np.ndarray, count: np.ndarray
          ) -> feed.Rows:
  index = selected_rows(job, arm)
  ids, tokens = job.column("pool", "id"), job.tokens("pool")
  responses = len(tokens.start) // len(ids)
  label = None
  if job.kind == "thumbs":
    label = np.array(job.column("pool", "label"))[index]
  return feed.Rows(
      [ids[i] for i in index], tokens,
      index[:, None] * responses + np.arange(responses)[None, :],
      np.asarray(total), np.asarray(count), label)


def _policy_start(job: Job, arm: Arm, folder: Any, batch_at: Callable
                  ) -> tuple[decoder.Params, decoder.Params]:
  """(trained, frozen) parameters that compute what the reference does."""
  c, m = job.c, job.policy
  if m.lora is None:  # the step donates its state, so it has a copy
    return {n: jnp.array(x, jnp.float32)
            for n, x in job.reference.items()}, {}
  fresh = adapters.init(jax.random.key(arm.seed), decoder.table(m), job.mesh)
  if m.lora.variant == "lora_sb":
    with Checkpoints(folder / BASES) as saved:
      if saved.latest() is None:
        found = subspace.bases(
            jax.random.key(arm.seed), m, job.mesh, job.reference,
            lambda sizes: steps.make_gradients(
                PRODUCERS["chunked"](sizes, c.model.head_chunk), job.loss,
                sft_weight=c.loss.sft_weight),
            [batch_at(step) for step in range(c.lora.batches)])
        saved.save(0, dict(params=found))
    fresh |= _bases(job, folder)
  adapters.assert_zero(fresh)
  trained, fixed = adapters.split(fresh, m.lora)
  return trained, job.reference | fixed


def _bases(job: Job, folder: Any) -> decoder.Params:
  """LoRA-SB's fixed matrices, as `align` saved them."""
  return restore_params(folder / BASES, {
      n: x for n, x in decoder.abstract(job.policy, job.mesh).items()
      if n.endswith((":a", ":b"))})


def run_align(job: Job, arm: Arm) -> None:
  """Trains the policy on the kept rows, from the reference."""
  c, m = job.c, job.model
  lora = lora_of(c)
  leaves = TRAINED + ((BASES,) if lora and lora.variant == "lora_sb" else ())

  def make(folder):
    total = artifacts.read_array(folder / "ref_sum.npy")
    count = artifacts.read_array(folder / "ref_count.npy")
    rows = _rows(job, arm, total, count)
    if "public" in job.loss.extras:
      rows = rows._replace(
          ref_public=artifacts.read_array(folder / "ref_public.npy"))
    if "weights" in job.loss.stats:
      rows = rows._replace(weights=artifacts.read_array(folder / "weights.npy"))
    if artifacts.read_json(folder / "ref_ids.json") != rows.ids:
      raise DataError(f"{folder}/ref_ids.json names other rows than "
                      "subset.parquet; run with --redo")
    if rows.label is not None and len(set(rows.label.tolist())) == 1:
      progress.say("  warning: all kept rows have the same label; the "
                   "loss will only push one way")
    updates, mismatched = _updates(job, arm, len(rows.ids)), None
    if "z0" in job.loss.stats:
      mismatched = feed.Mismatched(
          feed.make_mismatched(rows, updates=updates, seed=arm.seed,
                               batch=c.train.batch_size, context=m.context),
          artifacts.read_array(folder / "mismatched_sum.npy"))
    cost = _train(job, folder, f"align {arm.name}", job.policy,
                  functools.partial(_policy_start, job, arm, folder), rows,
                  job.loss, c.train, lr=c.lora.lr if lora else c.train.lr,
                  updates=updates, seed=arm.seed, mismatched=mismatched,
                  sft_weight=c.loss.sft_weight, optimizer=c.train.optimizer,
                  trace=tuple(c.profile.steps))
    return (list(leaves), cost,
            dict(updates=updates, rows=len(rows.ids),
                 say=f"{updates} updates"))

  fields = pick(c, "loss", "train", "model.head_chunk", "model.dtype",
                *(["lora"] if lora else [])) | _like(arm)
  if c.train.optimizer == "adamw":  # runs of before there was a choice go on
    del fields["train.optimizer"]
  job.run(arm_folder(job, arm), "align", arm.name, make=make, resumes=leaves,
          fields=fields,
          inputs=dict(ref_logps=job.key("ref_logps", arm.name)))


def run_evaluate(job: Job, arm: Arm) -> None:
  """Measures the policy on the held-out split, and exports it."""
  folder = arm_folder(job, arm)

  @functools.lru_cache(maxsize=1)
  def policy():
    m = job.policy
    trained = restore_params(
        folder / "checkpoints",
        adapters.split(decoder.abstract(m, job.mesh), m.lora)[0])
    if m.lora is None:
      return trained
    if m.lora.variant == "lora_sb":
      trained |= _bases(job, folder)
    return job.reference | trained

  def export(folder):
    params, m = policy(), job.policy
    merged = adapters.Merged(params, m.lora) if m.lora else params
    files = weights.export_folder(folder / "export", merged, job.model,
                                  job.tokenizer)
    if m.lora:
      peft_folder.save(folder / "adapter", params, m,
                       base=job.c.model.checkpoint)
      files = [*files, "adapter"]
    return files, Cost(), {}

  def measure(folder):
    # Arms of one seed meet the same noise; another seed meets another.
    outcome = _examine(job, policy(), job.policy, arm.seed)
    under = evaluate.score_answers(
        job.mesh, job.reference, job.model, job.examined, outcome.said,
        new=job.c.eval.new_tokens, tile=job.c.eval.tile,
        chunk=job.c.model.head_chunk)
    metrics = evaluate.measure(job.examined, outcome,
                               _load_outcome(job.shared / "baseline"), under)
    files = _save_outcome(folder, job.examined, outcome)
    if jax.process_index() == 0:
      artifacts.write_json(folder / "eval.json", metrics)
    win = metrics.get("win_vs_target")
    say = f"wins {100 * win['value']:.1f} % against the target" if win else ""
    return ([*files, "eval.json"], Cost(outcome.operations, outcome.tokens),
            dict(say=say))

  job.run(folder, "evaluate", arm.name, make=measure,
          fields=pick(job.c, "eval"),
          inputs=dict(align=job.key("align", arm.name),
                      baseline=job.key("baseline")))
  job.run(folder, "export", arm.name, fields={},
          inputs=dict(align=job.key("align", arm.name)), make=export)


def run_shared(job: Job, arms: list[Arm]) -> None:
  """The stages that all arms read."""
  run_data(job)
  for arm in arms:
    budget_rows(arm.budget, len(job.column("pool", "id")),
                job.c.train.batch_size)
  run_sft(job)
  run_embed(job)
  if any("residual" in lookup(SAMPLERS, a.sampler, "sampler",
                              "select.sampler").needs for a in arms):
    run_residual(job)
  if any("log_likelihood" in lookup(SAMPLERS, a.sampler, "sampler",
                                    "select.sampler").needs for a in arms):
    run_mixture(job)
  run_baseline(job)


def run_arm(job: Job, arm: Arm) -> None:
  """The stages of one arm."""
  for stage in (run_select, run_ref_logps, run_align, run_evaluate):
    stage(job, arm)
