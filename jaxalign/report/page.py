"""Markup that escapes by default, numbers as text, and the page's skeleton."""

import base64
from collections.abc import Iterable, Sequence
import hashlib
import html
import json
import math
from typing import Any
import urllib.parse

MISSING = "–"  # a value that was never measured
NO_BREAK = "\u00a0"
_VOID = {"meta", "br", "input"}


class Html(str):
  """Markup that is safe as it stands; only this module and charts make it.

  Adding two gives a plain `str`, which is escaped again where it is used: a
  mistake shows as visible tags, never as live ones. Use `join`.
  """

  __slots__ = ()


def _visible() -> dict[int, str]:
  """What stands in for characters that hide, reorder or break text."""
  table = {i: chr(0x2400 + i) for i in range(32) if i not in (9, 10)}
  table[0x7F] = "\u2421"
  table.update({i: "\ufffd" for i in range(0x80, 0xA0)})
  table.update({i: "\ufffd" for i in range(0xD800, 0xE000)})
  for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A)):
    table[i] = f"[U+{i:04X}]"  # bidi controls: they can disguise what is read
  return table


_VISIBLE = _visible()


def plain(value: Any) -> str:
  """`value` as text in which control characters are seen, not obeyed.

  Also what makes a name from data safe to print on a terminal, and a lone
  surrogate safe to encode.
  """
  if value is None:
    return MISSING
  return str(value).replace("\r\n", "\n").translate(_VISIBLE)


def esc(value: Any) -> Html:
  """Any value as safe markup; `Html` passes, everything else is escaped."""
  if isinstance(value, Html):
    return value
  return Html(html.escape(plain(value), quote=True))


