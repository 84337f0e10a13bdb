"""The page on the agreement of any table of raters."""

from typing import Any

from jaxalign.report import page
from jaxalign.report.nodes import entries, finite, Node, number


def alpha_sentence(node: Node) -> str:
  """Krippendorff's alpha over the humans, or over all raters, in words."""
  humans, whom, alpha = node.judged.humans, "all raters", node.among.alpha
  if entries(humans.between):  # judges are then left out
    whom, alpha = "the humans", humans.alpha
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


def left_out(node: Node) -> list[str]:
  """What the tables leave out."""
  rows = (
    (node.among.more, "pairs of raters with less in common"),
    (node.more, "raters with fewer verdicts"),
  )
  return [f"{number(n)} more {what} are not shown." for n, what in rows if n]


def agreement_html(numbers: dict[str, Any]) -> str:
  """The page of `jaxalign.cli.agreement.measure`, perhaps from a file."""
  node = Node(numbers)
  words = dict(alpha=alpha_sentence(node), left_out=left_out(node))
  return page.render("agreement.html", found=node, **words)
