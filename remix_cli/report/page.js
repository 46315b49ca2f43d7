// Draws the charts of the report. Text from runs is only ever set as text, never as markup.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const MAP = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"]; // cividis

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function label(parent, x, y, text, anchor) {
  svg("text", { x, y, "text-anchor": anchor || "start" }, parent).textContent = text;
}

function short(value) {
  const size = Math.abs(value);
  if (value !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2);
  return String(Number(value.toPrecision(5)));
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  const last = high + step * 1e-9;
  for (let i = Math.ceil(low / step - 1e-9); i * step <= last && found.length < 50; i++) found.push(i * step);
  return found;
}

// A tick's label, with the digits that tell it from the next one.
function tickText(value, step) {
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  if (value === 0 || (Math.abs(value) < 1e6 && digits < 6)) return String(Number(value.toFixed(digits)));
  const places = Math.max(0, Math.ceil(Math.log10(Math.abs(value) / step) - 1e-9));
  return value.toExponential(places).replace(/\.?0+e/, "e");
}

const runName = (i) => DATA.runs[i].name;
const runClass = (i) => `run${i % 8}`;
const dash = (i) => DASHES[(i + Math.floor(i / 8)) % 4]; // no two of 32 are alike

// A chart's frame: axes with round ticks, and the scales from values to pixels.
function frame(plot, chart, box) {
  const width = Math.max(plot.clientWidth, 200);
  const height = Math.min(340, Math.max(220, width * 0.45));
  const margin = { left: 52, right: 24, top: chart.y ? 22 : 10, bottom: 40 };
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height }, plot);
  const right = width - margin.right, bottom = height - margin.bottom;
  const x = (v) => margin.left + ((v - box.x0) / (box.x1 - box.x0)) * (right - margin.left);
  const y = (v) => bottom - ((v - box.y0) / (box.y1 - box.y0)) * (bottom - margin.top);
  const levels = ticks(box.y0, box.y1, height / 55);
  for (const v of levels) {
    svg("path", { d: `M${margin.left} ${y(v)}H${right}`, class: "grid" }, picture);
    label(picture, margin.left - 6, y(v) + 4, tickText(v, levels[1] - levels[0] || Math.abs(v) || 1), "end");
  }
  for (const v of ticks(box.x0, box.x1, width / 90)) {
    if (box.whole && v % 1) continue;
    label(picture, x(v), bottom + 18, short(v), "middle");
  }
  label(picture, (margin.left + right) / 2, height - 4, chart.x, "middle");
  if (chart.y) label(picture, 0, 12, chart.y);
  return { picture, x, y, width, height, left: margin.left, right, top: margin.top, bottom };
}

