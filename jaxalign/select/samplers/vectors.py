"""The vector of each row that a geometric sampler compares."""

import numpy as np

from jaxalign.core import devices
from jaxalign.core.errors import ConfigError
from jaxalign.select.chunks import large_empty, on_host, own_mesh
from jaxalign.select.costs import Sizes
from jaxalign.select.pool import Pool
from jaxalign.select.samplers.values import not_finite, one_side, require
from jaxalign.select.topk import refuse_rows

PAIRS = ("mean", "chosen", "rejected", "difference", "concat")
METRICS = ("cosine", "centred", "euclidean")
ROUNDING = 2.0**-24  # of one float32 operation
HOURS = 24.0  # at the assumed rate, above which a method does not start
_LOOK = "look at the embedding of those records"


def refuse_above(value: float, limit: float, what: str, advice: str) -> None:
  """Stops a method that cannot scale before it starts, with the number."""
  if value > limit:
    raise ConfigError(
      f"{what}, {value:.3g}, is above the {limit:.3g} that this form is made "
      f"for; {advice}"
    )


def refuse_long(flops: float, what: str, advice: str, *, host: bool) -> None:
  """Stops a method that would take more than a day before it starts, at the
  rate that the dry run assumes for the host (NumPy) or this process's devices.
  """
  seconds = devices.seconds_for(flops, flops * host, own_mesh())
  hours = seconds / 3600
  if hours > HOURS:
    raise ConfigError(
      f"{what} would take about {hours:,.0f} hours, {flops:.3g} "
      f"flops at an assumed {flops / seconds / 1e9:,.0f} GFLOP/s, "
      f"above the {HOURS:g} hours that a selection may take; {advice}"
    )


def width_of(p: Sizes, pair: str = "mean") -> int:
  """W of `vectors`."""
  return p.e * (2 if pair == "concat" and p.r == 2 else 1)


def vectors(
  pool: Pool, pair: str = "mean", metric: str = "cosine"
) -> np.ndarray:
  """One vector a row [N, W] float32, from the embeddings of its responses.

  Args:
    pool: `pool.embedding` [N, R, E], finite.
    pair: of a pair's two sides: their "mean" (both count alike, as in the sum
      that is the default of `isa`), "chosen", "rejected", "difference"
      (chosen minus rejected: what a pair teaches, which shares few picks with
      the others), or "concat" (W = 2E). A single response stands for itself.
    metric: "cosine" scales every vector to length 1, so that a product is a
      cosine and a distance ranks as one; "centred" takes off the mean of the
      pool first (the hidden states of a language model share one large
      direction); "euclidean" leaves them as they are.

  Raises:
    NumericError: a row that is not finite, or of length 0 where lengths are
      scaled; the message names the ids.
  """
  require(pair in PAIRS, "pair", pair, PAIRS)
  require(metric in METRICS, "metric", metric, METRICS)
  x = pool.embedding
  if x.ndim == 2:
    x = x[:, None]
  if x.ndim != 3:
    raise ConfigError(
      f"the embedding has shape {x.shape}, wanted [N, R, E]; look at "
      "config.embed"
    )
  refuse_rows(not_finite(x), pool.ids, "an embedding that is not finite", _LOOK)

  def one_vector(rows):
    rows = np.float32(rows)
    if pair == "concat":
      return rows.reshape(len(rows), -1)
    return one_side(rows, pair, "pair")

  n, r, width = x.shape
  out = large_empty((n, width * (r if pair == "concat" else 1)))
  on_host(one_vector, x, out=out)
  if metric == "centred":
    mean = out.mean(axis=0, dtype=np.float64)
    on_host(lambda rows: rows - mean[None], out, out=out)
  if metric != "euclidean":
    norm = lengths(out)
    advice = f"set config.select.kwargs.metric to 'euclidean', or {_LOOK}"
    refuse_rows(norm <= 1e-30, pool.ids, "a vector of length 0", advice)
    on_host(lambda rows, norm: rows / norm[:, None], out, norm, out=out)
  return out


def directions(pool: Pool, pair: str, metric: str) -> np.ndarray:
  """`vectors` of length 1, for what is made of cosines."""
  require(metric != "euclidean", "metric", metric, METRICS[:2])
  return vectors(pool, pair, metric)


def lengths(x: np.ndarray) -> np.ndarray:
  """[N, W] -> [N] float64 Euclidean lengths."""
  return np.sqrt(np.einsum("nw,nw->n", x, x, dtype=np.float64))
