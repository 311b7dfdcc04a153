// Remembers what /metrics said for a while, and tells what happened between two moments.

// A sum over workers may come out lower in its last bits; what is lower still has begun anew.
const ROUNDING = 1 - 1e-9;

/** Samples of all series, newest last. Counters go on growing over a restart of the service. */
class History {
  #columns = new Map();
  #byName = new Map();
  #keepMs;

  constructor(keepSeconds) {
    this.#keepMs = keepSeconds * 1000;
    this.samples = [];
    this.restarts = [];
    this.newest = null;
  }

  /** Takes the text of /metrics as of `at` (ms). */
  add(at, text) {
    // The viewer's clock was set back: of what was before, no rate can be told.
    if (this.newest !== null && at <= this.newest.at) this.samples = [];
    const { kinds, values } = parseExposition(text);
    const told = new Map(values);
    const isFirst = this.newest === null;
    for (const [series] of values) this.#columnOf(series, kinds);
    const row = new Float64Array(this.#columns.size).fill(NaN);
    const asTold = row.slice();
    let hasRestarted = false;
    for (const [series, column] of this.#columns) {
      const value = told.get(series);
      asTold[column.index] = value ?? NaN;
      if (!column.isCumulative) {
        row[column.index] = value ?? NaN;
        continue;
      }
      // One that is not told has not begun yet: codes appear when they first happen.
      const current = value ?? 0;
      const hasReset = current < column.last * ROUNDING;
      hasRestarted ||= hasReset;
      column.total += hasReset ? current : Math.max(0, current - column.last);
      column.last = current;
      row[column.index] = column.total;
    }
    if (hasRestarted && !isFirst) this.restarts.push(at);
    this.samples.push({ at, row });
    this.newest = { at, row: asTold };
    const oldest = at - this.#keepMs;
    while (this.samples.length > 2 && this.samples[1].at <= oldest) this.samples.shift();
  }

  #columnOf(series, kinds) {
    if (this.#columns.has(series)) return;
    const { name, labels } = parseSeries(series);
    const column = {
      index: this.#columns.size,
      labels,
      isCumulative: isCumulative(name, kinds),
      last: 0,
      total: 0,
    };
    this.#columns.set(series, column);
    if (!this.#byName.has(name)) this.#byName.set(name, []);
    this.#byName.get(name).push(column);
  }

  /** What happened in the last `seconds`: less if less is known, null before there are two. */
  last(seconds) {
    const { samples } = this;
    if (samples.length < 2) return null;
    const to = samples[samples.length - 1];
    // Half a second of grace: polls are never exactly a period apart.
    const oldest = to.at - seconds * 1000 - 500;
    const from = samples.findIndex((sample) => sample.at >= oldest);
    return this.between(samples[Math.min(from, samples.length - 2)], to);
  }

  /** What the newest sample says, counted from the start of the service. */
  sinceStart() {
    return this.between(null, this.newest);
  }

  /** How often the service began anew in the last `seconds`. */
  restartsWithin(seconds) {
    return this.restarts.filter((at) => at >= this.newest.at - seconds * 1000).length;
  }

  between(from, to) {
    return new View(this.#byName, from, to);
  }
}

/** What happened from one sample (null: the start of the service) to another. */
class View {
  #byName;
  #from;
  #to;

  constructor(byName, from, to) {
    this.#byName = byName;
    this.#from = from;
    this.#to = to;
    this.seconds = from === null ? NaN : (to.at - from.at) / 1000;
  }

  has(name) {
    return this.#columns(name, {}).length > 0;
  }

  /** Growth of a counter, over all of its series with these labels. */
  increase(name, labels = {}) {
    return this.#columns(name, labels).reduce((sum, column) => sum + this.#growth(column), 0);
  }

  perSecond(name, labels = {}) {
    return this.increase(name, labels) / this.seconds;
  }

  /** Growth by the value of one label. */
  increaseBy(name, label) {
    const sums = new Map();
    for (const column of this.#columns(name, {})) {
      const value = column.labels[label];
      sums.set(value, (sums.get(value) ?? 0) + this.#growth(column));
    }
    return sums;
  }

  /** Observations: upper bounds, the count in each bucket, their sum and number. */
  histogram(name, labels = {}) {
    const cumulative = new Map();
    for (const column of this.#columns(`${name}_bucket`, labels)) {
      const bound = toNumber(column.labels.le);
      cumulative.set(bound, (cumulative.get(bound) ?? 0) + this.#growth(column));
    }
    const bounds = [...cumulative.keys()].sort((a, b) => a - b);
    const counts = bounds.map(
      (bound, i) => cumulative.get(bound) - (i === 0 ? 0 : cumulative.get(bounds[i - 1])),
    );
    const sum = this.increase(`${name}_sum`, labels);
    return { bounds, counts, sum, count: this.increase(`${name}_count`, labels) };
  }

  /** Values of a gauge now, with their labels. */
  gauges(name) {
    return this.#columns(name, {})
      .map((column) => ({ labels: column.labels, value: this.#to.row[column.index] ?? NaN }))
      .filter(({ value }) => !Number.isNaN(value));
  }

  #columns(name, labels) {
    const wanted = Object.entries(labels);
    return (this.#byName.get(name) ?? []).filter((column) =>
      wanted.every(([label, value]) =>
        Array.isArray(value) ? value.includes(column.labels[label]) : column.labels[label] === value,
      ),
    );
  }

  #growth({ index }) {
    // A sample taken before the series was known says nothing of it: it began at 0.
    return (this.#to.row[index] || 0) - (this.#from?.row[index] || 0);
  }
}

/** As Prometheus' histogram_quantile, but Infinity beyond the last bound; NaN of nothing. */
function quantile({ bounds, counts }, q) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (total <= 0) return NaN;
  let left = q * total;
  for (let i = 0; i < bounds.length; i += 1) {
    if (left <= counts[i] && counts[i] > 0) {
      if (bounds[i] === Infinity) return Infinity;
      const lower = i === 0 ? 0 : bounds[i - 1];
      return lower + ((bounds[i] - lower) * left) / counts[i];
    }
    left -= counts[i];
  }
  return Infinity;
}

/** The bound that a share q of the observations does not exceed: for counts, which have no halves. */
function boundOf({ bounds, counts }, q) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  let left = q * total;
  for (let i = 0; i < bounds.length && total > 0; i += 1) {
    left -= counts[i];
    if (left <= 0) return bounds[i];
  }
  return NaN;
}

function mean({ sum, count }) {
  return count > 0 ? sum / count : NaN;
}
