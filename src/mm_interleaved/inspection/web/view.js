"use strict";
// The data are in <script id="data">; arrays are 16-bit integers in base64 (see inspection/page.py).
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#c8553d", "#2f7fb8", "#5a9a3c", "#9b5fc0", "#c79a1e", "#2a9d8f", "#d0679b", "#7a6a53"];
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const MARGIN = 0.14;  // around an image, for points outside of it
const MOST_POINTS = 800;
const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list" && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function integers(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

// A block of points with the axes [F, S, H, R, ...]: F layers or steps, S tokens or cells, H heads, R images.
class Block {
  constructor(data) {
    Object.assign(this, data);
    this.x = integers(data.locations);
    this.w = integers(data.weights);
    this.i = integers(data.ignored);
    this.shown = data.rows ? data.rows.length : 0;
  }
  ignoredAt(f, s, h) { return this.i[(f * this.units + s) * this.heads + h] / 65535; }
  weightAt(f, s, h, r, v, p) {
    return this.w[((((f * this.units + s) * this.heads + h) * this.images + r) * this.levels + v) * this.points + p] / 65535;
  }
  placeAt(f, s, h, r, p) {
    const at = 2 * ((((f * this.units + s) * this.heads + h) * this.images + r) * this.points + p);
    return [this.x[at], this.x[at + 1]].map((n) => this.low + n / 65535 * (this.high - this.low));
  }
}

// Texts: one block [layers, tokens]; images: a block [steps, cells] for each map of the UNet.
const RECORDS = DATA.records.map((record) => ({ ...record, blocks: record.blocks.map((b) => new Block(b)) }));
const state = { record: null, units: [], pinned: null, layer: -1, head: -1, level: -1, map: 0, step: -1,
                mode: "points", a: DATA.compared ? DATA.compared[0] : -1, b: DATA.compared ? DATA.compared[1] : -1 };
const ofText = (record) => record.kind === "text";
const block = (record) => record.blocks[ofText(record) ? 0 : Math.min(state.map, record.blocks.length - 1)];
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const name = (image) => `Image ${image + 1}`;
const colour = (image) => COLOURS[image % COLOURS.length];
const css = (property) => getComputedStyle(document.documentElement).getPropertyValue(property).trim();

function frames(record) {
  if (ofText(record)) return state.layer < 0 ? record.layers.map((_, k) => k) : [Math.min(state.layer, record.layers.length - 1)];
  return [state.step < 0 ? record.steps.length - 1 : Math.min(state.step, record.steps.length - 1)];
}
const heads = (record) => (state.head < 0 ? record.heads.map((_, k) => k) : [Math.min(state.head, record.heads.length - 1)]);
const levels = (record) => (state.level < 0 ? record.levels.map((_, k) => k) : [Math.min(state.level, record.levels.length - 1)]);

// The mean shares of the images and of the ignore slot over units, for some frames and heads.
function shares(record, units, fs = frames(record), hs = heads(record)) {
  const of = block(record), found = new Array(record.images.length).fill(0);
  const vs = levels(record), count = fs.length * hs.length * units.length || 1;
  let ignored = 0, outside = 0;
  for (const f of fs) for (const s of units) for (const h of hs) {
    ignored += of.ignoredAt(f, s, h);
    for (let r = 0; r < of.images; r++) for (let p = 0; p < of.points; p++) {
      let sum = 0;
      for (const v of vs) sum += of.weightAt(f, s, h, r, v, p);
      found[r] += sum;
      const [x, y] = of.placeAt(f, s, h, r, p);
      if (x < 0 || x > 1 || y < 0 || y > 1) outside += sum;
    }
  }
  return { images: found.map((n) => n / count), ignored: ignored / count, outside: outside / count };
}

function reference(record, unit) {
  if (ofText(record)) return [0.5, 0.5];
  const of = block(record), row = Math.floor(unit / of.shown), column = unit % of.shown;
  return [column, row].map((n) => (of.rows[n] + 0.5) / of.side);
}

