r"""Alignment next to TRL: speed on real pairs, and peak memory.

  python tools/bench.py train --data=<pairs.jsonl.gz>          # speed, 5 M
  python tools/bench.py train --data=... --size=25m --pairs=32
  python tools/bench.py train --data=... --memory              # peak memory

Every system is a process of its own that waits for its turn; turns go round,
so that what else the machine does meets all of them. A turn is one epoch over
the same pairs in float32, and its tokens are counted: a system that saw others
is refused. Compiling and the first updates come before the first turn.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TEXTS = ("prompt", "chosen", "rejected")
SIZES = {
  "5m": dict(layers=5, width=256, heads=4, ff=704),
  "25m": dict(layers=7, width=512, heads=8, ff=1408),
}
# Ours, a step at a time: (layout, head, reference inside the step).
OURS = {
  "ours, as TRL does it": ("padded", "plain", True),
  "+ reference once": ("padded", "plain", False),
  "+ head in chunks": ("padded", "chunked", False),
  "+ packed": ("packed_apart", "chunked", False),
  "+ prompt once": ("packed", "chunked", False),
}
ALL_TRL = dict(beta=0.1, num_train_epochs=1000, max_grad_norm=1.0, seed=0)
ALL_TRL |= dict(learning_rate=1e-6, lr_scheduler_type="constant")
ALL_TRL |= dict(max_length=None, gradient_checkpointing=False)
ALL_TRL |= dict(bf16=False, use_cpu=True, dataloader_pin_memory=False)
ALL_TRL |= dict(logging_steps=10**6, save_strategy="no", report_to=[])
ALL_TRL |= dict(disable_tqdm=True)
GROUPED = dict(
  train_sampling_strategy="group_by_length", length_column_name="length"
)
TRL = {
  "TRL, random": dict(train_sampling_strategy="random"),
  "TRL, group_by_length": GROUPED,
  "TRL, grouped, reference once": GROUPED | dict(precompute_ref_log_probs=True),
}


def columns(pairs: list[dict]) -> tuple[list[str], dict[str, list[str]]]:
  """Prompts, and the answers by side, as `encode_texts` takes them."""
  take = lambda name: [p[name] for p in pairs]
  return take(TEXTS[0]), {name: take(name) for name in TEXTS[1:]}


def prepare(args, folder: pathlib.Path) -> None:
  """Pairs that fit the context, a tokenizer of them, a fresh model's export."""
  import jax
  import numpy as np

  from jaxalign.core import sharding
  from jaxalign.data import records, tokenizer, tokens
  from jaxalign.data.encode import encode_texts
  from jaxalign.model import decoder, hf

  rows = [r for r in records.load_records(args.data).rows if r["prompt"]]
  texts = [r["prompt"] + r["chosen"] for r in rows]
  tok = tokenizer.Tokenizer(tokenizer.train_tokenizer(texts[:1500], 4096))
  encoded, _, refused = encode_texts(tok, *columns(rows), context=1 << 14)
  both = tokens.row_lengths(encoded).reshape(-1, 2)
  kept = [r for i, r in enumerate(rows) if i not in refused]
  # TRL lets an answer's first token merge with its prompt's last one.
  length = lambda text: len(tok.encode_rendered(text)) + 2
  apart = [[length(r["prompt"] + r[side]) for side in TEXTS[1:]] for r in kept]
  merged = (np.array(apart) != both).any(1)
  fits = np.flatnonzero((both.max(1) <= args.context) & ~merged)
  chosen = np.random.default_rng(0).permutation(fits)[: args.pairs]
  line(
    f"{len(rows)} pairs, {int(merged.sum())} whose answers merge with the "
    f"prompt left out, {len(fits)} of at most {args.context} tokens; "
    f"{len(chosen)} of them are used"
  )
  used = [{k: kept[i][k] for k in TEXTS} for i in chosen]
  (folder / "pairs.json").write_text(json.dumps(used))
  shape = {**SIZES[args.size]}
  vocab = args.vocab or -(-tok.vocab_size // 64) * 64
  shape |= dict(kv_heads=shape["heads"], head_size=64)
  m = decoder.ModelConfig(**shape, vocab=vocab, context=args.context)
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = decoder.init(jax.random.key(0), m)
    hf.export_folder(folder / "export", params, m, tok)
  count = decoder.parameter_count(m)
  line(f"Llama of {count:,} parameters, vocabulary {vocab}")


def line(text: str) -> None:
  print(text, flush=True)


def serve(turn) -> None:
  """Runs `turn()` at every line of input and writes what it returns."""
  for _ in sys.stdin:
    wall, cpu = time.monotonic(), time.process_time()
    out = turn()
    out |= dict(wall=time.monotonic() - wall, cpu=time.process_time() - cpu)
    say(out)


def say(out: dict) -> None:
  out["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print("RESULT " + json.dumps(out), flush=True)


def resident() -> float:
  """MiB that this process holds now."""
  words = pathlib.Path("/proc/self/statm").read_text().split()
  return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours(args) -> None:
  """Child: one of OURS."""
  import jax
  import numpy as np

  from jaxalign.core import sharding
  from jaxalign.data import tokenizer
  from jaxalign.data.encode import encode_texts
  from jaxalign.model import hf
  from jaxalign.train import feed, losses, optim
  from jaxalign.train import step as steps
  from jaxalign.train.logps import PRODUCERS
  from jaxalign.train.reference import Reference, reference_logps

  jax.devices()
  idle = resident()
  layout, head, online = OURS[args.system]
  folder = pathlib.Path(args.workdir)
  pairs = json.loads((folder / "pairs.json").read_text())
  n = len(pairs)
  m = hf.read_config(folder / "export", "float32", "none")
  m = m._replace(context=args.context, attention="tiles")
  tok = tokenizer.load_tokenizer(folder / "export")
  encoded, _, refused = encode_texts(tok, *columns(pairs), context=args.context)
  assert not refused
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  with jax.set_mesh(mesh):
    params = hf.load_folder(folder / "export", m, mesh)
    ids, row_of = [str(i) for i in range(n)], np.arange(2 * n).reshape(n, 2)
    unit = np.ones((n, 2), np.float32)
    rows = feed.TrainRows(ids, encoded, row_of, 0 * unit, unit)

    def score():
      frozen = Reference(mesh, params, m, tile=32, chunk=64)
      return reference_logps(frozen, encoded, rows.row_of, layout)

    once = 0.0
    if not online:
      score()  # compiles
      begin = time.process_time()
      total, count = score()
      once = time.process_time() - begin
      rows = rows._replace(ref_sum=total, ref_count=count)
    producer = PRODUCERS[head](m, 64)
    tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.999)
    dpo = losses.bind(losses.LOSSES["dpo"], "dpo", dict(beta=0.1))
    train_step = steps.make_train_step(producer, dpo, tx)
    reference = jax.jit(
      lambda p, t, k: jax.lax.map(lambda micro: producer(p, *micro).sum, (t, k))
    )
    state = steps.init_state(jax.tree.map(lambda x: x + 0, params), tx, dpo)
    batching = feed.Batching(args.batch, 0, args.micro, args.context, layout)
    fed = feed.Feed(mesh, rows, batching, lambda step: 1e-6)
    at, updates = fed.batch_at, n // args.batch

    def update(step):
      nonlocal state
      batch = at(step)
      if online:
        sums = reference(params, batch.tokens, batch.mask)
        batch = batch.replace(ref=batch.ref.replace(sum=sums))
      state, totals = train_step(state, batch)
      return totals

    def turn():
      jax.block_until_ready([update(s) for s in range(updates)])
      return dict(tokens=sum(map(fed.tokens_at, range(updates))), once=once)

    shapes, begin = set(), time.monotonic()
    for s in range(updates):  # every shape once
      key = str(jax.tree.map(lambda x: x.shape, at(s).tokens))
      if key not in shapes:
        shapes.add(key)
        jax.block_until_ready(update(s))
    say(dict(ready=time.monotonic() - begin, shapes=len(shapes), idle=idle))
    serve(turn)


def theirs(args) -> None:
  """Child: TRL's DPOTrainer; a callback waits at the end of every epoch."""
  import warnings

  import datasets
  import torch
  import transformers
  import trl

  warnings.filterwarnings("ignore")
  datasets.disable_progress_bars()
  transformers.logging.set_verbosity_error()
  idle = resident()
  folder = pathlib.Path(args.workdir)
  pairs = json.loads((folder / "pairs.json").read_text())
  tok = transformers.AutoTokenizer.from_pretrained(
    folder / "export", local_files_only=True
  )
  updates = len(pairs) // args.batch
  batch = dict(per_device_train_batch_size=args.batch // args.micro)
  batch |= dict(gradient_accumulation_steps=args.micro)
  own = ALL_TRL | TRL[args.system] | batch
  config = trl.DPOConfig(output_dir=str(folder / "trl"), **own)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / "export", local_files_only=True, dtype=torch.float32
  )
  begin, cpu = time.monotonic(), time.process_time()
  trainer = trl.DPOTrainer(
    model=model,
    processing_class=tok,
    args=config,
    train_dataset=datasets.Dataset.from_list(pairs),
  )
  once = time.process_time() - cpu if trainer.precompute_ref_logps else 0.0
  ids = ("prompt_ids", "chosen_ids", "rejected_ids")
  sizes = [[len(r[k]) for k in ids] for r in trainer.train_dataset]
  trainer.train_dataset = trainer.train_dataset.add_column(
    "length", [p + max(a, b) for p, a, b in sizes]
  )
  if trainer._signature_columns is None:
    trainer._set_signature_columns_if_needed()
  trainer._signature_columns.append("length")  # the sampler reads it
  total = sum(2 * p + a + b for p, a, b in sizes)
  found = dict(tokens=0)

  def count(inputs):
    found["tokens"] += int(inputs["attention_mask"].sum())
    return inputs

  collate = trainer.data_collator
  trainer.data_collator = lambda rows: count(collate(rows))

  class Turns(transformers.TrainerCallback):
    """One epoch a line of input; the first update is a turn of its own."""

    def __init__(self):
      self.started = False

    def on_step_end(self, args, state, control, **kwargs):
      if not self.started:
        self.started = True
        say(dict(ready=time.monotonic() - begin, idle=idle, tokens=total))
        self.wait(state)
      elif state.global_step == self.until:
        wall, cpu = time.monotonic(), time.process_time()
        spent = dict(wall=wall - self.wall, cpu=cpu - self.cpu)
        seen = found["tokens"] - self.seen
        say(dict(once=once, tokens=total, seen=seen, **spent))
        self.wait(state)

    def wait(self, state):
      if not sys.stdin.readline():
        os._exit(0)
      self.until = state.global_step + updates
      self.seen = found["tokens"]
      self.wall, self.cpu = time.monotonic(), time.process_time()

  trainer.add_callback(Turns())
  trainer.train()


class Child:
  """A system in a process of its own."""

  def __init__(self, name: str, args, folder: str, micro: int):
    self.name, self.micro = name, micro
    own = dict(system=name, workdir=folder, micro=micro)
    own |= {k: getattr(args, k) for k in ("context", "batch", "size")}
    env = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    env |= dict(JAX_PLATFORMS="cpu", TOKENIZERS_PARALLELISM="false")
    self.process = subprocess.Popen(
      [sys.executable, __file__, *(f"--{k}={v}" for k, v in own.items())],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=open(f"{folder}/errors.txt", "a"),
      text=True,
      env=os.environ | env,
    )
    self.first = None

  def ready(self):
    self.first = self.first or self.read()
    return self

  def read(self) -> dict:
    for line in self.process.stdout:
      if line.startswith("RESULT "):
        return json.loads(line[7:])
    raise SystemExit(f"{self.name} ended; see errors.txt in the work folder")

  def turn(self) -> dict:
    self.process.stdin.write("go\n")
    self.process.stdin.flush()
    return self.read()

  def end(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def settings(args) -> None:
  import importlib.metadata as about

  versions = ", ".join(
    f"{n} {about.version(n)}" for n in ("jax", "torch", "transformers", "trl")
  )
  line(
    f"{versions}; {os.cpu_count()} cores; float32; batch {args.batch} pairs; "
    "AdamW, clip 1, rate 1e-6; TRL: gradient checkpointing off, sdpa, its own "
    "chunked log-probabilities"
  )


def best_micro(name: str, args, folder: str) -> int:
  """TRL's fastest number of micro-batches for the same batch."""
  found = {}
  for micro in args.micros:
    child = Child(name, args, folder, micro).ready()
    found[micro] = child.turn()["cpu"]
    child.end()
  times = ", ".join(f"{args.batch // k}: {v:.1f}" for k, v in found.items())
  line(f"{name}: CPU seconds by pairs on the device at once: {times}")
  return min(found, key=found.get)


def speed(args, folder: str) -> None:
  settings(args)
  wanted = args.only.split("|")
  names = [n for n in (*TRL, *OURS) if any(part in n for part in wanted)]
  micro = args.micros[0]
  if len(args.micros) > 1:  # padding is its own at random, and its worst case
    micro = best_micro(list(TRL)[0], args, folder)
  children = [Child(n, args, folder, micro if n in TRL else 1) for n in names]
  children = [c.ready() for c in children]
  results = {c.name: [] for c in children}
  for _ in range(args.count):
    for child in children:
      results[child.name].append(child.turn())
      line(f"{child.name} {json.dumps(results[child.name][-1])}")
  seen = {n: r[0]["tokens"] for n, r in results.items()}
  if len(set(seen.values())) > 1:
    raise SystemExit(f"systems saw different tokens: {seen}")
  total = seen[names[0]]
  base = {
    key: {n: statistics.median(x[key] for x in r) for n, r in results.items()}
    for key in ("wall", "cpu")
  }
  peers = [n for n in list(TRL)[:2] if n in results]
  heads = ["system", "tokens/s", "CPU s an epoch", "CPU s, reference once"]
  heads += [f"{n}: CPU, wall" for n in peers]
  line(f"\n{total:,} tokens an epoch; load {os.getloadavg()[0]:.1f}\n")
  line(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
  for name in results:
    wall, cpu = base["wall"][name], base["cpu"][name]
    ratios = (
      f"{base['cpu'][n] / cpu:.2f} x, {base['wall'][n] / wall:.2f} x"
      for n in peers
    )
    once = results[name][0]["once"]
    cells = name, f"{total / wall:,.0f}", f"{cpu:.1f}", f"{once:.1f}", *ratios
    line(f"| {' | '.join(cells)} |")
  last = list(OURS)[-1]
  for epochs in (1, 3) if last in results else ():
    mine = base["cpu"][last] * epochs + results[last][0]["once"]
    times = (f"{epochs * base['cpu'][n] / mine:.2f} x {n}" for n in peers)
    words = f"- {epochs} epoch(s), the reference pass counted, CPU time:"
    line(f"{words} {', '.join(times)}")
  for c in children:
    extra = f"{args.batch // c.micro} pairs at once"
    if "shapes" in c.first:
      extra = f"{c.first['shapes']} shapes"
    above = results[c.name][-1]["peak"] - c.first["idle"]
    ready = f"ready after {c.first['ready']:.0f} s"
    line(f"- {c.name}: {ready}, {extra}, peak {above:,.0f} MiB above idle")
    c.end()


def memory(args, folder: str) -> None:
  settings(args)
  print("| system | idle MiB | peak above it, MiB |\n|---|---|---|")
  for name in (list(TRL)[0], *list(OURS)[2:]):
    child = Child(name, args, folder, 1).ready()
    last = child.turn()
    child.end()
    idle = child.first["idle"]
    line(f"| {name} | {idle:,.0f} | {last['peak'] - idle:,.0f} |")
  print(f"{last['tokens']:,} tokens in {args.pairs} pairs")


def main(argv) -> None:
  """The whole comparison; with --system, one child of it."""
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  p.add_argument("--data", default="", help="pairs, for `records.load`")
  p.add_argument("--size", default="5m", choices=list(SIZES))
  p.add_argument("--memory", action="store_true", help="peaks, no speed")
  p.add_argument("--only", default="", help="parts of systems' names, a|b")
  words = "TRL's accumulations to choose the fastest from"
  p.add_argument(
    "--micros", type=int, nargs="+", default=[1, 2, 4, 8], help=words
  )
  numbers = dict(pairs=64, batch=16, micro=1, context=512, vocab=0, count=3)
  for name, default in numbers.items():
    p.add_argument(f"--{name}", type=int, default=default)
  for name in ("system", "workdir"):
    p.add_argument(f"--{name}", default="")
  args = p.parse_args(argv)
  if args.system:
    return (ours if args.system in OURS else theirs)(args)
  with tempfile.TemporaryDirectory() as folder:
    prepare(args, pathlib.Path(folder))
    try:
      (memory if args.memory else speed)(args, folder)
    except SystemExit:
      print(pathlib.Path(f"{folder}/errors.txt").read_text()[-3000:])
      raise


if __name__ == "__main__":
  main(sys.argv[1:])
