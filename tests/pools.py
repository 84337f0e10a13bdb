"""Made-up rows: a pool with every column that samplers read; token pairs."""

import numpy as np

from jaxalign.data import tokens
from jaxalign.select import pool as pools


def make(responses=2, n=200, seed=0, width=8):
  """N rows whose ids arrive in another order than the rows are made in."""
  rng = np.random.default_rng(seed)
  shape = (n, responses)
  loss = rng.gamma(2.0, 0.3, size=(n, 6))
  # Each of six models has seen half of the rows, no row was seen by all.
  loss[(np.arange(n)[:, None] + np.arange(6)) % 2 == 0] = np.nan
  columns = {
    "embedding": rng.normal(size=(*shape, width)).astype(np.float32),
    "answer_embedding": np.float32(
      np.random.default_rng(seed + 1).normal(size=(*shape, width))
    ),
    "log_likelihood": -90 - rng.gamma(2.0, 8.0, size=shape),
    "length": rng.integers(1, 99, size=shape).astype(np.int32),
    "topic": rng.integers(0, 9, size=n),
    "source": rng.choice(["web", "chat", "code"], size=n, p=[0.6, 0.3, 0.1]),
    "logp": -rng.gamma(4.0, 9.0, size=shape),
    "logp_alone": -rng.gamma(4.0, 12.0, size=shape),
    "logp_count": rng.integers(5, 40, size=shape),
    "p_yes": rng.random(shape),
    "reward": rng.normal(size=shape),
    "proxy_logp": -rng.gamma(4.0, 9.0, size=shape),
    "proxy_ref_logp": -rng.gamma(4.0, 9.0, size=shape),
    "held_out_loss": loss,
  }
  if responses == 1:
    columns["label"] = rng.random(n) < 0.3
  columns |= {
    "grams": rng.poisson(0.2, size=(*shape, 2 * width)).astype(np.uint8),
    "residual": rng.normal(size=(*shape, width)).astype(np.float32),
    "least": -rng.gamma(2.0, 1.0, size=shape),
    "overlap": rng.integers(0, 9, size=(*shape, 2)).astype(np.float32),
    "group": np.array([f"g{i % 7}" for i in range(n)]),
  }
  columns["subset"] = np.arange(n) % 5 == 0
  return pools.make_pool([f"id{i:05d}" for i in rng.permutation(n)], columns)


def with_columns(pool, **columns):
  """The pool with some columns replaced."""
  return pools.Pool(pool.ids, pool.columns | columns)


def pairs_of_tokens(rng, n, vocab, prompts, answers):
  """The rows of n pairs, two a pair, that share their prompts.

  Tokens are from 3 to below `vocab`, lengths of `prompts` and of `answers`
  from the first to below the second of two numbers.
  """
  ids, start = [], []
  for _ in range(n):
    prompt = rng.integers(3, vocab, rng.integers(*prompts))
    for _ in range(2):
      ids.append(
        np.concatenate([prompt, rng.integers(3, vocab, rng.integers(*answers))])
      )
      start.append(len(prompt))
  return tokens.TokenRows(
    np.concatenate(ids).astype(np.int32),
    np.cumsum([0, *map(len, ids)]),
    np.int32(start),
    np.zeros(2 * n, np.int32),
  )


def clusters(n=300, width=12, seed=0, responses=2):
  """A pool with a dense cluster, a wide one, and a few rows far off."""
  rng = np.random.default_rng(seed)
  pool = make(responses, n, seed, width)
  spread = np.where(
    np.arange(n) % 10 == 0, 3.0, np.where(np.arange(n) % 3 == 0, 1.0, 0.2)
  )
  x = 1 + rng.normal(size=(n, responses, width)) * spread[:, None, None]
  return with_columns(pool, embedding=x.astype(np.float32))


def planted(n=240):
  """A pool in which every third row is a near-copy of the one before it."""
  pool = make(2, n, width=16)
  x = pool.embedding.copy()
  x[2::3] = x[1::3] + 0.02 * x[2::3]
  return with_columns(pool, embedding=x)


def copied(pool, rows, times):
  """The pool with each of its first rows' embeddings so many times."""
  x = np.repeat(pool.embedding[:rows], times, axis=0)
  return with_columns(pool, embedding=x)


def vectors_of(pool, pair="mean", metric="cosine"):
  """[N, W] float64 of the vectors that a row is compared by."""
  x = np.float64(pool.embedding)
  x = {
    "mean": x.mean(1),
    "chosen": x[:, 0],
    "rejected": x[:, -1],
    "difference": x[:, 0] - x[:, -1],
    "concat": x.reshape(len(x), -1),
  }[pair]
  if metric == "centred":
    x = x - x.mean(0)
  if metric != "euclidean":
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
  return x
