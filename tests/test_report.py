"""Pages and charts: nothing from data becomes markup, nothing is missing."""

import contextlib
import copy
import html.parser
import math
import re

import jinja2
import pytest

from jaxalign.report import charts, nodes, page, study_page, terminal
from jaxalign.report.nodes import Node

PAYLOADS = [
  "<script>alert(1)</script>",
  "<ScRiPt>alert(1)</sCrIpT>",
  "<img src=x onerror=alert(1)>",
  "<svg onload=alert(1)>",
  "<svg><script>alert(1)</script></svg>",
  "<body onload=alert(1)>",
  '"><script>alert(1)</script>',
  "'><script>alert(1)</script>",
  '" onmouseover="alert(1)',
  "' onfocus='alert(1)' autofocus='",
  "</title><script>alert(1)</script>",
  "</style><script>alert(1)</script>",
  "</pre><iframe src=javascript:alert(1)>",
  "</desc></svg><script>1</script>",
  "</textarea><script>alert(1)</script>",
  "<!--><script>alert(1)</script>",
  "--><img src=x onerror=alert(1)>",
  "<![CDATA[<script>alert(1)</script>]]>",
  "<?xml version=1?><script>alert(1)</script>",
  "<iframe srcdoc='<b>x</b>'>",
  "<object data=javascript:alert(1)>",
  "<embed src=//evil.example/x.swf>",
  "<a href=javascript:alert(1)>x</a>",
  "<a href='data:text/html,<b>x'>y</a>",
  "<form action=//evil.example><input name=x>",
  "<base href=//evil.example/>",
  "<link rel=stylesheet href=//evil.example/x.css>",
  "<meta http-equiv=refresh content='0;url=//evil.example'>",
  "<style>*{background:url(//evil.example)}</style>",
  "<math><mtext><mglyph><style><img src=x onerror=1>",
  "<details open ontoggle=alert(1)>",
  "<video><source onerror=alert(1)>",
  "<svg><animate onbegin=alert(1) attributeName=x>",
  "<svg><foreignObject><b onclick=1>x</b></foreignObject></svg>",
  "<template><script>alert(1)</script></template>",
  "&lt;script&gt;alert(1)&lt;/script&gt;",
  "&#60;script&#62;alert(1)",
  "`${alert(1)}`",
  "javascript:alert(1)",
  "<scr\x00ipt>alert(1)</script>",
  "\u202e<script>\u202c",
  "<img src=x \x0conerror=alert(1)>\ud800",
]

ELEMENTS = frozenset(
  "html head meta title style body header main nav section h1 h2 h3 p a ul "
  "li dl dt dd div span small code pre table thead tbody tr th td "
  "figure figcaption details summary svg g line rect circle text polyline "
  "polygon desc".split()
)
ATTRIBUTES = frozenset(
  "lang charset http-equiv content name class id href role tabindex dir "
  "scope style aria-label aria-hidden x y x1 x2 y1 y2 cx cy r width height "
  "points viewbox preserveaspectratio vector-effect text-anchor "
  "overflow".split()
)


class Reader(html.parser.HTMLParser):
  """Checks every element, attribute and closing tag; keeps the text."""

  elements, attributes = ELEMENTS, ATTRIBUTES

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.open, self.text, self.seen, self.svgs = [], [], [], []
    self.scripts = []

  def handle_starttag(self, tag, attrs):
    assert tag in self.elements, tag
    names = [name for name, _ in attrs]
    assert len(set(names)) == len(names), (tag, names)
    for name, value in attrs:
      assert name in self.attributes, (tag, name)
      if name == "href":
        assert re.fullmatch(r"#[a-z]+|[\w%./~-]+", value), value
        assert not value.startswith("/")
      if name == "style":
        assert re.fullmatch(r"height:\d+px", value), value
    self.seen.append((tag, dict(attrs)))
    if tag not in ("meta", "br", "input"):
      self.open.append(tag)
    if tag == "svg" and dict(attrs).get("role") == "img":
      self.svgs.append([dict(attrs), set()])
    if self.svgs and tag in ("title", "desc"):
      self.svgs[-1][1].add(tag)

  def handle_startendtag(self, tag, attrs):
    raise AssertionError(f"self-closing {tag}")

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag

  def handle_data(self, data):
    kind = self.open[-1] if self.open else ""
    if kind != "style":
      (self.scripts if kind == "script" else self.text).append(data)

  def handle_comment(self, data):
    raise AssertionError(f"comment {data!r}")

  def handle_pi(self, data):
    raise AssertionError(f"instruction {data!r}")

  def unknown_decl(self, data):
    raise AssertionError(f"declaration {data!r}")