// All points of the selection: levels that share a place are added up.
function points(record, units) {
  const of = block(record), found = [], vs = levels(record);
  const fs = frames(record), hs = heads(record), count = fs.length * hs.length * units.length || 1;
  for (const f of fs) for (const s of units) for (const h of hs) for (let r = 0; r < of.images; r++) for (let p = 0; p < of.points; p++) {
    let weight = 0, best = vs[0], most = -1;
    for (const v of vs) {
      const w = of.weightAt(f, s, h, r, v, p);
      weight += w;
      if (w > most) { most = w; best = v; }
    }
    const [x, y] = of.placeAt(f, s, h, r, p);
    found.push({ slot: r, x, y, weight: weight / count, own: weight, frame: f, unit: s, head: h, level: best });
  }
  return found.sort((a, b) => b.weight - a.weight);
}

function ramp(share) {
  const at = Math.max(0, Math.min(1, share)) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((n, k) => Math.round(n + (RAMP[low + 1][k] - n) * (at - low)));
}

function fit(canvas) {
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const width = Math.max(1, Math.round(box.width * ratio)), height = Math.max(1, Math.round(box.height * ratio));
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, box.width, box.height);
  return [context, box.width, box.height];
}

// ---- the document

const PHOTOS = DATA.views.map((url) => Object.assign(new Image(), { src: url }));
const words = [];    // {record, units, button, canvas}
const regions = [];  // {record, canvas, button, cursor}

function buildDocument() {
  const place = $("document");
  for (const segment of DATA.segments) {
    const role = segment.role ? [make("span", { className: "role" }, segment.role)] : [];
    const record = segment.record === null ? null : RECORDS[segment.record];
    if (segment.kind === "image") place.append(buildImage(segment, record, role));
    else if (record === null) place.append(make("p", { className: "given" }, ...role, segment.text));
    else place.append(buildText(record, role));
  }
}

function buildText(record, role) {
  const paragraph = make("p", {}, ...role);
  let group = null;  // a word with the punctuation after it, which does not go to a line of its own
  record.words.forEach(([begin, end], number) => {
    const text = record.pieces.slice(begin, end).join("");
    if (number && /^\s/.test(text)) paragraph.append(" ");
    if (!group || !/^[^\p{L}\p{N}\s<]+$/u.test(text)) paragraph.append(group = make("span", { className: "group" }));
    const units = Array.from({ length: end - begin }, (_, k) => begin + k);
    const canvas = make("canvas", { "aria-hidden": "true" });
    const button = make("button", { type: "button", className: "word" }, text.trim() || "\u2423", canvas);
    if (/^<.*>$/.test(text.trim())) button.classList.add("special");
    const word = { record, units, button, canvas, number };
    words.push(word);
    button.addEventListener("mouseenter", () => preview(record, units, true));
    button.addEventListener("focus", () => preview(record, units, true));
    button.addEventListener("click", (event) => {
      if (event.shiftKey && state.record === record) pin(record, span(state.units, units));
      else toggle(record, units);
    });
    button.addEventListener("keydown", (event) => moveWord(event, word));
    group.append(button);
  });
  paragraph.addEventListener("mouseleave", release);
  return paragraph;
}

const span = (some, more) => {
  const low = Math.min(...some, ...more), high = Math.max(...some, ...more);
  return Array.from({ length: high - low + 1 }, (_, k) => low + k);
};

function moveWord(event, word) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") unpin();
  if (!by) return;
  event.preventDefault();
  const next = words[words.indexOf(word) + by];
  if (!next) return;
  const units = event.shiftKey && next.record === state.record ? span(state.units, next.units) : null;
  next.button.focus();
  if (units) pin(next.record, units);
}

function buildImage(segment, record, role) {
  const label = name(segment.image);
  const picture = make("img", { src: DATA.views[segment.image], alt: label, className: "still" });
  if (record === null) return make("figure", {}, make("figcaption", {}, ...role, `${label}, ${segment.given ? "given" : "generated"}`), picture);
  const canvas = make("canvas", {});
  const title = record.images.length ? `${label}, generated: point at a region` : `${label}, generated; no image is before it`;
  if (!record.images.length) return make("figure", {}, make("figcaption", {}, ...role, title), picture);
  picture.className = "";
  const button = make("div", { className: "regions", tabIndex: 0, role: "application",
    "aria-label": `Regions of ${label}. Arrow keys move, Enter keeps the region.` }, picture, canvas);
  const region = { record, canvas, button, cursor: 0, start: null };
  regions.push(region);
  const at = (event) => {
    const box = button.getBoundingClientRect(), side = block(record).shown;
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [y, x].map((n) => Math.max(0, Math.min(side - 1, Math.floor(n * side)))).reduce((row, column) => row * side + column);
  };
  button.addEventListener("pointermove", (event) => {
    region.cursor = at(event);
    if (region.start !== null) pin(record, rectangle(record, region.start, region.cursor));
    else preview(record, [region.cursor], true);
  });
  button.addEventListener("pointerdown", (event) => {
    button.setPointerCapture(event.pointerId);
    region.start = event.shiftKey && state.record === record && state.pinned ? state.units[0] : at(event);
    pin(record, rectangle(record, region.start, at(event)));
  });
  button.addEventListener("pointerup", () => { region.start = null; });
  button.addEventListener("pointerleave", release);
  button.addEventListener("focus", () => { if (!button.matches(":hover")) preview(record, [region.cursor], true); });
  button.addEventListener("keydown", (event) => moveRegion(event, region));
  return make("figure", {}, make("figcaption", {}, ...role, title), button);
}

