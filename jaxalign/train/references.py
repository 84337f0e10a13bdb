"""What some losses read of the kept rows beside the reference's sums.

It is computed once an arm, by the `ref_logps` stage, and stored by row.
"""

import numpy as np

from jaxalign.core.artifacts import Cost
from jaxalign.core.job import Job
from jaxalign.data import tokens as tokens_lib
from jaxalign.embed import passes as embed
from jaxalign.train import feed
from jaxalign.train.losses import matching


def common_prefix_sums(job: Job, rows: feed.Rows) -> tuple[np.ndarray, Cost]:
  """The reference's `Logps.common_prefix`, [M, R] nats, and what it cost.

  A response's first tokens do not see the rest: they are scored by the pass
  of all log-probabilities on rows that end there. The shortest of a row is
  its whole sum, and needs none.
  """
  starts = rows.tokens.start[rows.row_of]  # [M, R]
  counts = tokens_lib.lengths(rows.tokens)[rows.row_of] - starts
  shortest = counts.min(axis=1, keepdims=True)
  longer = counts > shortest
  common_prefix = np.array(rows.ref_sum, np.float32)
  if not longer.any():
    return common_prefix, Cost()
  heads = tokens_lib.shorten(
    tokens_lib.take(rows.tokens, rows.row_of[longer]),
    (starts + shortest)[longer],
  )
  c = job.c
  common_prefix[longer] = embed.score_rows(
    job.mesh,
    job.reference,
    job.model,
    heads,
    tile=c.embed.tile,
    chunk=c.model.head_chunk,
    label="ref_logps",
  ).logp
  return common_prefix, Cost(embed.flops(job.model, heads), len(heads.ids))


def prompt_weights(
  job: Job, rows: feed.Rows, seed: int
) -> tuple[np.ndarray, Cost]:
  """`matching.density_ratios` of the kept rows, [M], and what it cost.

  Of the PROMPTS alone, by the mean of the reference's hidden states: the
  pool's embeddings hold the answers too, and would tell the label itself.
  """
  first = rows.row_of[:, 0]
  prompts = tokens_lib.shorten(
    tokens_lib.take(rows.tokens, first), rows.tokens.start[first]
  )
  x = embed.pool_rows(
    job.mesh,
    job.reference,
    job.model,
    prompts,
    pooling="mean",
    tile=job.c.embed.tile,
    label="ref_logps",
    ids=rows.ids,
  )
  return (
    matching.density_ratios(x, rows.label, seed=seed),
    Cost(embed.flops(job.model, prompts, 0), len(prompts.ids)),
  )