def read(document, reader=None):
  """Parses a page, checks that it is whole and closed, returns the reader."""
  reader = reader or Reader()
  document.encode("utf-8")
  reader.feed(document)
  reader.close()
  assert not reader.open, reader.open
  ids = [a["id"] for _, a in reader.seen if "id" in a]
  assert len(ids) == len(set(ids))
  for attributes, inside in reader.svgs:
    assert attributes["aria-label"] and inside == {"title", "desc"}
  for _, attributes in reader.seen:
    if attributes.get("href", "").startswith("#"):
      assert attributes["href"][1:] in ids
  return reader


def interval(value, width=0.02, **more):
  ends = dict(low=value - width, high=value + width)
  return dict(value=value, n=1000, **ends, **more)


def make_arm(name, sampler, win, seed=0, is_all=False):
  texts = dict(prompt="a prompt", chosen="a chosen", rejected="a rejected")
  mixture = dict(components=2, covariance="full", pca=64, auc=0.54, nmi=0.03)
  mixture |= dict(in_fit=-143.2, held_out=-151.9, label_accuracy=0.51)
  mixture["warnings"] = ["a mixture warning"]
  metrics = dict(win_vs_target=interval(win), malformed=interval(0.02, 0.01))
  metrics |= dict(accuracy=interval(0.7, ties=0.03), kl=interval(2.3, 0.2))
  histogram = dict(edges=[0.0, 0.5, 1.0], selected=[1, 9], rest=[70, 20])
  return dict(
    name=name,
    sampler=sampler,
    budget=1.0 if is_all else 0.1,
    seed=seed,
    rows=8000 if is_all else 800,
    updates=90,
    is_all=is_all,
    metrics=metrics,
    curves={
      "train/loss": [[s, 0.69 / (1 + s)] for s in range(1, 4)],
      "rewards/accuracies": [[s, 0.6] for s in range(1, 4)],
    },
    selection=dict(
      length=dict(selected=[9, 40, 90], rest=[5, 30, 80]),
      topics=dict(selected=57, pool=64),
      score_histogram=histogram,
      stability=dict(jaccard=[0.91, 0.89], mean=0.9),
      mixture=mixture,
      examples_top=[dict(id="row-1", score=0.36, **texts)],
      examples_bottom=[dict(id="row-2", score=0.01, **texts)],
    ),
    saved=dict(with_sft=0.4, without_sft=0.8),
  )


