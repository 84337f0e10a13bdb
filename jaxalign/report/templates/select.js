"use strict";
// The rows of a selection: filtered, sorted, searched; a table that draws
// only the rows in view, and a map. Text goes in as text, never as markup.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const n = data.id.length, HEIGHT = 32;
const text = (key, i) => {  // a coded column, or "" where there is none
  const column = data[key];
  return column ? column.names[column.at[i]] : "";
};
const kept = (i) => data.rank[i] <= data.selected;
const show = (x, digits) => x === null ? "–" : digits === undefined
  ? String(x).replace("-", "−") : x.toFixed(digits).replace("-", "−");
const figure = (x) => x === null ? "none"  // as `reasons.in_script`
  : x !== 0 && Math.abs(x) < 1e-4 ? x.toExponential() : String(x);
const count = (x) => x.toLocaleString("en-US");
const nearId = (i) => {
  const at = data.near ? data.near[i] : -1;
  return typeof at === "string" ? at : at < 0 ? "" : data.id[at];
};
const copy = (i) => data.copy.includes(data.near_code[i]);

function reason(i) {
  const words = {rank: count(data.rank[i]), near: nearId(i),
    score: figure(data.score[i]),
    cosine: figure(data.cosine ? data.cosine[i] : null), ...data.common};
  const whole = data.words.why[data.why[i]] +
    data.words.near[data.near_code[i]] + data.words.length[data.tail[i]];
  return whole.replace(/\{(\w+)\}/g, (_, name) => words[name]);
}

// Columns of the table.
const first = data.texts.length ? data.texts[0] : null;
const columns = [
  {key: "kept", head: "", width: "1rem", value: (i) => kept(i) ? 1 : 0,
   text: (i) => kept(i) ? "●" : "○", name: "kept"},
  {key: "rank", head: "Rank", width: "3.6rem", right: true,
   value: (i) => data.rank[i], text: (i) => count(data.rank[i])},
  {key: "score", head: "Score", width: "5.4rem", right: true,
   value: (i) => data.score[i],
   text: (i) => data.score[i] === null ? "–"
     : figure(data.score[i]).replace("-", "−")},
  {key: "id", head: "Id", width: "minmax(6rem,9rem)", code: true,
   value: (i) => data.id[i], text: (i) => data.id[i]}];
if (data.length) columns.push(
  {key: "length", head: "Tokens", width: "3.8rem", right: true,
   value: (i) => data.length[i], text: (i) => show(data.length[i])});
if (data.cosine) columns.push(
  {key: "cosine", head: "Nearest kept", width: "6.4rem", right: true,
   value: (i) => data.cosine[i], text: (i) => show(data.cosine[i], 3)});
for (const key of ["label", "source", "topic"]) {
  if (data[key]) columns.push(
    {key, head: key[0].toUpperCase() + key.slice(1),
     width: key === "label" ? "6rem" : "minmax(5rem,9rem)",
     value: (i) => text(key, i), text: (i) => text(key, i)});
}
if (first) columns.push(
  {key: "text", head: first.name, width: "minmax(14rem,1fr)",
   value: (i) => first.at[i], text: (i) => first.at[i].slice(0, 300)});

// What is shown now.
let order = Int32Array.from({length: n}, (_, i) => i), selected = -1;
let sortKey = "rank", down = false, box = null, hay = null;
let visible = new Uint8Array(n).fill(1);

function haystack() {
  if (hay) return hay;
  hay = new Array(n);
  for (let i = 0; i < n; i++) {
    let all = data.id[i] + "\n" + text("source", i) + "\n" + text("topic", i);
    for (const t of data.texts) all += "\n" + t.at[i];
    hay[i] = all.normalize("NFC").toLowerCase();
  }
  return hay;
}

