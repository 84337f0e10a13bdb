r"""Samplers on real pairs, judged by a small head on frozen embeddings.

  python tools/real_pairs.py --data=<hh-harmless pairs.jsonl.gz> \
    --checkpoint=<an all-MiniLM folder> --cache=/tmp/pairs.npz

A Bradley-Terry logistic head reads the embedding of the end of prompt and
answer beside that of the answer alone. Its regularisation is chosen once, by
cross-validation on all pairs, before any sampler runs. Then, in each of
--splits random splits: every sampler chooses a share of the training pairs, a
head is fitted to those, and is right on so many held-out pairs. Differences to
random are paired by split; splits overlap, so their variance is inflated by
n_test / n_train (Nadeau and Bengio 2003). The samplers read the end of the
text alone, `real` that of the answer; crossfit_lite reads counts of tokens,
and no embedding.

What a head chosen by a head can show is little: at small shares it mostly
hands on what all labels say. Not circular is the last table: a fifth of the
training labels turned around, or 15 % of the pairs given answers of other
prompts, and the share of such pairs that each sampler keeps at a tenth.
"""

import argparse
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

from jaxalign.core import progress, sharding
from jaxalign.core.lookup import lookup  # noqa: E402
from jaxalign.data import records  # noqa: E402
from jaxalign.data import tokens as tokens_lib  # noqa: E402
from jaxalign.select import grams  # noqa: E402
from jaxalign.select import mixture as mixtures  # noqa: E402
from jaxalign.select.pool import make_pool  # noqa: E402
from jaxalign.select.samplers import SAMPLERS  # noqa: E402
from jaxalign.select.samplers.crossfit import heads  # noqa: E402

NAMES = (
  "random",
  "isa",
  "isa(order=magnitude)",
  "isa(order=renormalised)",
  "density",
  "k_center",
  "herding",
  "real",
  "length",
  "crossfit_lite",
)
RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # for one of all rows
KEPT = 0.1  # of the training pairs, where bad ones are injected


def embedded(args) -> tuple[list[dict], dict[str, np.ndarray], list]:
  """Rows, their two embeddings [N, 2, E], and token ids of the answers."""
  rows = records.load_records(args.data).rows
  if args.limit:
    rows = rows[: args.limit]
  from jaxalign.embed import texts

  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  sides = ("chosen", "rejected")
  asked = dict(
    text=[r["prompt"] + r[s] for r in rows for s in sides],
    answer=[r[s] for r in rows for s in sides],
  )
  ids = np.array([r["id"] for r in rows])
  with jax.set_mesh(mesh):
    params, m, tok = texts.read_encoder(args.checkpoint, mesh)
    words = [e.ids for e in tok.encode_batch(asked["answer"])]
    if args.cache and os.path.exists(args.cache):
      with np.load(args.cache, allow_pickle=False) as found:
        if np.array_equal(found["ids"], ids):
          return rows, {n: found[n] for n in asked}, words
    x = {
      n: texts.embed_texts(mesh, params, m, tok, t).reshape(len(rows), 2, -1)
      for n, t in asked.items()
    }
  if args.cache:
    np.savez(args.cache, ids=ids, **x)
  return rows, x, words


def token_rows(words: list) -> tokens_lib.TokenRows:
  """Rows of answers alone, for `grams`."""
  return tokens_lib.TokenRows(
    np.concatenate([np.int32(w) for w in words]),
    np.cumsum([0] + [len(w) for w in words]),
    np.zeros(len(words), np.int32),
    np.zeros(len(words), np.int32),
  )


def differences(x: dict[str, np.ndarray]) -> np.ndarray:
  """[N, 2E] chosen less rejected: what the judging head reads."""
  both = np.concatenate([x["text"], x["answer"]], axis=2).astype(np.float64)
  return both[:, 0] - both[:, 1]


def right(
  d: np.ndarray, train: np.ndarray, test: np.ndarray, ridge: float
) -> float:
  """Held-out accuracy of a head fitted to some pairs, a share."""
  score = d[test] @ heads.fit(d[train], np.ones(len(train)), ridge)
  return float(np.mean(score > 0) + 0.5 * np.mean(score == 0))


def choose_ridge(d: np.ndarray, group: np.ndarray) -> float:
  """The ridge of least out-of-fold loss on all pairs, for any number."""
  fold = heads.folds(0, group, 10, "real pairs")
  i, losses = heads.choose_ridge(d, np.ones(len(d)), fold, RIDGES)
  print(
    "ridge for one row: "
    + ", ".join(f"{r:g}: {loss:.4f}" for r, loss in zip(RIDGES, losses))
    + f" nats; kept {RIDGES[i]:g} x {len(d)}"
  )
  return RIDGES[i] * len(d)


def pool_of(rows, x, words, index) -> tuple:
  """The columns that samplers read, of some rows; and the mixture's."""
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  text = x["text"][index]
  flat = np.ascontiguousarray(text.reshape(-1, text.shape[-1]), np.float32)
  with jax.set_mesh(mesh):
    fitted = mixtures.fit(mesh, flat, mixtures.MixtureOptions(starts=3))
  counts = grams.columns(
    token_rows([w for i in index for w in (words[2 * i], words[2 * i + 1])]), 2
  )
  length = np.array([[len(words[2 * i]), len(words[2 * i + 1])] for i in index])
  return make_pool(
    [rows[i]["id"] for i in index],
    dict(
      embedding=text,
      answer_embedding=x["answer"][index],
      length=length,
      row=np.arange(len(index)),
      log_likelihood=mixtures.log_likelihood(fitted, flat).reshape(-1, 2),
      group=np.array([rows[i]["group"] for i in index]),
      **counts,
    ),
  )


