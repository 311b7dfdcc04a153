// Numbers as people read them; a dash for what is not known.

const NBSP = "\u00a0";
const NOTHING = "\u2013";

/** Three significant digits, or whole with separators. */
function formatNumber(value) {
  if (!Number.isFinite(value)) return value === Infinity ? "beyond" : NOTHING;
  if (Math.abs(value) >= 100) return formatCount(value);
  return String(Number(value.toPrecision(3)));
}

function formatCount(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : NOTHING;
}

function formatShare(value) {
  if (!Number.isFinite(value)) return NOTHING;
  if (value > 0 && value < 1e-4) return `<0.01${NBSP}%`;
  return `${Number((value * 100).toPrecision(value >= 0.9995 ? 4 : 3))}${NBSP}%`;
}

/** Of a latency; Infinity is beyond the last bound of a histogram, 1 s. */
function formatSeconds(value) {
  if (value === Infinity) return `over 1${NBSP}s`;
  if (!Number.isFinite(value)) return NOTHING;
  if (value >= 1) return `${Number(value.toPrecision(3))}${NBSP}s`;
  if (value >= 1e-3 || value === 0) return `${Number((value * 1e3).toPrecision(3))}${NBSP}ms`;
  return `${Number((value * 1e6).toPrecision(3))}${NBSP}us`;
}

/** Of seconds to years, in its two largest units. */
function formatAge(seconds) {
  if (seconds === Infinity) return "longer";
  if (!Number.isFinite(seconds)) return NOTHING;
  if (seconds < 1) return `1${NBSP}s`;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  let left = Math.round(seconds);
  const parts = [];
  for (const [unit, length] of units) {
    const count = Math.floor(left / length);
    left -= count * length;
    if (count > 0 || parts.length > 0) parts.push([count, unit]);
  }
  return parts
    .slice(0, parts[0][0] >= 100 ? 1 : 2)
    .filter(([count]) => count > 0)
    .map(([count, unit]) => `${count.toLocaleString("en-US")}${NBSP}${unit}`)
    .join(" ");
}

function formatAgo(seconds) {
  return Number.isFinite(seconds) ? `${formatAge(seconds)} ago` : NOTHING;
}

function formatBytes(value) {
  if (!Number.isFinite(value)) return NOTHING;
  return value >= 1e9 ? `${formatNumber(value / 1e9)}${NBSP}GB` : `${formatNumber(value / 1e6)}${NBSP}MB`;
}

/** The time of day of `ms`, as the viewer's clock has it. */
function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB");
}
