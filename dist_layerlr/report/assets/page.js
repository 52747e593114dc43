"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
// Cells stand in the order of their names, which are written once.
for (const frame of data.frames) frame.cells = Object.fromEntries(data.names.map((name, i) => [name, frame.cells[i]]));
const main = document.querySelector("main");
const NS = "http://www.w3.org/2000/svg";
// Stops of a map that is even in lightness, so that it reads without colour too.
const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
// Okabe and Ito's colours; dashes tell the series apart where colours do not.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8860b"];
const DASHES = ["", "6 3", "2 3", "9 3 2 3"];
const WIDTH = 1120, LABEL = 120, ROW = 22, MOST = 64;

function make(kind, attributes, parent, text) {
  const svg = ["svg", "rect", "text", "path", "line", "g", "title"].includes(kind);
  const found = svg ? document.createElementNS(NS, kind) : document.createElement(kind);
  for (const [key, value] of Object.entries(attributes || {})) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  if (parent) parent.append(found);
  return found;
}

function shown(value) {
  if (value === null || value === undefined || !isFinite(value)) return "none";
  const size = Math.abs(value);
  return size === 0 || (size >= 0.01 && size < 1e5) ? String(+value.toPrecision(3)) : value.toExponential(1);
}

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((part, i) => Math.round(part + (at - low) * (STOPS[low + 1][i] - part)));
}

function section(title, note) {
  const found = make("section", {}, main);
  make("h2", {}, found, title);
  if (note) make("p", {}, found, note);
  return found;
}

const tip = document.getElementById("tip");
function point(element, text) {
  element.addEventListener("mousemove", (event) => {
    tip.textContent = text();
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  element.addEventListener("mouseleave", () => { tip.hidden = true; });
}

// A map of all panels. Returns what paints it with {cell: value}.
function heatMap(parent, name, describe) {
  const scale = make("div", { class: "scale" }, parent), painted = [];
  const low = make("span", {}, scale), bar = make("i", {}, scale), high = make("span", {}, scale);
  make("span", {}, scale, name + ", log scale");
  bar.style.background = "linear-gradient(to right, " + STOPS.map((s) => `rgb(${s})`).join(",") + ")";
  for (const panel of data.panels) {
    const figure = make("figure", {}, parent);
    make("h3", {}, figure, panel.title);
    const rows = panel.components, blocks = panel.blocks, foot = panel.outside ? 4 : 20;
    const size = Math.min((WIDTH - LABEL) / blocks, MOST), height = rows.length * ROW + foot;
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": panel.title }, figure);
    rows.forEach((row, y) => make("text", { x: LABEL - 6, y: y * ROW + 15, "text-anchor": "end" }, svg, row));
    const every = Math.ceil(26 / size);
    for (let x = 0; x < blocks && !panel.outside; x += every) {
      make("text", { x: LABEL + (x + 0.5) * size, y: rows.length * ROW + 14, "text-anchor": "middle", class: "soft" },
        svg, String(x));
    }
    for (const cell of panel.cells) {
      const x = LABEL + cell.block * size, y = rows.indexOf(cell.component) * ROW;
      const rect = make("rect", { x, y, width: Math.max(size - 1, 1), height: ROW - 1, tabindex: -1 }, svg);
      const text = size >= 50 ? make("text", { x: x + size / 2, y: y + 15, "text-anchor": "middle" }, svg) : null;
      painted.push({ cell, rect, text });
      point(rect, () => describe(cell));
      if (text) text.style.pointerEvents = "none";
    }
  }
  return (values) => {
    const known = painted.map(({ cell }) => values(cell)).filter((v) => v > 0);
    const least = Math.min(...known), most = Math.max(...known), span = Math.log(most / least) || 1;
    low.textContent = known.length ? shown(least) : "nothing above 0";
    high.textContent = known.length ? shown(most) : "";
    for (const { cell, rect, text } of painted) {
      const value = values(cell);
      const rgb = value > 0 ? colour(most > least ? Math.log(value / least) / span : 1) : null;
      rect.style.fill = rgb ? `rgb(${rgb})` : "var(--empty)";
      if (text) {
        text.textContent = value > 0 ? shown(value) : value === 0 ? "0" : "";
        const light = rgb && rgb[0] * 0.3 + rgb[1] * 0.59 + rgb[2] * 0.11 > 120;
        text.style.fill = rgb ? (light ? "#000" : "#fff") : "var(--soft)";
      }
    }
  };
}

function ticks(low, high, log) {
  if (log) {
    const found = [], first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const step = Math.max(1, Math.ceil((last - first) / 4));
    for (let power = first; power <= last; power += step) found.push(10 ** power);
    return found.length > 1 ? found : [low, Math.sqrt(low * high), high];
  }
  return [0, 1, 2, 3].map((i) => low + ((high - low) * i) / 3);
}

// Series: {name, points: [[step, value]], faint}. Values that are not above 0 leave a log chart.
function chart(parent, title, series, log) {
  const figure = make("figure", {}, parent), W = 546, H = 210, L = 56, B = 24, T = 8, R = 14;
  make("h3", {}, figure, title);
  const all = series.flatMap((s) => s.points).filter(([, v]) => v !== null && isFinite(v) && (!log || v > 0));
  if (!all.length) { make("p", {}, figure, "No numbers."); return; }
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (x1 === x0) x1 = x0 + 1;
  if (y1 === y0) { y0 = log ? y0 / 1.5 : y0 - (Math.abs(y0) || 1) * 0.1; y1 = log ? y1 * 1.5 : y1 + (Math.abs(y1) || 1) * 0.1; }
  const go = log ? Math.log : (v) => v;
  const px = (x) => L + ((x - x0) / (x1 - x0)) * (W - L - R);
  const py = (y) => H - B - ((go(y) - go(y0)) / (go(y1) - go(y0))) * (H - B - T);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title }, figure);
  for (const y of ticks(y0, y1, log)) {
    make("line", { x1: L, x2: W - R, y1: py(y), y2: py(y), stroke: "var(--line)" }, svg);
    make("text", { x: L - 6, y: Math.min(Math.max(py(y) + 4, 10), H - B + 2), "text-anchor": "end", class: "soft" }, svg, shown(y));
  }
  const marks = [...new Set([0, 1, 2, 3].map((i) => Math.round(x0 + ((x1 - x0) * i) / 3)))];
  marks.forEach((x, i) => {
    const anchor = i === 0 ? "start" : i === marks.length - 1 ? "end" : "middle";
    make("text", { x: px(Math.min(x, x1)), y: H - 8, "text-anchor": anchor, class: "soft" }, svg, (i === 0 ? "step " : "") + x);
  });
  const legend = make("div", { class: "legend" }, figure);
  series.forEach((one, i) => {
    const stroke = COLOURS[i % COLOURS.length], dash = DASHES[i % DASHES.length];
    const style = { stroke, "stroke-dasharray": dash, "stroke-width": 1.6, fill: "none", opacity: one.faint ? 0.6 : 1 };
    let path = "", pen = false;
    for (const [x, y] of one.points) {
      const known = y !== null && isFinite(y) && (!log || y > 0);
      if (known) path += `${pen ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`;
      pen = known;
    }
    make("path", { d: path, "stroke-linecap": "round", ...style }, svg);
    const entry = make("span", {}, legend);
    make("path", { d: "M0 4L26 4", ...style }, make("svg", { viewBox: "0 0 26 8" }, entry));
    entry.append(one.name);
  });
}

