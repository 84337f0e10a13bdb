"""The page of a selection, in a real browser where there is one."""

import json
import re
import unicodedata

import browser
import numpy as np
import pytest
import test_report

from jaxalign.report import page, select_page
from jaxalign.report.nodes import visible
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
SIDES = ("prompt", "chosen", "rejected")
DIAGNOSTICS = dict(
  notes=["warning: <script>x</script>", "a <b>note</b>"],
  stability=dict(jaccard=[0.7, 0.84], mean=0.77),
  held_out=dict(auc=0.61, mean_fitted=-3.125, mean_held_out=-4.5),
  labels=dict(accuracy=0.52, nmi=0.03),
)
MIXTURE = dict(components=2, covariance="diag", directions=12, warnings=["w"])


def make(n=N, sides=2):
  """A selection whose texts, ids and sources attack the page."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, sides, 6)).astype(np.float32)
  x[n // 2 : n // 2 + 30] = x[:30] + 0.01
  ids = [f"r{i:04d}" for i in range(n)]
  ids[7] = "<b onclick=window.pwned=1>\"7'"
  sources = np.array(["web", "</option><script>window.pwned=1"])
  columns = {"embedding": x, "length": rng.integers(3, 200, (n, sides))}
  columns["source"] = sources[rng.integers(0, 2, n)]
  if sides == 1:
    columns["label"] = rng.random(n) < 0.4
  pool = make_pool(ids, columns)
  words = lambda side, i: (
    f"{side} number {i} {HOSTILE[i % len(HOSTILE)]} of {rng.integers(0, 50)}"
  )
  texts = {k: [words(k, i) for i in range(n)] for k in SIDES[: sides + 1]}
  score = rng.normal(size=n) * 10.0 ** rng.integers(-6, 6, n)
  score[3] = -np.inf
  selection = Selection(np.argsort(-score)[:60], score)
  more = dict(diagnostics=DIAGNOSTICS, texts=texts)
  more["others"] = selection_report.alternatives(pool, 60)
  out, table = selection_report.describe(pool, selection, "isa", **more)
  out["overlaps"][0]["a"] = "</td><script>"
  return out | dict(sampler="</title><script>", mixture=MIXTURE), table


@pytest.fixture(scope="module")
def made():
  return make()


class Reader(test_report.Reader):
  elements = test_report.Reader.elements | set(
    "script noscript label input select option button canvas i".split()
  )
  attributes = test_report.Reader.attributes | set(
    "type autocomplete spellcheck placeholder value hidden aria-live".split()
  )


def read(document):
  return test_report.read(document, Reader())


@pytest.mark.parametrize("sides", [1, 2])
def test_the_page_is_closed_and_whole(sides):
  out, table = make(200, sides)
  with test_report.missing_keys() as missing:
    reader = read(select_page.selection_html(out, table))
  # What this selection has not.
  assert missing <= {"component", "reading", "why"}
  # The data and our own script, no other; nothing is fetched.
  marked = {"type": "application/json", "id": "data"}
  assert [a for t, a in reader.seen if t == "script"] == [marked, {}]
  data, code = reader.scripts
  assert code == (page.TEMPLATES / "select.js").read_text()
  found = json.loads(data)
  assert len(found["id"]) == 200
  assert re.search("[<>&\u2028\u2029]", data) is None
  (policy,) = (a["content"] for _, a in reader.seen if "http-equiv" in a)
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
  assert "unsafe-inline'; script" not in policy
  links = [a["href"] for _, a in reader.seen if "href" in a]
  assert links and all(link.startswith("#") for link in links)
  # A text is as it was, but for what hides or reorders.
  i = int(np.flatnonzero(table["id"] == "r0000")[0])
  assert found["texts"][0]["at"][i] == visible(table["texts"]["prompt"][i])
  text = " ".join(" ".join(reader.text).split())
  for words in ("0.770", "0.700, 0.840", "0.610", "−3.125", "0.520", "12 Log"):
    assert words in text


def test_texts_are_cut_to_the_size_of_the_page(monkeypatch):
  out, table = make(200)
  monkeypatch.setattr(select_page, "TEXTS", 200 * 120)
  found = select_page.payload(out, table)
  sizes = [len(t) for one in found["texts"] for t in one["at"]]
  assert max(sizes) <= 40 and sum(sizes) <= select_page.TEXTS
  assert found["texts"][0]["at"][0].endswith("…")


def test_a_record_with_little_on_it_still_renders():
  pool = make_pool(["a", "b", "c"], {})
  for rows in (np.arange(1), np.arange(3), np.empty(0, np.int64)):
    out, table = selection_report.describe(pool, Selection(rows, np.zeros(3)))
    document = select_page.selection_html(out, table)
    assert "not measured" in document
    read(document)


# In a browser.


@pytest.fixture(scope="module")
def tab(made, tmp_path_factory):
  if browser.find() is None:
    names = ", ".join(browser.NAMES)
    pytest.skip(f"needs a Chromium: none of {names} is installed")
  path = tmp_path_factory.mktemp("page") / "selection.html"
  path.write_text(select_page.selection_html(*made), encoding="utf-8")
  with browser.page() as found:
    found.path = path
    yield found


@pytest.fixture
def opened(tab):
  tab.messages.clear()
  tab.open(tab.path)
  yield tab
  assert not tab.messages  # no error, no refused resource, no dialog
  assert tab.run("window.pwned === undefined")
  assert tab.run("document.querySelectorAll('script').length") == 2


def texts(tab, selector, of="e.textContent"):
  """`of` of every element, its text by default."""
  every = f"[...document.querySelectorAll({json.dumps(selector)})]"
  return tab.run(f"{every}.map(e => {of})")


def text(tab, selector):
  return texts(tab, selector)[0]


def click(tab, selector):
  tab.run(f"document.querySelector({json.dumps(selector)}).click()")


def in_view(tab):
  """The places in the table of the rows drawn, from the top."""
  return texts(tab, ".line", "Number(e.dataset.row)")


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


def scroll(tab, top):
  tab.run(
    f"document.getElementById('view').scrollTop = {top};"
    "new Promise(r => setTimeout(r, 200))"
  )


def search(tab, words):
  tab.type("#q", words)
  tab.run("new Promise(r => setTimeout(r, 120))")


def choose(tab, name, value):
  tab.run(
    f"(() => {{ const s = document.getElementById('f-{name}');"
    f"s.value = '{value}'; s.dispatchEvent(new Event('change')); }})()"
  )


def test_only_the_rows_in_view_are_drawn(opened, made):
  drawn = in_view(opened)
  assert 13 <= len(drawn) < 40
  order = np.argsort(made[1]["rank"])
  assert drawn == order[: len(drawn)].tolist()
  assert text(opened, "#count") == f"{N} of {N} rows, 60 of them kept."


@pytest.mark.parametrize(
  "key", ["rank", "score", "id", "length", "cosine", "source", "topic"]
)
def test_a_click_on_a_head_sorts(opened, made, key):
  table = made[1]
  if key == "rank":
    click(opened, "[data-key=id]")
  values = np.asarray(table[key]).tolist()
  if key == "score":
    values = [float(f"{v:.6g}") for v in values]
  elif isinstance(values[0], float):
    values = [round(v, 4) for v in values]
  elif isinstance(values[0], str):
    values = [visible(v) for v in values]
  rank = np.asarray(table["rank"])
  lost = [i for i, v in enumerate(values) if v in (np.inf, -np.inf)]
  for down in (False, True):
    click(opened, f"[data-key={key}]")
    (sort,) = texts(opened, f":has(> [data-key={key}])", "e.ariaSort")
    assert sort == ("descending" if down else "ascending")
    # Missing values last both ways; of equals, the better rank first.
    good = sorted(set(range(N)) - set(lost), key=lambda i: rank[i])
    good.sort(key=lambda i: values[i], reverse=down)
    assert every(opened) == good + sorted(lost, key=lambda i: rank[i])


def test_the_cells_are_those_of_the_table(opened, made):
  table = made[1]
  cells = texts(opened, ".line", "[...e.children].map(c => c.textContent)")
  for i, row in zip(in_view(opened), cells):
    assert row[0] == ("●" if table["kept"][i] else "○")
    assert int(row[1].replace(",", "")) == table["rank"][i]
    assert float(row[2].replace("−", "-")) == float(f"{table['score'][i]:.6g}")
    assert row[3] == table["id"][i]
    assert float(row[5]) == pytest.approx(table["cosine"][i], abs=6e-4)
    assert row[-1] == visible(table["texts"]["prompt"][i].strip())


WORDS = ["<script>", "</script>", "onerror=window", "\"'`${", "café", "東京"]
WORDS += ["🎈", "]]><!--", "{near}", "\\u003c", "e\u0301clair", "number 17"]
WORDS += ["prompt 3 of 4", "__proto__", "[u+202e]", "<b onclick", "not here"]


@pytest.mark.parametrize("words", WORDS)
def test_search_finds_just_the_rows_that_hold_all_words(opened, made, words):
  table = made[1]
  search(opened, words)
  lower = lambda text: unicodedata.normalize("NFC", text).lower()
  shown = [[visible(t.strip()) for t in x] for x in table["texts"].values()]
  columns = zip(table["id"], table["source"], table["topic"], *shown)
  rows = [lower("\n".join(map(str, row))) for row in columns]
  holds = lambda row: all(word in row for word in lower(words).split())
  wanted = {i for i, row in enumerate(rows) if holds(row)}
  assert (not wanted) == (words == "not here")
  if wanted:
    assert set(every(opened)) == wanted
    assert text(opened, "#count").startswith(f"{len(wanted)} of {N} rows")
  else:
    assert text(opened, "#count") == "No row matches." and not in_view(opened)
  search(opened, "")
  assert text(opened, "#count").startswith(f"{N} of {N}")


def test_filters_and_reset(opened, made):
  table = made[1]
  kept, near = np.asarray(table["kept"]), np.asarray(table["cosine"]) >= 0.95
  left = lambda rows: set(every(opened)) == set(np.flatnonzero(rows).tolist())
  choose(opened, "kept", 1)
  assert left(kept)
  choose(opened, "kept", 0)
  click(opened, "#f-copy")
  assert near[~kept].any() and left(~kept & near)
  click(opened, "#reset")
  assert text(opened, "#count") == f"{N} of {N} rows, 60 of them kept."
  choose(opened, "why", 5)  # no finite score
  assert left(~np.isfinite(table["score"]))
  choose(opened, "why", "")
  for name in ("source", "topic"):
    options = texts(opened, f"#f-{name} option", "[e.value, e.textContent]")
    column = np.array([visible(v) for v in table[name]])
    assert len(options) == len(set(column)) + 1
    value, words = options[1]
    choose(opened, name, value)
    assert left(column == words)
    choose(opened, name, "")


def test_a_row_has_its_reason_and_leads_to_its_neighbour(opened, made):
  out, table = made
  sentences = reasons.sentences(out, table)
  for place in (0, 5, 59, 60, 61, N - 1):
    i = int(np.argsort(table["rank"])[place])
    scroll(opened, 32 * place)
    click(opened, f'[data-row="{i}"]')
    assert text(opened, "#detail h3") == table["id"][i]
    assert text(opened, "#detail .reason") == sentences[i]
    shown = [visible(t[i].strip()) for t in table["texts"].values()]
    assert texts(opened, "#detail pre")[:3] == shown
    click(opened, "#detail .near")
    assert text(opened, "#detail h3") == table["near"][i]


def test_keys_move_through_the_rows(opened, made):
  order = np.argsort(made[1]["rank"])
  opened.run("document.getElementById('view').focus()")
  places = dict(ArrowDown=1, PageDown=13, ArrowUp=12, End=N - 1, Home=0)
  for key, place in places.items():
    for kind in ("keyDown", "keyUp"):
      opened.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    assert text(opened, "#detail h3") == made[1]["id"][order[place]]
    assert int(order[place]) in in_view(opened)


def test_the_map(opened, made):
  found = select_page.payload(*made)
  x, y = np.array(found["x"]), np.array(found["y"])
  opened.run(
    "document.documentElement.style.scrollBehavior = 'auto';"
    "document.getElementById('map').scrollIntoView()"
  )
  box = "(r => [r.left, r.top, r.width, r.height])(e.getBoundingClientRect())"
  ((left, top, wide, high),) = texts(opened, "#map", box)
  px = left + 10 + x / 1000 * (wide - 20)
  py = top + high - 10 - y / 1000 * (high - 20)
  gaps = np.hypot(px[:, None] - px, py[:, None] - py) + 99 * np.eye(N)
  alone = int(gaps.min(axis=1).argmax())  # the loneliest point
  opened.click(float(px[alone]), float(py[alone]))
  assert text(opened, "#detail h3") == made[1]["id"][alone]
  pixel = opened.run(
    f"[...document.getElementById('map').getContext('2d').getImageData("
    f"{px[alone] - left}, {py[alone] - top}, 1, 1).data]"
  )
  assert pixel[3] > 0
  x0, y0, x1, y1 = np.array([0.3, 0.2, 0.7, 0.6]) * [wide, high, wide, high]
  x0, y0, x1, y1 = map(float, (left + x0, top + y0, left + x1, top + y1))
  opened.click(x0, y0, (x1, y1))

  def within(room):
    across = (px > x0 + room) & (px < x1 - room)
    inside = across & (py > y0 + room) & (py < y1 - room)
    return set(np.flatnonzero(inside).tolist())

  assert 20 < len(within(0)) < N - 20
  assert within(1) <= set(every(opened)) <= within(-1)
  assert "within the rectangle" in text(opened, "#count")
  click(opened, "#reset")
  assert text(opened, "#count").startswith(f"{N} of {N}")
  choose(opened, "colour", "source")
  assert texts(opened, "#legend li").count("web") == 1


@pytest.mark.parametrize("width", [360, 500, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_no_width_scrolls_sideways(tab, width, dark):
  tab.open(tab.path, width, 900, dark)
  assert tab.run("document.documentElement.scrollWidth") <= width
  ground = "rgb(20, 23, 26)" if dark else "rgb(252, 252, 250)"
  assert tab.run("getComputedStyle(document.body).backgroundColor") == ground
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
  assert any(
    "Content Security Policy" in json.dumps(s) for s in opened.messages
  )
  opened.messages.clear()


@pytest.mark.slow
def test_a_hundred_thousand_rows_stay_usable(tab, tmp_path):
  rng = np.random.default_rng(0)
  n = 100_000
  length = rng.integers(3, 200, (n, 2))
  x = rng.normal(size=(n, 2, 8)).astype(np.float32)
  ids = [f"{i:06d}" for i in range(n)]
  pool = make_pool(ids, dict(length=length, embedding=x))
  score = rng.normal(size=n)
  long = {k: [f"{k} {i} " + "words " * 60 for i in range(n)] for k in SIDES}
  selection = Selection(np.argsort(-score)[:10_000], score)
  made = selection_report.describe(pool, selection, texts=long)
  document = select_page.selection_html(*made)
  assert len(document.encode()) < 32e6
  (tmp_path / "large.html").write_text(document)
  tab.messages.clear()
  tab.open(tmp_path / "large.html")
  timed = lambda selector: tab.run(
    "(() => { const t = performance.now();"
    f"document.querySelector({json.dumps(selector)}).click();"
    "return performance.now() - t; })()"
  )
  assert len(in_view(tab)) < 50
  assert timed("[data-key=score]") < 3000
  search(tab, "chosen 99999")
  tab.wait("document.getElementById('count').textContent.startsWith('1 of')")
  assert timed("#reset") < 3000
  scroll(tab, 32 * 99000)
  rows = texts(tab, ".line", "e.children[1].textContent")
  assert "99,001" in rows and not tab.messages
