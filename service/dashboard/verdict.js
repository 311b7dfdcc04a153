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

/** `{level, headline, detail, problems}`; problems are `{level, title, detail, todo}`, worst first. */
function judge({ state, figures, restarts }) {
  const notReady = judgeReadiness(state);
  if (notReady !== null) return notReady;
  if (figures === null) {
    return verdict("idle", "Ready", "Measuring: the first figures come with the next look.", []);
  }
  const problems = [
    ...judgeWorkers(state, figures, restarts),
    ...judgeRequests(figures),
    ...judgeUsers(figures),
    ...judgeModel(state, figures),
    ...judgeProcess(figures),
  ].sort((a, b) => LEVELS.indexOf(b.level) - LEVELS.indexOf(a.level));
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

function problem(level, title, detail, todo) {
  return { level, title, detail, todo };
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

function judgeRequests({ requests, latency, batches }) {
  const found = [];
  const many = requests.offered >= LIMITS.judgedFromRequests;
  const failed = levelOf(share(requests.failed, requests.offered), LIMITS.failedShare, many);
  if (failed !== "ok") {
    found.push(problem(failed, `${formatShare(share(requests.failed, requests.offered))} of requests fail`,
      `By code: ${codesOf(requests, "failed")}.`, "See the log; if it began with a new bundle, roll back."));
  }
  const lost = levelOf(share(requests.refused, requests.offered), LIMITS.lostShare, many);
  if (lost !== "ok") {
    const drops = listCounts(batches.drops);
    found.push(problem(lost,
      `${formatShare(share(requests.refused, requests.offered))} of requests refused or late`,
      `By code: ${codesOf(requests, "refused")}.${drops && ` Why they were not run: ${drops}.`}`,
      "More load than it can answer in time: add workers or replicas, or send less."));
  }
  const slow = levelOf(latency.p99, LIMITS.p99Seconds, many);
  if (slow !== "ok") {
    found.push(problem(slow, `slow: 1 answer in 100 takes over ${formatSeconds(latency.p99)}`,
      `Half are within ${formatSeconds(latency.p50)}.`,
      "See which stage is long: queue means load, features means the store, run means the model."));
  }
  const wrong = levelOf(share(requests.caller, requests.offered), LIMITS.callerShare, many);
  if (wrong !== "ok") {
    found.push(problem(wrong,
      `${formatShare(share(requests.caller, requests.offered))} of requests are callers' mistakes`,
      `By code: ${codesOf(requests, "caller")}.`, "The callers' answers say which field is at fault."));
  }
  return found;
}

function judgeUsers({ requests, users }) {
  const many = requests.answered >= LIMITS.judgedFromRequests;
  const level = levelOf(requests.degradedShare, LIMITS.degradedShare, many);
  const stale = share(users.degraded.get("stale_user_features") ?? 0, requests.answered);
  const staleLevel = levelOf(stale, LIMITS.staleShare, many);
  const unknown = share(users.unknown, requests.answered);
  const unknownLevel = levelOf(unknown, LIMITS.unknownUserShare, many);
  const found = [];
  if (level !== "ok") {
    const why = listCounts(users.storeErrors);
    found.push(problem(level,
      `${formatShare(requests.degradedShare)} of answers made without the user's record`,
      why ? `The online store (Redis): ${why}.` : "",
      "Is Redis up, reachable and quick? Answers go on with defaults, and are less accurate."));
  }
  if (staleLevel !== "ok") {
    found.push(problem(staleLevel, `${formatShare(stale)} of answers used an old user record`, "",
      "Run materialize and load-records again; see why they stopped."));
  }
  if (unknownLevel !== "ok") {
    found.push(problem(unknownLevel, `${formatShare(unknown)} of requests are of users without a record`,
      "They are scored with defaults.", "Is this the right store? Run load-records."));
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
      "They are scored with defaults.", "Make and load a newer item snapshot."));
  }
  if (state.bundleAge >= LIMITS.bundleAgeSeconds[0]) {
    found.push(problem("watch", "the bundle is old", `It was made ${formatAgo(state.bundleAge)}.`,
      "Train on newer logs and export; see why that stopped."));
  }
  const drifted = [...state.drift].filter(([, psi]) => psi >= LIMITS.drift[0]);
  if (drifted.length > 0) {
    drifted.sort(([, a], [, b]) => b - a);
    const [worst, psi] = drifted[0];
    found.push(problem("watch",
      drifted.length === 1 ? "a feature has drifted" : `${drifted.length} features have drifted`,
      `Most of all ${worst} (PSI ${formatNumber(psi)}).`,
      "Did its source change? If the world did, train again on newer logs."));
  }
  return found;
}

function judgeProcess({ process, seconds }) {
  const found = [];
  const late = quantile(process.lag, 0.99);
  const level = levelOf(late, LIMITS.lagP99Seconds, true);
  if (level !== "ok") {
    found.push(problem(level, `the event loop is late by ${formatSeconds(late)} (p99)`, "",
      "Something else takes the core, or the core is full: see CPU and quota."));
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
  const parts = [
    `${formatNumber(requests.perSecond)} requests/s with ${formatNumber(candidatesPerSecond)} candidates/s`,
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

/** Few requests make no percentage worth an alarm: `isJudged` false is always ok. */
function levelOf(value, [watch, bad], isJudged) {
  if (!isJudged || Number.isNaN(value) || value < watch || value === 0) return "ok";
  return value >= bad ? "bad" : "watch";
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