def make_summary():
  """A summary with every field filled."""
  stage = lambda stage, arm, flops, seconds: dict(
    stage=stage, arm=arm, flops=flops, tokens=2e5, seconds=seconds, bytes=4e8
  )
  gap = dict(metric="win_vs_target", difference=interval(-0.004))
  lengths = dict(prompt=[1, 2, 3], response=[4, 5, 6])
  mesh, again = dict(fsdp=4, tensor=2), copy.deepcopy(lengths)
  whole = make_arm("all", "all", 0.641, is_all=True)
  return dict(
    title="A tenth against all",
    command="python -m jaxalign.study --x=1",
    created="2025-06-11",
    version="0.1.0",
    question="Is a tenth enough?",
    verdicts=["A tenth is enough."],
    warnings=["One seed only."],
    machine=dict(platform="cpu", devices=8, mesh=mesh, jax="0.10.2"),
    data=dict(
      source="world",
      schema="pairs",
      kind="pairs",
      seen=12034,
      rows=dict(sft=2000, pool=8000, held_out=1000),
      refused={"empty response": 12},
      duplicates=3,
      chars=lengths,
      tokens=again,
      truncation=dict(rows_cut=3, too_long=29, context=64, fits=90),
      examples=[dict(prompt="p", chosen="c", rejected="r")],
    ),
    baseline=dict(name="SFT model", win_vs_target=interval(0.48)),
    arms=[make_arm("isa", "isa", 0.637), whole],
    comparisons=[dict(a="isa", b="all", words="no difference", **gap)],
    ledger=dict(
      stages=[
        stage("sft", None, 4.2e15, 612),
        stage("train", "isa", 9e14, 71),
        stage("train", "all", 9e14, 71),
      ],
      selection_share=0.083,
      saved=[dict(arm="isa", against="all", with_sft=0.4, without_sft=0.8)],
    ),
    samples=[
      dict(prompt="q", target="t", sft="s", arms={"isa": "an answer"})
      | dict(rewards={"target": 1.2, "isa": 0.7})
    ],
    files={"Summary": "summary.json"},
  )


@pytest.fixture
def summary():
  return make_summary()


def shown(summary):
  """What a reader of the page sees."""
  return text_of(study_page.study_html(summary))


def text_of(document):
  return "".join(read(document).text).replace("\u00a0", " ")


def whole(summary):
  """Renders a page and a text that must hold together."""
  read(study_page.study_html(summary))
  assert terminal.study_text(summary)


def poisoned(value, payload):
  """`value` with every string replaced."""
  if isinstance(value, dict):
    return {k: poisoned(v, payload) for k, v in value.items()}
  if isinstance(value, list):
    return [poisoned(v, payload) for v in value]
  return payload if isinstance(value, str) else value


def paths(value, path=()):
  """Where the leaves of a nested structure are."""
  if not isinstance(value, (dict, list)):
    yield path
    return
  for key in value if isinstance(value, dict) else range(len(value)):
    yield from paths(value[key], (*path, key))


def put(value, path, new):
  """A copy of `value` with `new` at `path`."""
  value = inner = copy.deepcopy(value)
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = new
  return value


@contextlib.contextmanager
def missing_keys():
  """The keys that pages read of objects that lack them: a misspelt one shows
  as a dash, which no other test would notice."""
  missing, get = set(), Node.__getitem__

  def noted(node, key):
    found = nodes.raw(node)
    if isinstance(found, dict) and key not in found:
      missing.add(str(key))
    return get(node, key)

  Node.__getitem__ = noted
  try:
    yield missing
  finally:
    Node.__getitem__ = get


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_stays_text(summary, payload):
  evil = poisoned(summary, payload)
  evil["data"] |= dict(refused={payload: 3}, chars={payload: [1, 2, 3]})
  addresses = ("javascript:alert(1)", "//evil.example/x", "../up", "http://x")
  evil["files"] = {payload: payload} | dict(zip("bcde", addresses))
  evil["samples"][0] |= dict.fromkeys(("arms", "rewards"), {payload: payload})
  evil["machine"] = {"mesh": {payload: payload}, "devices": payload}
  arm = evil["arms"][0]
  arm["curves"][payload] = [[1, 2], [2, payload]]
  arm["metrics"][payload] = dict.fromkeys(interval(0), payload)
  for document in (study_page.study_html(evil), study_page.arm_html(arm)):
    reader = read(document)
    assert nodes.visible(payload) in "\n".join(reader.text)
    # An attribute holds it whole, too, where one does.
    assert "onerror" not in {n for _, a in reader.seen for n in a}
  text = terminal.study_text(evil)
  assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_each_field_alone_may_be_a_payload(summary):
  for path in paths(summary):
    whole(put(summary, path, "\"'><script>alert(1)</script>"))


