"""The page of a selection: its rows to search and sort, a map, the figures."""

from collections.abc import Sequence
import importlib.resources
from typing import Any

import numpy as np

from jaxalign.report import charts, page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import run
from jaxalign.report.pages.run import fields, items, records
from jaxalign.select.card import rows as rows_lib
from jaxalign.select.card.geometry import ALIKE

TEXTS = 12_000_000  # characters of text a page holds, divided among its rows
LEAST, MOST = 90, 1500  # characters of one row
PLANE = 1000  # places on the map, from side to side
EDGE = 0.001  # share of the rows that may lie outside the map, at its border
SIDES = {
  "prompt": ("Prompt", ""),
  "chosen": ("Chosen", "yes"),
  "rejected": ("Rejected", "no"),
  "completion": ("Response", ""),
}
CHANCE = f"Random subsets, 95{page.NO_BREAK}%"
NAMES = {"False": "undesirable", "True": "desirable"}


def _file(name: str) -> str:
  return (importlib.resources.files("jaxalign.report.pages") / name).read_text(
    "utf-8"
  )


# What the script reads.


def _coded(
  values: Sequence[Any], names: dict[str, str] | None = None
) -> dict[str, Any]:
  """A column as its distinct values, the commonest first, and places."""
  text = [page.plain(v) for v in values]
  found, inverse, counts = np.unique(
    text, return_inverse=True, return_counts=True
  )
  order = np.argsort(-counts, kind="stable")
  place = np.empty(len(order), np.int64)
  place[order] = np.arange(len(order))
  return {
    "names": [(names or {}).get(str(found[i]), str(found[i])) for i in order],
    "at": place[inverse].tolist(),
  }


def _places(values: np.ndarray) -> list[int]:
  """Coordinates as whole numbers; the outermost rows stand at the border."""
  values = np.asarray(values, np.float64)
  low, high = np.quantile(values, [EDGE, 1 - EDGE])
  span = high - low if high > low else 1.0
  low, span = low - 0.02 * span, 1.04 * span
  return (
    np.clip(np.round(PLANE * (values - low) / span), 0, PLANE)
    .astype(int)
    .tolist()
  )


def _cut(value: Any, limit: int) -> str:
  """A text of at most `limit` characters; what hides or reorders is shown."""
  if value is None:
    return ""
  text = str(value).strip()
  shown = page.plain(text[:limit])
  whole = len(text) <= limit and len(shown) <= limit
  return shown if whole else shown[: limit - 1] + "…"


