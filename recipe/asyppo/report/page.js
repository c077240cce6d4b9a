// Draws the report from the JSON beside it. Text of a run only ever becomes a text node.
"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const COLOURS = ["#4269d0", "#e8a80c", "#ff725c", "#35a58f", "#3ca951", "#e8649c", "#a463f2", "#9c6b4e", "#7f8896", "#5aa9e6"];
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name);
const charts = [];

function add(parent, tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  parent.append(element);
  return element;
}

function format(number) {
  if (number === null || number === undefined) return "–";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(number.toPrecision(3)).toExponential();
  return String(Number(number.toPrecision(4)));
}

function table(parent, head, rows, classes = []) {
  const box = add(parent, "div", "", "scroll"), body = add(box, "table");
  const fill = (tag, cells) => {
    const row = add(body, "tr");
    cells.forEach((cell, i) => add(row, tag, cell, tag === "td" ? classes[i] || "" : ""));
  };
  fill("th", head);
  rows.forEach(row => fill("td", row));
}

// -- curves ------------------------------------------------------------------------------------------------------------

// Of a logarithmic axis only 1, 2 and 5 of every decade.
const roundOnly = (_, splits) => splits.map(value => value !== null && /^[125](e|$)/.test(value.toExponential()) ? value : null);

function axis(size, isLog = false) {
  return {
    ...(isLog && { filter: roundOnly }),
    stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, size, font: "12px system-ui",
    values: (_, values) => values.map(value => value === null ? "" : format(value)),
  };
}

// A line plot as wide as its parent; `series` as uPlot takes it, x first in `data`.
function chart(parent, data, series, options = {}) {
  const last = data[0].length - 1;
  const plot = new uPlot({
    width: parent.clientWidth - 30, height: 210, padding: [8, 8, 0, 0],
    scales: { x: { time: false }, y: options.log ? { distr: 3 } : {} },
    axes: [axis(34), axis(58, options.log)],
    series: [{ label: options.x || "step" }, ...series],
    bands: options.bands || [],
    cursor: { points: { size: 6 }, ...options.cursor },
    hooks: {
      setCursor: [plot => { options.onCursor?.(plot.cursor.idx ?? null); }],
      setLegend: [plot => { if (plot.legend.idx == null) plot.setLegend({ idx: last }, false); }],
      setSeries: [(plot, index, change) => {
        (options.edges?.[index] || []).forEach(edge => plot.setSeries(edge, { show: change.show }, false));
      }],
    },
  }, data, parent);
  plot.setLegend({ idx: last }, false);
  new ResizeObserver(() => plot.setSize({ width: parent.clientWidth - 30, height: 210 })).observe(parent);
  charts.push(plot);
  return plot;
}

function shortName(key, keys) {
  const common = keys.length < 2 ? "" : keys.reduce((prefix, other) => {
    while (!other.startsWith(prefix)) prefix = prefix.slice(0, prefix.lastIndexOf("/", prefix.length - 2) + 1);
    return prefix;
  }, keys[0].slice(0, keys[0].lastIndexOf("/") + 1));
  return key.slice(common.length);
}

function drawPanel(parent, panel) {
  const card = add(parent, "div", "", "card");
  add(card, "h3", panel.title);
  const keys = [...new Set(panel.lines.map(line => line.key))], several = report.bands.length > 1;
  const data = [panel.steps], series = [], bands = [], edges = {};
  for (const line of panel.lines) {
    const index = keys.indexOf(line.key), colour = COLOURS[(several ? line.band : index) % COLOURS.length];
    const name = shortName(line.key, keys);
    const label = several ? report.bands[line.band] + (keys.length > 1 ? " · " + name : "") : name;
    data.push(line.mean);
    series.push({ label, stroke: colour, width: 1.5, dash: several ? DASHES[index % 4] : [], spanGaps: true,
      points: { show: line.mean.filter(value => value !== null).length < 12 }, value: (_, value) => format(value) });
    const at = series.length;
    if (line.low) {
      for (const edge of [line.high, line.low]) {
        data.push(edge);
        series.push({ label: "", class: "edge", stroke: "transparent", width: 0, points: { show: false }, spanGaps: true });
      }
      bands.push({ series: [at + 1, at + 2], fill: colour + "2e" });
      edges[at] = [at + 1, at + 2];
    }
  }
  chart(card, data, series, { log: panel.log, bands, edges, cursor: { sync: { key: "steps", scales: ["x", null] } } });
}

function drawCurves() {
  const parent = document.getElementById("curves");
  for (const [title, panels] of Object.entries(report.sections)) {
    const section = add(parent, "section");
    section.id = title.toLowerCase();
    add(section, "h2", title);
    const grid = add(section, "div", "", "grid");
    panels.forEach(panel => drawPanel(grid, panel));
  }
}

// -- verdict and settings ----------------------------------------------------------------------------------------------

function drawVerdict() {
  const section = document.getElementById("verdict");
  add(section, "p", report.verdict.summary, report.verdict.findings.length ? "" : "healthy");
  if (report.verdict.findings.length)
    table(section, ["run", "metric", "value", "healthy range", "what to try"], report.verdict.findings, ["", "", "value"]);
}

function drawSettings() {
  const section = document.getElementById("settings");
  if (report.settings.length) table(section, ["setting", ...report.runs.map(run => run.name)], report.settings);
  else add(section, "p", report.runs.length > 1 ? "None." : "There is one run; give more to compare them.", "soft");
}

// -- start -------------------------------------------------------------------------------------------------------------

document.getElementById("runs").textContent = report.runs.map(run => `${run.name} (${run.steps} steps)`).join(", ") + " · " + report.made;
drawVerdict();
drawSettings();
drawCurves();
for (const section of document.querySelectorAll("section")) {
  const link = add(document.getElementById("nav"), "a", section.querySelector("h2").textContent);
  link.href = "#" + section.id;
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(plot => plot.redraw(false)));
