"""What a selection looks like, and how far it can be trusted."""

from typing import Any

import numpy as np

from jaxalign.select import mixture as mixtures
from jaxalign.select.card.fits import (
    auc, component_labels, held_out, jaccard, mixture_summary,
    normalised_mutual_information, stability)
from jaxalign.select.pool import Pool, Selection

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def lengths(pool: Pool, rows: np.ndarray) -> dict[str, Any]:
  """Quantiles of the response tokens, chosen rows beside the rest.

  A pair counts with the mean of its two sides.
  """
  length = np.asarray(pool.length, np.float64).reshape(len(pool.ids), -1)
  length = length.mean(axis=1)
  mask = np.zeros(len(length), bool)
  mask[rows] = True
  out = {"quantiles": list(QUANTILES)}
  for name, part in (("chosen", length[mask]), ("rest", length[~mask])):
    out[name] = ([float(q) for q in np.quantile(part, QUANTILES)]
                 if part.size else None)
  return out


def topics(pool: Pool, rows: np.ndarray) -> dict[str, Any]:
  """How many topics the chosen rows cover, and how unevenly."""
  names, inverse = np.unique(np.asarray(pool.topic), return_inverse=True)
  everywhere = np.bincount(inverse, minlength=len(names)) / len(inverse)
  chosen = np.bincount(inverse[rows], minlength=len(names)) / max(1, len(rows))
  return {"topics": len(names), "covered": int((chosen > 0).sum()),
          "largest_share": float(chosen.max()),
          "largest_share_in_pool": float(everywhere.max()),
          "moved": float(np.abs(chosen - everywhere).sum() / 2)}


def label_share(pool: Pool, rows: np.ndarray) -> dict[str, float]:
  """Share of desirable rows among the chosen and in the pool (thumbs)."""
  label = np.asarray(pool.label, bool)
  return {"chosen": float(label[rows].mean()) if len(rows) else None,
          "pool": float(label.mean())}


def selection_card(pool: Pool, selection: Selection,
                   mixture: mixtures.Mixture | None = None,
                   diagnostics: dict[str, Any] | None = None,
                   sampler: str = "") -> dict[str, Any]:
  """All that is known of a selection, as JSON holds it.

  Args:
    pool: what was chosen from; lengths, topics and labels are described where
      it has them.
    selection: the rows and the score of all.
    mixture: described where one was fitted.
    diagnostics: results of `stability`, `held_out`, `component_labels` by
      name; stored as they are.
    sampler: its name.
  """
  n, rows = len(pool.ids), np.asarray(selection.rows)
  mask = np.zeros(n, bool)
  mask[rows] = True
  card = {"sampler": sampler, "selected": len(rows), "pool": n,
          "share": len(rows) / n if n else 0.0}
  score = np.asarray(selection.score, np.float64)
  for name, part in (("chosen", score[mask]), ("rest", score[~mask])):
    finite = part[np.isfinite(part)]
    card[f"mean_score_{name}"] = float(finite.mean()) if finite.size else None
  for name, column, describe in (("length", "length", lengths),
                                 ("topic", "topic", topics),
                                 ("label_share", "label", label_share)):
    if column in pool.columns:
      card[name] = describe(pool, rows)
  if mixture is not None:
    card["mixture"] = mixture_summary(mixture)
  card["diagnostics"] = dict(diagnostics or {})
  return card