def test_free_text_is_all_there(summary):
  """Every text of the summary is found on the page, as text."""
  wanted, marked = [], summary
  # These say what is looked up.
  keys = ("metric", "covariance", "sampler", "stage")
  for i, path in enumerate(paths(summary)):
    inner = marked
    for key in path:
      inner = inner[key]
    if isinstance(inner, str) and path[-1] not in keys:
      wanted.append(f"<mark {i}> & text")
      marked = put(marked, path, wanted[-1])
  text = "\n".join(read(study_page.study_html(marked)).text)
  assert len(wanted) > 30
  assert [w for w in wanted if w not in text] == []


ODD = [None, math.nan, math.inf, -math.inf, "x", [], {}, [None]]
ODD += [10**400, 1e308, True, -5]


@pytest.mark.parametrize("odd", range(len(ODD)))
def test_leaves_may_be_odd(summary, odd):
  """All at once, then every twelfth alone; the twelve tests reach each."""
  changed = summary
  for i, path in enumerate(paths(summary)):
    changed = put(changed, path, ODD[odd])
    if i % len(ODD) == odd:
      for new in (ODD[odd], ODD[odd - 5]):
        whole(put(summary, path, new))
  whole(changed)


def test_any_part_may_be_absent(summary):
  inner = {path[:i] for path in paths(summary) for i in range(1, len(path))}
  for path in inner:
    for new in (None, "x"):
      read(study_page.study_html(put(summary, path, new)))
  for key in summary:
    whole({k: v for k, v in summary.items() if k != key})


@pytest.mark.parametrize(
  "nothing",
  [{}, {"arms": []}, {"arms": None}, {"arms": [{}]}, {"arms": [None]}, None],
)
def test_what_was_not_measured_is_reported(nothing):
  assert shown(nothing).count("not measured in this job") >= 8
  whole(nothing)
  read(study_page.arm_html({}))


def test_nothing_is_loaded(summary):
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  loads = (" src=", "url(", "@import", "<script", "<link", "<img", "<iframe")
  loads += ("http://", "https://", "javascript:")
  arm = study_page.arm_html(summary["arms"][0])
  for document in (study_page.study_html(summary), arm):
    lower = document.lower()
    assert not [words for words in loads if words in lower]
    seen = [a for _, a in read(document).seen if "http-equiv" in a]
    assert [a["content"] for a in seen] == [policy]


SHOWN = """A tenth is enough.|63.7 [61.7, 65.7]|−0.4 [−2.4, +1.6]|8.3 %|row-1
6.00 PFLOP|10m12s|57 of the pool's 64 topics|a mixture warning
python -m jaxalign.study --x=1"""


def test_page_shows_what_was_measured(summary):
  text = shown(summary)
  missing = [words for words in re.split("[|\n]", SHOWN) if words not in text]
  assert not missing and "Selecting cost more" not in text


@pytest.mark.parametrize("where", ["ledger", "arms"])
def test_a_negative_saving_is_a_warning(summary, where):
  if where == "ledger":
    summary["ledger"]["saved"][0]["with_sft"] = -0.124
  else:
    summary["ledger"] = None
    summary["arms"][0]["saved"]["with_sft"] = -0.124
  document = study_page.study_html(summary).replace("\u00a0", " ")
  words = ('class="callout warning"', '<span class="minus">−12.4 %</span>')
  words += ("Selecting cost more than it saved", "−12.4 % saved")
  assert [w for w in words if w not in document] == []
  assert "Costs more than it saves" in terminal.study_text(summary)


def test_an_unknown_cost_is_reported(summary):
  summary["ledger"]["stages"][0]["flops"] = math.nan
  text = shown(summary)
  assert "FLOPs of 1 stage were not measured" in text
  assert "≥ 1.80 PFLOP" in text


