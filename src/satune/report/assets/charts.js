"use strict";
// Charts from plain data: lines, bands, whiskers, marks by outcome, lanes of steps, and timelines.
// Text reaches the page by textContent alone.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = ["circle", "square", "up", "diamond", "down", "plus", "cross"];
const COLOURS = 6;

function node(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function html(tag, className = "", text = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  made.append(...children);
  return made;
}

// Controls and characters that turn the direction of writing become visible, one unit for one.
function plain(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g,
    (c) => (c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "\ufffd"));
}

function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return plain(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

const colourClass = (colour) => (typeof colour === "number" ? `c${colour % COLOURS}` : colour);

function shapePath(shape, x, y, r) {
  const d = r * 0.9, t = r * 0.42;
  switch (SHAPES[shape % SHAPES.length]) {
    case "square": return `M${x - d} ${y - d}h${2 * d}v${2 * d}h${-2 * d}z`;
    case "up": return `M${x} ${y - r * 1.15}L${x + r * 1.1} ${y + d}H${x - r * 1.1}z`;
    case "down": return `M${x} ${y + r * 1.15}L${x + r * 1.1} ${y - d}H${x - r * 1.1}z`;
    case "diamond": return `M${x} ${y - r * 1.25}l${r * 1.25} ${r * 1.25}l${-r * 1.25} ${r * 1.25}l${-r * 1.25} ${-r * 1.25}z`;
    case "plus": return `M${x - t} ${y - r}h${2 * t}v${r - t}h${r - t}v${2 * t}h${t - r}v${r - t}h${-2 * t}v${t - r}h${t - r}v${-2 * t}h${r - t}z`;
    case "cross": return `M${x - r} ${y - r + t}L${x - r + t} ${y - r}L${x} ${y - t}L${x + r - t} ${y - r}L${x + r} ${y - r + t}L${x + t} ${y}L${x + r} ${y + r - t}L${x + r - t} ${y + r}L${x} ${y + t}L${x - r + t} ${y + r}L${x - r} ${y + r - t}L${x - t} ${y}z`;
    default: return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
  }
}

// A mark that tells what became of a step by its form: full, half, hollow, crossed out, a dash.
function mark(shape, x, y, r, outcome, colour) {
  const group = node("g", { class: colourClass(colour) });
  if (outcome === "idle") {
    group.append(node("path", { class: "line", d: `M${x - r} ${y}h${2 * r}` }));
    return group;
  }
  const whole = outcome === undefined || outcome === "accepted";
  group.append(node("path", { class: whole ? "mark" : "mark hollow", d: shapePath(shape, x, y, r) }));
  if (outcome === "shrunk") group.append(node("path", { class: "mark", d: shapePath(shape, x, y, r * 0.45) }));
  if (outcome === "refused")
    group.append(node("path", { class: "strike", d: `M${x - r * 1.4} ${y - r * 1.4}L${x + r * 1.4} ${y + r * 1.4}M${x + r * 1.4} ${y - r * 1.4}L${x - r * 1.4} ${y + r * 1.4}` }));
  return group;
}

function ticks(low, high, wanted, least = 0) {
  const step = 10 ** Math.floor(Math.log10((high - low) / wanted));
  const factor = [1, 2, 5, 10].find((f) => (high - low) / (step * f) <= wanted) ?? 10;
  const width = Math.max(least, step * factor), found = [];
  for (let at = Math.ceil(low / width - 1e-9); at * width <= high + width * 1e-9; at++)
    found.push(Number((at * width).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) {
      const at = factor * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  const whole = found.filter((at) => Math.abs(Math.log10(at) % 1) < 1e-9);
  return found.length > 7 && whole.length > 1 ? whole : found;
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  const [a, b] = [f(low), f(high)];
  return (value) => from + ((f(value) - a) / (b - a || 1)) * (to - from);
}

const known = (values) => values.filter((v) => v !== null && v !== undefined);

function extent(values, log) {
  const found = log ? values.filter((v) => v > 0) : values;
  let [low, high] = [Math.min(...found), Math.max(...found)];
  if (!found.length) [low, high] = [log ? 0.1 : 0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  return [low, high];
}

function ends(chart, series) {
  const [x0, x1] = extent(series.flatMap((s) => s.x).concat(chart.lanes.flatMap((l) => l.x)), chart.log_x);
  const ys = known(series.flatMap((s) => [...s.y, ...s.low, ...s.high]).concat(chart.rules.map((r) => r.y)));
  let [y0, y1] = extent(ys, chart.log_y);
  if (chart.log_y) return { x0, x1, y0: y0 / 1.3, y1: y1 * 1.3 };
  if (chart.floor !== null) y0 = Math.min(chart.floor, y0);
  else y0 -= (y1 - y0) * 0.08;
  y1 = chart.ceiling !== null ? Math.max(chart.ceiling, y1) : y1 + (y1 - y0) * 0.1;
  return { x0, x1, y0, y1 };
}

function short(text, length) {
  const clean = plain(text);
  return clean.length > length ? `${clean.slice(0, length - 1)}…` : clean;
}

// On paper a plot is drawn anew for the width of a sheet, or of half of one.
let onPaper = false;
const everyPlot = [];

function widthOf(plot) {
  if (onPaper) return plot.parentElement.classList.contains("wide") ? 680 : 330;
  return Math.max(260, plot.clientWidth || 560);
}

function drawForPaper(paper) {
  onPaper = paper;
  for (const [plot, draw] of everyPlot) if (plot.isConnected) draw();
}

addEventListener("beforeprint", () => drawForPaper(true));
addEventListener("afterprint", () => drawForPaper(false));

// Draws into `plot`; gives the points that can be pointed at: {x, y, text}.
function drawChart(plot, chart, hidden) {
  const width = widthOf(plot);
  const wide = width > 600;
  const series = chart.series.filter((_, at) => !hidden.has(at));
  const named = Math.max(0, ...chart.lanes.map((l) => Math.min(12, l.name.length)));
  const left = Math.max(46, named * 6.4 + 12), right = 14, top = 26;
  const height = wide ? 260 : 200, laneHeight = 18;
  const gap = chart.lanes.length ? 8 : 0;
  const bottom = top + height, base = bottom + gap + chart.lanes.length * laneHeight;
  const svg = node("svg", { viewBox: `0 0 ${width} ${base + 36}`, role: "img", "aria-label": `${chart.title}: ${chart.y_label} by ${chart.x_label}` });
  const { x0, x1, y0, y1 } = ends(chart, series);
  const px = scale(x0, x1, left + 8, width - right - 8, chart.log_x), py = scale(y0, y1, bottom, top, chart.log_y);
  const hits = [];

  svg.append(node("text", { class: "tick", x: 0, y: 11 }, chart.y_label));
  for (const at of chart.log_y ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    svg.append(node("line", { class: "grid", x1: left, x2: width - right, y1: py(at), y2: py(at) }));
    svg.append(node("text", { class: "tick", x: left - 6, y: py(at) + 4, "text-anchor": "end" }, shown(at)));
  }
  svg.append(node("line", { class: "axis", x1: left, x2: width - right, y1: bottom, y2: bottom }));
  for (const at of chart.log_x ? logTicks(x0, x1) : ticks(x0, x1, wide ? 12 : 6, 1)) {
    svg.append(node("line", { class: "axis", x1: px(at), x2: px(at), y1: base, y2: base + 4 }));
    svg.append(node("text", { class: "tick", x: px(at), y: base + 16, "text-anchor": "middle" }, shown(at)));
  }
  svg.append(node("text", { class: "tick", x: (left + width - right) / 2, y: base + 31, "text-anchor": "middle" }, chart.x_label));

  for (const rule of chart.rules) {
    svg.append(node("line", { class: "rule", x1: left, x2: width - right, y1: py(rule.y), y2: py(rule.y) }));
    svg.append(node("text", { class: "halo", x: width - right - 2, y: py(rule.y) - 4, "text-anchor": "end" }, short(rule.label, 48)));
  }
  for (const one of series) drawSeries(svg, one, px, py, hits, chart.log_y);
  for (const [row, lane] of chart.lanes.entries()) {
    const y = bottom + gap + (row + 0.5) * laneHeight;
    svg.append(node("text", { class: "tick", x: left - 6, y: y + 4, "text-anchor": "end" }, short(lane.name, 12)));
    const r = Math.max(1.8, Math.min(5, (0.42 * (width - left - right)) / Math.max(1, lane.x.length)));
    lane.x.forEach((x, at) => {
      svg.append(mark(lane.colour, px(x), y, r, lane.outcomes[at], lane.colour));
      hits.push({ x: px(x), y, text: `${plain(lane.name)}: ${lane.outcomes[at]}\n${plain(lane.tips[at])}` });
    });
  }
  plot.replaceChildren(svg);
  return { svg, hits, width };
}

function drawSeries(svg, one, px, py, hits, logY) {
  const group = node("g", { class: colourClass(one.colour) });
  const fits = (v) => v !== null && v !== undefined && !(logY && v <= 0);
  const points = one.x.map((x, at) => (fits(one.y[at]) ? { x: px(x), y: py(one.y[at]), at } : null));
  const spans = one.x.map((x, at) => (fits(one.low[at]) && fits(one.high[at]) ? [px(x), py(one.low[at]), py(one.high[at])] : null)).filter(Boolean);
  if (spans.length && one.marker === null) {
    const there = spans.map(([x, , high]) => `${x} ${high}`), back = spans.map(([x, low]) => `${x} ${low}`).reverse();
    group.append(node("path", { class: "band", d: `M${there.concat(back).join("L")}z` }));
  } else for (const [x, low, high] of spans) group.append(node("line", { class: "whisker", x1: x, x2: x, y1: low, y2: high }));
  if (one.line !== "none") {
    let path = "", pen = "M";
    for (const point of points) {
      if (point) path += `${pen}${point.x} ${point.y}`;
      pen = point ? "L" : "M";
    }
    group.append(node("path", { class: one.line === "dashed" ? "line dashed" : "line", d: path }));
  }
  const r = Math.max(2.2, Math.min(4.5, 260 / Math.max(1, points.length)));
  for (const point of points) {
    if (!point) continue;
    if (one.marker !== null) group.append(mark(one.marker, point.x, point.y, r, one.outcomes[point.at], one.colour));
    hits.push({ x: point.x, y: point.y, text: pointText(one, point.at) });
  }
  svg.append(group);
}

function pointText(one, at) {
  const span = known([one.low[at], one.high[at]]);
  const between = span.length === 2 && span[0] !== span[1] ? ` [${shown(span[0])}, ${shown(span[1])}]` : "";
  const outcome = one.outcomes[at] ? `, ${one.outcomes[at]}` : "";
  return `${plain(one.name)}: ${shown(one.y[at])}${between}${outcome}` + (one.tips[at] ? `\n${plain(one.tips[at])}` : "");
}

function legendKey(one) {
  const svg = node("svg", { viewBox: "0 0 22 14", "aria-hidden": "true" });
  const group = node("g", { class: colourClass(one.colour) });
  if (one.line !== "none") group.append(node("path", { class: one.line === "dashed" ? "line dashed" : "line", d: "M1 7h20" }));
  if (one.marker !== null) group.append(mark(one.marker, 11, 7, 4, undefined, one.colour));
  svg.append(group);
  return svg;
}

function outcomeKeys(outcomes, says) {
  return outcomes.map((outcome) => {
    const svg = node("svg", { viewBox: "0 0 22 14", "aria-hidden": "true" }, mark(0, 11, 7, 4, outcome, "ink"));
    return html("span", "", "", svg, says[outcome]);
  });
}

// Shows the text of the nearest point while a pointer is over the plot.
function pointing(plot, drawn) {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const { svg, hits, width } = drawn();
    const box = svg.getBoundingClientRect(), k = width / box.width;
    const [x, y] = [(event.clientX - box.left) * k, (event.clientY - box.top) * k];
    let best = null, least = 24;
    for (const hit of hits) {
      const inside = hit.box && x >= hit.box[0] && x <= hit.box[1] && y >= hit.box[2] && y <= hit.box[3];
      const away = hit.box ? (inside ? 0 : 99) : Math.hypot(hit.x - x, hit.y - y);
      if (away < least) [best, least] = [hit, away];
    }
    if (!best) return hide();
    tip.textContent = best.text;
    tip.hidden = false;
    const room = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - room.width - 4))}px`;
    tip.style.top = `${event.clientY - room.height - 10 > 0 ? event.clientY - room.height - 10 : event.clientY + 18}px`;
  });
}

// Plots are drawn at once when they are in the page, so that addresses within it can be found, and
// again whenever their width changes.
const fresh = [];

function drawFresh() {
  everyPlot.splice(0, everyPlot.length, ...everyPlot.filter(([plot]) => plot.isConnected));
  fresh.splice(0).forEach((draw) => draw());
}

function redrawn(plot, draw) {
  let last = 0;
  const again = () => {
    if (plot.clientWidth && plot.clientWidth !== last) {
      last = plot.clientWidth;
      draw();
    }
  };
  fresh.push(again);
  everyPlot.push([plot, draw]);
  new ResizeObserver(again).observe(plot);
}

function chartItem(chart, says) {
  const box = html("figure", "item", "", html("h3", "", chart.title));
  box.style.margin = "0";
  if (chart.lanes.length || chart.series.length > 4) box.classList.add("wide");
  if (!chart.series.some((s) => known(s.y).length) && !chart.rules.length) {
    box.append(html("p", "absent", chart.absent));
    return box;
  }
  const hidden = new Set(), plot = html("div", "plot"), legend = html("div", "legend");
  let drawn = { svg: null, hits: [], width: 1 };
  const draw = () => { drawn = drawChart(plot, chart, hidden); };
  if (chart.series.length > 1)
    chart.series.forEach((one, at) => {
      const button = html("button", "", "", legendKey(one), plain(one.name));
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        if (!hidden.delete(at)) hidden.add(at);
        button.setAttribute("aria-pressed", String(!hidden.has(at)));
        draw();
      });
      legend.append(button);
    });
  const all = [...chart.series, ...chart.lanes].flatMap((s) => s.outcomes);
  const outcomes = Object.keys(says).filter((outcome) => all.includes(outcome));
  if (chart.explained && outcomes.length) legend.append(...outcomeKeys(outcomes, says));
  box.append(legend, plot);
  if (chart.note) box.append(html("p", "note", chart.note));
  box.append(numbers(chart));
  redrawn(plot, draw);
  pointing(plot, () => drawn);
  return box;
}

// The chart's numbers as a table, made when it is opened.
function numbers(chart) {
  const details = html("details", "numbers", "", html("summary", "", "numbers"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const rows = chart.series.flatMap((s) => s.x.map((x, at) => [s.name, x, s.y[at], s.low[at] ?? null, s.high[at] ?? null]));
    details.append(tableOf(["series", chart.x_label, chart.y_label, "low", "high"], rows, {}));
  });
  return details;
}

function tableOf(columns, rows, marks) {
  const numeric = columns.map((_, at) => rows.some((row) => typeof row[at] === "number") && rows.every((row) => typeof row[at] !== "string"));
  const head = html("tr", "", "", ...columns.map((name, at) => html("th", numeric[at] ? "number" : "", plain(name))));
  const body = rows.map((row, index) => {
    const cells = row.map((cell, at) => {
      const text = shown(cell);
      return html("td", numeric[at] || typeof cell === "number" ? "number" : text.length > 40 ? "long" : "", text);
    });
    return html("tr", marks[index] ?? "", "", ...cells);
  });
  return html("div", "scroll", "", html("table", "", "", html("thead", "", "", head), html("tbody", "", "", ...body)));
}

function tableItem(table) {
  const box = html("div", "item wide long", "", html("h3", "", table.title));
  if (table.rows.length) box.append(tableOf(table.columns, table.rows, table.marks));
  if (table.note) box.append(html("p", table.rows.length ? "note" : "absent", table.note));
  return box;
}

function drawTimeline(plot, chart, [from, to]) {
  const width = widthOf(plot), row = 26, left = 78, right = 14, top = 4;
  const base = top + chart.lanes.length * row;
  const svg = node("svg", { viewBox: `0 0 ${width} ${base + 34}`, role: "img", "aria-label": chart.title });
  const px = scale(from, to, left, width - right, false), hits = [];
  for (const at of ticks(from, to, width > 600 ? 10 : 5)) {
    svg.append(node("line", { class: "grid", x1: px(at), x2: px(at), y1: top, y2: base }));
    svg.append(node("text", { class: "tick", x: px(at), y: base + 15, "text-anchor": "middle" }, shown(at)));
  }
  svg.append(node("text", { class: "tick", x: (left + width) / 2, y: base + 30, "text-anchor": "middle" }, "seconds of work"));
  chart.lanes.forEach((name, at) => svg.append(node("text", { class: "tick", x: left - 8, y: top + (at + 0.5) * row + 4, "text-anchor": "end" }, short(name, 11))));
  for (const bar of chart.bars) {
    if (bar.end < from || bar.start > to) continue;
    const [x1, x2] = [px(Math.max(from, bar.start)), px(Math.min(to, bar.end))], y = top + bar.lane * row + 4;
    const colour = colourClass(chart.colours[chart.phases.indexOf(bar.phase)]);
    svg.append(node("rect", { class: `bar ${colour} ${bar.phase === "other" ? "other" : ""}`, x: x1, y, width: Math.max(0.6, x2 - x1), height: row - 8, rx: x2 - x1 > 6 ? 2 : 0 }));
    hits.push({ box: [x1 - 1, x2 + 1, y, y + row - 8], text: `${bar.phase}: ${shown(bar.end - bar.start)} s\n${plain(bar.tip)}` });
  }
  plot.replaceChildren(svg);
  return { svg, hits, width };
}

function timelineItem(chart) {
  const box = html("figure", "item wide", "", html("h3", "", chart.title));
  box.style.margin = "0";
  if (!chart.bars.length) {
    box.append(html("p", "absent", chart.absent));
    return box;
  }
  const end = Math.max(...chart.bars.map((bar) => bar.end));
  const plot = html("div", "plot"), legend = html("div", "legend"), choice = html("select");
  choice.setAttribute("aria-label", "stage");
  choice.append(new Option("whole run", "-1"), ...chart.stages.map(([stage], at) => new Option(`stage ${stage}`, at)));
  let drawn = { svg: null, hits: [], width: 1 };
  const draw = () => {
    const at = Number(choice.value);
    const span = at < 0 ? [0, end] : [chart.stages[at][1], (chart.stages[at + 1] ?? [0, end])[1]];
    drawn = drawTimeline(plot, chart, span);
  };
  choice.addEventListener("change", draw);
  chart.phases.forEach((phase, at) => {
    const key = node("svg", { viewBox: "0 0 22 14", "aria-hidden": "true" },
      node("rect", { class: `bar ${colourClass(chart.colours[at])} ${phase === "other" ? "other" : ""}`, x: 3, y: 2, width: 16, height: 10, rx: 2 }));
    legend.append(html("span", "", "", key, plain(phase)));
  });
  if (chart.stages.length > 1) legend.append(choice);
  box.append(legend, plot);
  if (chart.note) box.append(html("p", "note", chart.note));
  redrawn(plot, draw);
  pointing(plot, () => drawn);
  return box;
}