function update() {
  const words = byId("q").value.normalize("NFC").toLowerCase()
    .split(/\s+/).filter(Boolean);
  const want = {};
  for (const key of ["kept", "why", "label", "source", "topic"]) {
    const one = byId("f-" + key);
    want[key] = one && one.value !== "" ? Number(one.value) : null;
  }
  const copies = byId("f-copy") && byId("f-copy").checked;
  const all = words.length ? haystack() : null;
  const found = [];
  let picked = 0;
  for (let i = 0; i < n; i++) {
    visible[i] = 0;
    if (want.kept !== null && want.kept !== (kept(i) ? 1 : 0)) continue;
    if (want.why !== null && data.why[i] !== want.why) continue;
    if (want.label !== null && data.label.at[i] !== want.label) continue;
    if (want.source !== null && data.source.at[i] !== want.source) continue;
    if (want.topic !== null && data.topic.at[i] !== want.topic) continue;
    if (copies && !copy(i)) continue;
    if (box && (data.x[i] < box[0] || data.x[i] > box[2] ||
                data.y[i] < box[1] || data.y[i] > box[3])) continue;
    if (all && !words.every((w) => all[i].includes(w))) continue;
    visible[i] = 1;
    found.push(i);
    if (kept(i)) picked++;
  }
  order = Int32Array.from(found);
  sort();
  byId("count").textContent = order.length === 0 ? "No row matches."
    : `${count(order.length)} of ${count(n)} rows, ${count(picked)} of them ` +
      "kept" + (box ? ", within the rectangle on the map." : ".");
  view.scrollTop = 0;
  draw();
  paint();
}

function sort() {
  const value = columns.find((c) => c.key === sortKey).value;
  const keys = new Array(n);
  for (const i of order) keys[i] = value(i);
  const side = down ? -1 : 1;
  order.sort((a, b) => {
    const x = keys[a], y = keys[b];
    if (x === y) return data.rank[a] - data.rank[b];
    if (x === null) return 1;  // what was not measured stands last
    if (y === null) return -1;
    return x < y ? -side : side;
  });
}

// The table.
const view = byId("view"), lines = byId("lines"), head = byId("head");
const inner = byId("inner");
inner.style.setProperty("--cols", columns.map((c) => c.width).join(" "));
for (const c of columns) {
  const cell = document.createElement("div");
  const button = document.createElement("button");
  cell.setAttribute("role", "columnheader");
  cell.className = c.right ? "r" : "";
  button.type = "button";
  button.dataset.key = c.key;
  button.textContent = c.head;
  if (c.name) button.setAttribute("aria-label", c.name);
  button.title = `sort by ${c.name || c.head.toLowerCase()}`;
  button.addEventListener("click", () => {
    down = sortKey === c.key ? !down : c.key === "kept";
    sortKey = c.key;
    sort();
    view.scrollTop = 0;
    heads();
    draw();
  });
  cell.append(button);
  head.append(cell);
}

function heads() {
  for (const cell of head.children) {
    const on = cell.firstChild.dataset.key === sortKey;
    cell.setAttribute("aria-sort",
      on ? (down ? "descending" : "ascending") : "none");
  }
}

function line(place) {
  const i = order[place], row = document.createElement("div");
  row.className = "line" + (kept(i) ? " kept" : "") +
    (i === selected ? " on" : "");
  row.style.top = place * HEIGHT + "px";
  row.id = "row-" + i;
  row.dataset.row = i;
  row.setAttribute("role", "row");
  row.setAttribute("aria-rowindex", place + 2);
  row.setAttribute("aria-selected", i === selected);
  for (const c of columns) {
    const cell = document.createElement("span");
    const inside = c.code ? document.createElement("code") : cell;
    cell.setAttribute("role", "gridcell");
    if (c.right) cell.className = "r";
    if (c.key === "kept") {
      cell.className = "dot";
      cell.setAttribute("aria-label", kept(i) ? "kept" : "left out");
    }
    inside.textContent = c.text(i);
    if (c.code) cell.append(inside);
    row.append(cell);
  }
  return row;
}

function draw() {
  const total = order.length;
  lines.style.height = total * HEIGHT + "px";
  view.setAttribute("aria-rowcount", total + 1);
  const from = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - 6);
  const to = Math.min(total,
    Math.ceil((view.scrollTop + view.clientHeight) / HEIGHT) + 6);
  const rows = [];
  for (let place = from; place < to; place++) rows.push(line(place));
  if (!total) {
    const none = document.createElement("p");
    none.className = "none";
    none.textContent = "No row matches: loosen a filter.";
    rows.push(none);
  }
  lines.replaceChildren(...rows);
}

const later = (fn) => {  // at most once a frame
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; fn(); });
  };
};
const drawSoon = later(draw), paintSoon = later(() => paint());
view.addEventListener("scroll", drawSoon);
lines.addEventListener("click", (event) => {
  const row = event.target.closest("[data-row]");
  if (row) choose(Number(row.dataset.row), false);
});
view.addEventListener("keydown", (event) => {
  const step = {ArrowDown: 1, ArrowUp: -1, PageDown: 12, PageUp: -12,
    Home: -n, End: n}[event.key];
  if (!step || !order.length) return;
  event.preventDefault();
  const at = order.indexOf(selected);
  const to = at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + step));
  choose(order[to], true);
});

