"""The page of a selection, in a real browser where there is one."""

import html.parser
import json
import re

import browser
import numpy as np
import pytest

from jaxalign.report import page as pages
from jaxalign.report import select_page as page
from jaxalign.report.values import plain
from jaxalign.select import selection_report
from jaxalign.select.pool import make_pool, Selection
from jaxalign.select.selection_report import reasons

N = 240
HOSTILE = [
  "<script>window.pwned=1</script>",
  "</script><script>window.pwned=1//",
  "<img src=x onerror=window.pwned=1>",
  "\"'`${window.pwned=1}",
  "]]><!-- <!--<script>",
  "{near} {rank} %s \\u003c",
  "naïve CAFÉ 東京 🎈",
  "e\u0301clair \u2028 line",
  "\u202eoverride\u202c",
  "\x00\x07null\ud800",
  "a\u00a0b\tc\nd",
  "__proto__ constructor",
]


def make(n=N, sides=2):
  """A selection whose texts, ids and sources attack the page."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, sides, 6)).astype(np.float32)
  x[n // 2 : n // 2 + 30] = x[:30] + 0.01
  ids = [f"r{i:04d}" for i in range(n)]
  ids[7] = "<b onclick=window.pwned=1>\"7'"
  columns = {
    "embedding": x,
    "length": rng.integers(3, 200, (n, sides)),
    "source": np.array(["web", "</option><script>window.pwned=1"])[
      rng.integers(0, 2, n)
    ],
  }
  if sides == 1:
    columns["label"] = rng.random(n) < 0.4
  pool = make_pool(ids, columns)
  at = {
    k: [
      f"{k} number {i} {HOSTILE[i % len(HOSTILE)]} of {rng.integers(0, 50)}"
      for i in range(n)
    ]
    for k in ("prompt", "chosen", "rejected")[: sides + 1]
  }
  score = rng.normal(size=n) * 10.0 ** rng.integers(-6, 6, n)
  score[3] = -np.inf
  kept = np.argsort(-score)[:60]
  out, table = selection_report.describe(
    pool,
    Selection(kept, score),
    sampler="</title><script>",
    texts=at,
    diagnostics={"notes": ["warning: <script>x</script>", "a <b>note</b>"]},
    others=selection_report.alternatives(pool, 60),
  )
  return out, table


@pytest.fixture(scope="module")
def made():
  return make()


class Reader(html.parser.HTMLParser):
  """What elements there are; scripts' texts apart."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.open, self.seen, self.scripts = [], [], []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    assert not any(k.startswith("on") for k, _ in attrs), attrs
    if tag not in ("meta", "br", "input"):
      self.open.append(tag)
    if tag == "script":
      self.scripts.append((dict(attrs), ""))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "script":
      self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data


def read(document):
  reader = Reader()
  reader.feed(document)
  reader.close()
  assert not reader.open
  return reader


@pytest.mark.parametrize("sides", [1, 2])
def test_the_page_is_closed_and_whole(sides):
  out, table = make(200, sides)
  document = page.selection_html(out, table)
  reader = read(document)
  (kind, data), (_, code) = reader.scripts  # the data and our own, no other
  assert kind == {"type": "application/json", "id": "data"}
  assert code == (pages.TEMPLATES / "select.js").read_text()
  found = json.loads(data)
  assert len(found["id"]) == 200
  assert re.search("[<>&\u2028\u2029]", data) is None
  policy = next(
    a["content"]
    for t, a in reader.seen
    if a.get("http-equiv") == "Content-Security-Policy"
  )
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
  assert "unsafe-inline'; script" not in policy
  for _, attributes in reader.seen:  # nothing is fetched
    assert not {"src", "action", "srcset"} & set(attributes)
    assert attributes.get("href", "#").startswith("#")
  # A text says what it said, but for what hides or reorders.
  i = int(np.flatnonzero(table["id"] == "r0000")[0])
  assert found["texts"][0]["at"][i] == plain(table["texts"]["prompt"][i])


def test_texts_are_cut_to_the_size_of_the_page(monkeypatch):
  out, table = make(200)
  monkeypatch.setattr(page, "TEXTS", 200 * 120)
  found = page.payload(out, table)
  sizes = [len(t) for one in found["texts"] for t in one["at"]]
  assert max(sizes) <= 40 and sum(sizes) <= page.TEXTS
  assert found["texts"][0]["at"][0].endswith("…")


def test_a_card_with_little_on_it_still_renders():
  pool = make_pool(["a", "b", "c"], {})
  for rows in (np.arange(1), np.arange(3), np.empty(0, np.int64)):
    out, table = selection_report.describe(pool, Selection(rows, np.zeros(3)))
    document = page.selection_html(out, table)
    assert "not measured" in document
    read(document)


