"""The page on the agreement of any table of raters."""

from typing import Any

from jaxalign.report import page
from jaxalign.report.nodes import entries, finite, Node, number


def alpha_sentence(found: Node) -> str:
  """Krippendorff's alpha over the humans, or over all raters, in words."""
  humans = found.judged.humans
  judged = bool(entries(humans.between))  # judges are then left out
  whom = "the humans" if judged else "all raters"
  alpha = humans.alpha if judged else found.among.alpha
  value = finite(alpha.value)
  if value is None:
    reason = "all labels are the same"
    if not alpha.units:
      reason = "no pair was judged by two raters"
    return f"Krippendorff's alpha is not defined: {reason}."
  ends = finite(alpha.low), finite(alpha.high)
  interval = "" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
  text = f"{value:.4f}{interval}".replace("-", "−")
  return (
    f"Krippendorff's alpha over {whom}: {text}, on {number(alpha.units)} "
    "pairs that two or more judged."
  )


def left_out(found: Node) -> list[str]:
  """What the tables leave out."""
  rows = (
    (found.among.more, "pairs of raters with less in common"),
    (found.more, "raters with fewer verdicts"),
  )
  return [f"{number(n)} more {what} are not shown." for n, what in rows if n]


def agreement_html(found: dict[str, Any]) -> str:
  """The page.

  Args:
    found: as `jaxalign.cli.agreement.measure` returns it, perhaps from a file.
  """
  node = Node(found)
  words = dict(alpha=alpha_sentence(node), left_out=left_out(node))
  return page.render("agreement.html", found=node, **words)