function extent(values, pad) {
  let low = Math.min(...values), high = Math.max(...values);
  const room = (high - low) * pad || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

function drawLines(plot, chart, data) {
  const xs = [...new Set(data.flatMap((s) => s.x))].sort((a, b) => a - b);
  const [y0, y1] = extent(data.flatMap((s) => s.y), 0.06);
  const [x0, x1] = xs.length > 1 ? [xs[0], xs[xs.length - 1]] : extent(xs, 0);
  const f = frame(plot, chart, { x0, x1, y0, y1, whole: true });
  for (const s of data) {
    const d = s.x.map((v, i) => `${i ? "L" : "M"}${f.x(v).toFixed(1)} ${f.y(s.y[i]).toFixed(1)}`).join("");
    svg("path", { d, class: `curve ${runClass(s.run)}`, "stroke-dasharray": dash(s.run) }, f.picture);
    if (s.x.length > 1) continue; // a line of one point is invisible
    svg("circle", { cx: f.x(s.x[0]), cy: f.y(s.y[0]), r: 4, class: `dot ${runClass(s.run)}` }, f.picture);
  }
  const cursor = svg("g", {}, f.picture);
  return {
    picture: f.picture,
    count: xs.length,
    at: (px) => nearest(xs, (v) => f.x(v), px),
    show(i) {
      cursor.replaceChildren();
      if (i === null) return null;
      const px = f.x(xs[i]);
      svg("path", { d: `M${px} ${f.top}V${f.bottom}`, class: "cursor" }, cursor);
      const lines = [`${chart.x} ${short(xs[i])}`];
      for (const s of data) {
        const at = s.x.indexOf(xs[i]);
        if (at < 0) continue;
        svg("circle", { cx: px, cy: f.y(s.y[at]), r: 4, class: `dot ${runClass(s.run)}` }, cursor);
        lines.push(`${runName(s.run)}: ${short(s.y[at])}`);
      }
      return { text: lines.join("\n"), x: px, y: f.top };
    },
  };
}

function drawBars(plot, chart, data) {
  const edges = data.edges, bins = edges.length - 1, count = data.series.length;
  const high = Math.max(...data.series.flatMap((s) => s.y));
  const box = { x0: edges[0], x1: edges[bins], y0: 0, y1: high * 1.05 || 1 };
  const f = frame(plot, chart, box);
  const bin = (f.right - f.left) / bins, wide = (bin * 0.86) / count;
  data.series.forEach((s, j) => {
    s.y.forEach((v, i) => {
      if (!v) return;
      const x = f.x(edges[i]) + bin * 0.07 + j * wide, height = Math.max(f.bottom - f.y(v), 1);
      const place = { x, y: f.bottom - height, width: Math.max(wide - 0.5, 0.8), height };
      svg("rect", { ...place, class: `bar ${runClass(s.run)}` }, f.picture);
    });
  });
  const cursor = svg("rect", { width: bin, height: f.bottom - f.top, y: f.top, class: "chosen" });
  return {
    picture: f.picture,
    count: bins,
    at: (px) => Math.min(bins - 1, Math.max(0, Math.floor((px - f.left) / bin))),
    show(i) {
      cursor.remove();
      if (i === null) return null;
      cursor.setAttribute("x", f.x(edges[i]));
      f.picture.append(cursor);
      const lines = [`${chart.x} ${short(edges[i])} to ${short(edges[i + 1])}`];
      for (const s of data.series) lines.push(`${runName(s.run)}: ${(100 * s.y[i]).toFixed(1)} %`);
      return { text: lines.join("\n"), x: f.x(edges[i + 1]), y: f.top };
    },
  };
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (MAP.length - 1);
  const i = Math.min(Math.floor(place), MAP.length - 2), part = place - i;
  const mix = [1, 3, 5].map((at) => {
    const [a, b] = [MAP[i], MAP[i + 1]].map((c) => parseInt(c.slice(at, at + 2), 16));
    return Math.round(a + (b - a) * part);
  });
  return `rgb(${mix.join(",")})`;
}

function drawHeat(plot, chart, data) {
  const { rows, columns, values } = data;
  const width = Math.max(plot.clientWidth, 200);
  const longest = Math.max(...rows.map((name) => name.length));
  const left = Math.min(width * 0.36, 12 + longest * 6.6);
  const high = Math.max(2, ...values.flat());
  const cell = rows.length > 40 ? 9 : rows.length > 16 ? 16 : 24;
  const top = 34, bottom = top + rows.length * cell, height = bottom + 40;
  const wide = Math.min(64, (width - left - 8) / columns.length);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height }, plot);
  for (let i = 0; i < 40; i++) {
    svg("rect", { x: left + i * 3, y: 4, width: 3.2, height: 10, fill: colour(i / 39) }, picture);
  }
  label(picture, left - 5, 13, "0", "end");
  label(picture, left + 126, 13, short(high));
  const fit = Math.floor(left / 6.6) - 1, every = Math.ceil(14 / cell);
  rows.forEach((name, r) => {
    const cut = name.length > fit ? `…${name.slice(-(fit - 1))}` : name;
    if (r % every === 0) label(picture, left - 5, top + r * cell + cell / 2 + 4, cut, "end");
    values[r].forEach((v, c) => {
      const place = { x: left + c * wide, y: top + r * cell, width: wide - 0.6, height: cell - 0.6 };
      svg("rect", { ...place, fill: colour(v / high) }, picture);
    });
  });
  const step = Math.ceil(22 / wide);
  columns.forEach((name, c) => {
    if (c % step === 0) label(picture, left + (c + 0.5) * wide, bottom + 14, name, "middle");
  });
  label(picture, left + (wide * columns.length) / 2, height - 6, chart.x, "middle");
  const cursor = svg("rect", { width: wide, height: cell, class: "cell" });
  const clamp = (v, n) => Math.min(n - 1, Math.max(0, v));
  return {
    picture,
    count: rows.length * columns.length,
    across: columns.length,
    at(px, py) {
      const c = clamp(Math.floor((px - left) / wide), columns.length);
      return clamp(Math.floor((py - top) / cell), rows.length) * columns.length + c;
    },
    show(i) {
      cursor.remove();
      if (i === null) return null;
      const r = Math.floor(i / columns.length), c = i % columns.length;
      cursor.setAttribute("x", left + c * wide);
      cursor.setAttribute("y", top + r * cell);
      picture.append(cursor);
      const text = `${rows[r]}\n${chart.x} ${columns[c]}: ${short(values[r][c])}`;
      return { text, x: left + (c + 1) * wide, y: top + (r + 1) * cell };
    },
  };
}