// One row in full.
function element(name, words, kind) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.textContent = words;
  return made;
}

function texts(i) {
  return data.texts.flatMap((t) => {
    const body = element("pre", t.at[i], t.kind);
    body.dir = "auto";
    return [element("h4", t.name), body];
  });
}

function choose(i, scroll) {
  selected = i;
  const facts = [];
  if (data.length) facts.push(`${show(data.length[i])} tokens`);
  for (const key of ["label", "source", "topic"]) {
    if (data[key]) facts.push(text(key, i));
  }
  const parts = [element("h3", data.id[i]),
    element("p", reason(i), "reason"),
    element("p", facts.join(" · "), "meta"), ...texts(i)];
  const near = nearId(i);
  if (near) {
    const at = data.near[i];
    parts.push(element("h4", kept(i) ? "Nearest other kept row"
                                     : "Nearest kept row"));
    if (typeof at === "string") {
      parts.push(element("p", near));
    } else {
      const go = element("button", near, "near");
      go.type = "button";
      go.addEventListener("click", () => choose(at, true));
      parts.push(go);
      if (first) parts.push(...texts(at).slice(0, 2));
    }
  }
  byId("detail").replaceChildren(...parts);
  byId("detail").scrollTop = 0;
  const place = order.indexOf(i);
  if (scroll && place >= 0) {
    const top = place * HEIGHT;
    if (top < view.scrollTop) view.scrollTop = top;
    const low = top + HEIGHT - view.clientHeight;
    if (low > view.scrollTop) view.scrollTop = low;
  }
  draw();
  paint();
  if (place >= 0) view.setAttribute("aria-activedescendant", "row-" + i);
}

// The map.
const map = byId("map"), tip = byId("tip"), colours = byId("f-colour");
const HUES = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
let scale = null, hover = -1, drag = null;
const css = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name);

function hues() {
  const by = colours.value;
  if (!by) return null;
  const column = data[by], size = new Array(column.names.length).fill(0);
  for (const at of column.at) size[at]++;
  const rank = size.map((s, k) => [s, k]).sort((a, b) => b[0] - a[0]);
  const of = new Array(size.length).fill(-1);
  rank.slice(0, HUES.length).forEach(([, k], place) => { of[k] = place; });
  return {of, column, rank};
}

function legend(by) {
  const items = [];
  const add = (colour, words) => {
    const item = document.createElement("li"), dot = element("i", "");
    dot.style.setProperty("--s", `var(${colour})`);
    item.append(dot, element("span", words));
    items.push(item);
  };
  if (by) {
    by.rank.slice(0, HUES.length).forEach(([, k], place) =>
      add(HUES[place], by.column.names[k]));
    if (by.rank.length > HUES.length) add("--rest", "others");
  } else {
    add("--c0", "kept");
    add("--rest", "left out");
  }
  byId("legend").replaceChildren(...items);
}

function paint() {
  if (!map) return;
  const ratio = window.devicePixelRatio || 1;
  const wide = map.clientWidth, high = map.clientHeight;
  map.width = wide * ratio;
  map.height = high * ratio;
  const ctx = map.getContext("2d");
  ctx.scale(ratio, ratio);
  const pad = 10, side = 1000;
  scale = {x: (v) => pad + v / side * (wide - 2 * pad),
    y: (v) => high - pad - v / side * (high - 2 * pad),
    vx: (p) => (p - pad) / (wide - 2 * pad) * side,
    vy: (p) => (high - pad - p) / (high - 2 * pad) * side};
  const by = hues(), palette = HUES.map(css), rest = css("--rest");
  const size = n > 20000 ? 1 : n > 3000 ? 1.5 : 2.2;
  const dot = (i, r) => {
    ctx.beginPath();
    ctx.arc(scale.x(data.x[i]), scale.y(data.y[i]), r, 0, 7);
    ctx.fill();
  };
  for (const top of [false, true]) {  // the kept ones lie above
    for (let i = 0; i < n; i++) {
      if (kept(i) !== top) continue;
      const hue = by ? by.of[by.column.at[i]] : top ? 0 : -1;
      ctx.fillStyle = hue < 0 ? rest : palette[hue];
      ctx.globalAlpha = visible[i] ? (top ? 0.95 : 0.55) : 0.05;
      if (!by && !top) {
        const p = size * 1.4;  // squares are drawn faster than circles
        ctx.fillRect(scale.x(data.x[i]) - p / 2, scale.y(data.y[i]) - p / 2,
                     p, p);
      } else {
        dot(i, top ? size + 0.9 : size);
      }
    }
  }
  ctx.globalAlpha = 1;
  const ring = (i) => {
    ctx.strokeStyle = css("--ink");
    ctx.lineWidth = 2;
    ctx.beginPath();
    ctx.arc(scale.x(data.x[i]), scale.y(data.y[i]), 6, 0, 7);
    ctx.stroke();
  };
  if (selected >= 0) {
    const at = data.near ? data.near[selected] : -1;
    if (typeof at === "number" && at >= 0) {
      ctx.strokeStyle = css("--ink");
      ctx.setLineDash([3, 3]);
      ctx.beginPath();
      ctx.moveTo(scale.x(data.x[selected]), scale.y(data.y[selected]));
      ctx.lineTo(scale.x(data.x[at]), scale.y(data.y[at]));
      ctx.stroke();
      ctx.setLineDash([]);
    }
    ring(selected);
  }
  const around = drag ? drag.box() : box;
  if (around) {
    ctx.strokeStyle = css("--accent");
    ctx.lineWidth = 1.5;
    ctx.strokeRect(scale.x(around[0]), scale.y(around[3]),
      scale.x(around[2]) - scale.x(around[0]),
      scale.y(around[1]) - scale.y(around[3]));
  }
  legend(by);
}