function rectangle(record, one, other) {
  const side = block(record).shown, found = [];
  const [r1, r2] = [one, other].map((n) => Math.floor(n / side)).sort((a, b) => a - b);
  const [c1, c2] = [one, other].map((n) => n % side).sort((a, b) => a - b);
  for (let r = r1; r <= r2; r++) for (let c = c1; c <= c2; c++) found.push(r * side + c);
  return found;
}

function moveRegion(event, region) {
  const side = block(region.record).shown;
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (event.key === "Escape") unpin();
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(region.record, [region.cursor]); }
  if (!step) return;
  event.preventDefault();
  const row = Math.floor(region.cursor / side) + step[0], column = region.cursor % side + step[1];
  if (row < 0 || column < 0 || row >= side || column >= side) return;
  region.cursor = row * side + column;
  if (event.shiftKey && state.record === region.record) pin(region.record, rectangle(region.record, state.units[0], region.cursor));
  else preview(region.record, [region.cursor], true, true);
}

// ---- the selection

function preview(record, units, hover, always) {
  if (state.pinned && !always) return;
  if (always) state.pinned = null;
  Object.assign(state, { record, units });
  draw();
}
function pin(record, units) { Object.assign(state, { record, units, pinned: { record, units } }); draw(); }
function unpin() { state.pinned = null; draw(); }
function toggle(record, units) {
  const same = state.pinned && state.pinned.record === record && String(state.pinned.units) === String(units);
  if (same) unpin(); else pin(record, units);
}
function release() { if (state.pinned) { Object.assign(state, state.pinned, { pinned: state.pinned }); draw(); } }

// ---- controls

function option(value, text) { return make("option", { value: String(value) }, text); }

function select(id, label, title) {
  const list = make("select", { id });
  list.addEventListener("change", () => { state[id] = Number(list.value); draw(); });
  return make("label", { id: `${id}-label`, title }, label, list);
}

function buildControls() {
  const step = make("input", { id: "step", type: "range", min: "0" });
  step.addEventListener("input", () => { state.step = Number(step.value); draw(); });
  const modes = make("fieldset", {}, make("legend", { className: "small" }));
  for (const [value, text] of [["points", "Points"], ["heat", "Heat map"]]) {
    const radio = make("input", { type: "radio", name: "mode", value, checked: value === state.mode });
    radio.addEventListener("change", () => { state.mode = value; draw(); });
    modes.append(make("label", {}, radio, text));
  }
  modes.firstChild.remove();
  modes.setAttribute("aria-label", "Points or heat map");
  $("controls").append(
    select("layer", "Layer", "Decoder layer of the language model"),
    select("map", "Map", "Map of the UNet whose cells ask"),
    make("label", { id: "step-label" }, make("span", { id: "step-text" }), step),
    select("head", "Head", "Head of MMFS"),
    select("level", "Level", "Level of the earlier image's pyramid"),
    modes,
    select("a", "Compare", "First image of the comparison"),
    select("b", "with", "Second image of the comparison"),
  );
}

function refill(id, values, texts, all) {
  const list = $(id), wanted = String(Math.min(state[id], values.length - 1));
  const key = JSON.stringify([values, texts, all]);
  if (list.dataset.key !== key) {
    list.replaceChildren(...(all === null ? [] : [option(-1, all)]), ...values.map((v, k) => option(v, texts[k])));
    list.dataset.key = key;
  }
  list.value = wanted;
}

