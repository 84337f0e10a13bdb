"""The page, and the text, on the agreement of any table of raters."""

from typing import Any

from jaxalign.report import charts, page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import judges as judges_page
from jaxalign.report.pages import run
from jaxalign.report.pages.run import fields, items, records

_SHARE = run.Metric("")  # shown in percent
_PLAIN = run.Metric("", share=False)
_BARS = 30  # pairs of raters in the chart
_WIDTH = 44  # of a name in the text


def _flat(value: Any, limit: int = 200) -> str:
  """Text from data in one line that a terminal cannot obey."""
  return charts.shorten(value, limit)


def _exact(found: Any) -> str:
  """A measure to four places, its interval to three."""
  found = fields(found)
  value, low, high = (
    page.finite(found.get(k)) for k in ("value", "low", "high")
  )
  if value is None:
    return page.MISSING
  ends = "" if None in (low, high) else f" [{low:.3f}, {high:.3f}]"
  return (f"{value:.4f}" + ends).replace("-", "−")


def _pairs(found: dict) -> list[tuple[str, dict]]:
  return [
    (page.plain(k), fields(v))
    for k, v in fields(fields(found.get("among")).get("between")).items()
  ]


def _alpha(found: dict) -> str:
  """Alpha over the humans, or over all raters, in a sentence."""
  judged = fields(fields(found.get("judged")).get("humans"))
  if len(fields(judged.get("between"))):  # a judge is no part of the bar
    return _sentence(judged, "the humans")
  return _sentence(fields(found.get("among")), "all raters")


def _sentence(among: dict, whom: str) -> str:
  alpha = fields(among.get("alpha"))
  if page.finite(alpha.get("value")) is None:
    why = (
      "no pair was judged by two raters"
      if not alpha.get("units")
      else "all labels are the same"
    )
    return f"Krippendorff's alpha cannot be told: {why}."
  return (
    f"Krippendorff's alpha over {whom}: {_exact(alpha)}, on "
    f"{page.number(alpha.get('units'))} pairs that two or more judged."
  )


def _more(found: dict) -> list[str]:
  """What the tables leave out."""
  out = []
  left = fields(found.get("among")).get("more")
  if left:
    out.append(
      f"{page.number(left)} more pairs of raters with less in common "
      "are not shown."
    )
  if found.get("more"):
    out.append(
      f"{page.number(found['more'])} more raters with fewer verdicts "
      "are not shown."
    )
  return out


# The page.


def _reading(files: Any) -> Html:
  """How every file was read, and its first rows as they were understood."""
  parts = []
  for one in records(files):
    parts += [
      tag("h3", page.plain(one.get("name"))),
      page.paragraph(
        f"{page.number(one.get('rows'))} rows, read as: "
        f"{page.plain(one.get('layout'))}; "
        f"{page.number(one.get('verdicts'))} verdicts."
      ),
    ]
    parts.append(
      tag("ul", *(tag("li", line) for line in run.words(one.get("lines"))))
    )
    for example in records(one.get("examples")):
      answers = [page.plain(a) for a in items(example.get("answers"))]
      texts = items(example.get("texts"))
      told = ", ".join(
        f"{page.plain(c[0])}: {page.plain(c[1])}"
        for c in items(example.get("cells"))
        if len(items(c)) == 2
      )
      boxes = [
        page.text_box(name, text, limit=400)
        for name, text in zip(answers, texts)
      ]
      parts.append(
        tag(
          "div",
          page.paragraph(
            f"{page.plain(example.get('where'))}: {told or 'no verdict'}"
          ),
          page.text_box(
            "Item", example.get("prompt") or example.get("item"), limit=400
          ),
          page.grid(*boxes),
          class_="example",
        )
      )
  return page.join(parts)