# In a browser.


@pytest.fixture(scope="module")
def tab(made, tmp_path_factory):
  if browser.find() is None:
    pytest.skip(
      f"needs a Chromium: none of {', '.join(browser.NAMES)} is installed"
    )
  path = tmp_path_factory.mktemp("page") / "selection.html"
  path.write_text(page.selection_html(*made), encoding="utf-8")
  with browser.page() as found:
    found.path = path
    yield found


@pytest.fixture
def opened(tab):
  tab.said.clear()
  tab.open(tab.path)
  yield tab
  assert not tab.said  # no error, no refused resource, no dialog
  assert tab.run("window.pwned === undefined")
  assert tab.run("document.querySelectorAll('script').length") == 2


ROWS = "[...document.querySelectorAll('.line')].map(r => Number(r.dataset.row))"


def in_view(tab):
  """The places in the table of the rows drawn, from the top."""
  return tab.run(ROWS)


def every(tab):
  """All rows that are left, in order, by scrolling from top to end."""
  return tab.run("""(async () => {
    const view = document.getElementById("view"), seen = [];
    const frame = () => new Promise(r => requestAnimationFrame(
        () => requestAnimationFrame(r)));
    for (let top = 0; ; top += 640) {
      view.scrollTop = top;
      await frame();
      for (const r of [...document.querySelectorAll(".line")].sort((a, b) =>
           a.offsetTop - b.offsetTop)) {
        const i = Number(r.dataset.row);
        if (!seen.includes(i)) seen.push(i);
      }
      if (top + view.clientHeight >= view.scrollHeight) return seen;
    }})()""")


def search(tab, words):
  tab.type("#q", words)
  tab.run("new Promise(r => setTimeout(r, 120))")


def count(tab):
  return tab.run("document.getElementById('count').textContent")


def test_only_the_rows_in_view_are_drawn(opened, made):
  drawn = in_view(opened)
  assert 13 <= len(drawn) < 40
  order = np.argsort(made[1]["rank"])
  assert drawn == order[: len(drawn)].tolist()
  assert count(opened) == f"{N} of {N} rows, 60 of them kept."


SORTS = {
  "rank": "rank",
  "score": "score",
  "id": "id",
  "length": "length",
  "cosine": "cosine",
  "source": "source",
  "topic": "topic",
}


@pytest.mark.parametrize("key", SORTS)
def test_a_click_on_a_head_sorts(opened, made, key):
  table = made[1]
  head = f"document.querySelector('[data-key={key}]')"
  if key == "rank":
    opened.run("document.querySelector('[data-key=id]').click()")
  values = np.asarray(table[key])
  if values.dtype.kind == "f":
    values = np.array(
      [
        float(f"{v:.6g}") if key == "score" else round(float(v), 4)
        for v in values
      ]
    )
  rank = np.asarray(table["rank"])
  for down in (False, True):
    opened.run(f"{head}.click()")
    assert opened.run(f"{head}.parentNode.getAttribute('aria-sort')") == (
      "descending" if down else "ascending"
    )
    # Missing values last both ways; of equals, the better rank first.
    text = (
      [plain(v) for v in values]
      if values.dtype.kind == "U"
      else (values.tolist())
    )
    good = [
      i
      for i in range(N)
      if not isinstance(text[i], float) or np.isfinite(text[i])
    ]
    good.sort(key=lambda i: rank[i])
    good.sort(key=lambda i: text[i], reverse=down)
    lost = sorted(set(range(N)) - set(good), key=lambda i: rank[i])
    assert every(opened) == good + lost


def test_the_cells_say_what_the_table_says(opened, made):
  table = made[1]
  cells = opened.run(
    "[...document.querySelectorAll('.line')].map(r => "
    "[...r.children].map(c => c.textContent))"
  )
  for i, row in zip(in_view(opened), cells):
    assert row[0] == ("●" if table["kept"][i] else "○")
    assert int(row[1].replace(",", "")) == table["rank"][i]
    assert float(row[2].replace("−", "-")) == float(f"{table['score'][i]:.6g}")
    assert row[3] == table["id"][i]
    assert float(row[5]) == pytest.approx(table["cosine"][i], abs=6e-4)
    assert row[-1] == plain(table["texts"]["prompt"][i].strip())