def join(parts: Iterable[Any], between: Any = Html("")) -> Html:
  """The parts, each through `esc`, with `between` between them."""
  return Html(esc(between).join(esc(p) for p in parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
  """One element: children through `esc`, attribute values always escaped.

  `class_="x"` writes class, `aria_label` aria-label; an attribute that is
  None is left out. Names come from code, never from data.
  """
  found = "".join(
    f" {key.rstrip('_').replace('_', '-')}="
    f'"{html.escape(plain(value), quote=True)}"'
    for key, value in attributes.items()
    if value is not None
  )
  if name in _VOID:
    return Html(f"<{name}{found}>")
  return Html(f"<{name}{found}>{join(children)}</{name}>")


# Numbers as text.


def finite(value: Any) -> float | None:
  """`value` as a float, or None where it is no finite number."""
  if value is None or isinstance(value, (bool, str, bytes)):
    return None
  try:
    found = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return found if math.isfinite(found) else None


def _odd(value: Any) -> str:
  """The text of a value that is no finite number."""
  if isinstance(value, float):
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
  return plain(value)


def _minus(text: str) -> str:
  return text.replace("-", "−")


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
  """A count with thousands marked, or a float to `digits` significant."""
  x = finite(value)
  if x is None:
    return _odd(value)
  plus = "+" if sign and x > 0 else ""
  if isinstance(value, int) or (x == int(x) and abs(x) >= 100):
    return plus + _minus(f"{int(value):,}")
  if abs(x) >= 10**digits:
    return plus + _minus(f"{x:,.0f}")
  if x and abs(x) < 1e-4:
    mantissa, _, power = f"{x:.{digits - 1}e}".partition("e")
    return plus + _minus(f"{mantissa}e{int(power)}")
  if x == 0:
    return "0"
  x = float(f"{x:.{digits - 1}e}")  # 0.9999 has become 1: one place fewer
  places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
  return plus + _minus(f"{x:.{places}f}")


def percent(value: Any, sign: bool = False, unit: str = "%") -> str:
  """A share as a percentage with one decimal; `unit` "" leaves the sign off."""
  x = finite(value)
  if x is None:
    return _odd(value)
  text = f"{100 * x:.1f}"
  text = "0.0" if text == "-0.0" else text
  plus = "+" if sign and x > 0 else ""
  return plus + _minus(text) + (NO_BREAK + unit if unit else "")


PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def prefix(value: Any) -> tuple[float, str]:
  """(divisor, SI prefix) that bring a magnitude between 1 and 1000."""
  x = abs(finite(value) or 0.0)
  power = 0
  # 999.5 already reads as 1,000 with three digits.
  while x >= 999.5 and power < len(PREFIXES) - 1:
    x, power = x / 1000, power + 1
  return 1000.0**power, PREFIXES[power]


def engineering(value: Any, unit: str = "FLOP") -> str:
  """3.4e15 as "3.40 PFLOP"."""
  x = finite(value)
  if x is None:
    return _odd(value)
  divisor, letter = prefix(x)
  text = number(x / divisor) if divisor > 1 else number(value)
  return f"{text}{NO_BREAK}{letter}{unit}"


# Blocks.


def paragraph(*children: Any, kind: str | None = None) -> Html:
  """A paragraph; `kind` is one of the classes in the style sheet."""
  return tag("p", *children, class_=kind)


def absent(what: str) -> Html:
  """The plain sentence that stands where something was not measured."""
  return paragraph(f"{what} not measured in this job.", kind="absent")


def callout(kind: str, title: Any, items: Sequence[Any]) -> Html:
  """A framed list; `kind` is "warning", "verdict" or "note"."""
  return tag(
    "div",
    paragraph(title, kind="callout-title"),
    tag("ul", *(tag("li", i) for i in items)),
    class_=f"callout {kind}",
    role="note",
  )


def figures(items: Sequence[tuple[Any, Any, Any]]) -> Html:
  """Key figures in a row: (value, what it is, a small remark or None)."""
  return tag(
    "dl",
    *(
      tag(
        "div",
        tag("dt", label),
        tag("dd", value),
        *([tag("dd", remark, class_="remark")] if remark else []),
      )
      for value, label, remark in items
    ),
    class_="figures",
  )


def table(
  head: Sequence[Any],
  rows: Sequence[Sequence[Any]],
  caption: str,
  text: Sequence[int] = (),
) -> Html:
  """A table in a container of its own that scrolls sideways.

  Args:
    head: the column heads.
    rows: cells; the first of a row is its head.
    caption: said above the table, and the name of the scrolling region.
    text: the columns, besides the first, that hold words and not numbers.
  """
  left = {0, *text}

  def side(i):
    return None if i in left else "n"

  # The caption stands outside: it must not scroll away with the columns.
  return join(
    [
      paragraph(caption, kind="caption"),
      tag(
        "div",
        tag(
          "table",
          tag(
            "thead",
            tag(
              "tr",
              *(
                tag("th", h, scope="col", class_=side(i))
                for i, h in enumerate(head)
              ),
            ),
          ),
          tag(
            "tbody",
            *(
              tag(
                "tr",
                *(
                  tag("th", cell, scope="row")
                  if i == 0
                  else tag("td", cell, class_=side(i))
                  for i, cell in enumerate(row)
                ),
              )
              for row in rows
            ),
          ),
          aria_label=caption,
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
      ),
    ]
  )


def facts(items: Sequence[tuple[Any, Any]]) -> Html:
  """A list of (name, value), for a card."""
  return tag(
    "dl",
    *(tag("div", tag("dt", name), tag("dd", value)) for name, value in items),
    class_="facts",
  )


def lines_of(found: Any) -> str:
  """A list of lines as one text; "" where it is none."""
  return (
    "\n".join(x for x in found if isinstance(x, str))
    if isinstance(found, (list, tuple))
    else ""
  )


def text_box(label: Any, text: Any, kind: str = "", limit: int = 1500) -> Html:
  """Text from data, line breaks kept, cut at `limit` characters."""
  if text is None:
    body = tag("p", "not recorded", class_="absent")
  else:
    words = plain(text).strip("\n")
    cut = len(words) - limit
    shown = words if cut <= 0 else words[:limit]
    body = tag("pre", shown, tabindex="0", dir="auto", aria_label=plain(label))
    if cut > 0:
      body = join(
        [
          body,
          tag("p", f"{cut:,} more characters are not shown.", class_="cut"),
        ]
      )
  return tag(
    "div",
    tag("p", label, class_="box-label"),
    body,
    class_=f"box {kind}".strip(),
  )


def figure(chart: Html, caption: Any) -> Html:
  """A chart and its caption."""
  # The container is the chart's own: one around the caption as well would
  # keep the figure counter inside it.
  return tag(
    "figure", tag("div", chart, class_="fit"), tag("figcaption", caption)
  )


def grid(*children: Any) -> Html:
  """Blocks side by side where there is room for two."""
  return tag("div", *children, class_="grid")


def link(label: Any, path: Any) -> Html:
  """A link to a file beside the page; any other address stays text."""
  address = plain(path)
  parts = address.split("/")
  beside = (
    address
    and not address.startswith("/")
    and ".." not in parts
    and "\\" not in address
    and ":" not in address
  )
  shown = tag("code", address)
  if beside:
    shown = tag("a", shown, href=urllib.parse.quote(address))
  return join([label, Html(" "), shown])


def data_block(anchor: str, value: Any) -> Html:
  """JSON in an element that never runs; `anchor` is its id, from code.

  Whatever could end the element or begin another is written as an escape.
  """
  text = json.dumps(
    value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
  )
  for raw in "<>&\u2028\u2029":
    text = text.replace(raw, f"\\u{ord(raw):04x}")
  return Html(f'<script type="application/json" id="{anchor}">{text}</script>')


def section(anchor: str, title: str, *children: Any) -> Html:
  """A numbered section; `anchor` comes from code."""
  return tag("section", tag("h2", title), *children, id=anchor)


def document(
  title: Any,
  sections: Sequence[tuple[str, str, Html]],
  lede: Any = None,
  byline: Sequence[Any] = (),
  top: Any = Html(""),
  style: str = "",
  script: str = "",
  data: Any = None,
) -> Html:
  """The whole page.

  Args:
    title: of the page.
    sections: (anchor, title, content) in order.
    lede: one sentence under the title.
    byline: small facts under the lede.
    top: what stands before the first section.
    style: CSS after the page's own, from code.
    script: JavaScript from code; the policy of the page lets this text run
      and no other. It stands at the end of the body.
    data: what the script reads, see `data_block`.
  """
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  scripts = []
  if script:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest())
    policy += f"; script-src 'sha256-{digest.decode()}'"
    scripts = [data_block("data", data), Html(f"<script>{script}</script>")]
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag("meta", http_equiv="Content-Security-Policy", content=policy),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("meta", name="color-scheme", content="light dark"),
    tag("meta", name="referrer", content="no-referrer"),
    tag("title", title),
    tag("style", Html(STYLE + style)),
  )
  nav = tag(
    "nav",
    *(tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections),
    aria_label="Sections",
  )
  header = tag(
    "header",
    tag("h1", title),
    *([paragraph(lede, kind="lede")] if lede else []),
    *([paragraph(join(byline, Html(" · ")), kind="byline")] if byline else []),
  )
  body = tag(
    "body",
    header,
    top,
    nav if len(sections) > 1 else "",
    tag("main", *(section(a, t, c) for a, t, c in sections)),
    *scripts,
  )
  return Html("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n")


STYLE = """
:root{--bg:#fcfcfa;--ink:#1a1d21;--muted:#575e68;--rule:#d8dbdf;
--panel:#f3f4f3;--accent:#0a5a9c;--warn:#9a4a00;--warn-bg:#fff3e0;
--c0:#00619c;--c1:#b23c00;--c2:#009e73;--c3:#b5588f;--c4:#b38a00;
--c5:#4499d8;--c6:#4b4f55;--cm:#6b727c;--rest:#9aa1aa}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171a;
--ink:#e8eaec;--muted:#a7aeb7;--rule:#363c43;--panel:#1d2125;
--accent:#79bdf7;--warn:#f2b05e;--warn-bg:#2f2413;
--c0:#4aa8e8;--c1:#ff7f3f;--c2:#2cc79b;--c3:#e59ac6;--c4:#f5d565;
--c5:#9ad6ff;--c6:#d3d7dc;--cm:#98a0aa;--rest:#6c747e}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:62rem;padding:2.5rem 1.25rem 4rem;
background:var(--bg);color:var(--ink);counter-reset:s f t;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",
Arial,sans-serif;overflow-wrap:break-word;font-variant-numeric:tabular-nums}
h1,h2,h3{font-family:"Iowan Old Style","Palatino Linotype",Palatino,Georgia,
"Liberation Serif",serif;line-height:1.2;font-weight:600;
text-wrap:balance}
h1{font-size:clamp(1.65rem,1.2rem + 2vw,2.4rem);margin:0 0 .6rem}
h2{font-size:1.5rem;margin:0 0 1rem;counter-increment:s}
h2::before{content:counter(s) "\\2002";color:var(--muted)}
h3{font-size:1.15rem;margin:2rem 0 .6rem}
p,li{max-width:46rem}
p{margin:.5rem 0}
a{color:var(--accent);text-underline-offset:.15em}
a:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--accent);
outline-offset:2px}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,
"Liberation Mono",monospace;font-size:.86em}
header{border-bottom:1px solid var(--rule);padding-bottom:1rem;
margin-bottom:1.5rem}
.lede{font-size:1.15rem;margin:.2rem 0 .6rem}
.byline,figcaption,.absent,.cut,.remark{color:var(--muted)}
.byline{font-size:.86rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.9rem;
padding:.75rem 0;border-block:1px solid var(--rule);margin:1.75rem 0 0}
section{margin-top:3rem}
.absent{font-style:italic}
.callout{border-left:4px solid var(--accent);background:var(--panel);
padding:.8rem 1.1rem;margin:1.1rem 0;border-radius:0 6px 6px 0}
.callout-title{font-weight:650;margin:0 0 .3rem}
.callout ul{margin:0;padding-left:1.15rem}
.callout li{margin:.25rem 0}
.callout.warning{border-color:var(--warn);background:var(--warn-bg)}
.callout.warning .callout-title{color:var(--warn)}
.verdict{font-size:1.08rem}
.figures{display:grid;gap:0 1.5rem;margin:1.6rem 0 0;padding:.35rem 0;
grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr))}
.figures div{padding:.45rem 0;display:flex;
flex-direction:column}
.figures dt{order:2;font-size:.84rem;color:var(--muted);line-height:1.35}
.figures dd{margin:0;font-size:1.55rem;font-weight:600;line-height:1.25;
letter-spacing:-.01em}
.figures .remark{order:3;font-size:.78rem;font-weight:400;letter-spacing:0}
.facts{margin:.8rem 0;columns:2;column-gap:2.5rem}
.facts div{display:flex;justify-content:space-between;gap:1rem;
padding:.32rem 0;border-bottom:1px solid var(--rule);break-inside:avoid}
.facts dt{color:var(--muted)}
.facts dd{margin:0;text-align:right;max-width:66%;overflow-wrap:break-word}
.scroll{overflow-x:auto;margin:.5rem 0 1.4rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
.caption{color:var(--muted);font-size:.88rem;margin:1.4rem 0 0;
break-after:avoid}
.caption::before{counter-increment:t;content:"Table " counter(t) ". ";
color:var(--ink);font-weight:600}
thead th{border-block:1.5px solid var(--ink);vertical-align:bottom;
font-weight:600;line-height:1.25}
tbody tr:last-child>*{border-bottom:1.5px solid var(--ink)}
th,td{padding:.42rem .7rem .42rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
tbody th{font-weight:500;min-width:6.5rem}
tr>:first-child{position:sticky;left:0;background:var(--bg)}
.n{text-align:right;padding:.42rem 0 .42rem .9rem;white-space:nowrap}
thead .n{white-space:normal}
.n+:not(.n){padding-left:1.6rem}
td small{display:block;color:var(--muted);font-size:.82em}
.minus{color:var(--warn);font-weight:650}
.grid{display:grid;gap:1.4rem 2.4rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.grid>*{min-width:0}
figure{margin:1.2rem 0;break-inside:avoid}
.fit{container-type:inline-size}
.grid figure{margin:0}
figcaption{font-size:.86rem;line-height:1.45;margin-top:.35rem;
max-width:46rem}
figcaption::before{counter-increment:f;content:"Figure " counter(f) ". ";
color:var(--ink);font-weight:600}
details{margin:1rem 0}
summary{cursor:pointer;color:var(--accent)}
details h3{margin-top:1rem}
.example{border-top:1px solid var(--rule);padding:1rem 0 .4rem}
.example>p{margin:0 0 .5rem}
.example .grid{row-gap:.2rem}
.box{min-width:0;margin:.2rem 0 .6rem}
.box-label{font-size:.82rem;color:var(--muted);margin:0 0 .2rem}
.box pre,pre.command{margin:0;padding:.6rem .75rem;background:var(--panel);
border-left:3px solid var(--rule);white-space:pre-wrap;
overflow-wrap:anywhere;line-height:1.45;border-radius:0 4px 4px 0}
.box pre{max-height:13rem;overflow:auto;font-family:inherit;font-size:.9rem}
.box.yes pre{border-color:var(--c0)}
.box.no pre{border-color:var(--c1)}
.cut{font-size:.8rem;margin:.15rem 0}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;
padding:0;margin:.6rem 0 1rem;font-size:.88rem}
.key li{display:flex;align-items:center;gap:.45rem}
.key svg{flex:none}
svg.chart{display:block;width:100%;overflow:visible;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,
sans-serif;font-variant-numeric:tabular-nums}
svg text{fill:var(--ink)}
svg .dim{fill:var(--muted)}
svg .rule{stroke:var(--rule);stroke-width:1}
svg .base{stroke:var(--muted);stroke-width:1}
svg .ref{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:4 3}
svg .mark{stroke:var(--s);stroke-width:2.4;stroke-linecap:round}
svg .dot{fill:var(--s);stroke:var(--bg);stroke-width:1.5}
svg .curve{fill:none;stroke:var(--s);stroke-width:1.8;stroke-linejoin:round}
svg .curve.d1{stroke-dasharray:7 3}
svg .curve.d2{stroke-dasharray:2 2.5}
svg .curve.d3{stroke-dasharray:9 3 2 3}
svg .band{fill:var(--s);fill-opacity:.16;stroke:none}
svg .bar{fill:var(--s);stroke:var(--bg);stroke-width:1.5}
svg .rest{fill:var(--rest);fill-opacity:.55}
svg .picked{fill:var(--c0);fill-opacity:.35;stroke:var(--c0);
stroke-width:1.4}
svg .halo{paint-order:stroke;stroke:var(--bg);stroke-width:4px;
stroke-linejoin:round}
.c0{--s:var(--c0)}.c1{--s:var(--c1)}.c2{--s:var(--c2)}.c3{--s:var(--c3)}
.c4{--s:var(--c4)}.c5{--s:var(--c5)}.c6{--s:var(--c6)}.cm{--s:var(--cm)}
/* Rows carry their words beside the marks where there is room, above them
where there is not: the words keep their size on a phone. */
svg .veil{display:none;fill:var(--bg)}
svg.rows{padding:22px 172px 46px 172px}
svg.rows .who{text-anchor:end;transform:translate(-14px,4px)}
svg.rows .what{text-anchor:start;transform:translate(14px,4px)}
@container (max-width:36rem){
svg .veil{display:inline}
svg.rows{padding:26px 12px 46px 12px}
svg.rows .who{text-anchor:start;transform:translate(-10px,-11px)}
svg.rows .what{text-anchor:end;transform:translate(10px,-11px)}}
svg.plot{padding:30px 14px 42px 48px}
svg.plot.named{padding-right:112px}
@container (max-width:25rem){svg.plot.named{padding-right:14px}
svg.plot .direct{display:none}}
@media (max-width:40rem){body{padding:1.4rem 1rem 3rem}
.facts{columns:1}h2{font-size:1.35rem}section{margin-top:2.4rem}
.figures{grid-template-columns:repeat(2,1fr)}
.figures dd{font-size:1.3rem}.figures .remark{font-size:.78rem}}
@media print{details::details-content{content-visibility:visible;
display:block}body{max-width:none;padding:0;font-size:10.5pt}
nav{display:none}.scroll{overflow:visible}.box pre{max-height:none}
section{margin-top:1.6rem}h2,h3{break-after:avoid}
tr,.callout,.example{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
