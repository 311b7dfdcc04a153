// How the service is doing, in words: what is wrong first, and what to do about it.

// Pairs: from here on worth watching, from here on bad. As far as they say the same thing, those of
// the alerts; these hold at once, and for a shorter time.
const LIMITS = {
  judgedFromRequests: 20,
  p99Seconds: [0.05, 0.1],
  lostShare: [0.001, 0.01],
  failedShare: [0.0001, 0.001],
  degradedShare: [0.01, 0.5],
  staleShare: [0.05, 0.5],
  unknownUserShare: [0.9, Infinity],
  callerShare: [0.01, Infinity],
  unknownItemShare: [0.1, 0.9],
  drift: [0.25, Infinity],
  bundleAgeSeconds: [14 * DAY_S, Infinity],
  lagP99Seconds: [0.02, 0.1],
  throttledShare: [0.05, 0.2],
};

const LEVELS = ["ok", "watch", "bad"];

/** The limits as rows for people: what, worth watching from, bad from. */
function limitRows() {
  const rows = [
    ["99 % of answers within (p99)", "p99Seconds", formatSeconds],
    ["refused, late or failed", "lostShare", formatShare],
    ["failed in the model or by a bug", "failedShare", formatShare],
    ["answered without the user's record", "degradedShare", formatShare],
    ["answered with an old user record", "staleShare", formatShare],
    ["requests of users without a record", "unknownUserShare", formatShare],
    ["callers' mistakes", "callerShare", formatShare],
    ["candidates that are not in the item table", "unknownItemShare", formatShare],
    ["drift (PSI) of a feature", "drift", formatNumber],
    ["age of the bundle", "bundleAgeSeconds", formatAge],
    ["event loop late (p99)", "lagP99Seconds", formatSeconds],
    ["held back by the CPU quota, share of the time", "throttledShare", formatShare],
  ];
  return rows.map(([what, name, format]) => [
    what,
    ...LIMITS[name].map((limit) => (limit === Infinity ? "-" : format(limit))),
  ]);
}

/**
 * `{level, headline, detail, problems}`; problems are `{level, title, detail, todo}`, worst first.
 *
 * figures, recent: of the window, and of the last seconds; null before there are two looks.
 */
function judge({ state, figures, recent, restarts }) {
  const notReady = judgeReadiness(state);
  if (notReady !== null) return notReady;
  if (figures === null) {
    return verdict("idle", "Ready", "Measuring: the first figures come with the next look.", []);
  }
  const problems = [
    ...judgeWorkers(state, figures, restarts),
    ...judgeRequests(figures, recent),
    ...judgeUsers(figures, recent),
    ...judgeModel(state, figures),
    ...judgeProcess(figures),
  ].sort((a, b) => LEVELS.indexOf(b.level) - LEVELS.indexOf(a.level) || b.weight - a.weight);
  const summary = summaryOf(figures);
  if (problems.length > 0) {
    const [first] = problems;
    const headline = first.level === "bad" ? "In trouble" : "Serving, but look at this";
    return verdict(first.level, `${headline}: ${first.title}`, summary, problems);
  }
  if (figures.requests.offered === 0) return verdict("idle", "Ready, no requests", summary, []);
  return verdict("ok", "Serving well", summary, []);
}

/** The verdict when /metrics itself cannot be had. */
function judgeGone(since, now, reason) {
  const ago = formatAge((now - since) / 1000);
  return verdict(
    "bad",
    `Not answering since ${clock(since)}`,
    `${reason} The figures below are of ${ago} ago.`,
    [
      problem("bad", "the service, or the way to it, is gone", "",
        "Look at whether the process lives, at its log, and at the network between."),
    ],
  );
}

function verdict(level, headline, detail, problems) {
  return { level, headline, detail, problems };
}

/** `weight`: how many times its limit a figure is; among equal levels the heaviest comes first. */
function problem(level, title, detail, todo, weight = 10) {
  return { level, title, detail, todo, weight };
}

function judgeReadiness(state) {
  if (state.numReady > 0) return null;
  if (state.bundles.length === 0) {
    return verdict("watch", "Not ready: no bundle yet",
      "The service lives, and refuses all requests with 503 not_ready until it has a bundle.", [
        problem("watch", "no bundle is being served", "",
          "Set CTR_BUNDLE to a bundle, or put one where it points; the log says what hinders."),
      ]);
  }
  return verdict("bad", "Shutting down: takes no new requests",
    "It finishes what it has, and ends.", [
      problem("bad", "the service is draining", "",
        "Expected during a restart or an upgrade; traffic should go to another one."),
    ]);
}