function showControls(record) {
  const text = ofText(record), index = (list) => list.map((_, k) => k);
  $("layer-label").hidden = !text;
  $("map-label").hidden = $("step-label").hidden = text;
  refill("head", index(record.heads), record.heads.map(String), "all");
  refill("level", index(record.levels), record.levels.map((s) => `${s} \u00d7 ${s}`), "all");
  if (text) refill("layer", index(record.layers), record.layers.map(String), "all");
  else {
    refill("map", index(record.blocks), record.blocks.map((b) => b.name), null);
    $("step").max = String(record.steps.length - 1);
    const at = frames(record)[0];
    $("step").value = String(at);
    $("step").hidden = record.steps.length < 2;
    $("step").setAttribute("aria-valuetext", `step ${record.steps[at]}`);
    $("step-text").textContent = `Step ${record.steps[at]} of ${record.total} (time ${record.timesteps[at]})`;
  }
  const comparable = record.images.length > 1;
  $("a-label").hidden = $("b-label").hidden = !comparable;
  const known = [...record.images].sort((m, n) => m - n);
  for (const id of ["a", "b"]) {
    const list = $(id);
    list.replaceChildren(option(-1, "none"), ...known.map((n) => option(n, name(n))));
    list.value = known.includes(state[id]) ? String(state[id]) : "-1";
  }
}

// ---- drawing

const compared = (record) => (record.images.includes(state.a) && record.images.includes(state.b) && state.a !== state.b ? [state.a, state.b] : null);

function bar(canvas, record, found) {
  const [context, width, height] = fit(canvas), pair = compared(record);
  const order = record.images.map((image, slot) => [image, found.images[slot]]).sort((m, n) => m[0] - n[0]);
  const shown = pair ? order.filter(([image]) => pair.includes(image)) : order;
  const total = pair ? shown.reduce((sum, [, share]) => sum + share, 0) || 1 : 1;
  context.fillStyle = css("--bar");
  context.fillRect(0, 0, width, height);
  let x = 0;
  for (const [image, share] of shown) {
    context.fillStyle = colour(image);
    context.fillRect(x, 0, width * share / total, height);
    x += width * share / total;
  }
}

function drawWords() {
  for (const word of words) {
    const on = state.record === word.record && word.units.some((u) => state.units.includes(u));
    word.button.classList.toggle("chosen", on);
    word.button.setAttribute("aria-pressed", String(Boolean(on && state.pinned)));
    const found = shares(word.record, word.units);
    bar(word.canvas, word.record, found);
    word.button.title = sentence(word.record, found);
  }
}

function drawRegions() {
  for (const { record, canvas } of regions) {
    const [context, width] = fit(canvas), side = block(record).shown, cell = width / side, pair = compared(record);
    if (pair) {
      for (let unit = 0; unit < side * side; unit++) {
        const found = shares(record, [unit]), [a, b] = pair.map((image) => found.images[record.images.indexOf(image)]);
        context.globalAlpha = 0.65 * Math.abs(a - b) / (a + b || 1);
        context.fillStyle = colour(a > b ? pair[0] : pair[1]);
        context.fillRect((unit % side) * cell, Math.floor(unit / side) * cell, cell, cell);
      }
      context.globalAlpha = 1;
    }
    if (state.record !== record) continue;
    for (const [style, line] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      const [first, last] = [state.units[0], state.units[state.units.length - 1]];
      const x = (first % side) * cell, y = Math.floor(first / side) * cell;
      context.strokeRect(x, y, ((last % side) + 1) * cell - x, (Math.floor(last / side) + 1) * cell - y);
    }
  }
}

function sentence(record, found) {
  const parts = record.images.map((image, slot) => [image, found.images[slot]]).sort((m, n) => m[0] - n[0])
    .map(([image, share]) => `${name(image)} ${percent(share)}`);
  return [...parts, `ignored ${percent(found.ignored)}`].join(", ");
}