def _two_by_two(found: dict) -> Html:
  pairs = _pairs(found)
  if not pairs:
    return page.paragraph("No two raters judged the same pair of answers.")
  rows = [
    (
      name,
      run.cell(_SHARE, one.get("agreement")),
      *judges_page.beyond_chance(one),
      page.number(fields(one.get("agreement")).get("n")),
    )
    for name, one in pairs
  ]
  chart = charts.intervals(
    [
      charts.Row(
        name,
        k.get("value"),
        k.get("low"),
        k.get("high"),
        run.measured(_PLAIN, k),
      )
      for name, k in (
        (name, fields(one.get("kappa"))) for name, one in pairs[:_BARS]
      )
    ],
    "Cohen's kappa, two raters at a time",
    "kappa",
    reference=0.0,
    reference_label="chance",
  )
  return page.join(
    [
      page.table(
        ("Raters", "Same verdict, %", *judges_page.MEASURES, "Pairs"),
        rows,
        "Raters two by two; 95 % intervals, drawn over items, below. A verdict "
        "that could not be read is left out.",
      ),
      page.figure(
        chart, "Agreement beyond chance: 1 is always, 0 is what chance gives."
      ),
    ]
  )


def _raters(found: dict) -> Html:
  """Each rater alone: place, length, ties."""
  rows = []
  for one in records(found.get("raters")):
    orders, lengths = fields(one.get("orders")), fields(one.get("lengths"))
    rows.append(
      (
        page.plain(one.get("name")),
        page.plain(one.get("role") or "rater"),
        page.number(one.get("verdicts")),
        page.number(one.get("ties")),
        page.number(one.get("unparsable")),
        run.cell(_SHARE, orders.get("consistent")),
        run.cell(_PLAIN, orders.get("kappa")),
        run.cell(_SHARE, orders.get("first")),
        run.cell(_SHARE, lengths.get("longer")),
        run.cell(_PLAIN, lengths.get("slope")),
      )
    )
  return page.table(
    (
      "Rater",
      "Role",
      "Verdicts",
      "Ties",
      "Not read",
      "Same verdict in both orders, %",
      "Kappa between the orders",
      "First answer named, %",
      "Longer answer wins, %",
      "Log-odds for one sd of length",
    ),
    rows,
    "Each rater alone. Both orders count where a pair was shown in both. "
    "First and longer: of the verdicts that name a winner; without a bias "
    "of place the first is named in half, if which answer stood first was "
    "drawn. A longer answer may be better: compare the raters.",
    text=(1,),
  )


def _errors(judged: dict) -> Html:
  """Whether a judge's errors go to the longer answer."""
  rows = []
  for name, one in fields(judged.get("judges")).items():
    found = fields(fields(one).get("lengths"))
    if found:
      errors = fields(found.get("errors"))
      rows.append(
        (
          page.plain(name),
          run.cell(_SHARE, found.get("longer")),
          run.cell(_SHARE, errors),
          page.number(errors.get("n")),
        )
      )
  if not rows:
    return page.paragraph(
      "Without the texts of the answers nothing can be said of their lengths.",
      kind="absent",
    )
  return page.table(
    (
      "Judge",
      "Longer answer wins, %",
      "Errors towards the longer, %",
      "Errors",
    ),
    rows,
    "Length: an error is a pair where the judge and the "
    "humans name different winners; without a bias half of them go to the "
    "longer answer.",
  )


def render(found: dict[str, Any]) -> str:
  """The page.

  Args:
    found: as `jaxalign.agreement.measure` returns it, perhaps from a file.
  """
  found = fields(found)
  sections = [
    (
      "raters",
      "Agreement",
      page.join(
        [
          page.paragraph(_alpha(found)),
          _two_by_two(found),
          *map(page.paragraph, _more(found)),
        ]
      ),
    )
  ]
  judged = fields(found.get("judged"))
  if judged:
    sections.append(
      (
        "judges",
        "Judges against humans",
        page.join(
          [judges_page.section(judged), tag("h3", "Length"), _errors(judged)]
        ),
      )
    )
  if not found.get("labels"):
    sections.append(("alone", "Place and length", _raters(found)))
  sections.append(
    ("reading", "How the files were read", _reading(found.get("files")))
  )
  refused = sum(
    page.finite(n) or 0
    for one in records(found.get("files"))
    for n in fields(one.get("refused")).values()
  )
  top = (
    page.callout(
      "warning",
      "Not all rows could be read",
      [
        f"{page.number(int(refused))} rows or verdicts were refused; the last "
        "section says why."
      ],
    )
    if refused
    else ""
  )
  return str(
    page.document(
      "Agreement of raters",
      sections,
      top=top,
      lede=_alpha(found),
      byline=[
        page.plain(one.get("name")) for one in records(found.get("files"))[:8]
      ],
    )
  )