function judgeWorkers(state, figures, restarts) {
  const found = [];
  const numDown = state.workers.length - state.numReady;
  if (numDown > 0) {
    found.push(problem("bad", `${numDown} of ${state.workers.length} workers not ready`,
      "The others serve on with less room.", "See the log for why it ended or cannot start."));
  }
  if (figures.process.restarts > 0) {
    found.push(problem("bad", "a worker ended and was started again",
      `${formatCount(figures.process.restarts)} times in ${formatAge(figures.seconds)}.`,
      "See the log for what ended it: memory, or a crash."));
  }
  if (figures.process.silent > 0) {
    found.push(problem("watch", "a worker did not tell its figures in time",
      "What is shown for it is what it told last.", "Is it hung or starved? See the CPU and log."));
  }
  if (restarts > 0) {
    found.push(problem("watch", "the service has been restarted",
      "Its counters began anew while this page was open.", "Nothing, if that was an upgrade; else see the log for why it ended."));
  }
  return found;
}

function judgeRequests(figures, recent) {
  const { requests, latency, batches } = figures;
  const offered = (of) => of.requests.offered;
  const found = [];
  const rate = (group, limits) =>
    weigh(figures, recent, {
      limits,
      format: formatShare,
      counted: offered,
      value: (of) => share(of.requests[group], of.requests.offered),
    });
  const failed = rate("failed", LIMITS.failedShare);
  if (failed.level !== "ok") {
    found.push(problem(failed.level, `${formatShare(failed.value)} of requests fail`,
      `${failed.said}By code: ${codesOf(requests, "failed")}.`,
      "See the log; if it began with a new bundle, roll back.", failed.weight));
  }
  const refused = rate("refused", LIMITS.lostShare);
  if (refused.level !== "ok") {
    const drops = listCounts(batches.drops);
    found.push(problem(refused.level, `${formatShare(refused.value)} of requests refused or late`,
      `${refused.said}By code: ${codesOf(requests, "refused")}.${drops && ` Why they were not run: ${drops}.`}`,
      "More load than it can answer in time: add workers or replicas, or send less.", refused.weight));
  }
  const slow = weigh(figures, recent, {
    limits: LIMITS.p99Seconds,
    format: formatSeconds,
    counted: (of) => of.requests.answered,
    value: (of) => of.latency.p99,
  });
  if (slow.level !== "ok") {
    found.push(problem(slow.level, `slow: 1 answer in 100 takes over ${formatSeconds(slow.value)}`,
      `${slow.said}Half are within ${formatSeconds(latency.p50)}.`,
      "See which stage is long: queue means load, features means the store, run means the model.",
      slow.weight));
  }
  const wrong = rate("caller", LIMITS.callerShare);
  if (wrong.level !== "ok") {
    found.push(problem(wrong.level, `${formatShare(wrong.value)} of requests are callers' mistakes`,
      `${wrong.said}By code: ${codesOf(requests, "caller")}.`,
      "The callers' answers say which field is at fault.", wrong.weight));
  }
  return found;
}

function judgeUsers(figures, recent) {
  const rate = (limits, value) =>
    weigh(figures, recent, {
      limits,
      format: formatShare,
      counted: (of) => of.requests.answered,
      value: (of) => share(value(of), of.requests.answered),
    });
  const found = [];
  const degraded = rate(LIMITS.degradedShare, (of) => of.requests.byOutcome.get("degraded") ?? 0);
  if (degraded.level !== "ok") {
    const why = listCounts(figures.users.storeErrors);
    found.push(problem(degraded.level,
      `${formatShare(degraded.value)} of answers made without the user's record`,
      `${degraded.said}${why && `The online store (Redis): ${why}.`}`,
      "Is Redis up, reachable and quick? Answers go on with defaults, and are less accurate.",
      degraded.weight));
  }
  const stale = rate(LIMITS.staleShare, (of) => of.users.degraded.get("stale_user_features") ?? 0);
  if (stale.level !== "ok") {
    found.push(problem(stale.level, `${formatShare(stale.value)} of answers used an old user record`,
      stale.said, "Run materialize and load-records again; see why they stopped.", stale.weight));
  }
  const unknown = rate(LIMITS.unknownUserShare, (of) => of.users.unknown);
  if (unknown.level !== "ok") {
    found.push(problem(unknown.level,
      `${formatShare(unknown.value)} of requests are of users without a record`,
      `${unknown.said}They are scored with defaults.`,
      "Is this the right store? Run load-records.", unknown.weight));
  }
  return found;
}