def injected(kind: str, rows, x, words, train, rng):
  """Training pairs with bad ones among them: (x, words, bad)."""
  bad = np.zeros(len(rows), bool)
  x, words = {k: v.copy() for k, v in x.items()}, list(words)
  if kind == "flips":
    bad[rng.choice(train, len(train) // 5, replace=False)] = True
    for v in x.values():
      v[bad] = v[bad][:, ::-1]
    for i in np.flatnonzero(bad):
      words[2 * i], words[2 * i + 1] = words[2 * i + 1], words[2 * i]
  if kind == "junk":
    bad[rng.choice(train, int(0.15 * len(train)), replace=False)] = True
    for i in np.flatnonzero(bad):  # two answers to other prompts
      for side in (0, 1):
        other, its = rng.choice(train), rng.integers(2)
        words[2 * i + side] = words[2 * other + its]
        for v in x.values():  # of the text only the answer's part is known
          v[i, side] = v[other, its]
  return x, words, bad


def corrected(d: np.ndarray, test: int, train: int) -> tuple[float, float]:
  """Mean and half a 95 % interval of differences over overlapping splits."""
  n = len(d)
  error = np.sqrt(d.var(ddof=1) * (1 / n + test / train))
  return float(d.mean()), float(stats.t.ppf(0.975, n - 1) * error)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data", required=True)
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--cache", default="")
  parser.add_argument("--splits", type=int, default=30)
  parser.add_argument("--limit", type=int, default=0)
  parser.add_argument("--fractions", default="0.01,0.035,0.1,0.25,0.5")
  parser.add_argument("--samplers", default=";".join(NAMES))
  args = parser.parse_args()
  progress.set_process(1)
  start = time.monotonic()
  rows, x, words = embedded(args)
  n, test_size = len(rows), max(200, len(rows) // 7)
  group = np.array([r["group"] for r in rows])
  d = differences(x)
  print(
    f"{n} pairs, {d.shape[1]} columns, embedded in "
    f"{time.monotonic() - start:.0f} s"
  )
  ridge = choose_ridge(d, group)
  names = args.samplers.split(";")
  shares = [float(f) for f in args.fractions.split(",")]
  found = {kind: {} for kind in ("clean", "flips", "junk")}
  kept_bad = {kind: {name: [] for name in names} for kind in found}
  for split in range(args.splits):
    rng = np.random.default_rng(split)
    order = rng.permutation(n)
    test = order[:test_size]
    train = order[test_size:][~np.isin(group[order[test_size:]], group[test])]
    train = np.sort(train)
    for kind in found:
      x2, words2, bad = injected(kind, rows, x, words, train, rng)
      d2, at = differences(x2), shares if kind == "clean" else [KEPT]
      d2[test] = d[test]
      pool = pool_of(rows, x2, words2, train)
      place = pool.columns["row"]
      for name in names:
        sampler = lookup(SAMPLERS, name, "sampler", "samplers")
        for share in at:
          m = max(8, round(share * len(train)))
          kept = train[place[sampler(split, pool, m).rows]]
          found[kind].setdefault((name, share), []).append(
            right(d2, kept, test, ridge)
          )
          if share == KEPT:
            kept_bad[kind][name].append(bad[kept].mean())
      found[kind].setdefault(("all", 1.0), []).append(
        right(d2, train, test, ridge)
      )
    sys.stderr.write(
      f"split {split + 1} of {args.splits}, {time.monotonic() - start:.0f} s\n"
    )
  size = len(train)

  def cell(kind, name, share):
    a = np.array(found[kind][name, share])
    if name == names[0]:
      return f"{100 * a.mean():.1f}"
    value, half = corrected(
      a - np.array(found[kind][names[0], share]), test_size, size
    )
    return f"{100 * value:+.1f} ± {100 * half:.1f}"

  print(
    f"\nHeld-out accuracy, %, {args.splits} splits of {size} / "
    f"{test_size} pairs; others less {names[0]}. All: "
    f"{100 * np.mean(found['clean']['all', 1.0]):.1f}\n"
  )
  print("| sampler | " + " | ".join(f"{100 * s:g} %" for s in shares) + " |")
  print("|---" * (len(shares) + 1) + "|")
  for name in names:
    print(
      f"| {name} | " + " | ".join(cell("clean", name, s) for s in shares) + " |"
    )
  print(f"\nBad pairs among those kept at {100 * KEPT:g} %, and accuracy\n")
  print(
    "| sampler | 20 % flips: kept | accuracy | 15 % junk: kept | accuracy "
    "|\n|---|---|---|---|---|"
  )
  for name in names:
    print(
      f"| {name} | "
      + " | ".join(
        f"{100 * np.mean(kept_bad[k][name]):.1f} % | {cell(k, name, KEPT)}"
        for k in ("flips", "junk")
      )
      + " |"
    )
  print(f"\n{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
  main()