function median(values) {
  const sorted = values.filter((v) => v !== null).sort((a, b) => a - b), half = sorted.length >> 1;
  if (!sorted.length) return null;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function perComponent(index) {
  const cells = data.panels.flatMap((panel) => panel.cells), kinds = data.rates.map((one) => one.name);
  return kinds.map((kind) => ({
    name: kind,
    points: data.frames.map((frame) => [frame.step, median(cells.filter((c) => c.component === kind)
      .map((c) => (frame.cells[c.name] || [])[index] ?? null))]),
  }));
}

function table(parent, rows, head) {
  const found = make("table", {}, parent);
  if (head) head.forEach((word) => make("th", {}, found.tHead?.rows[0] || make("tr", {}, found.createTHead()), word));
  const body = make("tbody", {}, found);
  for (const row of rows) {
    const line = make("tr", {}, body);
    row.forEach((value) => make("td", {}, line, value));
  }
}

function factors(cell) {
  return [cell.name, `${cell.params} parameters, ${cell.numel.toLocaleString("en")} elements`, ...cell.lines].join("\n");
}

document.getElementById("summary").textContent = data.summary;
heatMap(section("Learning rates", "Blocks across, components down; grey cells are held at rate 0. Point at a cell for its rule and factors."),
  "learning rate", factors)((cell) => cell.lr);

if (data.frames.length) {
  const part = section("Gradients and updates",
    "Norms as the optimizer gets gradients, after clipping; |update| / |weights| of that step.");
  let frame = data.frames[data.frames.length - 1];
  const slide = make("label", { class: "slide" }, part), label = make("span", {}, slide);
  const input = make("input", { type: "range", min: 0, max: data.frames.length - 1, value: data.frames.length - 1 }, slide);
  const maps = [["Gradient norm", 1], ["Update-to-weight ratio", 3]].map(([name, index]) => {
    make("h3", {}, part, name);
    const words = ["learning rate", "gradient norm", "weight norm", "update / weight"];
    const describe = (cell) => [cell.name, `step ${frame.step + 1}`,
      ...words.map((word, i) => `${word} ${shown((frame.cells[cell.name] || [])[i])}`)].join("\n");
    return [heatMap(part, name.toLowerCase(), describe), index];
  });
  const paint = () => {
    frame = data.frames[input.value];
    label.textContent = `after step ${frame.step + 1}`;
    for (const [map, index] of maps) map((cell) => (frame.cells[cell.name] || [])[index] ?? null);
  };
  input.addEventListener("input", paint);
  paint();
}

if (data.loss.length) {
  const curves = make("div", { class: "pair" }, section("Curves"));
  let mean = null;
  const smooth = data.loss.map(([x, y]) => [x, (mean = y === null ? mean : mean === null ? y : 0.9 * mean + 0.1 * y)]);
  const losses = [{ name: "smoothed", points: smooth }, { name: "each row", points: data.loss, faint: true }];
  if (data.held.length) losses.push({ name: "held out", points: data.held });
  chart(curves, "Loss", losses, false);
  chart(curves, "Learning rate, median of each component", data.rates, true);
  if (data.frames.length) {
    chart(curves, "Gradient norm, median of each component", perComponent(1), true);
    chart(curves, "Update / weight, median of each component", perComponent(3), true);
  }
  if (data.speed.length) chart(curves, "Samples per second", [{ name: "all ranks", points: data.speed }], false);
}

if (data.samples.length) {
  const pictures = make("div", { class: "pictures" }, section("Samples"));
  for (const sample of data.samples) {
    const figure = make("figure", {}, pictures);
    make("h3", {}, figure, sample.name);
    make("img", { src: sample.uri, alt: sample.name }, figure);
  }
}

for (const [title, note, head, rows] of data.tables) table(section(title, note), rows, head);
document.body.dataset.drawn = "yes";
