r"""Tries to break crossfit: pools whose labels are wrong in systematic ways.

  python tools/crossfit_break.py --seeds=201,202,203
  python tools/crossfit_break.py --seeds=201 --cases=length,junk_fixed \
      --arms='random;crossfit_lite' --out=lines.jsonl

Written down before any of these seeds was looked at (0 and 1 were used to
choose): 4,000 pairs of the built-in world, a world and a reference of its own
each seed, a tenth kept, beside a random tenth and beside the oracle, the
largest true margins. The cases differ from "clean" in one thing:

  flips         25 % of labels turned around (what crossfit is made for)
  junk          15 % of pairs of random words (too)
  length        the annotator adds 0.75 to the reward for each filler word,
                whose true worth is -0.25
  opener        the annotator adds 3 to the reward of one opener
  minority      a fifth of the rows come from another source, whose annotators
                like openers and closers just the other way round: their truth
  unnamed       the same rows, no source recorded
  topics        topics of about a fifth of the prompts are liked the other way
                round; the pool has the topic, no source
  junk_fixed    15 % of pairs: four words, always preferred to four others
  junk_copies   15 % of pairs: near-copies (one word differs) of ten pairs of
                random words, under prompts of their own, labelled alike
  xor           no opener and no closer is good: even ones suit even ones and
                odd ones odd ones (1.5, else -1.5), and the arguments count
  small         500 pairs in all, 25 % of labels turned around
  other         25 % of labels turned around; embeddings and residuals are of
                another model, one that was never trained
  unpaired      25 % of labels turned around, then single rows

Where crossfit has a keyword against a case it is run with and without, and
the two that ask for no column also where nothing is wrong: orthogonal=length;
orthogonal=style, for a person who suspects that opener and counts it;
slices=source or topic; and copies=None, without what "auto" does by default.

Of what is kept: the share whose label disagrees with the true reward (of the
row's own source or topic; a thumb is wrong where a pair would be), the share
of junk, tokens by which the chosen answer is longer (of unpaired rows: than a
disliked one), how much oftener the favoured opener is in the chosen answer
than in the rejected, the share of the minority. No policy is trained: this
says what is kept, not what it is worth. crossfit reads every label: it saves
training, not annotation; a random tenth reads none.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import common  # noqa: E402
from jaxalign import pipeline
from jaxalign.core import progress, sharding
from jaxalign.data import tokens as tokens_lib  # noqa: E402
from jaxalign.data import world as world_lib  # noqa: E402
from jaxalign.data.encode import encode_texts
from jaxalign.embed import passes as embed
from jaxalign.model import decoder  # noqa: E402
from jaxalign.model import job as job_lib  # noqa: E402
from jaxalign.select import grams
from jaxalign.select import pool as pools  # noqa: E402
from jaxalign.select.samplers import combine  # noqa: E402

SMALL = 500
FLIPS = ("flips", "small", "other", "unpaired")
ARMS = "random;external_margin;crossfit_lite;crossfit"
MENDS = dict(
  clean=("orthogonal=length", "copies=None"),  # what they cost
  flips=("orthogonal=length", "copies=None"),
  length=("orthogonal=length",),
  opener=("orthogonal=style",),
  minority=("slices=source",),
  topics=("slices=topic",),
  junk_fixed=("copies=None",),
  junk_copies=("copies=None",),
)
MEASURES = ("wrong", "junk", "longer", "opener", "minority")


class Case(NamedTuple):
  """Labelled pairs and what is true of them, by row."""

  prompt: list[str]
  said: list[tuple[str, str]]  # chosen, rejected
  truth: np.ndarray  # [N, 2]; MALFORMED twice: junk
  minority: np.ndarray  # [N] bool
  favoured: str  # the opener that a biased annotator likes
  topic: np.ndarray  # [N]
  named: str = ""  # the column that tells the minority


def parts(
  world: world_lib.World, prompt: str, said: str
) -> tuple[int, int, int, int, float]:
  """Topic, opener, closer, fillers, true reward of a well-formed answer."""
  words, n = said.split(), world.knobs["arguments"]
  return (
    world_lib.topic(world, prompt),
    world.words["openers"].index(words[0]),
    world.words["closers"].index(words[-1]),
    len(words) - n - 2,
    world_lib.reward(world, prompt, said),
  )


def make(name: str, world: world_lib.World, seed: int, count: int) -> Case:
  """The rows of a case, labelled by Bradley-Terry at the world's temperature.

  The two answers of a row, and what draws its label, are alike in all cases.
  """
  n = SMALL if name == "small" else count
  rows = world_lib.generate_rows(world, seed)["pool"][:n]
  rng = np.random.default_rng([seed, 7])
  draw, flip, odd, junk = rng.random((4, count))[:, :n]
  said = [(r["chosen"], r["rejected"]) for r in rows]
  prompt = [r["prompt"] for r in rows]
  p = np.array(
    [[parts(world, q, a) for a in both] for q, both in zip(prompt, said)]
  )  # [n, 2, 5]
  topic, opener, closer = np.moveaxis(p[..., :3].astype(int), 2, 0)
  truth, minority, named = p[..., 4].copy(), np.zeros(n, bool), ""
  style = world.opener_value[topic, opener] + world.closer_value[closer]
  mean = world.opener_value.mean(axis=0)
  favoured = int(np.argsort(mean)[len(mean) // 2])  # neither good nor bad
  if name in ("minority", "unnamed", "topics"):
    named = {"minority": "source", "topics": "topic"}.get(name, "")
    minority = odd < 0.2
    if name == "topics":
      order, share = rng.permutation(len(world.topic_p)), world.topic_p
      few = order[np.cumsum(share[order]) <= 0.2]
      minority = np.isin(topic[:, 0], few)
    truth -= np.where(minority[:, None], 2 * style, 0)
  if name == "xor":
    suits = np.where((opener + closer) % 2 == 0, 1.5, -1.5)
    truth += suits - style
  seen = truth.copy()
  if name == "length":
    seen += 0.75 * p[..., 3]
  if name == "opener":
    seen += 3.0 * (opener == favoured)
  first = draw < 1 / (
    1 + np.exp(-(seen[:, 0] - seen[:, 1]) / world.knobs["temperature"])
  )
  if name in FLIPS:
    first ^= flip < 0.25
  swap = np.where(first, 0, 1)
  said = [both if k == 0 else both[::-1] for both, k in zip(said, swap)]
  truth = np.where(swap[:, None] == 1, truth[:, ::-1], truth)
  if name.startswith("junk"):
    bad = np.flatnonzero(junk < 0.15)
    for i, both in zip(bad, _junk(name, world, rng, len(bad))):
      said[i], truth[i] = both, world_lib.MALFORMED
  return Case(
    prompt,
    said,
    truth,
    minority,
    world.words["openers"][favoured],
    topic[:, 0],
    named,
  )


def _junk(kind, world, rng, count):
  """(chosen, rejected) texts of random words, of one pattern or of ten."""
  words = [
    w
    for role in ("arguments", "openers", "fillers", "closers", "forms")
    for w in world.words[role]
  ]
  size = world.knobs["arguments"] + 3
  if kind == "junk_fixed":
    liked, hated = rng.permutation(words)[:8].reshape(2, 4)
    return [
      tuple(" " + " ".join(rng.choice(part, size)) for part in (liked, hated))
      for _ in range(count)
    ]
  made = rng.choice(words, (10 if kind == "junk_copies" else count, 2, size))
  out = []
  for i in range(count):
    both = made[i % len(made)].copy()
    if kind == "junk_copies":
      both[rng.integers(2), rng.integers(size)] = rng.choice(words)
    out.append(tuple(" " + " ".join(map(str, part)) for part in both))
  return out


def columns_of(
  job: job_lib.Job, texts: list[tuple[str, str]], wanted: set
) -> dict[str, np.ndarray]:
  """Every column that crossfit reads, of responses [n, ...]."""
  c = job.c
  rows, _, left_out = encode_texts(
    job.tokenizer,
    [q for q, _ in texts],
    dict(response=[a for _, a in texts]),
    c.model.context,
  )
  assert not left_out, "a text is longer than the context"
  counts = grams.columns(rows, 1)
  out = dict(
    length=(tokens_lib.row_lengths(rows) - rows.start).astype(np.int32),
    grams=counts["grams"][:, 0],
    overlap=counts["overlap"][:, 0],
  )
  if "residual" not in wanted:
    return out
  keys = dict(
    trained=job.reference,
    other=decoder.init(jax.random.key(1234), job.model, job.mesh),
  )
  for key, params in keys.items():
    mark = "" if key == "trained" else "other_"
    args = job.mesh, params, job.model, rows
    found = embed.pass_rows(*args, embed.OUTPUTS, tile=c.embed.tile)
    found["logp_count"] = found.pop("count")
    out |= {mark + k: v for k, v in found.items()}
  return out


def pool_of(case: Case, name: str, texts: dict, columns: dict) -> tuple:
  """The pool of a case, and its truth, minority and junk in pool order."""
  at = np.array(
    [[texts[q, a] for a in both] for q, both in zip(case.prompt, case.said)]
  )  # [N, 2]
  n = len(at)
  table = {}
  for key, value in columns.items():
    # Two models' columns: a case reads those of one.
    if key.startswith("other_") == (name == "other") or not (
      key.startswith("other_") or "other_" + key in columns
    ):
      table[key.removeprefix("other_")] = value[at]
  group = np.array(case.prompt)
  ids = np.array([f"{i * 7919 % n:05d}" for i in range(n)])
  style = np.array(
    [[a.split()[0] == case.favoured for a in both] for both in case.said]
  ).astype(float)
  junk = (case.truth == world_lib.MALFORMED).all(axis=1)
  wrong = (case.truth[:, 0] < case.truth[:, 1]) & ~junk
  minority = case.minority
  if case.named == "source":
    table["source"] = np.where(minority, "other", "most")
  if case.named == "topic":
    table["topic"] = case.topic
  table["style"] = style  # for who suspects that word
  table["reward"] = case.truth
  if name == "unpaired":
    two = lambda x: np.repeat(x, 2, axis=0)
    table = {
      k: two(v) if v.ndim == 1 else v.reshape(2 * n, 1, *v.shape[2:])
      for k, v in table.items()
    }
    table["label"] = np.tile([True, False], n)
    ids = np.array([f"{i}/{side}" for i in ids for side in "cr"])
    group, junk, wrong, minority = map(two, (group, junk, wrong, minority))
    style = style.reshape(-1, 1)
  pool = pools.make_pool(
    ids,
    table
    | dict(
      group=group, _junk=junk, _wrong=wrong, _minority=minority, _style=style
    ),
  )
  facts = {k: pool.columns[k] for k in pool.columns if k[0] == "_"}
  return pools.Pool(
    pool.ids, {k: v for k, v in pool.columns.items() if k[0] != "_"}
  ), facts


def measured(pool: pools.Pool, facts: dict, rows: np.ndarray) -> dict:
  """What is written of the kept rows."""

  def gap(value):
    value = np.asarray(value, float)[rows]
    if value.shape[1] == 2:
      return value[:, 0].mean() - value[:, 1].mean()
    liked = np.asarray(pool.label)[rows]
    return (value[liked].mean() if liked.any() else 0) - (
      value[~liked].mean() if (~liked).any() else 0
    )

  return dict(
    wrong=facts["_wrong"][rows].mean(),
    junk=facts["_junk"][rows].mean(),
    longer=gap(pool.length),
    opener=gap(facts["_style"]),
    minority=facts["_minority"][rows].mean(),
  )


def one_seed(args: argparse.Namespace, seed: int) -> list[dict]:
  """A line for each case and arm."""
  c = common.base()
  c.data.seed = seed
  c.data.world.pool_rows = args.rows
  c.sft.updates = c.sft.save_every = args.updates
  arms = args.arms.split(";")
  wanted = {name for arm in arms for name in combine.named(arm).needs}
  mesh = sharding.make_mesh(c.mesh, jax.devices())
  lines = []
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    job = pipeline.make_job(c, mesh, folder)
    pipeline.run_data(job)
    if "residual" in wanted:
      pipeline.run_sft(job)
    world = world_lib.build_world(c.data.world.to_dict(), seed)
    cases = {
      name: make(name, world, seed, args.rows) for name in args.cases.split(",")
    }
    texts = {}
    for case in cases.values():
      for q, both in zip(case.prompt, case.said):
        for a in both:
          texts.setdefault((q, a), len(texts))
    columns = columns_of(job, list(texts), wanted)
    for name, case in cases.items():
      pool, facts = pool_of(case, name, texts, columns)
      n = len(pool.ids)
      lines.append(
        dict(
          case=name,
          seed=seed,
          arm="pool",
          **measured(pool, facts, np.arange(n)),
        )
      )
      tried = arms + [
        f"{arm}({mend})"
        for arm in arms
        if arm in ("crossfit", "crossfit_lite")
        for mend in MENDS.get(name, ())
      ]
      for arm in tried:
        sampler = combine.named(arm)
        if sampler.pairs and name == "unpaired":
          continue
        start = time.monotonic()
        found = sampler(seed, pool, n // 10)
        lines.append(
          dict(
            case=name,
            seed=seed,
            arm=arm,
            **measured(pool, facts, found.rows),
            seconds=time.monotonic() - start,
            notes=list(found.notes),
          )
        )
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", default="201,202,203")
  parser.add_argument(
    "--cases",
    default="clean,flips,junk,length,opener,"
    "minority,unnamed,topics,junk_fixed,junk_copies,xor,"
    "small,other,unpaired rows",
  )
  parser.add_argument(
    "--arms", default=ARMS, help="samplers, with ; between them"
  )
  parser.add_argument("--rows", type=int, default=4000)
  parser.add_argument("--updates", type=int, default=150)
  parser.add_argument("--out", default="", help="lines of JSON, appended")
  args = parser.parse_args()
  progress.set_process(1)  # the stages say nothing; the table is the output
  lines = []
  for seed in map(int, args.seeds.split(",")):
    new = one_seed(args, seed)
    lines += new
    if args.out:
      with open(args.out, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in new)
  print(
    "| case | kept by | wrong | junk | chosen longer by | favoured opener "
    "| minority | seconds |\n|---|---|---|---|---|---|---|---|"
  )
  for case, arm in dict.fromkeys((x["case"], x["arm"]) for x in lines):
    these = [x for x in lines if (x["case"], x["arm"]) == (case, arm)]
    mean = {
      k: np.mean([x.get(k, 0) for x in these]) for k in (*MEASURES, "seconds")
    }
    print(
      f"| {case} | {arm} | {100 * mean['wrong']:.1f} % | "
      f"{100 * mean['junk']:.1f} % | {mean['longer']:+.2f} | "
      f"{100 * mean['opener']:+.1f} % | {100 * mean['minority']:.1f} % | "
      f"{mean['seconds']:.0f} |"
    )
  for arm in dict.fromkeys(x["arm"] for x in lines):
    for x in lines:
      if x["arm"] == arm and x["seed"] == lines[0]["seed"]:
        for note in x.get("notes", ()):
          print(f"{x['case']}, {arm}: {note}", file=sys.stderr)


if __name__ == "__main__":
  main()
