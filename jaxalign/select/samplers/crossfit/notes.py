"""What a person should know of labels: do they follow length, or one source?"""

import numpy as np

from jaxalign.select.samplers.crossfit.heads import fit_folds, LEAST_GAIN

NOTED_ROWS = 50  # of a slice; a smaller one has no note
ALONE = 0.2  # fraction of the heads' gain that length may have unremarked


def predicts_alone(
  x: np.ndarray, y: np.ndarray, fold: np.ndarray
) -> tuple[float, float]:
  """Out-of-fold loss, nats, and accuracy of a head on x [N, H] alone."""
  margin, loss = fit_folds(x, y, fold, 1e-3)[0].judge(x, y, fold)
  # Equal lengths say nothing: half of them are right.
  return float(loss.mean()), float(((margin > 0) + (margin == 0) / 2).mean())


def length_gap(
  length: np.ndarray, label: np.ndarray | None, rows: np.ndarray
) -> float:
  """Chosen less rejected, or liked less disliked, mean over some rows."""
  length = length[rows]
  if label is None:
    return float((length[:, 0] - length[:, 1]).mean())
  liked = label[rows]
  if liked.all() or not liked.any():
    return float("nan")
  return float(length[liked].mean() - length[~liked].mean())


def gap_note(
  length: np.ndarray,
  label: np.ndarray | None,
  kept: np.ndarray,
  accuracy: float,
) -> str:
  """How much longer the better answers are, of the kept rows and of all."""
  one, other = (
    ("liked", "disliked") if label is not None else ("chosen", "rejected")
  )
  whole = np.arange(len(length))
  return (
    f"{one} answers are longer than {other} ones by "
    f"{length_gap(length, label, kept):+.2f} tokens among the kept, "
    f"{length_gap(length, label, whole):+.2f} in the pool; length alone "
    f"predicts {100 * accuracy:.1f} % of labels"
  )


def length_warning(
  alone: tuple[float, float], loss: float, accuracy: float, chance: float
) -> list[str]:
  """A warning where length alone has ALONE of what the heads gain on chance.

  Args:
    alone: loss and accuracy of length alone.
    loss, accuracy, chance: of the heads, and of knowing nothing.
  """
  gain, most = chance - alone[0], chance - loss
  if gain < max(ALONE * most, LEAST_GAIN):
    return []
  return [
    f"warning: length alone predicts {100 * alone[1]:.1f} % of labels, "
    f"the heads {100 * accuracy:.1f} % ({gain:.3f} of {most:.3f} nats "
    "below chance): labels that follow length are kept first; if length "
    "is no merit here, set config.select.kwargs.orthogonal to 'length'"
  ]


def slice_notes(
  code: np.ndarray,
  names: list[str],
  by: str,
  agrees: np.ndarray,
  kept: np.ndarray,
  own: set[int],
  proportional: bool,
) -> list[str]:
  """Lines on slices whose labels contradict the shared heads.

  A slice does where the heads agree with fewer than half of its labels by two
  standard errors, or with so few more that less than half of its share is
  kept.

  Args:
    code: [N] from 0; names: of the codes; by: the columns that make them.
    agrees: [N] bool, whether shared heads agree with the label.
    kept: row numbers.
    own: codes of slices whose own heads are used.
    proportional: each slice keeps its share.
  """
  notes = []
  size = np.bincount(code, minlength=len(names))
  for k in np.flatnonzero(size >= NOTED_ROWS):
    share, got = size[k] / len(code), float((code[kept] == k).mean())
    right = float(agrees[code == k].mean())
    error = np.sqrt(right * (1 - right) / size[k])
    text = (
      f"{by} {names[k]!r} ({100 * share:.1f} % of rows): shared heads "
      f"agree with {100 * right:.1f} % of its labels"
    )
    if k in own:
      notes.append(
        f"{text}, heads of its own judge it; {100 * got:.1f} % of what is kept"
      )
    elif right + 2 * error < 0.5 or got < share / 2 and not proportional:
      advice = f"; set config.select.kwargs.slices to {by!r}"
      notes.append(
        f"warning: {text}, and it is {100 * got:.1f} % of what is kept: it "
        "may prefer otherwise, and the majority is followed"
        f"{'' if proportional else advice}"
      )
  return notes[:8]
