// Reads the Prometheus text format as this service writes it: no timestamps, labels in one order.

/** Kinds by family, and [series, value] pairs; a series is its name with its labels, as written. */
function parseExposition(text) {
  const kinds = new Map();
  const values = [];
  for (const line of text.split("\n")) {
    if (line.startsWith("# TYPE ")) {
      const [, , family, kind] = line.split(" ");
      kinds.set(family, kind);
    } else if (line !== "" && !line.startsWith("#")) {
      const end = line.lastIndexOf(" ");
      values.push([line.slice(0, end), toNumber(line.slice(end + 1))]);
    }
  }
  return { kinds, values };
}

/** Name and labels of a series as written. */
function parseSeries(series) {
  const brace = series.indexOf("{");
  if (brace < 0) return { name: series, labels: {} };
  const labels = {};
  for (const [, label, value] of series.slice(brace).matchAll(/(\w+)="((?:\\.|[^"\\])*)"/g)) {
    labels[label] = value.replace(/\\(.)/g, (_, escaped) => (escaped === "n" ? "\n" : escaped));
  }
  return { name: series.slice(0, brace), labels };
}

/** Whether a series only grows: counters, and all that belongs to a histogram. */
function isCumulative(name, kinds) {
  const family = name.replace(/_(bucket|sum|count)$/, "");
  return kinds.get(name) === "counter" || kinds.get(family) === "histogram";
}

function toNumber(text) {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}