def test_seeds_of_a_sampler_share_a_colour(summary):
  summary["arms"] = [
    make_arm(f"{s}-{i}", s, 0.6, i) for s in ("isa", "random") for i in range(3)
  ]
  nodes = list(Node(summary).arms)
  wanted = [("isa", 0)] * 3 + [("random", 1)] * 3
  assert study_page.styles(nodes) == wanted
  read(study_page.study_html(summary))
  for arm in summary["arms"][3:]:
    arm |= dict(sampler="isa", budget=0.05)
  names = [name for name, _ in study_page.styles(list(Node(summary).arms))]
  assert names == ["isa 10.0\u00a0%"] * 3 + ["isa 5.0\u00a0%"] * 3


@pytest.mark.parametrize("arms", [0, 1, 3, 60])
def test_terminal_fits(summary, arms):
  name = "a long name of an arm " * 3
  summary["arms"] = [make_arm(f"{name}{i}", "isa", 0.6) for i in range(arms)]
  summary["verdicts"] = ["A verdict in many words. " * 30] * 20
  lines = terminal.study_text(summary).split("\n")
  assert len(lines) <= 25
  assert max(map(len, lines)) <= 80


def test_only_templates_write_markup():
  draw = page.ENVIRONMENT.from_string('{{ x }}|{{ x ~ "<u>" }}|<p a="{{ x }}">')
  once = "&lt;i&gt;&#34;"
  assert draw.render(x='<i>"') == f'{once}|{once}&lt;u&gt;|<p a="{once}">'
  assert draw.render(x=Node(None)) == '–|–&lt;u&gt;|<p a="–">'
  with pytest.raises(jinja2.UndefinedError):  # a misspelt name
    draw.render(y=1)


def test_a_node_is_nothing_where_nothing_is():
  node = Node({"a": [1, {"b": "x"}], "items": 3})
  assert node.a[1].b == "x" and node["items"] == node.items == 3
  for odd in (node.c, node.a.b, node.a[5], node.a[0].b.c, node["a"]["b"]):
    assert nodes.raw(odd) is None and not odd and list(odd) == []
    assert str(odd) == "–" and len(odd) == 0


def test_numbers_and_units():
  numbers = {"–": None, "0": 0, "12,034": 12034, "−3": -3, "0.0500": 0.05}
  numbers |= {"NaN": math.nan, "∞": math.inf, "2.30e−7": 2.3e-7}
  numbers |= {"123": 123.4, "1,234": 1234.5, "True": True, "<b>": "<b>"}
  for words, value in numbers.items():
    assert nodes.number(value) == words
  units = {
    "63.7 %": nodes.percent(0.6374),
    "0.0 %": nodes.percent(-0.0001),
    "3.40 PFLOP": nodes.engineering(3.4e15),
    "1.00 PFLOP": nodes.engineering(999.9e12),
    "12 B": nodes.engineering(12, "B"),
    "–": nodes.engineering(None),
  }
  for words, text in units.items():
    assert text == words.replace(" ", "\u00a0")


OUTSIDE = ["/etc/passwd", "//x/y", "../x", "a/../../x", "javascript:1", "a\\b"]
OUTSIDE += ["", "java\tscript:1", "http://x"]


def test_only_files_in_the_folder_of_the_page_are_links():
  draw = page.ENVIRONMENT.from_string("{{ m.link('name', address) }}")
  for address in ("arms/isa 0/report.html", "summary.json", *OUTSIDE):
    assert ("<a " in draw.render(address=address)) == (address not in OUTSIDE)


# Charts.


def test_ticks_are_round():
  at = lambda *limits: [mark for mark, _ in charts.ticks(*limits)]
  assert at(0, 10, 5) == [0, 2, 4, 6, 8, 10]
  marks = {round(m, 9): words for m, words in charts.ticks(-0.031, 0.052, 4)}
  assert (marks[0.02], marks[-0.02]) == ("0.02", "−0.02")
  assert 0 in at(-0.031, 0.052, 4)
  assert at(1, 1) == at(math.nan, 1) == []


