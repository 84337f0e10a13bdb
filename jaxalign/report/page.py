"""Pages from jinja templates: one HTML file each, which loads nothing.

A template walks JSON as `nodes.Node`s. Text from data is escaped by jinja and
made visible by `nodes.visible`. A template may call every function of `nodes`,
`charts` and this module, of a module that calls `expose`, and, as `m`, the
macros of `macros.html`; a name that does not exist stops it.
"""

import base64
from collections.abc import Callable
import hashlib
import pathlib
from typing import Any, NamedTuple
import urllib.parse

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from jaxalign.report import charts, nodes
from jaxalign.report.nodes import entries, finite, MISSING, Node, visible

CHARTS = ("intervals", "lines", "bars", "histogram", "legend")
TEMPLATES = pathlib.Path(__file__).parent / "templates"


class Metric(NamedTuple):
  """How a metric is named, and whether it is a fraction, shown in percent."""

  name: str
  fraction: bool = True
  unit: str = ""
  even: bool = False  # whether 1/2 means no preference at all


PERCENT, PLAIN = Metric(""), Metric("", fraction=False)
METRICS = {
  f"win_vs_{side}{suffix}": Metric(f"Wins against the {name}{how}", even=True)
  for suffix, how in (
    ("", ""),
    ("_macro", ", mean over groups"),
    ("_equal_length", " at equal length"),
    ("_true", " by the true reward"),
  )
  for side, name in (
    ("target", "target"),
    ("sft", "reference"),
    ("chosen", "chosen answer"),
  )
} | {
  "win_rate": Metric("Win rate", even=True),
  "accuracy": Metric("Preference accuracy, held out", even=True),
  "likelihood_accuracy": Metric(
    "Chosen likelier per token, no reference", even=True
  ),
  "malformed": Metric("Malformed answers"),
  "ended": Metric("Answers that ended"),
  "empty": Metric("Empty answers"),
  "kl": Metric("KL from the reference", fraction=False, unit="nats"),
  "length": Metric("Answer length", fraction=False, unit="tokens"),
}


def metric(name: Any) -> Metric:
  """What is known of a metric; an unknown one keeps its own name."""
  return METRICS.get(str(name), Metric(visible(name), fraction=False))


def headed(name: Any) -> str:
  """A metric's name with its unit, for the head of a column or an axis."""
  m = metric(name)
  return ", ".join(filter(None, (m.name, "%" if m.fraction else m.unit)))


def metrics_of(arm: Node) -> dict[str, Node]:
  """An arm's metrics; a baseline keeps them next to its name."""
  own = {k: v for k, v in entries(arm) if k in METRICS and entries(v)}
  return own | {str(k): v for k, v in entries(arm.metrics)}


def metric_names(arms: list[Node]) -> list[str]:
  """The metrics that any arm has, in the order of METRICS, then the rest."""
  names = {name for arm in arms for name in metrics_of(arm)}
  return [n for n in METRICS if n in names] + sorted(names - set(METRICS))


def value_text(value: Any, m: Metric = PERCENT, sign: bool = False) -> str:
  """One value of a metric, without its unit."""
  if m.fraction:
    return nodes.percent(value, sign, "")
  return nodes.number(value, sign=sign)


def bounds(found: Node, m: Metric = PERCENT, sign: bool = False) -> str:
  """The 95 % interval in brackets, or nothing where there is none."""
  ends = (found["low"], found["high"])
  if any(nodes.raw(end) is None for end in ends):
    return ""
  return f"[{', '.join(value_text(end, m, sign) for end in ends)}]"


def measured(found: Any, m: Metric = PERCENT, sign: bool = False) -> str:
  """Value and interval in one line."""
  found = Node(found)
  value = value_text(found["value"], m, sign)
  return f"{value} {bounds(found, m, sign)}".strip()


