"""Pages and charts: nothing from data becomes markup, nothing is missing."""

import copy
import html.parser
import math
import re

import jinja2
import pytest

from jaxalign.report import charts, page, study_page, terminal, values
from jaxalign.report.values import Node

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

ELEMENTS = set(
  "html head meta title style body header main nav section h1 h2 h3 p a ul "
  "li dl dt dd div span small code pre table thead tbody tr th td "
  "figure figcaption details summary svg g line rect circle text polyline "
  "polygon desc".split()
)
ATTRIBUTES = set(
  "lang charset http-equiv content name class id href role tabindex dir "
  "scope style aria-label aria-hidden x y x1 x2 y1 y2 cx cy r width height "
  "points viewbox preserveaspectratio vector-effect text-anchor "
  "overflow".split()
)


class Reader(html.parser.HTMLParser):
  """Checks every element, attribute and closing tag; keeps the text."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.open, self.text, self.seen, self.svgs = [], [], [], []

  def handle_starttag(self, tag, attrs):
    assert tag in ELEMENTS, tag
    names = [name for name, _ in attrs]
    assert len(set(names)) == len(names), (tag, names)
    for name, value in attrs:
      assert name in ATTRIBUTES, (tag, name)
      if name == "href":
        assert re.fullmatch(r"#[a-z]+|[\w%./~-]+", value), value
        assert not value.startswith("/")
      if name == "style":
        assert re.fullmatch(r"height:\d+px", value), value
    self.seen.append((tag, dict(attrs)))
    if tag not in ("meta", "br"):
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
    if not self.open or self.open[-1] != "style":
      self.text.append(data)

  def handle_comment(self, data):
    raise AssertionError(f"comment {data!r}")

  def handle_pi(self, data):
    raise AssertionError(f"instruction {data!r}")

  def unknown_decl(self, data):
    raise AssertionError(f"declaration {data!r}")


def read(document):
  """Parses a page, checks that it is whole and closed, returns the reader."""
  reader = Reader()
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
  return dict(
    value=value, low=value - width, high=value + width, n=1000, **more
  )


def make_arm(name, sampler, win, seed=0, is_all=False):
  return dict(
    name=name,
    sampler=sampler,
    budget=1.0 if is_all else 0.1,
    seed=seed,
    rows=8000 if is_all else 800,
    updates=90,
    is_all=is_all,
    metrics=dict(
      win_vs_target=interval(win),
      malformed=interval(0.02, 0.01),
      accuracy=interval(0.7, ties=0.03),
      kl=interval(2.3, 0.2),
    ),
    curves={
      "train/loss": [[s, 0.69 / (1 + s)] for s in range(1, 4)],
      "rewards/accuracies": [[s, 0.6] for s in range(1, 4)],
    },
    selection={
      "length": {"selected": [9, 40, 90], "rest": [5, 30, 80]},
      "topics": {"selected": 57, "pool": 64},
      "score_histogram": {
        "edges": [0.0, 0.5, 1.0],
        "selected": [1, 9],
        "rest": [70, 20],
      },
      "stability": {"jaccard": [0.91, 0.89], "mean": 0.9},
      "mixture": dict(
        components=2,
        covariance="full",
        pca=64,
        in_fit=-143.2,
        held_out=-151.9,
        auc=0.54,
        label_accuracy=0.51,
        nmi=0.03,
        warnings=["a mixture warning"],
      ),
      "examples_top": [
        dict(
          id="row-1",
          score=0.36,
          prompt="a prompt",
          chosen="a chosen",
          rejected="a rejected",
        )
      ],
      "examples_bottom": [
        dict(id="row-2", score=0.01, prompt="p", chosen="c", rejected="r")
      ],
    },
    saved=dict(with_sft=0.4, without_sft=0.8),
  )


@pytest.fixture
def summary():
  """A summary with every field filled."""
  stages = [
    dict(
      stage="sft",
      arm=None,
      flops=4.2e15,
      tokens=1.2e6,
      seconds=612,
      bytes=4.4e8,
    )
  ]
  stages += [
    dict(stage="train", arm=a, flops=9e14, tokens=2e5, seconds=71, bytes=4e8)
    for a in ("isa", "all")
  ]
  return dict(
    title="A tenth against all",
    command="python -m jaxalign.study --x=1",
    created="2025-06-11",
    version="0.1.0",
    asked="Is a tenth enough?",
    verdicts=["A tenth is enough."],
    warnings=["One seed only."],
    machine=dict(
      platform="cpu", devices=8, mesh=dict(fsdp=4, tensor=2), jax="0.10.2"
    ),
    data=dict(
      source="world",
      schema="pairs",
      kind="pairs",
      seen=12034,
      rows=dict(sft=2000, pool=8000, held_out=1000),
      refused={"empty response": 12},
      duplicates=3,
      chars=dict(prompt=[1, 2, 3], response=[4, 5, 6]),
      tokens=dict(prompt=[1, 2, 3], response=[4, 5, 6]),
      truncation=dict(rows_cut=3, tokens_cut=29, share=0.004),
      examples=[dict(prompt="p", chosen="c", rejected="r")],
    ),
    baseline=dict(name="SFT model", win_vs_target=interval(0.48)),
    arms=[
      make_arm("isa", "isa", 0.637),
      make_arm("all", "all", 0.641, is_all=True),
    ],
    comparisons=[
      dict(
        a="isa",
        b="all",
        metric="win_vs_target",
        difference=interval(-0.004),
        words="no difference",
      )
    ],
    ledger=dict(
      stages=stages,
      selection_share=0.083,
      saved=[dict(arm="isa", against="all", with_sft=0.4, without_sft=0.8)],
    ),
    samples=[
      dict(
        prompt="q",
        target="t",
        sft="s",
        arms={"isa": "an answer"},
        rewards={"target": 1.2, "isa": 0.7},
      )
    ],
    files={"Summary": "summary.json"},
  )


def poisoned(value, payload):
  """`value` with every string, and every key that is a name, replaced."""
  if isinstance(value, str):
    return payload
  if isinstance(value, list):
    return [poisoned(v, payload) for v in value]
  if isinstance(value, dict):
    return {k: poisoned(v, payload) for k, v in value.items()}
  return value


def paths(value, path=()):
  """Where the leaves of a nested structure are."""
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from paths(inner, (*path, key))
  elif isinstance(value, list):
    for i, inner in enumerate(value):
      yield from paths(inner, (*path, i))
  else:
    yield path


def put(value, path, new):
  """A copy of `value` with `new` at `path`."""
  value = copy.deepcopy(value)
  inner = value
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = new
  return value


def test_there_are_forty_payloads():
  assert len(set(PAYLOADS)) >= 40


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_stays_text(summary, payload):
  evil = poisoned(summary, payload)
  evil["data"]["refused"] = {payload: 3}
  evil["data"]["chars"] = {payload: [1, 2, 3]}
  evil["files"] = {
    payload: payload,
    "b": "javascript:alert(1)",
    "c": "//evil.example/x",
    "d": "../up",
    "e": "http://x",
  }
  evil["samples"][0]["arms"] = {payload: payload}
  evil["samples"][0]["rewards"] = {payload: payload}
  evil["machine"] = {"mesh": {payload: payload}, "devices": payload}
  evil["arms"][0]["curves"][payload] = [[1, 2], [2, payload]]
  evil["arms"][0]["metrics"][payload] = {
    "value": payload,
    "low": payload,
    "high": payload,
    "n": payload,
  }
  for document in (
    study_page.study_html(evil),
    study_page.arm_html(evil["arms"][0]),
  ):
    reader = read(document)
    text = "\n".join(reader.text)
    assert values.plain(payload) in text
    # An attribute holds it whole, too, where one does.
    assert "onerror" not in {n for _, a in reader.seen for n in a}
  said = terminal.study_text(evil)
  assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)


def test_each_field_alone_may_be_a_payload(summary):
  payload = "\"'><script>alert(1)</script>"
  for path in paths(summary):
    read(study_page.study_html(put(summary, path, payload)))
    terminal.study_text(put(summary, path, payload))


def test_free_text_is_all_there(summary):
  """Every text of the summary is found on the page, as text."""
  marked = copy.deepcopy(summary)
  for i, path in enumerate(paths(summary)):
    inner = marked
    for key in path[:-1]:
      inner = inner[key]
    # The metric of a comparison and the sampler name what is looked up.
    if isinstance(inner[path[-1]], str) and path[-1] not in (
      "metric",
      "covariance",
      "sampler",
      "stage",
    ):
      inner[path[-1]] = f"<mark {i}> & text"
      marked.setdefault("_", []).append(f"<mark {i}> & text")
  wanted = marked.pop("_")
  text = "\n".join(read(study_page.study_html(marked)).text)
  assert len(wanted) > 30
  assert [w for w in wanted if w not in text] == []


ODD = [
  None,
  math.nan,
  math.inf,
  -math.inf,
  "x",
  [],
  {},
  [None],
  10**400,
  1e308,
  True,
  -5,
]


@pytest.mark.parametrize("odd", range(len(ODD)))
def test_leaves_may_be_odd(summary, odd):
  """All at once, then every twelfth alone; the twelve tests reach each."""
  changed = copy.deepcopy(summary)
  for i, path in enumerate(paths(summary)):
    changed = put(changed, path, ODD[odd])
    if i % len(ODD) == odd:
      for new in (ODD[odd], ODD[odd - 5]):
        alone = put(summary, path, new)
        read(study_page.study_html(alone))
        terminal.study_text(alone)
  read(study_page.study_html(changed))
  terminal.study_text(changed)


def test_any_part_may_be_absent(summary):
  inner = {path[:i] for path in paths(summary) for i in range(1, len(path))}
  for path in inner:
    for new in (None, "x"):
      read(study_page.study_html(put(summary, path, new)))
  for key in summary:
    less = {k: v for k, v in summary.items() if k != key}
    read(study_page.study_html(less))
    terminal.study_text(less)


@pytest.mark.parametrize(
  "nothing",
  [{}, {"arms": []}, {"arms": None}, {"arms": [{}]}, {"arms": [None]}, None],
)
def test_nothing_measured_is_said(nothing):
  text = "".join(read(study_page.study_html(nothing)).text)
  assert text.count("not measured in this job") >= 8
  assert terminal.study_text(nothing)
  read(study_page.arm_html({}))


def test_nothing_is_loaded(summary):
  for document in (
    study_page.study_html(summary),
    study_page.arm_html(summary["arms"][0]),
  ):
    assert "http://" not in document and "https://" not in document
    for word in (
      " src=",
      "url(",
      "@import",
      "<script",
      "<link",
      "<img",
      "<iframe",
      "javascript:",
    ):
      assert word not in document.lower()
    policy = [
      a["content"]
      for t, a in read(document).seen
      if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == [
      "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]


def test_page_shows_what_was_found(summary):
  text = "".join(read(study_page.study_html(summary)).text).replace(
    "\u00a0", " "
  )
  for words in (
    "A tenth is enough.",
    "63.7 [61.7, 65.7]",
    "−0.4 [−2.4, +1.6]",
    "8.3 %",
    "6.00 PFLOP",
    "10m12s",
    "57 of the pool's 64 topics",
    "a mixture warning",
    "row-1",
    "python -m jaxalign.study --x=1",
  ):
    assert words in text, words
  assert "Selecting cost more" not in text


@pytest.mark.parametrize("where", ["ledger", "arms"])
def test_a_negative_saving_is_a_warning(summary, where):
  if where == "ledger":
    summary["ledger"]["saved"][0]["with_sft"] = -0.124
  else:
    summary["ledger"] = None
    summary["arms"][0]["saved"]["with_sft"] = -0.124
  document = study_page.study_html(summary).replace("\u00a0", " ")
  assert 'class="callout warning"' in document
  assert "Selecting cost more than it saved" in document
  assert "−12.4 % saved" in document
  assert '<span class="minus">−12.4 %</span>' in document
  assert "Costs more than it saves" in terminal.study_text(summary)


def test_an_unknown_cost_is_said(summary):
  summary["ledger"]["stages"][0]["flops"] = math.nan
  text = "".join(read(study_page.study_html(summary)).text).replace(
    "\u00a0", " "
  )
  assert "FLOPs of 1 stage were not measured" in text
  assert "≥ 1.80 PFLOP" in text


def test_seeds_of_a_sampler_share_a_colour(summary):
  arms = [
    make_arm(f"{s}-{i}", s, 0.6, i) for s in ("isa", "random") for i in range(3)
  ]
  assert [s for s in study_page.styles([Node(a) for a in arms])] == [
    ("isa", 0)
  ] * 3 + [("random", 1)] * 3
  summary["arms"] = arms
  read(study_page.study_html(summary))


@pytest.mark.parametrize("arms", [0, 1, 3, 60])
def test_terminal_fits(summary, arms):
  summary["arms"] = [
    make_arm("a long name of an arm " * 3 + str(i), "isa", 0.6)
    for i in range(arms)
  ]
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
    assert odd == None and not odd and list(odd) == []  # noqa: E711
    assert str(odd) == "–" and len(odd) == 0


@pytest.mark.parametrize(
  "value, words",
  [
    (None, "–"),
    (0, "0"),
    (12034, "12,034"),
    (-3, "−3"),
    (0.05, "0.0500"),
    (math.nan, "NaN"),
    (math.inf, "∞"),
    (2.3e-7, "2.30e−7"),
    (123.4, "123"),
    (1234.5, "1,234"),
    (True, "True"),
    ("<b>", "<b>"),
  ],
)
def test_number(value, words):
  assert values.number(value) == words


def test_units():
  assert values.percent(0.6374) == "63.7\u00a0%"
  assert values.percent(-0.0001) == "0.0\u00a0%"
  assert values.engineering(3.4e15) == "3.40\u00a0PFLOP"
  assert values.engineering(999.9e12) == "1.00\u00a0PFLOP"
  assert values.engineering(12, "B") == "12\u00a0B"
  assert values.engineering(None) == "–"


@pytest.mark.parametrize(
  "address, live",
  [
    ("arms/isa 0/report.html", True),
    ("summary.json", True),
    ("/etc/passwd", False),
    ("//x/y", False),
    ("../x", False),
    ("a/../../x", False),
    ("javascript:1", False),
    ("a\\b", False),
    ("", False),
    ("java\tscript:1", False),
    ("http://x", False),
  ],
)
def test_only_files_beside_the_page_are_links(address, live):
  draw = page.ENVIRONMENT.from_string("{{ m.link('name', address) }}")
  assert ("<a " in draw.render(address=address)) == live


def test_ticks_are_round():
  assert charts.ticks(0, 10, 5) == ([0, 2, 4, 6, 8, 10], 0)
  marks, decimals = charts.ticks(-0.031, 0.052, 4)
  assert decimals == 2 and 0 in marks
  assert charts.ticks(1, 1) == ([], 0)
  assert charts.ticks(math.nan, 1) == ([], 0)


def attributes(markup, tag):
  return [a for t, a in read(markup).seen if t == tag]


def test_intervals_lie_where_they_should():
  rows = [charts.Row("a", 0.2, 0.0, 0.4), charts.Row("b", 0.8, 0.6, 1.0)]
  chart = charts.intervals(rows, "t", "x", scale=100, reference=0.5)
  spots = [float(a["cx"][:-1]) for a in attributes(chart, "circle")]
  # The axis runs from -6 to 106.
  assert spots == pytest.approx([100 * 26 / 112, 100 * 86 / 112], abs=0.01)
  dashed = [a for a in attributes(chart, "line") if a["class"] == "ref"]
  assert dashed[0]["x1"] == "50.00%"


@pytest.mark.parametrize(
  "chart",
  [
    lambda: charts.intervals([], "t", "x"),
    lambda: charts.intervals([charts.Row("a", math.nan)], "t", "x"),
    lambda: charts.lines([], "t", "x", "y"),
    lambda: charts.lines([charts.Series("a", [])], "t", "x", "y"),
    lambda: charts.lines([charts.Series("a", [(1, math.nan)])], "t", "x", "y"),
    lambda: charts.bars([], [], "t", "x"),
    lambda: charts.bars([("a", [math.nan, 0], "")], ["p", "q"], "t", "x"),
    lambda: charts.histogram([], [], [], "t", "x"),
    lambda: charts.histogram([0, 1], [1, 2], [1], "t", "x"),
    lambda: charts.histogram([0, math.nan], [1], [1], "t", "x"),
  ],
)
def test_nothing_to_draw_is_said(chart):
  assert "no data" in "".join(read(chart()).text)


@pytest.mark.parametrize(
  "points",
  [
    [(1, 2)],
    [(1, 2), (1, 2)],
    [(0, 5), (1, 5)],
    [(0, 1e-300), (1, 0)],
    [(0, 1e300), (1, 1)],
    [(0, -1e199), (1, 1e199)],
    [(0, 1), (1, 1 + 1e-16)],
  ],
)
def test_lines_of_hardly_anything(points):
  chart = charts.lines([charts.Series("a", points)], "t", "x", "y")
  read(chart)
  assert "nan" not in chart and "inf" not in chart


def test_lines_keep_a_gap_honest():
  points = [(i, math.nan if i == 3 else i) for i in range(6)]
  chart = charts.lines(
    [
      charts.Series("a", points, 0, [(0, 0, 1), (5, 4, 6)]),
      charts.Series("b", points, 1),
    ],
    "t",
    "x",
    "y",
    reference=2,
  )
  assert "2 non-finite values left out" in "".join(read(chart).text)
  assert len(attributes(chart, "polygon")) == 1


def test_thin_keeps_the_mean():
  points = [(float(i), float(i % 7)) for i in range(1000)]
  few, k = charts.thin(points, 100)
  assert len(few) == 100 and k == 10
  assert sum(y for _, y in few) / 100 == pytest.approx(
    sum(y for _, y in points) / 1000
  )


def test_bars_fill_the_scale():
  chart = charts.bars(
    [("a", [1, 3], "4"), ("b", [2, None], "2")], ["p", "q"], "t", "x"
  )
  wide = [
    float(a["width"][:-1])
    for a in attributes(chart, "rect")
    if a["class"].startswith("bar")
  ]
  assert wide == pytest.approx([25, 75, 50])


def test_histogram_scales_each_to_its_own():
  chart = charts.histogram([0, 1, 2], [0, 5], [10, 30], "t", "x")
  tall = {a["class"]: float(a["height"]) for a in attributes(chart, "rect")}
  # 100 % of the selected, and 75 % of the rest, on an axis to 108 %.
  assert tall["picked"] == pytest.approx(160 / 1.08, abs=0.1)
  assert tall["rest"] == pytest.approx(0.75 * 160 / 1.08, abs=0.1)