function drawImages(record, all) {
  const place = $("images"), pair = compared(record), units = state.units;
  const order = record.images.map((image, slot) => [image, slot]).sort((m, n) => m[0] - n[0]).filter(([image]) => !pair || pair.includes(image));
  const key = JSON.stringify(order);
  if (place.dataset.key !== key) {
    place.dataset.key = key;
    place.replaceChildren(...order.map(([image]) => {
      const mark = make("span", { className: "key" });
      mark.style.background = colour(image);
      return make("figure", {}, make("figcaption", {}, make("span", {}, mark, name(image)), make("span", { className: "share" })),
                  make("canvas", { role: "img" }));
    }));
  }
  const found = shares(record, units), most = Math.max(1e-9, ...all.slice(0, 1).map((p) => p.weight));
  order.forEach(([image, slot], number) => {
    const figure = place.children[number], canvas = figure.querySelector("canvas");
    figure.querySelector(".share").textContent = percent(found.images[slot]);
    const mine = all.filter((p) => p.slot === slot);
    canvas.setAttribute("aria-label", `${name(image)}: ${percent(found.images[slot])} of the weight, ${mine.length} points`);
    const [context, width] = fit(canvas), inner = width / (1 + 2 * MARGIN), start = inner * MARGIN;
    const at = (x, y) => [start + x * inner, start + y * inner];
    context.globalAlpha = state.mode === "heat" ? 0.75 : 0.9;
    if (PHOTOS[image].complete) context.drawImage(PHOTOS[image], start, start, inner, inner);
    context.globalAlpha = 1;
    if (state.mode === "heat") drawHeat(context, record, mine, start, inner);
    else drawPoints(context, record, mine.slice(0, MOST_POINTS), most, at, width);
    context.setLineDash([5, 4]);
    context.strokeStyle = css("--soft");
    context.lineWidth = 1;
    context.strokeRect(start, start, inner, inner);
    context.setLineDash([]);
    const seen = new Set(units.map((unit) => String(reference(record, unit))));
    if (seen.size <= 64) for (const text of seen) drawReference(context, ...at(...text.split(",").map(Number)));
  });
}

function drawPoints(context, record, mine, most, at, width) {
  const centre = (point) => at(...reference(record, point.unit));
  for (const point of mine.slice(0, 150)) {
    const [x, y] = at(point.x, point.y), [rx, ry] = centre(point);
    context.strokeStyle = `rgba(${ramp(point.weight / most).join(",")},${0.7 * Math.sqrt(point.weight / most)})`;
    context.lineWidth = 1.2;
    context.beginPath(); context.moveTo(rx, ry); context.lineTo(x, y); context.stroke();
  }
  for (const point of [...mine].reverse()) {
    const share = point.weight / most, [x, y] = at(point.x, point.y);
    const radius = Math.max(1.2, width / 34 * Math.sqrt(share));
    if (x < -radius || y < -radius || x > width + radius || y > width + radius) continue;
    context.beginPath(); context.arc(x, y, radius, 0, 7);
    context.fillStyle = `rgba(${ramp(share).join(",")},${0.35 + 0.6 * share})`;
    context.fill();
    context.strokeStyle = share > 0.15 ? "#000a" : "#0003";
    context.lineWidth = 0.8;
    context.stroke();
  }
}

