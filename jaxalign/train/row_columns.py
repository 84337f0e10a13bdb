"""What a loss reads of its rows besides sums, computed once before training.

A new one is one entry of COLUMNS: a name that a loss declares with `needs`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import tokens
from jaxalign.embed import passes
from jaxalign.train.feed import TrainRows
from jaxalign.train.reference import Reference
from jaxalign.train.statistics import STATISTICS


def common_prefix(
  reference: Reference, rows: TrainRows, seed: int
) -> tuple[np.ndarray, Cost]:
  """The reference's `Logps.common_prefix`, [M, R] nats, and what it cost.

  A response's first tokens do not see the rest: they are scored by the pass
  of all log-probabilities on rows that end there. The shortest of a row is
  its whole sum, and needs none.
  """
  del seed
  starts = rows.tokens.start[rows.row_of]  # [M, R]
  counts = tokens.row_lengths(rows.tokens)[rows.row_of] - starts
  shortest = counts.min(axis=1, keepdims=True)
  longer = counts > shortest
  sums = np.array(rows.ref_sum, np.float32)
  if not longer.any():
    return sums, Cost()
  heads = tokens.cut_rows(
    tokens.take_rows(rows.tokens, rows.row_of[longer]),
    (starts + shortest)[longer],
  )
  sums[longer] = reference.score(heads).logp
  return sums, Cost(passes.pass_flops(reference.model, heads), len(heads.ids))


def prompt_weights(
  reference: Reference, rows: TrainRows, seed: int
) -> tuple[np.ndarray, Cost]:
  """`density_ratios` of the kept rows, [M], and what it cost.

  Of the PROMPTS alone, by the mean of the reference's hidden states: the
  pool's embeddings hold the answers too, and would tell the label itself.
  """
  first = rows.row_of[:, 0]
  prompts = tokens.cut_rows(
    tokens.take_rows(rows.tokens, first), rows.tokens.start[first]
  )
  mesh, params, m, tile = reference[:4]
  how = passes.PassOptions(tile, label=reference.label, ids=rows.ids)
  found = passes.pass_rows(mesh, params, m, prompts, ["embedding"], how)
  flops = passes.pass_flops(m, prompts, ["embedding"])
  weights = density_ratios(found["embedding"], rows.label, seed=seed)
  return weights, Cost(flops, len(prompts.ids))


COLUMNS: dict[str, Callable[..., Any]] = {
  "common_prefix": common_prefix,
  "weights": prompt_weights,
}


EXTRAS = ("common_prefix",)  # those that are fields of Logps


def columns_of(loss: Callable) -> tuple[str, ...]:
  """The names of COLUMNS that a loss reads."""
  return tuple(n for n in COLUMNS if n in (*loss.stats, *loss.extras))


def check_reads(loss: Callable, name: str) -> None:
  """Raises ConfigError for a loss that reads what no step computes."""
  stats = ("label", *(n for n in COLUMNS if n not in EXTRAS), *STATISTICS)
  unknown = [n for n in loss.stats if n not in stats]
  unknown += [n for n in loss.extras if n not in EXTRAS]
  if unknown:
    raise ConfigError(
      f"loss {name!r} asks for {', '.join(unknown)}, which no step computes "
      f"(known: {', '.join(stats + EXTRAS)}); set config.loss.name"
    )


def density_ratios(
  embedding: np.ndarray, label: np.ndarray, *, seed: int = 0, sample: int = 1024
) -> np.ndarray:
  """Weights for `bco_udm`: underlying distribution matching, Jung et al. 2024.

  Desirable and undesirable answers often come from other prompts; a classifier
  on the prompts' embeddings says how much, and undesirable rows are weighed as
  if they had the desirable rows' prompts. p(desirable | prompt) is a balanced
  logistic regression on at most `sample` prompts of each class, in float64 on
  the host; u = clip(p / (1 - p + 1e-8), 0.5, 10), 1 on desirable rows. TRL
  draws its sample with replacement and fits alike.

  Args:
    embedding: [N, E] of the prompts, finite.
    label: [N] bool, true: desirable.
    seed: of the sample; unused where a class fits whole.
    sample: rows of a class at most.

  Returns:
    [N] float32.

  Raises:
    DataError: one class only, or an embedding that is not finite.
  """
  from sklearn.linear_model import LogisticRegression  # a second to import

  embedding = np.asarray(embedding, np.float64)
  label = np.asarray(label, bool)
  if label.all() or not label.any():
    raise DataError(
      f"all {len(label)} rows have the same label, wanted both; "
      "set config.loss.name to 'bco', which matches no prompts"
    )
  if not np.isfinite(embedding).all():
    raise DataError(
      "prompt embeddings hold NaN or infinity, wanted finite "
      "numbers; set config.loss.name to 'bco'"
    )
  rng, rows = np.random.default_rng(seed), []
  for side in (True, False):
    at = np.flatnonzero(label == side)
    if len(at) > sample:
      at = np.sort(rng.choice(at, sample, replace=False))
    rows.append(at)
  rows = np.concatenate(rows)
  model = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=1000)
  p = model.fit(embedding[rows], label[rows]).predict_proba(embedding)[:, 1]
  ratio = np.clip(p / (1 - p + 1e-8), 0.5, 10.0)
  return np.where(label, 1.0, ratio).astype(np.float32)
