// Looks at /metrics again and again while the page is seen, and shows what it says.

const KEEP_SECONDS = 900;
const RECENT_SECONDS = 10;
const ANSWER_LIMIT_MS = 10000;
const FIRST_LOOKS_MS = 1000;
const SIGNS = { ok: "\u2713", watch: "!", bad: "\u2715", idle: "\u2013" };
const COLOURS = { ok: "#17723f", watch: "#b86e00", bad: "#b42318", idle: "#6b7280" };

const parameters = new URLSearchParams(location.search);
const everyMs = 1000 * (positive(parameters.get("every")) ?? 5);
LIMITS.p99Seconds[0] = (positive(parameters.get("p99_ms")) ?? LIMITS.p99Seconds[0] * 1000) / 1000;
LIMITS.p99Seconds[1] = Math.max(...LIMITS.p99Seconds);

const history_ = new History(KEEP_SECONDS);
const points = [];
let timer = null;
let isLooking = false;
let numLooks = 0;
const openedAt = Date.now();
const seenSince = new Map();
let failure = null;

function positive(text) {
  const value = Number(text);
  return value > 0 && Number.isFinite(value) ? value : null;
}

async function look() {
  clearTimeout(timer);
  if (isLooking) return;
  isLooking = true;
  const asked = Date.now();
  try {
    const text = await askMetrics();
    failure = null;
    history_.add(Date.now(), text);
    addPoint();
    put("look.seconds", (Date.now() - asked) / 1000, formatSeconds);
  } catch (error) {
    failure = reasonOf(error);
  }
  isLooking = false;
  render();
  numLooks += 1;
  document.body.dataset.looks = String(numLooks);
  // Two looks make the first figures: the second one comes soon. Never at once after a late
  // answer: of a moment's difference no rate can be told.
  const isNew = points.length === 0 || points[points.length - 1].isGap;
  const wait = isNew && failure === null ? Math.min(FIRST_LOOKS_MS, everyMs) : everyMs;
  if (!document.hidden) timer = setTimeout(look, Math.max(wait / 2, asked + wait - Date.now()));
}

async function askMetrics() {
  const answer = await fetch("metrics", {
    cache: "no-store",
    credentials: "same-origin",
    signal: AbortSignal.timeout(ANSWER_LIMIT_MS),
  });
  if (!answer.ok) throw new Error(`/metrics answered ${answer.status}.`);
  const text = await answer.text();
  if (!text.includes("scoring_ready")) throw new Error("/metrics is not that of a scoring service.");
  return text;
}

function reasonOf(error) {
  if (error.name === "TimeoutError") return `No answer within ${ANSWER_LIMIT_MS / 1000} s: hung, or far too loaded.`;
  return error instanceof TypeError ? "No connection to it." : error.message;
}

/** What happened between the last two looks, for the pictures; a gap if too long ago. */
function addPoint() {
  const { samples } = history_;
  const to = samples[samples.length - 1];
  const oldest = to.at - KEEP_SECONDS * 1000;
  while (points.length > 0 && (points[0].at < oldest || points[0].at > to.at)) points.shift();
  if (samples.length < 2) return;
  const from = samples[samples.length - 2];
  if (to.at - from.at > 3 * everyMs + ANSWER_LIMIT_MS) {
    points.push({ at: to.at, isGap: true });
    return;
  }
  const view = history_.between(from, to);
  const requests = requestsOf(view);
  const { p50, p99, p999 } = latencyOf(view, ["ok", "degraded"]);
  const degraded = requests.byOutcome.get("degraded") ?? 0;
  points.push({
    at: to.at,
    isGap: false,
    perSecond: requests.perSecond,
    answered: (requests.answered - degraded) / view.seconds,
    degraded: degraded / view.seconds,
    lost: (requests.refused + requests.failed) / view.seconds,
    other: (requests.caller + requests.cancelled) / view.seconds,
    lostShare: requests.lostShare,
    degradedShare: requests.degradedShare,
    candidates: view.perSecond("scoring_candidates_total"),
    p50,
    p99,
    p999,
    predictedWait: largest(view.gauges("scoring_predicted_wait_seconds")),
  });
}

function render() {
  const { newest } = history_;
  if (newest === null) {
    renderVerdict(judgeGone(openedAt, Date.now(), failure));
    return;
  }
  document.body.toggleAttribute("data-is-gone", failure !== null);
  const total = history_.sinceStart();
  const state = stateOf(total);
  const seconds = Number(new FormData(byId("window")).get("seconds"));
  const view = history_.last(seconds);
  const figures = view === null ? null : figuresOf(view);
  const recent = view === null ? null : figuresOf(history_.last(RECENT_SECONDS));
  renderVerdict(
    failure === null
      ? judge({ state, figures, recent, restarts: history_.restartsWithin(seconds) })
      : judgeGone(newest.at, Date.now(), failure),
  );
  setText(byId("as-of"), clock(newest.at));
  renderState(state, total);
  if (figures !== null) renderFigures(figures, state, view);
  renderScores(figures?.scores ?? [], scoresOf(total));
  renderPictures(points);
}

/** Titles without their numbers, which change while the trouble is the same. */
function withoutNumbers(title) {
  return title.replace(/[\d.,<]+\s?(%|ms|s)?/g, "");
}

/** Since when each problem has been seen without a break, by this page's clock. */
function tellSince(problems) {
  const present = new Set(problems.map(({ title }) => withoutNumbers(title)));
  for (const title of seenSince.keys()) if (!present.has(title)) seenSince.delete(title);
  return problems.map((found) => {
    const title = withoutNumbers(found.title);
    if (!seenSince.has(title)) seenSince.set(title, Date.now());
    return { ...found, detail: `${found.detail} Seen since ${clock(seenSince.get(title))}.`.trim() };
  });
}

function renderVerdict({ level, headline, detail, problems: found }) {
  const problems = tellSince(found);
  const [first, ...others] = problems;
  document.body.dataset.level = level;
  byId("verdict").dataset.level = level;
  setText(byId("sign"), SIGNS[level]);
  setText(byId("headline"), headline);
  setText(byId("why"), first?.detail ?? "");
  setText(byId("todo"), first === undefined ? "" : `What to do: ${first.todo}`);
  setText(byId("detail"), detail);
  byId("also").replaceChildren(...others.map(makeProblem));
  // Without numbers: it is read out only when something else is the matter.
  setText(byId("announce"), [headline.split(":")[0], ...problems.map(({ title }) => title)]
    .map(withoutNumbers).join(". "));
  document.title = `${SIGNS[level]} ${headline}`;
  const icon = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><circle cx="4" cy="4" r="4" fill="${COLOURS[level]}"/></svg>`;
  document.querySelector('link[rel="icon"]').href = `data:image/svg+xml,${encodeURIComponent(icon)}`;
}

function makeProblem({ level, title, detail, todo }) {
  const item = document.createElement("li");
  item.dataset.level = level;
  const strong = document.createElement("strong");
  strong.textContent = `Also: ${title}.`;
  item.append(strong, ` ${detail} ${todo}`);
  return item;
}

setText(byId("host"), location.host);
setText(byId("every"), formatNumber(everyMs / 1000));
setText(byId("judged-from"), String(LIMITS.judgedFromRequests));
fillTable(byId("limits"), limitRows());
byId("window").addEventListener("change", render);
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : look()));
look();