def attributes(markup, tag):
  return [a for t, a in read(markup).seen if t == tag]


def test_intervals_lie_where_they_should():
  rows = [charts.Row("a", 20, 0, 40), charts.Row("b", 80, 60, 100)]
  chart = page.draw.intervals(rows, "t", "x", reference=50)
  spots = [float(a["cx"][:-1]) for a in attributes(chart, "circle")]
  # The axis runs from -6 to 106.
  assert spots == pytest.approx([100 * 26 / 112, 100 * 86 / 112], abs=0.01)
  dashed = [a for a in attributes(chart, "line") if a["class"] == "ref"]
  assert dashed[0]["x1"] == "50.00%"


def test_nothing_to_draw_is_reported():
  nan, series = math.nan, charts.Series
  for kind, *data in (
    ("intervals", []),
    ("intervals", [charts.Row("a", nan)]),
    ("bars", [], []),
    ("bars", [("a", [nan, 0], "")], ["p", "q"]),
    ("histogram", [], [], []),
    ("histogram", [0, 1], [1, 2], [1]),
    ("histogram", [0, nan], [1], [1]),
    ("lines", []),
    ("lines", [series("a", [])]),
    ("lines", [series("a", [(1, nan)])]),
  ):
    labels = ("t", "x", "y") if kind == "lines" else ("t", "x")
    chart = getattr(page.draw, kind)(*data, *labels)
    assert "no data" in "".join(read(chart).text), (kind, data)


def test_lines_of_hardly_anything():
  several = [[(1, 2)], [(1, 2), (1, 2)], [(0, 5), (1, 5)]]
  several += [[(0, 1e-300), (1, 0)], [(0, 1e300), (1, 1)]]
  several += [[(0, -1e199), (1, 1e199)], [(0, 1), (1, 1 + 1e-16)]]
  for points in several:
    chart = page.draw.lines([charts.Series("a", points)], "t", "x", "y")
    read(chart)
    assert "nan" not in chart and "inf" not in chart.replace("non-finite", "")


def test_lines_keep_a_gap_honest():
  points = [(i, math.nan if i == 3 else i) for i in range(6)]
  banded = charts.Series("a", points, 0, [(0, 0, 1), (5, 4, 6)])
  series = [banded, charts.Series("b", points, 1)]
  chart = page.draw.lines(series, "t", "x", "y", reference=2)
  assert "2 non-finite values left out" in "".join(read(chart).text)
  assert len(attributes(chart, "polygon")) == 1


def test_thin_keeps_the_mean():
  points = [(float(i), float(i % 7)) for i in range(1000)]
  few, k = charts.thin(points, 100)
  assert len(few) == 100 and k == 10
  mean = lambda points: sum(y for _, y in points) / len(points)
  assert mean(few) == pytest.approx(mean(points))


def test_bars_fill_the_scale():
  rows = [("a", [1, 3], "4"), ("b", [2, None], "2")]
  boxes = attributes(page.draw.bars(rows, ["p", "q"], "t", "x"), "rect")
  wide = [a["width"][:-1] for a in boxes if a["class"].startswith("bar")]
  assert [float(w) for w in wide] == pytest.approx([25, 75, 50])


def test_histogram_scales_each_to_its_own():
  chart = page.draw.histogram([0, 1, 2], [0, 5], [10, 30], "t", "x")
  tall = {a["class"]: float(a["height"]) for a in attributes(chart, "rect")}
  # 100 % of the selected, and 75 % of the rest, on an axis to 108 %.
  assert tall["picked"] == pytest.approx(160 / 1.08, abs=0.1)
  assert tall["rest"] == pytest.approx(0.75 * 160 / 1.08, abs=0.1)