@pytest.mark.parametrize(
  "words",
  [
    "<script>",
    "</script>",
    "onerror=window",
    "\"'`${",
    "café",
    "東京",
    "🎈",
    "]]><!--",
    "{near}",
    "\\u003c",
    "e\u0301clair",
    "number 17",
    "prompt 3 of 4",
    "__proto__",
    "[u+202e]",
    "nowhere to be found",
    "<b onclick",
  ],
)
def test_search_finds_just_the_rows_that_hold_all_words(opened, made, words):
  table = made[1]
  search(opened, words)
  import unicodedata

  wanted = set()
  for i in range(N):
    hay = "\n".join(
      [table["id"][i], str(table["source"][i]), str(table["topic"][i])]
      + [plain(t[i].strip()) for t in table["texts"].values()]
    )
    hay = unicodedata.normalize("NFC", hay).lower()
    parts = unicodedata.normalize("NFC", words).lower().split()
    if all(p in hay for p in parts):
      wanted.add(i)
  assert (len(wanted) == 0) == (words == "nowhere to be found")
  if wanted:
    assert set(every(opened)) == wanted
    assert count(opened).startswith(f"{len(wanted)} of {N} rows")
  else:
    assert count(opened) == "No row matches." and not in_view(opened)
  search(opened, "")
  assert count(opened).startswith(f"{N} of {N}")


def choose(tab, name, value):
  tab.run(
    f"(() => {{ const s = document.getElementById('f-{name}');"
    f"s.value = '{value}'; s.dispatchEvent(new Event('change')); }})()"
  )


def test_filters_and_reset(opened, made):
  table = made[1]
  kept, near = np.asarray(table["kept"]), np.asarray(table["cosine"]) >= 0.95
  choose(opened, "kept", 1)
  assert set(every(opened)) == set(np.flatnonzero(kept).tolist())
  choose(opened, "kept", 0)
  opened.run("document.getElementById('f-copy').click()")
  assert near[~kept].any()
  assert set(every(opened)) == set(np.flatnonzero(~kept & near).tolist())
  opened.run("document.getElementById('reset').click()")
  assert count(opened) == f"{N} of {N} rows, 60 of them kept."
  choose(opened, "why", 5)  # no finite score
  assert every(opened) == np.flatnonzero(~np.isfinite(table["score"])).tolist()
  choose(opened, "why", "")
  for name in ("source", "topic"):
    options = opened.run(
      f"[...document.getElementById('f-{name}').options]"
      ".map(o => [o.value, o.textContent])"
    )
    column = np.array([plain(v) for v in table[name]])
    assert len(options) == len(set(column)) + 1
    value, words = options[1]
    choose(opened, name, value)
    assert set(every(opened)) == set(np.flatnonzero(column == words).tolist())
    choose(opened, name, "")


def test_a_row_says_its_reason_and_leads_to_its_neighbour(opened, made):
  out, table = made
  said = reasons.sentences(out, table)
  rank = np.asarray(table["rank"])
  for place in (0, 5, 59, 60, 61, N - 1):
    i = int(np.argsort(rank)[place])
    opened.run(f"""(async () => {{
      const view = document.getElementById("view");
      view.scrollTop = {32 * place};
      await new Promise(r => requestAnimationFrame(() =>
          requestAnimationFrame(r)));
      document.querySelector('[data-row="{i}"]').click(); }})()""")
    detail = opened.run(
      "[document.querySelector('#detail h3').textContent, "
      "document.querySelector('#detail .reason')"
      ".textContent]"
    )
    assert detail == [table["id"][i], said[i]]
    texts = opened.run(
      "[...document.querySelectorAll('#detail pre')]"
      ".slice(0, 3).map(e => e.textContent)"
    )
    assert texts == [plain(t[i].strip()) for t in table["texts"].values()]
    opened.run("document.querySelector('#detail .near').click()")
    assert (
      opened.run("document.querySelector('#detail h3').textContent")
      == (table["near"][i])
    )


def test_keys_move_through_the_rows(opened, made):
  order = np.argsort(made[1]["rank"])
  opened.run("document.getElementById('view').focus()")
  for key, place in (
    ("ArrowDown", 1),
    ("PageDown", 13),
    ("ArrowUp", 12),
    ("End", N - 1),
    ("Home", 0),
  ):
    for kind in ("keyDown", "keyUp"):
      opened.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    assert (
      opened.run("document.querySelector('#detail h3').textContent")
      == (made[1]["id"][order[place]])
    )
    assert int(order[place]) in in_view(opened)


def places(made):
  found = page.payload(*made)
  return np.array(found["x"]), np.array(found["y"])


