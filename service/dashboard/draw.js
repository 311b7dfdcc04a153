// Puts figures, tables and pictures into the page. Knows nothing of what they mean.

const SVG = "http://www.w3.org/2000/svg";

function byId(id) {
  return document.getElementById(id);
}

/** Shows a figure wherever the page names it; the number itself stays beside its text. */
function put(name, value, format = formatNumber, level = "ok") {
  for (const element of document.querySelectorAll(`[data-figure="${name}"]`)) {
    show(element, value, format, level);
  }
}

function show(element, value, format, level = "ok") {
  setText(element, format(value));
  element.dataset.value = String(value);
  element.dataset.level = level;
}

/** Only if it changes: selections and screen readers are left in peace. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Fills a table's body. Cells are texts, elements, or `{figure, value, format, level}`. */
function fillTable(table, rows) {
  const body = rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell, i) => makeCell(cell, i === 0)));
    return row;
  });
  table.tBodies[0].replaceChildren(...body);
}

function makeCell(cell, isFirst) {
  const element = document.createElement(isFirst ? "th" : "td");
  if (isFirst) element.scope = "row";
  if (cell instanceof Node || typeof cell === "string") {
    element.append(cell);
  } else {
    element.dataset.figure = cell.figure;
    show(element, cell.value, cell.format, cell.level);
  }
  return element;
}

/** A bar from `start` to `end`, shares of its cell. */
function makeBar(start, end) {
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.marginLeft = `${start * 100}%`;
  bar.style.width = `${(end - start) * 100}%`;
  return bar;
}

/** One line over time, in a box of 100 x 100. `values` are numbers, NaN is a gap. */
function drawSpark(svg, times, values) {
  const top = Math.max(...values.filter(Number.isFinite), 0);
  const place = placer(times, top || 1);
  const line = linePath(times, values, place);
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(...(top > 0 ? [areaPath(times, values, place), line] : [line]));
}

/**
 * A picture over time with its scale.
 *
 * series: `{name, values}`, drawn in order; stacked: each stands on those before it.
 */
function drawChart(figure, { times, series, isStacked = false, format, limit = NaN }) {
  const plot = figure.querySelector(".plot") ?? addPlot(figure);
  const sums = times.map(() => 0);
  const tops = series.map(({ values }) => {
    if (!isStacked) return values;
    return values.map((value, i) => (sums[i] += value));
  });
  const top = niceTop(Math.max(...tops.flat().filter(Number.isFinite), 0));
  const place = placer(times, top);
  const paths = series.map(({ name }, i) =>
    isStacked
      ? bandPath(times, i === 0 ? times.map(() => 0) : tops[i - 1], tops[i], place, name)
      : linePath(times, tops[i], place, name),
  );
  if (limit <= top) {
    paths.unshift(makePath("limit", `M0 ${place(0, limit)[1]}H100`));
  }
  plot.querySelector("svg").replaceChildren(...paths);
  setText(plot.querySelector("span"), format(top));
  const span = times.length > 1 ? (times[times.length - 1] - times[0]) / 1000 : NaN;
  const [from, to] = figure.querySelectorAll(".axis span");
  setText(from, Number.isNaN(span) ? "" : `${formatAge(span)} ago`);
  setText(to, "now");
}

function addPlot(figure) {
  const plot = document.createElement("div");
  plot.className = "plot";
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  plot.append(svg, document.createElement("span"));
  const axis = document.createElement("div");
  axis.className = "axis";
  axis.append(document.createElement("span"), document.createElement("span"));
  figure.append(plot, axis);
  return plot;
}

/** Columns of a histogram; `line` are shares to compare with. Empty ends are left out. */
function drawBars(element, { bounds, counts }, { format, line = null }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const shares = counts.map((count) => (total > 0 ? count / total : 0));
  const isShown = shares.map((value, i) => value > 0 || (line !== null && line[i] > 0));
  const first = Math.max(0, isShown.indexOf(true) - 1);
  const last = Math.min(bounds.length - 1, isShown.lastIndexOf(true) + 1);
  const top = Math.max(...shares, ...(line ?? []), 1e-9);
  const columns = [];
  for (let i = first; i <= last && total > 0; i += 1) {
    const column = document.createElement("div");
    column.title = `${bucketName(bounds, i, format)}: ${formatShare(shares[i])}`;
    const bar = document.createElement("i");
    bar.style.height = `${(shares[i] / top) * 100}%`;
    column.append(bar);
    if (line !== null) {
      const mark = document.createElement("b");
      mark.style.height = `${(line[i] / top) * 100}%`;
      column.append(mark);
    }
    columns.push(column);
  }
  element.replaceChildren(...columns);
  const scale = element.nextElementSibling?.classList.contains("scale")
    ? element.nextElementSibling
    : addScale(element);
  const middle = Math.floor((first + last) / 2);
  const texts = total > 0
    ? [`${format(first > 0 ? bounds[first - 1] : 0)}`, format(bounds[middle]), upperName(bounds, last, format)]
    : ["nothing yet", "", ""];
  scale.querySelectorAll("span").forEach((span, i) => setText(span, texts[i]));
}

function addScale(element) {
  const scale = document.createElement("p");
  scale.className = "note scale";
  scale.append(...[0, 1, 2].map(() => document.createElement("span")));
  element.after(scale);
  return scale;
}

function bucketName(bounds, i, format) {
  if (bounds[i] === Infinity) return `over ${format(bounds[i - 1])}`;
  return i === 0 ? `up to ${format(bounds[0])}` : `${format(bounds[i - 1])} to ${format(bounds[i])}`;
}

function upperName(bounds, i, format) {
  return bounds[i] === Infinity ? `over ${format(bounds[i - 1])}` : format(bounds[i]);
}

/** Maps a time and a value into the box of 100 x 100, in which y points down. */
function placer(times, top) {
  const from = times[0];
  const span = Math.max(1, times[times.length - 1] - from);
  return (time, value) => [
    (100 * (time - from)) / span,
    // Beyond the last bound of a histogram: at the upper edge.
    Math.max(0, 100 - (100 * Math.min(value, top)) / top),
  ];
}

function linePath(times, values, place, name = "") {
  let isDown = false;
  let path = "";
  values.forEach((value, i) => {
    if (Number.isNaN(value)) {
      isDown = false;
      return;
    }
    const [x, y] = place(times[i], value);
    path += `${isDown ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`;
    // A value between two gaps would have no length.
    if (!isDown) path += `h0.2`;
    isDown = true;
  });
  return makePath(name, path);
}

function areaPath(times, values, place) {
  return bandPath(times, times.map(() => 0), values, place, "area");
}

function bandPath(times, lower, upper, place, name) {
  let path = "";
  let start = 0;
  while (start < times.length) {
    let end = start;
    while (end < times.length && !Number.isNaN(upper[end])) end += 1;
    if (end > start) {
      const over = [];
      const under = [];
      for (let i = start; i < end; i += 1) {
        over.push(place(times[i], upper[i]).map((n) => n.toFixed(2)).join(" "));
        under.unshift(place(times[i], lower[i]).map((n) => n.toFixed(2)).join(" "));
      }
      path += `M${[...over, ...under].join("L")}Z`;
    }
    start = end + 1;
  }
  return makePath(`area ${name}`, path);
}

function makePath(name, data) {
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("class", name);
  path.setAttribute("d", data);
  return path;
}

/** The least of 1, 2, 5 times a power of ten that is not below. */
function niceTop(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.9999) ?? value;
}