def payload(card: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
  """The columns of `card.examine` as the script of the page reads them."""
  n = len(table["id"])
  place = {name: i for i, name in enumerate(np.asarray(table["id"]).tolist())}
  out = dict(
    selected=card["selected"],
    common=rows_lib.fixed(card),
    words=dict(why=rows_lib.WHY, near=rows_lib.NEAR, length=rows_lib.LENGTH),
    copy=[2, 4],
    id=[page.plain(i) for i in table["id"]],
    score=[
      rows_lib.figure(v)
      for v in np.asarray(table["score"], np.float64).tolist()
    ],
    **{
      k: np.asarray(table[k]).tolist()
      for k in ("rank", "why", "near_code", "tail")
    },
  )
  if any(table["near"]):
    out["near"] = [
      place.get(k, page.plain(k)) if k else -1
      for k in np.asarray(table["near"]).tolist()
    ]
    out["cosine"] = [
      rows_lib.places(v)
      for v in np.asarray(table["cosine"], np.float64).tolist()
    ]
  if "x" in table:
    out["x"], out["y"] = _places(table["x"]), _places(table["y"])
  if "length" in table:
    out["length"] = np.round(table["length"], 1).tolist()
  for name in ("label", "source", "topic"):
    if name in table:
      out[name] = _coded(table[name], NAMES if name == "label" else None)
  texts = table.get("texts") or {}
  room = int(min(MOST, max(LEAST, TEXTS / max(1, n)))) // max(1, len(texts))
  out["texts"] = [
    dict(
      name=SIDES.get(k, (k, ""))[0],
      kind=SIDES.get(k, (k, ""))[1],
      at=[_cut(v, room) for v in values],
    )
    for k, values in texts.items()
  ]
  return out


# The rows.


def _choice(name: str, label: str, options: Sequence[tuple[Any, str]]) -> Html:
  """A list to choose from; the first leaves all."""
  return tag(
    "label",
    label,
    tag(
      "select",
      *(
        tag("option", charts.shorten(words, 60), value=value)
        for value, words in options
      ),
      id=f"f-{name}",
    ),
  )


def _tools(data: dict[str, Any]) -> Html:
  """The search, the filters, and the line that says what they left."""
  reasons = sorted(set(data["why"]))
  parts = [
    tag(
      "label",
      "Search ids and texts",
      tag(
        "input",
        type="search",
        id="q",
        autocomplete="off",
        spellcheck="false",
        placeholder="words that must all occur",
      ),
      class_="wide",
    ),
    _choice("kept", "Rows", [("", "all"), (1, "kept"), (0, "left out")]),
    _choice(
      "why",
      "Why",
      [("", "any reason")] + [(i, rows_lib.KINDS[i]) for i in reasons],
    ),
  ]
  for name in ("label", "source", "topic"):
    if name in data and len(data[name]["names"]) > 1:
      parts.append(
        _choice(
          name,
          name.capitalize(),
          [("", "all")] + list(enumerate(data[name]["names"][:500])),
        )
      )
  if "x" in data:
    by = [("", "kept or left out")] + [
      (k, k) for k in ("label", "source", "topic") if k in data
    ]
    parts.append(_choice("colour", "Colours of the map", by))
  if "near" in data:
    parts.append(
      tag(
        "label",
        tag("input", type="checkbox", id="f-copy"),
        "near-duplicates only",
        class_="tick",
      )
    )
  parts.append(tag("button", "Reset", type="button", id="reset"))
  return tag("div", *parts, class_="tools", role="search")


def _rows(card: dict[str, Any], data: dict[str, Any]) -> Html:
  """The tools, the map, one row in full, and the table."""
  shown = fields(card.get("shown"))
  left, pool = shown.get("left", 0), card["pool"]
  parts = []
  if shown.get("kept", 0) + left < pool:
    parts.append(
      page.paragraph(
        f"This page holds {page.number(shown['kept'])} of the "
        f"{page.number(card['selected'])} kept rows and a uniform sample of "
        f"{page.number(left)} of the {page.number(pool - card['selected'])} "
        "left out; scores.parquet has all."
      )
    )
  parts += [
    tag(
      "noscript",
      page.paragraph(
        "The table and the map need scripts; the figures below do not.",
        kind="absent",
      ),
    ),
    _tools(data),
    tag("p", id="count", role="status", aria_live="polite"),
  ]
  detail = tag(
    "div",
    id="detail",
    tabindex="0",
    role="region",
    aria_label="The row that is chosen",
    aria_live="polite",
  )
  if "x" in data:
    seen = fields(fields(card.get("geometry")).get("map"))
    shares = items(seen.get("explained"))
    drawn = tag(
      "figure",
      tag(
        "div",
        tag(
          "canvas",
          id="map",
          role="img",
          aria_label="Map of the rows; the table has the same rows",
        ),
        tag("div", id="tip", hidden=""),
        class_="plot-box",
      ),
      tag("ul", id="legend"),
      tag(
        "figcaption",
        "The rows on the first two principal directions of "
        f"their embeddings ({' and '.join(page.percent(s) for s in shares)}"
        " of the variance: near on the map need not be near). Click a "
        "point for its row; draw a rectangle to keep only the rows in "
        "it.",
      ),
    )
    parts.append(tag("div", drawn, detail, class_="stage"))
  else:
    parts.append(detail)
  parts.append(
    tag(
      "div",
      tag(
        "div",
        tag("div", id="head", class_="head", role="row"),
        tag(
          "div",
          tag("div", id="lines", role="rowgroup"),
          id="view",
          class_="view",
          tabindex="0",
          role="grid",
          aria_label="Rows",
        ),
        id="inner",
        class_="inner",
      ),
      class_="sheet",
    )
  )
  parts.append(
    page.paragraph(
      "A column's head sorts by it, and again the other way. ● kept, ○ left "
      "out. Nearest kept: the cosine to the nearest (other) kept row.",
      kind="byline",
    )
  )
  found = records(card.get("examples"))
  if found:
    parts.append(
      tag(
        "details",
        tag("summary", "First and last rows, with their reasons"),
        tag(
          "ul",
          *(
            tag("li", tag("code", one.get("id")), " ", one.get("reason"))
            for one in found
          ),
        ),
      )
    )
  return page.join(parts)


# Figures.


def _said(words: Any) -> Html:
  kind = {"large": "said-large", "medium": "said-large"}.get(
    str(words), "said-none" if words == "within chance" else None
  )
  return tag("span", words if words is not None else page.MISSING, class_=kind)


def _p(value: Any) -> str:
  x = page.finite(value)
  return (
    page.MISSING
    if x is None
    else "< 0.001"
    if x < 0.001
    else (page.number(x, 2))
  )


def _span(one: dict[str, Any], shown: Any) -> str:
  if one.get("low") is None:
    return page.MISSING
  return f"{shown(one['low'])} to {shown(one['high'])}"


def shifts(card: dict[str, Any]) -> Html:
  """How the kept rows differ from the pool, beside random subsets."""
  found = records(card.get("shifts"))
  if not found:
    return page.absent("How the kept rows differ from the pool was")
  parts = [
    page.paragraph(
      "Beside each shift stands where 95 % of uniformly random subsets of the "
      "same size would lie. A shift outside is no accident; whether it is "
      "slight (below 0.2), small, medium (from 0.5) or large (from 0.8) is "
      "its effect size (Cohen), which does not grow with the number of "
      "rows."
    )
  ]
  numbers = [one for one in found if one.get("kind") == "number"]
  if numbers:
    signed = lambda v: page.number(v, sign=True)
    parts.append(
      page.table(
        ("What", "Pool", "Kept", "Shift", CHANCE, "Effect, sd", "p", "Said"),
        [
          (
            f"{one['name'].capitalize()}, {one.get('unit')}",
            page.number(one.get("pool")),
            page.number(one.get("kept")),
            signed(one.get("shift")),
            _span(one, signed),
            page.number(one.get("effect"), 2, sign=True),
            _p(one.get("p")),
            _said(one.get("said")),
          )
          for one in numbers
        ],
        "Means of the kept rows and of the pool.",
        text=(7,),
      )
    )
  signed = lambda v: page.percent(v, sign=True, unit="")
  for one in found:
    if one.get("kind") != "share":
      continue
    name = one["name"]
    what = (
      "clusters of the embeddings"
      if (name == "topic" and card.get("topics_are") == "clusters")
      else name
    )
    parts.append(tag("h3", what.capitalize()))
    if one.get("moved") is not None and one.get("moved_high") is not None:
      parts.append(
        page.paragraph(
          f"{page.percent(one['moved'])} of the kept rows would have to "
          "change their value to be distributed as the pool is; of a random "
          f"subset {page.percent(one['moved_chance'])}, in 95 % of them at "
          f"most {page.percent(one['moved_high'])} (p "
          f"{_p(one.get('moved_p'))}). {page.number(one['covered'])} of "
          f"{page.number(one['values'])} values are among the kept rows."
        )
      )
    rows, drawn = [], []
    for row in records(one.get("rows")):
      value = row.get("value")
      label = (
        "all others"
        if value is None
        else NAMES.get(str(value), page.plain(value))
        if name == "label"
        else (page.plain(value))
      )
      rows.append(
        (
          charts.shorten(label, 60),
          page.percent(row["pool"], unit=""),
          page.percent(row.get("kept"), unit=""),
          _span(row, lambda v: page.percent(v, unit="")),
          page.number(row.get("effect"), 2, sign=True),
          _p(row.get("p")),
          _said(row.get("said")),
        )
      )
      if row.get("low") is not None:
        gap = row["kept"] - row["pool"]
        drawn.append(
          charts.Row(
            label,
            gap,
            row["low"] - row["pool"],
            row["high"] - row["pool"],
            signed(gap),
            1 if row["said"] != "within chance" else (charts.MUTED),
          )
        )
    if drawn:
      parts.append(
        page.figure(
          charts.intervals(
            drawn,
            f"Share of each {name}, kept minus pool",
            "points, kept minus pool",
            scale=100,
            reference=0,
            reference_label="as the pool",
          ),
          "Dot: the share among the kept rows less that in the pool, in "
          "points. Bar: where 95 % of random subsets lie. Coloured: beyond "
          "chance, all values corrected together (Holm).",
        )
      )
    parts.append(
      tag(
        "details",
        tag("summary", "The shares in a table"),
        page.table(
          (
            what.capitalize(),
            "Pool, %",
            "Kept, %",
            CHANCE,
            "Effect, h",
            "p",
            "Said",
          ),
          rows,
          f"Shares of the commonest values of {what}.",
          text=(6,),
        ),
      )
    )
  return page.join(parts)


def neighbours(card: dict[str, Any]) -> Html:
  """How near what was left out is to what was kept; near-duplicates."""
  seen = fields(card.get("geometry"))
  if seen.get("why"):
    return page.callout(
      "warning", "Neighbours were not measured", [seen["why"]]
    )
  if not seen:
    return page.absent("Neighbours and near-duplicates were")
  found, parts = fields(seen.get("neighbours")), []
  rows = []
  for key, label, colour in (
    ("quantiles", "these kept rows", 0),
    ("random", "a random subset", charts.MUTED),
  ):
    at = items(found.get(key))
    if len(at) == 5:
      rows.append(
        charts.Row(
          label,
          at[2],
          at[0],
          at[4],
          f"{page.number(at[2])} [{page.number(at[0])}, {page.number(at[4])}]",
          colour,
        )
      )
  if rows:
    every = found.get("asked") == found.get("of")
    who = (
      "every row"
      if every
      else (
        f"a sample of {page.number(found.get('asked'))} of the "
        f"{page.number(found.get('of'))} rows"
      )
    )
    parts.append(
      page.figure(
        charts.intervals(
          rows,
          "Cosine to the nearest kept row",
          "cosine to the nearest kept row of a row left out",
        ),
        f"Of {who} left out, the cosine to its nearest kept row, found "
        "exactly: median, and the range from the 5th to the 95th percentile; "
        "beside it the same for a random subset of the same size"
        + (
          f" ({page.number(found.get('random_asked'))} rows asked)."
          if found.get("random_asked")
          else "."
        ),
      )
    )
  copies = fields(seen.get("near_duplicates"))
  rows, asked = [], []
  for key, label, colour in (
    ("kept", "kept rows", 0),
    ("random", "random, as many", charts.MUTED),
    ("pool", "the pool", charts.MUTED),
  ):
    one = fields(copies.get(key))
    if one.get("value") is not None:
      rows.append(
        charts.Row(
          label,
          one["value"],
          one["low"],
          one["high"],
          f"{page.percent(one['value'], unit='')} "
          f"[{page.percent(one['low'], unit='')}, "
          f"{page.percent(one['high'], unit='')}]",
          colour,
        )
      )
      asked.append(f"{page.number(one['n'])} of {label}")
  if rows:
    parts.append(
      page.figure(
        charts.intervals(
          rows,
          "Rows with a near-duplicate",
          "rows with a near-duplicate among their own, %",
          scale=100,
        ),
        "Share of rows with another row of the same set at a cosine of "
        f"{page.number(ALIKE)} or more, with a 95 % interval (Wilson); asked "
        f"were {', '.join(asked)}. A larger set has more near-duplicates: "
        "compare the kept rows with the random ones.",
      )
    )
  near = fields(found.get("near_copy"))
  text = "Cosines are of the mean of a row's responses, less the mean of the "
  text += "pool."
  if near.get("value") is not None:
    text = (
      f"{page.percent(near['value'])} of the rows left out nearly "
      f"repeat a kept row. {text}"
    )
  return page.join([page.grid(*parts), page.paragraph(text)])


def agreement(card: dict[str, Any]) -> Html:
  """Other samplers, other seeds, and the mixture itself."""
  parts = []
  found = records(card.get("overlaps"))
  if found:
    parts.append(
      page.table(
        ("Selections", "Jaccard", "By chance, 95 %"),
        [
          (
            f"{page.plain(one['a'])} and {page.plain(one['b'])}",
            page.number(one["jaccard"]),
            _span(one, page.number),
          )
          for one in found
        ],
        "Rows in both over rows in either, of selections of the same size; "
        "those of the other samplers are what each would keep of this pool at "
        "its defaults (random and stratified read one draw). By chance: two "
        "independent random subsets.",
      )
    )
  else:
    parts.append(page.absent("What other samplers would have kept was"))
  words = run.card_words(
    card | {"diagnostics": fields(card.get("diagnostics"))}
  )
  parts.append(run.stability(fields(words.get("stability"))))
  parts.append(run.mixture(fields(words.get("mixture"))))
  return page.join(parts)


def spectra(card: dict[str, Any]) -> Html:
  """How variance falls off, per label and per cluster, and their gap."""
  found = fields(card.get("spectra"))
  if found.get("why"):
    return page.paragraph(
      f"Not measured: {page.plain(found['why'])}.", kind="absent"
    )
  if not found:
    return page.absent("Spectra of the embeddings were")
  parts = [
    page.paragraph(
      "The eigenvalues of the covariance of embeddings, at equal numbers of "
      "rows a group. Groups of unequal spectra are learnt unequally even "
      "where they have as many rows. The gap is the largest ratio of two "
      "groups' effective numbers of directions; beside it stands that of "
      "groups made by shuffling."
    )
  ]
  for key, title in (
    ("label", "By label"),
    ("component", "By component of the mixture"),
    ("topic", "By topic or cluster"),
  ):
    one = fields(found.get(key))
    if not one:
      continue
    parts.append(tag("h3", title))
    if one.get("why"):
      parts.append(
        page.paragraph(f"Not compared: {one['why']}.", kind="absent")
      )
      continue
    p = page.finite(one.get("p"))
    verdict = (
      "more than shuffled groups show"
      if p is not None and p <= 0.05
      else "no more than shuffled groups show"
    )
    parts.append(
      page.paragraph(
        f"Gap {page.number(one.get('gap'))} ({verdict}: median "
        f"{page.number(one.get('gap_chance'))}, 95 % below "
        f"{page.number(one.get('gap_high'))}; p {_p(p)})."
      )
    )
    groups = records(one.get("groups"))
    rows = [
      (
        charts.shorten(g.get("name"), 40),
        page.number(g.get("rows")),
        page.number(g.get("effective_rank")),
        page.number(g.get("participation")),
        page.number(g.get("decay")),
        page.percent(g.get("first"), unit=""),
        page.percent(g.get("first_ten"), unit=""),
        page.number(g.get("variance")),
      )
      for g in groups
    ]
    table = page.table(
      (
        "Group",
        "Rows seen",
        "Effective rank",
        "Participation",
        "Decay",
        "First, %",
        "First ten, %",
        "Variance",
      ),
      rows,
      f"Of {page.number(one.get('used'))} rows each. Effective rank: exp of "
      "the entropy of the eigenvalues. Participation: the square of their "
      "sum over the sum of their squares. Decay: slope of log eigenvalue "
      "over log rank.",
    )
    series = [
      charts.Series(
        str(g.get("name")),
        [(i + 1, v) for i, v in enumerate(items(g.get("curve")))],
        i,
      )
      for i, g in enumerate(groups[:6])
    ]
    parts.append(
      page.figure(
        charts.lines(
          series,
          f"Variance held by the first directions, {title.lower()}",
          "directions",
          "share of variance, %",
          scale=100,
        ),
        "Share of the variance of a group that its first directions hold.",
      )
    )
    if len(series) > 2:
      parts.append(charts.legend([(s.name, s.colour) for s in series]))
    parts.append(table)
  one = fields(found.get("kept"))
  if one and not one.get("why"):
    parts.append(tag("h3", "Kept rows"))
    inside = one["low"] <= one["kept"] <= one["high"]
    parts.append(
      page.paragraph(
        f"The kept rows take part in {page.number(one['kept'])} directions; "
        f"random subsets of as many rows ({page.number(one['used'])}) in "
        f"{page.number(one['chance'])}, from {page.number(one['low'])} to "
        f"{page.number(one['high'])}: "
        + (
          "no other spread."
          if inside
          else "they are spread wider."
          if one["kept"] > one["high"]
          else "they are spread less."
        )
      )
    )
  return page.join(parts)


def render(card: dict[str, Any], rows: dict[str, Any]) -> str:
  """The page of a selection.

  Args:
    card: as `select.card.examine` returns it.
    rows: the table that it returns beside it.

  Returns:
    A whole HTML document that needs no other file; text is cut so that the
    rows hold TEXTS characters in all.
  """
  data = payload(card, rows)
  notes = [
    page.plain(n) for n in items(fields(card.get("diagnostics")).get("notes"))
  ]
  warned = [
    page.plain(n) for n in items(fields(card.get("mixture")).get("warnings"))
  ]
  warned += [
    n.removeprefix("warning: ") for n in notes if n.startswith("warning")
  ]
  notes = [n for n in notes if not n.startswith("warning")]
  seen = fields(card.get("geometry"))
  copies = fields(fields(seen.get("near_duplicates")).get("kept"))
  top = [
    page.figures(
      [
        (
          page.number(card["selected"]),
          "rows kept",
          f"of {page.number(card['pool'])}, {page.percent(card['share'])}",
        ),
        (page.plain(card.get("sampler") or page.MISSING), "sampler", None),
        (page.number(card.get("cut")), "lowest kept score", None),
        (
          page.percent(copies.get("value")),
          "kept rows with a near-duplicate",
          None,
        ),
      ]
    )
  ]
  if warned:
    top.append(page.callout("warning", "To be careful about", warned))
  if notes:
    top.append(page.callout("note", "What the sampler says", notes))
  sections = [
    ("rows", "Rows", _rows(card, data)),
    ("shifts", "What shifted", shifts(card)),
    ("neighbours", "Neighbours", neighbours(card)),
    ("agreement", "Agreement", agreement(card)),
    ("spectra", "Spectra", spectra(card)),
  ]
  if lines := page.lines_of(card.get("reading")):
    sections.append(
      (
        "reading",
        "How the rows were read",
        page.text_box("As the log had it", lines, limit=8000),
      )
    )
  document = page.document(
    f"Selection: {page.plain(card.get('sampler') or 'a sampler')}, "
    f"{page.number(card['selected'])} of {page.number(card['pool'])} rows",
    sections,
    lede=card.get("about") or None,
    top=page.join(top),
    byline=[f"{page.number(len(data['id']))} rows on this page"],
    style=_file("select.css"),
    script=_file("select.js"),
    data=data,
  )
  size = len(document.encode())
  return str(document).replace(
    "rows on this page</p>",
    f"rows on this page · {page.number(size / 1e6)} MB</p>",
    1,
  )