function judgeModel(state, figures) {
  const found = [];
  const { requests } = figures;
  const many = requests.answered >= LIMITS.judgedFromRequests;
  if (figures.nonFinite > 0) {
    found.push(problem("bad", "the model gives no number for some candidates",
      `${formatCount(figures.nonFinite)} candidates.`, "Roll the bundle back."));
  }
  if (figures.batches.splits > 0) {
    found.push(problem("bad", "model runs fail and are repeated",
      `${formatCount(figures.batches.splits)} runs.`, "See the log for which request is at fault."));
  }
  for (const [part, count] of figures.swapsRefused) {
    if (count > 0) {
      found.push(problem("watch", `new ${part === "items" ? "items were" : "bundle was"} refused`,
        "The old goes on.", "The log says what is damaged or does not fit; export it again."));
    }
  }
  const unknown = share(figures.unknownItems, figures.candidates);
  const level = levelOf(unknown, LIMITS.unknownItemShare, many);
  if (level !== "ok") {
    found.push(problem(level, `${formatShare(unknown)} of candidates are not in the item table`,
      "They are scored with defaults.", "Make and load a newer item snapshot.",
      unknown / LIMITS.unknownItemShare[0]));
  }
  if (state.bundleAge >= LIMITS.bundleAgeSeconds[0]) {
    found.push(problem("watch", "the bundle is old", `It was made ${formatAgo(state.bundleAge)}.`,
      "Train on newer logs and export; see why that stopped.", 1));
  }
  const drifted = [...state.drift].filter(([, psi]) => psi >= LIMITS.drift[0]);
  if (drifted.length > 0) {
    drifted.sort(([, a], [, b]) => b - a);
    const [worst, psi] = drifted[0];
    found.push(problem("watch",
      drifted.length === 1 ? "a feature has drifted" : `${drifted.length} features have drifted`,
      `Most of all ${worst} (PSI ${formatNumber(psi)}).`,
      "Did its source change? If the world did, train again on newer logs.", 1));
  }
  return found;
}

function judgeProcess({ process, seconds }) {
  const found = [];
  const late = quantile(process.lag, 0.99);
  const level = levelOf(late, LIMITS.lagP99Seconds, true);
  if (level !== "ok") {
    found.push(problem(level, `the event loop is late by ${formatSeconds(late)} (p99)`, "",
      "Something else takes the core, or the core is full: see CPU and quota.",
      late / LIMITS.lagP99Seconds[0]));
  }
  const throttled = levelOf(process.throttled / seconds, LIMITS.throttledShare, true);
  if (throttled !== "ok") {
    found.push(problem(throttled, "the CPU quota holds the service back",
      `${formatShare(process.throttled / seconds)} of the time.`, "Raise the quota, or fewer workers."));
  }
  return found;
}

function summaryOf({ requests, latency, seconds, candidatesPerSecond }) {
  const span = formatAge(seconds);
  if (requests.offered === 0) return `No requests in the last ${span}.`;
  const answered = requests.answered / seconds;
  const parts = [
    `${formatNumber(requests.perSecond)} requests/s asked, ${formatNumber(answered)} answered with ${formatNumber(candidatesPerSecond)} candidates/s`,
  ];
  if (requests.answered > 0) parts.push(`99 % of answers within ${formatSeconds(latency.p99)}`);
  const lost = requests.refused + requests.failed;
  parts.push(
    lost === 0
      ? "none refused or failed"
      : `${formatShare(requests.lostShare)} refused, late or failed`,
  );
  return `In the last ${span}: ${parts.join("; ")}.`;
}

/**
 * A figure over the window and of late: `{level, value, said, weight}`.
 *
 * Of late decides when a trouble begins, and says so when it has ended. `value` and `counted` are
 * functions of figures: few requests make no percentage worth an alarm.
 */
function weigh(figures, recent, { limits, format, counted, value }) {
  const isEnough = (of) => counted(of) >= LIMITS.judgedFromRequests;
  const whole = value(figures);
  const late = value(recent);
  const level = levelOf(whole, limits, isEnough(figures));
  const lateLevel = levelOf(late, limits, isEnough(recent));
  if (!isEnough(recent) || recent.seconds > 0.8 * figures.seconds) {
    return { level, value: whole, said: "", weight: whole / limits[0] };
  }
  const span = formatAge(recent.seconds);
  const isSteady = Math.abs(late - whole) <= 0.1 * whole;
  if (late >= whole || isSteady) {
    const said = isSteady
      ? ""
      : `So in the last ${span}; ${format(whole)} over ${formatAge(figures.seconds)}. `;
    return { level: worse(level, lateLevel), value: late, said, weight: late / limits[0] };
  }
  return {
    level: lateLevel === "ok" && level === "bad" ? "watch" : worse(level, lateLevel),
    value: whole,
    said: `${lateLevel === "ok" ? "It seems to be over" : "Less"}: ${format(late)} in the last ${span}. `,
    weight: late / limits[0],
  };
}

function levelOf(value, [watch, bad], isJudged) {
  if (!isJudged || Number.isNaN(value) || value < watch || value === 0) return "ok";
  return value >= bad ? "bad" : "watch";
}

function worse(a, b) {
  return LEVELS[Math.max(LEVELS.indexOf(a), LEVELS.indexOf(b))];
}

function codesOf(requests, group) {
  const counts = [...requests.byOutcome].filter(
    ([outcome]) => (OUTCOMES[outcome] ?? ["failed"])[0] === group,
  );
  return listCounts(new Map(counts));
}

function listCounts(counts) {
  return [...counts]
    .filter(([, count]) => count > 0)
    .sort(([, a], [, b]) => b - a)
    .map(([name, count]) => `${name} ${formatCount(count)}`)
    .join(", ");
}