function drawReference(context, x, y) {
  for (const [style, line] of [["#000", 3.5], ["#fff", 1.6]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.beginPath();
    context.arc(x, y, 5, 0, 7);
    context.moveTo(x - 10, y); context.lineTo(x + 10, y); context.moveTo(x, y - 10); context.lineTo(x, y + 10);
    context.stroke();
  }
}

// A point spreads over the cells of its level that it interpolates between.
function drawHeat(context, record, mine, start, inner) {
  const side = 48, heat = new Float32Array(side * side);
  for (const point of mine) {
    const wide = Math.max(1 / record.levels[point.level], 1 / side), reach = Math.ceil(wide * side);
    const [cx, cy] = [Math.floor(point.x * side), Math.floor(point.y * side)];
    for (let y = Math.max(0, cy - reach); y <= Math.min(side - 1, cy + reach); y++) {
      const down = 1 - Math.abs((y + 0.5) / side - point.y) / wide;
      if (down <= 0) continue;
      for (let x = Math.max(0, cx - reach); x <= Math.min(side - 1, cx + reach); x++) {
        const across = 1 - Math.abs((x + 0.5) / side - point.x) / wide;
        if (across > 0) heat[y * side + x] += point.weight * down * across / (wide * side) ** 2;
      }
    }
  }
  const most = Math.max(1e-12, ...heat), small = new OffscreenCanvas(side, side), pixels = new ImageData(side, side);
  heat.forEach((value, k) => {
    const share = value / most;
    pixels.data.set([...ramp(share), Math.round(235 * Math.sqrt(share))], 4 * k);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, start, start, inner, inner);
}

function drawShares(record, found) {
  const rows = record.images.map((image, slot) => [name(image), colour(image), found.images[slot], image]).sort((m, n) => m[3] - n[3]);
  if (state.level < 0) rows.push(["Ignore slot", css("--soft"), found.ignored]);
  rows.push(["Outside", css("--bar"), found.outside]);
  $("shares").replaceChildren(...rows.map(([text, paint, share]) => {
    const key = make("span", { className: "key" }), fill = make("div", { className: "fill" });
    key.style.background = fill.style.background = paint;
    fill.style.width = `${100 * share}%`;
    const label = make("span", {}, key, text);
    if (text === "Outside") label.title = "Weight of points outside of their image, where features count as 0; part of the images' shares";
    return make("div", { className: "row" }, label, make("div", { className: "track" }, fill), make("span", { className: "number" }, percent(share)));
  }));
}

function drawHeads(record) {
  const text = ofText(record), rows = text ? record.layers : record.blocks;
  $("grid-title").textContent = `Share of the ignore slot by ${text ? "layer" : "map"} and head; choose one`;
  const saved = state.map, head = make("tr", {}, make("th", {}, "head"), ...record.heads.map((h) => make("th", {}, String(h))));
  const dark = document.documentElement.classList.contains("dark");
  const body = rows.map((row, k) => {
    if (!text) state.map = k;
    const cells = record.heads.map((number, h) => {
      const side = text ? null : block(record).shown;
      const units = text || k === saved ? state.units : moved(record, saved, k, side);
      const ignored = shares(record, units, text ? [k] : frames(record), [h]).ignored;
      const chosen = state.head === h && (text ? state.layer === k : saved === k);
      const button = make("button", { type: "button", title: `${text ? `layer ${row}` : row.name}, head ${number}: ignored ${percent(ignored)}`,
                                      className: chosen ? "chosen" : "" }, String(Math.round(100 * ignored)));
      const shade = Math.round(dark ? 35 + 120 * ignored : 245 - 120 * ignored);
      button.style.background = `rgb(${shade},${shade},${Math.round(shade * 0.97)})`;
      button.style.color = shade <= 117 ? "#fff" : "#000";  // a contrast of at least 4.5
      button.addEventListener("click", () => {
        const again = chosen;
        if (text) state.layer = again ? -1 : k; else chooseMap(record, k);
        state.head = again ? -1 : h;
        draw();
      });
      return make("td", {}, button);
    });
    return make("tr", {}, make("th", { scope: "row" }, text ? `layer ${row}` : row.name), ...cells);
  });
  state.map = saved;
  $("heads").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

// The same region on another map of the UNet.
function moved(record, from, to) {
  const [a, b] = [record.blocks[from].shown, record.blocks[to].shown], found = new Set();
  for (const unit of state.units) {
    const row = Math.floor((Math.floor(unit / a) + 0.5) / a * b), column = Math.floor((unit % a + 0.5) / a * b);
    found.add(row * b + column);
  }
  return [...found].sort((m, n) => m - n);
}
function chooseMap(record, to) {
  const units = moved(record, state.map, to);
  for (const region of regions) if (region.record === record) region.cursor = units[0];
  Object.assign(state, { map: to, units });
  if (state.pinned) state.pinned = { record, units };
}

function drawOffsets(record, all) {
  const canvas = $("offsets").firstChild || $("offsets").appendChild(make("canvas", { role: "img" }));
  const bins = new Array(16).fill(0), counts = new Array(16).fill(0), end = 0.8;
  let total = 0, mean = 0;
  for (const point of all) {
    const [rx, ry] = reference(record, point.unit), length = Math.hypot(point.x - rx, point.y - ry);
    const bin = Math.min(bins.length - 1, Math.floor(length / end * bins.length));
    bins[bin] += point.weight; counts[bin] += 1 / all.length; total += point.weight; mean += point.weight * length;
  }
  const [context, width, height] = fit(canvas), base = height - 18, most = Math.max(...bins.map((n) => n / (total || 1)), ...counts);
  const wide = width / bins.length;
  bins.forEach((value, k) => {
    context.fillStyle = css("--accent");
    const tall = (base - 14) * value / (total || 1) / most;
    context.fillRect(k * wide + 1, base - tall, wide - 2, tall);
    context.strokeStyle = css("--soft");
    const line = base - (base - 14) * counts[k] / most;
    context.beginPath(); context.moveTo(k * wide + 1, line); context.lineTo((k + 1) * wide - 1, line); context.stroke();
  });
  context.fillStyle = css("--soft");
  context.font = "11px system-ui, sans-serif";
  ["0", "0.2", "0.4", "0.6", "0.8 and more"].forEach((text, k) => {
    context.textAlign = k === 0 ? "left" : k === 4 ? "right" : "center";
    context.fillText(text, Math.min(width, k * 0.2 / end * width), height - 4);
  });
  const words = `mean ${(mean / (total || 1)).toFixed(2)}`;
  context.textAlign = "right";
  context.fillText(words, width, 10);
  canvas.setAttribute("aria-label", `Histogram of distances from the reference point, in sides of the image: ${words}`);
}

function drawStrongest(record, all) {
  const text = ofText(record), head = ["image", "x", "y", "weight", text ? "layer" : "map", "head", "level", text ? "token" : "region"];
  const rows = all.slice(0, 6).map((p) => [
    name(record.images[p.slot]), p.x.toFixed(2), p.y.toFixed(2), p.own.toFixed(3), text ? record.layers[p.frame] : block(record).name,
    record.heads[p.head], record.levels[p.level], text ? record.pieces[p.unit].trim() || "\u2423" : p.unit,
  ]);
  $("strongest").replaceChildren(make("thead", {}, make("tr", {}, ...head.map((t) => make("th", {}, t)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((t) => make("td", {}, String(t)))))));
}

function drawScale(all) {
  const canvas = make("canvas", {});
  $("scale").replaceChildren("weight 0", canvas, all.length ? all[0].weight.toPrecision(2) : "0", " \u2295 reference point");
  const [context, width, height] = fit(canvas);
  for (let x = 0; x < width; x++) { context.fillStyle = `rgb(${ramp(x / width).join(",")})`; context.fillRect(x, 0, 1, height); }
}

function drawStatus(record, found) {
  const several = !ofText(record) && state.units.length > 1;
  const what = ofText(record)
    ? [make("b", {}, `\u201c${state.units.map((u) => record.pieces[u]).join("").trim()}\u201d`)]
    : [make("b", {}, `${several ? `${state.units.length} regions` : "A region"} of ${name(record.image)}`)];
  const blind = record.images.length ? sentence(record, found) : "no image is before it: all of the weight is in the ignore slot";
  $("status").replaceChildren(...what, ` ${several ? "look" : "looks"} at ${blind}${state.pinned ? " (kept)" : ""}`);
  if (!record.images.length) $("status").replaceChildren(...what, `: ${blind}`);
}

let drawn = null;
function draw() {
  if (state.record === null) return;
  const record = state.record;
  if (!ofText(record)) {
    state.map = Math.min(state.map, record.blocks.length - 1);
    const most = block(record).shown ** 2;
    if (drawn && drawn.record === record && drawn.map !== state.map) {
      const wanted = state.map;
      state.map = drawn.map;
      chooseMap(record, wanted);
    }
    state.units = state.units.filter((u) => u < most);
    if (!state.units.length) state.units = [0];
  }
  drawn = { record, map: state.map };
  showControls(record);
  const all = points(record, state.units), found = shares(record, state.units);
  drawStatus(record, found);
  drawImages(record, all);
  drawScale(all);
  drawShares(record, found);
  drawHeads(record);
  drawOffsets(record, all);
  drawStrongest(record, all);
  drawWords();
  drawRegions();
}

function setTheme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", String(dark));
  draw();
}

function begin() {
  $("about").textContent = DATA.about;
  buildDocument();
  buildControls();
  $("theme").addEventListener("click", () => setTheme(!document.documentElement.classList.contains("dark")));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") unpin(); });
  addEventListener("resize", draw);
  const first = words.find((w) => w.record.images.length) || words[0];
  if (first) Object.assign(state, { record: first.record, units: first.units });
  else if (regions.length) Object.assign(state, { record: regions[0].record, units: [0] });
  else $("status").textContent = "Nothing was generated after an image.";
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  Promise.all(PHOTOS.map((photo) => photo.decode().catch(() => null))).then(draw);
}
begin();