def cell(found: Any, m: Metric = PERCENT) -> Any:
  """Value over interval, for a table; metrics may add a fraction of ties."""
  found = Node(found)
  if not entries(found):
    return MISSING
  ties = finite(found["ties"]) and f"ties {nodes.percent(found['ties'])}"
  small = Markup("<small>{}</small>").format
  lines = Markup().join(small(s) for s in (bounds(found, m), ties) if s)
  return Markup("{}{}").format(value_text(found["value"], m), lines)


def gap(found: Any, m: Metric = PERCENT) -> Markup:
  """A signed difference over its interval."""
  found = Node(found)
  words = value_text(found["value"], m, True), bounds(found, m, True) or MISSING
  return Markup("{} <small>{}</small>").format(*words)


def finite_number(value: Any, otherwise: str = MISSING) -> str:
  """A finite number, or what stands in its place."""
  return otherwise if finite(value) is None else nodes.number(value)


def span(found: Node, words: Callable[..., str], **options: Any) -> str:
  """From `low` to `high`."""
  low, high = found["low"], found["high"]
  if nodes.raw(low) is None:
    return MISSING
  return f"{words(low, **options)} to {words(high, **options)}"


def local_link(path: Any) -> str:
  """The address of a file in the page's folder; "" of any other address."""
  address = visible(path)
  outside = address.startswith("/") or ".." in address.split("/")
  if outside or set(address) & {"\\", ":"}:
    return ""
  return urllib.parse.quote(address)


def script_json(value: Any) -> Markup:
  """JSON for an element that never runs, and which no text in it can end."""
  text = htmlsafe_json_dumps(
    value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
  )
  return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def script_digest(script: str) -> str:
  """What a content security policy calls this script by."""
  found = hashlib.sha256(script.encode()).digest()
  return f"sha256-{base64.b64encode(found).decode()}"


def interval_row(
  label: Any,
  found: Any,
  m: Metric = PERCENT,
  colour: int = 0,
  sign: bool = False,
) -> charts.Row:
  """A value and its interval as a row of a forest plot."""
  ends = [charts.drawable(found[k]) for k in ("value", "low", "high")]
  if m.fraction:
    ends = [end and 100 * end for end in ends]
  return charts.Row(label, *ends, measured(found, m, sign), colour)


def quantile_row(
  label: str, found: Node, colour: int = charts.MUTED
) -> charts.Row:
  """An odd number of quantiles as a row: the middle and the outer two."""
  found = list(found) or [Node(None)]
  low, middle, high = found[0], found[len(found) // 2], found[-1]
  words = f"{nodes.number(middle)} [{nodes.number(low)}, {nodes.number(high)}]"
  return charts.Row(label, middle, low, high, words, colour)


def source(name: str) -> Markup:
  """A file of `templates` as it is."""
  return Markup((TEMPLATES / name).read_text("utf-8"))


def _printed(value: Any) -> Any:
  """What a template prints: markup as it is, everything else made visible."""
  return value if hasattr(value, "__html__") else visible(value)


ENVIRONMENT = jinja2.Environment(
  loader=jinja2.FileSystemLoader(TEMPLATES),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
  finalize=_printed,
  extensions=["jinja2.ext.do"],
)


def expose(names: dict[str, Any]) -> None:
  """Lets templates call the functions of a module, and use them as filters."""
  public = {k: v for k, v in names.items() if callable(v) and k[0].islower()}
  ENVIRONMENT.globals |= public
  ENVIRONMENT.filters |= public


def render(template: Any, **context: Any) -> str:
  """A whole page of one of the `templates`."""
  return ENVIRONMENT.get_template(template).render(context)


for _module in (vars(nodes), vars(charts), globals()):
  expose(_module)
ENVIRONMENT.globals |= dict(PLAIN=PLAIN, MISSING=MISSING, zip=zip)
draw = ENVIRONMENT.get_template("charts.html").module  # SVG of each chart
expose({name: getattr(draw, name) for name in CHARTS})
ENVIRONMENT.globals["m"] = ENVIRONMENT.get_template("macros.html").module