function nearest(values, place, px) {
  let best = 0;
  values.forEach((v, i) => {
    if (Math.abs(place(v) - px) < Math.abs(place(values[best]) - px)) best = i;
  });
  return best;
}

const DRAW = { lines: drawLines, bars: drawBars, heat: drawHeat };

function start(figure) {
  const chart = DATA.charts.find((c) => c.id === figure.dataset.chart);
  const plot = figure.querySelector(".plot"), select = figure.querySelector("select");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  let drawn = null, chosen = null;

  function show(i, speak) {
    chosen = i;
    const found = drawn.show(i);
    tip.hidden = found === null;
    if (found === null) return;
    tip.textContent = found.text;
    const room = plot.clientWidth - tip.offsetWidth;
    const left = found.x + 10 <= room ? found.x + 10 : found.x - tip.offsetWidth - 14;
    tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
    tip.style.top = `${Math.max(0, found.y)}px`;
    if (speak) document.getElementById("said").textContent = found.text;
  }

  function move(event) {
    const box = drawn.picture.getBoundingClientRect();
    const scale = drawn.picture.viewBox.baseVal.width / box.width;
    show(drawn.at((event.clientX - box.left) * scale, (event.clientY - box.top) * scale), false);
  }

  function press(event) {
    const across = drawn.across || 1;
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    if (drawn.across) Object.assign(steps, { ArrowDown: across, ArrowUp: -across });
    if (event.key === "Escape") show(null);
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = chosen === null ? 0 : chosen + steps[event.key];
    show(Math.min(drawn.count - 1, Math.max(0, next)), true);
  }

  function draw() {
    const view = chart.views[select ? Number(select.value) : 0];
    plot.replaceChildren();
    drawn = DRAW[chart.kind](plot, chart, view.data);
    const picture = drawn.picture;
    picture.setAttribute("tabindex", 0);
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `${chart.title}, ${view.label}. ${view.summary}`);
    picture.addEventListener("pointermove", move);
    picture.addEventListener("pointerdown", move);
    picture.addEventListener("pointerleave", () => show(null));
    picture.addEventListener("blur", () => show(null));
    picture.addEventListener("keydown", press);
    plot.append(tip);
    show(null);
    legend(figure, chart, view.data);
  }

  if (select) select.addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth !== width) draw();
    width = plot.clientWidth;
  }).observe(plot);
}

function legend(figure, chart, data) {
  const list = figure.querySelector(".legend");
  list.replaceChildren();
  for (const s of chart.kind === "heat" ? [] : chart.kind === "bars" ? data.series : data) {
    const item = document.createElement("li");
    const line = svg("svg", { viewBox: "0 0 28 10", class: runClass(s.run), "aria-hidden": "true" });
    const thick = chart.kind === "bars" ? 9 : 2.5;
    const style = { "stroke-width": thick, "stroke-dasharray": chart.kind === "bars" ? "" : dash(s.run) };
    svg("path", { d: "M0 5H28", fill: "none", ...style }, line);
    const { name, method } = DATA.runs[s.run];
    item.append(line, name === method ? name : `${name} (${method})`);
    list.append(item);
  }
}

// CSV ------------------------------------------------------------------------------------------

function rowsOf(chart) {
  const rows = [];
  if (chart.kind === "lines") rows.push(["view", "run", "x", "y"]);
  if (chart.kind === "bars") rows.push(["view", "run", "from", "to", "share"]);
  if (chart.kind === "heat") rows.push(["view", "row", "column", "value"]);
  for (const { label: view, data } of chart.views) {
    if (chart.kind === "lines") {
      for (const s of data) s.x.forEach((x, i) => rows.push([view, runName(s.run), x, s.y[i]]));
    } else if (chart.kind === "bars") {
      for (const s of data.series) {
        s.y.forEach((v, i) => rows.push([view, runName(s.run), data.edges[i], data.edges[i + 1], v]));
      }
    } else {
      data.values.forEach((row, r) => {
        row.forEach((v, c) => rows.push([view, data.rows[r], data.columns[c], v]));
      });
    }
  }
  return rows;
}

// A cell that begins like a formula would be run as one by a spreadsheet.
function csvCell(value) {
  let text = String(value);
  if (typeof value === "string" && /^[=+@\t-]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv(id) {
  const rows = id === "table" ? [DATA.table.headings, ...DATA.table.rows] : rowsOf(DATA.charts.find((c) => c.id === id));
  return `${rows.map((row) => row.map(csvCell).join(",")).join("\n")}\n`;
}

for (const button of document.querySelectorAll("button[data-csv]")) {
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(button.dataset.csv)], { type: "text/csv" }));
    link.download = `${button.dataset.csv}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
for (const figure of document.querySelectorAll("[data-chart]")) start(figure);