function closest(px, py) {
  let best = -1, low = 14 * 14;
  for (let i = 0; i < n; i++) {
    if (!visible[i]) continue;
    const dx = scale.x(data.x[i]) - px, dy = scale.y(data.y[i]) - py;
    const d = dx * dx + dy * dy - (kept(i) ? 4 : 0);
    if (d < low) { low = d; best = i; }
  }
  return best;
}

if (map) {
  const at = (event) => {
    const r = map.getBoundingClientRect();
    return [event.clientX - r.left, event.clientY - r.top];
  };
  map.addEventListener("pointerdown", (event) => {
    const [x, y] = at(event);
    if (event.pointerType !== "mouse") return;
    drag = {x, y, x2: x, y2: y, box() {
      return [scale.vx(Math.min(this.x, this.x2)),
        scale.vy(Math.max(this.y, this.y2)),
        scale.vx(Math.max(this.x, this.x2)),
        scale.vy(Math.min(this.y, this.y2))];
    }};
    map.setPointerCapture(event.pointerId);
  });
  map.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (drag) {
      drag.x2 = x; drag.y2 = y;
      paintSoon();
      return;
    }
    const i = closest(x, y);
    if (i !== hover) {
      hover = i;
      tip.hidden = i < 0;
      if (i >= 0) tip.textContent = `${data.id[i]} · rank ` +
        `${count(data.rank[i])} · ${kept(i) ? "kept" : "left out"}` +
        (first ? `\n${first.at[i].slice(0, 120)}` : "");
    }
    if (i >= 0) {
      tip.style.left = Math.min(x + 12, map.clientWidth - 180) + "px";
      tip.style.top = Math.min(y + 12, map.clientHeight - 60) + "px";
    }
  });
  map.addEventListener("pointerleave", () => {
    tip.hidden = true;
    hover = -1;
  });
  const click = (x, y) => {
    const i = closest(x, y);
    if (i >= 0) choose(i, true);
  };
  map.addEventListener("pointerup", (event) => {
    const [x, y] = at(event);
    if (!drag) { click(x, y); return; }
    const moved = Math.hypot(drag.x2 - drag.x, drag.y2 - drag.y) > 5;
    const around = moved ? drag.box() : null;
    drag = null;
    if (moved || box) { box = around; update(); }
    if (!moved) click(x, y);
  });
  colours.addEventListener("change", paint);
  new ResizeObserver(() => { paintSoon(); drawSoon(); }).observe(map);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

let timer = 0;
byId("q").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(update, n > 20000 ? 150 : 40);
});
for (const key of ["kept", "why", "label", "source", "topic", "copy"]) {
  const one = byId("f-" + key);
  if (one) one.addEventListener("change", update);
}
byId("reset").addEventListener("click", () => {
  byId("q").value = "";
  for (const one of document.querySelectorAll(".tools select")) one.value = "";
  if (byId("f-copy")) byId("f-copy").checked = false;
  box = null;
  sortKey = "rank";
  down = false;
  heads();
  update();
});
heads();
update();
if (n) choose(order[0], false);
document.documentElement.dataset.ready = "1";
})();
