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

// Steps and tokens have no fractions.
const WHOLE = [...Array(9).keys()].flatMap(power => [1, 2, 5].map(digit => digit * 10 ** power));

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
    width: parent.clientWidth - 30, height: options.height || 210, padding: [8, 8, 0, 0],
    scales: { x: { time: false }, y: options.log ? { distr: 3 } : {} },
    axes: [{ ...axis(34), incrs: WHOLE }, axis(58, options.log)],
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
  new ResizeObserver(() => plot.setSize({ width: parent.clientWidth - 30, height: options.height || 210 })).observe(parent);
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

// -- token view --------------------------------------------------------------------------------------------------------

const MASKED = 1, FILTERED = 2, OBSERVATION = 4;
const chosen = { step: 0, group: 0, colour: "sigma", responses: "all", masked: false, filtered: false, high: false };
let tokenCharts = [];

// Controls, and marks that would turn the text behind them around, become visible; the joiners of scripts stay.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
  mark => "\u27e8" + mark.codePointAt(0).toString(16).padStart(4, "0") + "\u27e9");
const quoted = text => text === "" ? "(a later byte)" : visible(text).replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u2423");

function select(parent, label, key, options) {
  const box = add(add(parent, "label", label), "select");
  box.name = key;
  options.forEach(([value, text]) => { add(box, "option", text).value = value; });
  box.value = chosen[key];
  box.onchange = () => { chosen[key] = box.value; drawTokens(); };
}

function check(parent, label, key, className) {
  const box = add(parent, "label"), input = add(box, "input");
  input.type = "checkbox";
  input.name = key;
  input.onchange = () => { chosen[key] = input.checked; drawTokens(); };
  add(box, "span", label, className);
}

function drawControls() {
  const section = document.getElementById("tokens"), steps = report.tokens.steps;
  if (!steps.length) {
    add(section, "p", "The runs kept no tokens; +asyppo.inspect.every=50 keeps some prompts of every 50th step.", "soft");
    return;
  }
  const controls = add(section, "div", "", "controls");
  select(controls, "Step", "step", steps.map((step, i) => [i, `${step.run}, step ${step.step}`]));
  select(controls, "Prompt", "group", [...Array(Math.max(...steps.map(step => step.groups.length))).keys()].map(i => [i, i + 1]));
  select(controls, "Responses", "responses", [["all", "all"], ["right", "right (reward above 0)"], ["wrong", "wrong"]]);
  select(controls, "Colour", "colour", [["sigma", "sigma"], ["advantage", "advantage"], ["after", "advantage after the mask"], ["entropy", "entropy"]]);
  add(controls, "span", "", "key");
  const show = add(controls, "span", "Show only", "controls");
  check(show, "masked", "masked", "masked");
  check(show, "filtered", "filtered", "filtered");
  check(show, "high sigma (top 10 %)", "high");
  if (report.tokens.left_out) add(section, "p", `${report.tokens.left_out} more responses are in the runs' inspect folders; a page has no room for them.`, "soft");
  add(section, "div").id = "lists";
  add(section, "div").id = "group";
}

function background(step, response, i) {
  const name = chosen.colour, number = response[name]?.[i] ?? 0, scale = step.scale[name === "after" ? "advantage" : name] || 1;
  const hue = name === "sigma" || name === "entropy" ? "--hot" : number > 0 ? "--up" : "--down";
  return `color-mix(in srgb, var(${hue}) ${(65 * Math.min(1, Math.abs(number) / scale)).toFixed(0)}%, transparent)`;
}

function isChosen(step, response, i) {
  const asked = [chosen.masked && response.flags[i] & MASKED, chosen.filtered && response.flags[i] & FILTERED, chosen.high && response.sigma[i] >= step.high_sigma];
  return !(chosen.masked || chosen.filtered || chosen.high) || asked.some(Boolean);
}

function describe(box, response, i) {
  const flags = response.flags[i], facts = [["token " + (i + 1), quoted(response.tokens[i])]];
  response.values.forEach((values, critic) => facts.push(["critic " + critic, format(values[i])]));
  facts.push(["sigma", format(response.sigma[i])], ["advantage", format(response.advantage[i])], ["after the mask", format(response.after[i])]);
  if (response.entropy) facts.push(["entropy", format(response.entropy[i])]);
  const words = [[MASKED, "masked"], [FILTERED, "filtered"], [OBSERVATION, "observation"]].filter(([bit]) => flags & bit).map(([, word]) => word);
  if (words.length) facts.push(["", words.join(", ")]);
  box.replaceChildren();
  for (const [name, value] of facts) {
    const fact = add(box, "span");
    add(fact, "b", name);
    fact.append(" " + value);
  }
}