def test_the_map(opened, made):
  x, y = places(made)
  opened.run(
    "document.documentElement.style.scrollBehavior = 'auto';"
    "document.getElementById('map').scrollIntoView()"
  )
  left, top, wide, high = opened.run(
    "(() => { const r = document.getElementById('map')"
    ".getBoundingClientRect(); return [r.left, r.top, r.width, r.height]"
    "})()"
  )
  px = left + 10 + x / 1000 * (wide - 20)
  py = top + high - 10 - y / 1000 * (high - 20)
  gaps = np.hypot(px[:, None] - px, py[:, None] - py) + 99 * np.eye(N)
  alone = int(gaps.min(axis=1).argmax())  # the loneliest point
  opened.click(float(px[alone]), float(py[alone]))
  assert (
    opened.run("document.querySelector('#detail h3').textContent")
    == (made[1]["id"][alone])
  )
  pixel = opened.run(
    f"[...document.getElementById('map').getContext('2d').getImageData("
    f"{px[alone] - left}, {py[alone] - top}, 1, 1).data]"
  )
  assert pixel[3] > 0
  edge = [
    left + wide * 0.3,
    top + high * 0.2,
    left + wide * 0.7,
    top + high * 0.6,
  ]
  opened.click(edge[0], edge[1], (edge[2], edge[3]))
  least = lambda room: set(
    np.flatnonzero(
      (px > edge[0] + room)
      & (px < edge[2] - room)
      & (py > edge[1] + room)
      & (py < edge[3] - room)
    ).tolist()
  )
  assert 20 < len(least(0)) < N - 20
  assert least(1) <= set(every(opened)) <= least(-1)
  assert "within the rectangle" in count(opened)
  opened.run("document.getElementById('reset').click()")
  assert count(opened).startswith(f"{N} of {N}")
  choose(opened, "colour", "source")
  assert (
    opened.run(
      "[...document.querySelectorAll('#legend li')].map(l => l.textContent)"
    ).count("web")
    == 1
  )


@pytest.mark.parametrize("width", [360, 500, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_no_width_scrolls_sideways(tab, width, dark):
  tab.open(tab.path, width, 900, dark)
  assert tab.run("document.documentElement.scrollWidth") <= width
  assert tab.run("getComputedStyle(document.body).backgroundColor") == (
    "rgb(20, 23, 26)" if dark else "rgb(252, 252, 250)"
  )
  assert tab.run("document.getElementById('map').clientWidth") > 200


def test_what_came_from_data_cannot_run(opened):
  """Even markup put into the page by force: the policy holds."""
  opened.run(
    "document.body.insertAdjacentHTML('beforeend', "
    "'<img src=x onerror=window.pwned=1>');"
    "new Promise(r => setTimeout(r, 100))"
  )
  opened.run(
    "(() => { const s = document.createElement('script');"
    "s.textContent = 'window.pwned = 1'; document.body.append(s);"
    "s.remove(); })()"
  )
  assert opened.run("window.pwned === undefined")
  assert any("Content Security Policy" in json.dumps(s) for s in opened.said)
  opened.said.clear()


@pytest.mark.slow
def test_a_hundred_thousand_rows_stay_usable(tab, tmp_path):
  rng = np.random.default_rng(0)
  n = 100_000
  pool = make_pool(
    [f"{i:06d}" for i in range(n)],
    {
      "length": rng.integers(3, 200, (n, 2)),
      "embedding": rng.normal(size=(n, 2, 8)).astype(np.float32),
    },
  )
  score = rng.normal(size=n)
  texts = {
    k: [f"{k} {i} " + "words " * 60 for i in range(n)]
    for k in ("prompt", "chosen", "rejected")
  }
  document = page.selection_html(
    *selection_report.describe(
      pool, Selection(np.argsort(-score)[:10_000], score), texts=texts
    )
  )
  assert len(document.encode()) < 32e6
  (tmp_path / "large.html").write_text(document)
  tab.said.clear()
  tab.open(tmp_path / "large.html")
  timed = lambda code: tab.run(
    f"(() => {{ const t = performance.now(); {code};"
    "return performance.now() - t; })()"
  )
  assert len(in_view(tab)) < 50
  assert timed("document.querySelector('[data-key=score]').click()") < 3000
  search(tab, "chosen 99999")
  tab.wait("document.getElementById('count').textContent.startsWith('1 of')")
  assert timed("document.getElementById('reset').click()") < 3000
  tab.run(
    "document.getElementById('view').scrollTop = 32 * 99000; "
    "new Promise(r => setTimeout(r, 200))"
  )
  rows = tab.run(
    "[...document.querySelectorAll('.line')].map(r => "
    "r.children[1].textContent)"
  )
  assert "99,001" in rows and not tab.said