# The text.


def _columns(head: list[str], rows: list[list[str]]) -> str:
  """Words under each other."""
  table = [head, *rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(head))]
  return "\n".join(
    "  ".join(
      word.ljust(w) if i == 0 else word.rjust(w)
      for i, (word, w) in enumerate(zip(row, widths))
    ).rstrip()
    for row in table
  )


def _cut(name: Any) -> str:
  return _flat(name, _WIDTH)


def _value(m: run.Metric, value: Any) -> str:
  return run.measured(m, fields(value)) if fields(value) else page.MISSING


def reading(files: list[dict[str, Any]]) -> str:
  """How the files were read, in lines."""
  out = []
  for one in files:
    out.append(
      f"{_flat(one['name'])}: {one['rows']:,} rows, read as: "
      f"{one['layout']}; {one['verdicts']:,} verdicts"
    )
    out += [f"  {_flat(line, 400)}" for line in one["lines"]]
    for example in one["examples"]:
      out.append(
        f"  {_flat(example['where'])}: item "
        f"{_flat(example['prompt'] or example['item'], 60)!r}"
      )
      out += [
        f"    {_flat(name, 40)}: {_flat(text, 60)!r}"
        for name, text in zip(example["answers"], example["texts"])
      ]
      out.append(
        "    "
        + "; ".join(
          f"{_flat(rater, 40)}: {_flat(word, 40)}"
          for rater, word in example["cells"]
        )
      )
  return "\n".join(out)


def terminal(found: dict[str, Any]) -> str:
  """All numbers as text.

  Args:
    found: as `jaxalign.agreement.measure` returns it.
  """
  pairs = _pairs(found)
  out = ["", _alpha(found)]
  if pairs:
    out += [
      "",
      _columns(
        ["raters", "same, %", "kappa", "Scott's pi", "alpha", "pairs"],
        [
          [
            _cut(name),
            _value(_SHARE, one.get("agreement")),
            *(_exact(one.get(k)) for k in ("kappa", "pi", "alpha")),
            page.number(fields(one.get("agreement")).get("n")),
          ]
          for name, one in pairs
        ],
      ),
    ]
  for name, one in fields(fields(found["judged"]).get("judges")).items():
    lines = [
      [
        v["rule"] if one["unparsable"] else "all verdicts could be read",
        _value(_SHARE, v["agreement"]),
        *(_exact(v[k]) for k in ("kappa", "pi", "alpha")),
        page.number(v["agreement"]["n"]),
      ]
      for v in one["against"].values()
    ]
    out += [
      "",
      _columns(
        [
          f"{_cut(name)} against the majority",
          "same, %",
          "kappa",
          "Scott's pi",
          "alpha",
          "pairs",
        ],
        lines if one["unparsable"] else lines[:1],
      ),
    ]
    errors = fields(fields(one.get("lengths")).get("errors"))
    if errors.get("n"):
      out.append(
        f"its errors towards the longer answer: "
        f"{_value(_SHARE, errors)} % of {errors['n']:,}"
      )
  if not found["labels"]:
    rows = []
    for one in found["raters"]:
      orders, lengths = one["orders"], fields(one["lengths"])
      rows.append(
        [
          _cut(one["name"]),
          page.number(one["verdicts"]),
          page.number(one["ties"]),
          page.number(one["unparsable"]),
          _value(_SHARE, orders["consistent"]),
          _exact(orders["kappa"]),
          _value(_SHARE, orders["first"]),
          _value(_SHARE, lengths.get("longer")),
          _value(_PLAIN, lengths.get("slope")),
        ]
      )
    out += [
      "",
      _columns(
        [
          "rater",
          "verdicts",
          "ties",
          "not read",
          "both orders alike, %",
          "their kappa",
          "first wins, %",
          "longer wins, %",
          "log-odds a sd of length",
        ],
        rows,
      ),
    ]
  return "\n".join([*out, *_more(found), "[...]: 95 % intervals"])