function drawResponse(parent, step, response) {
  const card = add(parent, "div", "", "card response"), isRight = response.score > 0;
  const head = add(card, "h3", `Response ${response.name} · `);
  add(head, "span", `reward ${format(response.score)}`, isRight ? "healthy" : "value");
  head.append(` · ${response.tokens.length} tokens`);
  const text = add(card, "div", "", "text"), numbers = add(card, "div", "", "numbers");
  const spans = response.tokens.map((token, i) => {
    const flags = response.flags[i], isFaded = !isChosen(step, response, i);
    const span = add(text, "span", visible(token), [[flags & MASKED, "masked"], [flags & FILTERED, "filtered"],
      [flags & OBSERVATION, "observation"], [isFaded, "faded"]].filter(([on]) => on).map(([, name]) => name).join(" "));
    span.style.background = background(step, response, i);
    return span;
  });
  let marked = null;
  const mark = i => {
    if (i === null || i === marked) return;
    if (marked !== null) spans[marked].classList.remove("at");
    spans[marked = i].classList.add("at");
    describe(numbers, response, i);
  };
  const data = [response.tokens.map((_, i) => i + 1), ...response.values];
  const series = response.values.map((_, critic) => ({ label: "critic " + critic, stroke: COLOURS[critic % COLOURS.length], width: 1.5,
    points: { show: response.tokens.length < 40 }, value: (_, value) => format(value) }));
  const plot = chart(card, data, series, { x: "token", onCursor: mark, height: 150 });
  tokenCharts.push(plot);
  text.onpointermove = event => {
    const i = spans.indexOf(event.target);
    if (i < 0 || i === marked) return;
    plot.setCursor({ left: plot.valToPos(i + 1, "x"), top: 10 }, false);
    mark(i);
  };
  if (spans.length) mark(0);
}

function drawLists(parent, step) {
  const grid = add(parent, "div", "", "grid lists"), card = add(grid, "div", "", "card");
  add(card, "h3", "Tenths of the tokens by sigma, lowest first");
  const means = Object.entries(step.by_sigma);
  tokenCharts.push(chart(card, [[...Array(10).keys()].map(i => i + 1), ...means.map(([, values]) => values)],
    means.map(([label], i) => ({ label, stroke: COLOURS[i], width: 1.5, value: (_, value) => format(value) })), { x: "tenth" }));
  for (const list of step.lists) {
    const card = add(grid, "div", "", "card");
    add(card, "h3", list.title);
    table(card, ["token", "mean", "seen"], list.rows.map(([text, mean, count]) => [quoted(text), format(mean), String(count)]), ["text", "number", "number"]);
  }
}

function drawTokens() {
  const parent = document.getElementById("group"), step = report.tokens.steps[chosen.step];
  if (!step) return;
  tokenCharts.forEach(plot => { charts.splice(charts.indexOf(plot), 1); plot.destroy(); });
  tokenCharts = [];
  parent.replaceChildren();
  document.getElementById("lists").replaceChildren();
  document.querySelector(".key").style.background = `linear-gradient(to right, ${chosen.colour === "advantage" || chosen.colour === "after" ? "var(--down), transparent, var(--up)" : "transparent, var(--hot)"})`;
  const group = step.groups[Math.min(chosen.group, step.groups.length - 1)];
  add(parent, "div", visible(group.prompt), "card text prompt");
  const grid = add(parent, "div", "", "grid responses");
  group.responses.filter(response => chosen.responses === "all" || (chosen.responses === "right") === (response.score > 0))
    .forEach(response => drawResponse(grid, step, response));
  drawLists(document.getElementById("lists"), step);
}

// -- start -------------------------------------------------------------------------------------------------------------

document.getElementById("runs").textContent = report.runs.map(run => `${run.name} (${run.steps} steps)`).join(", ") + " · " + report.made;
drawVerdict();
drawSettings();
drawCurves();
drawControls();
drawTokens();
for (const section of document.querySelectorAll("section")) {
  const link = add(document.getElementById("nav"), "a", section.querySelector("h2").textContent);
  link.href = "#" + section.id;
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(plot => plot.redraw(false)));
if (report.live) {
  // Not while somebody reads with the mouse.
  let moved = 0;
  addEventListener("pointermove", () => { moved = Date.now(); });
  setInterval(() => { if (Date.now() - moved > 30_000) location.reload(); }, 30_000);
}
