// From two moments of /metrics to the figures that the page shows. Knows the metrics' names.

const OUTCOMES = {
  ok: ["answered", "answered in full"],
  degraded: ["answered", "answered with defaults in place of the user's record"],
  overloaded: ["refused", "refused at once: would have been late"],
  deadline_exceeded: ["refused", "given up: the time limit passed"],
  not_ready: ["refused", "refused: no bundle yet"],
  shutting_down: ["refused", "refused: the service was shutting down"],
  inference_failed: ["failed", "the model run failed"],
  internal_error: ["failed", "a bug in the service: see its log"],
  invalid_request: ["caller", "the caller's mistake: malformed"],
  too_many_candidates: ["caller", "the caller's mistake: too many candidates"],
  payload_too_large: ["caller", "the caller's mistake: body too long"],
  cancelled: ["cancelled", "the caller hung up first"],
};

const STAGES = {
  parse: "read the request",
  features: "fetch the user's record",
  encode: "turn values into model inputs",
  queue: "wait for a model run",
  run: "run the model",
  respond: "write the answer",
};

const DAY_S = 86400;
const STALE_RECORD_S = 7 * DAY_S;

/** What the service is, as of the newest sample; no window needed. */
function stateOf(view) {
  const ready = view.gauges("scoring_ready");
  const bundles = view.gauges("scoring_bundle_info").map(({ labels }) => labels);
  const unique = new Map(bundles.map((labels) => [labels.bundle, labels.schema]));
  return {
    workers: ready.map(({ labels, value }) => ({ worker: labels.worker, isReady: value > 0 })),
    numReady: ready.filter(({ value }) => value > 0).length,
    bundles: [...unique].map(([bundle, schema]) => ({ bundle, schema })),
    bundleAge: largest(view.gauges("scoring_bundle_age_seconds")),
    itemRows: largest(view.gauges("scoring_item_table_rows")),
    itemAge: largest(view.gauges("scoring_item_snapshot_age_seconds")),
    queueRows: sumOf(view.gauges("scoring_queue_rows")),
    predictedWait: largest(view.gauges("scoring_predicted_wait_seconds")),
    maxBatchRows: range(view.gauges("scoring_max_batch_rows")),
    runFixed: largest(view.gauges("scoring_run_fixed_seconds")),
    runRow: largest(view.gauges("scoring_run_row_seconds")),
    connections: sumOf(view.gauges("scoring_open_connections")),
    residentBytes: sumOf(view.gauges("scoring_process_resident_bytes")),
    openFiles: sumOf(view.gauges("scoring_process_open_files")),
    drift: new Map(
      view.gauges("scoring_feature_drift").map(({ labels, value }) => [labels.feature, value]),
    ),
  };
}

/** What happened in the view. Shares are NaN where nothing was counted. */
function figuresOf(view) {
  const requests = requestsOf(view);
  return {
    seconds: view.seconds,
    requests,
    candidates: view.increase("scoring_candidates_total"),
    candidatesPerSecond: view.perSecond("scoring_candidates_total"),
    latency: latencyOf(view, ["ok", "degraded"]),
    stages: Object.keys(STAGES).map((stage) => {
      const histogram = view.histogram("scoring_stage_seconds", { stage });
      return { stage, mean: mean(histogram), p99: quantile(histogram, 0.99), ...histogram };
    }),
    batches: {
      rows: view.histogram("scoring_batch_rows"),
      requests: view.histogram("scoring_batch_requests"),
      perSecond: view.perSecond("scoring_batch_rows_count"),
      splits: view.increase("scoring_batch_splits_total"),
      drops: view.increaseBy("scoring_batch_drops_total", "reason"),
    },
    users: {
      degraded: view.increaseBy("scoring_degraded_total", "reason"),
      storeErrors: view.increaseBy("scoring_store_errors_total", "code"),
      unknown: view.increase("scoring_unknown_users_total"),
      recordAge: view.histogram("scoring_record_age_seconds"),
    },
    unknownItems: view.increase("scoring_unknown_items_total"),
    ignoredFeatures: view.increase("scoring_ignored_features_total"),
    nonFinite: view.increase("scoring_non_finite_outputs_total"),
    scores: scoresOf(view),
    features: featuresOf(view),
    process: {
      lag: view.histogram("scoring_event_loop_lag_seconds"),
      cores: view.has("scoring_process_cpu_seconds_total")
        ? view.perSecond("scoring_process_cpu_seconds_total")
        : NaN,
      throttled: view.increase("scoring_cpu_throttled_seconds_total"),
      restarts: view.increase("scoring_worker_restarts_total"),
      silent: view.increase("scoring_silent_workers_total"),
    },
    swaps: view.increaseBy("scoring_swaps_total", "part"),
    swapsRefused: view.increaseBy("scoring_swaps_refused_total", "part"),
  };
}

function requestsOf(view) {
  const byOutcome = view.increaseBy("scoring_request_seconds_count", "outcome");
  const sums = { answered: 0, refused: 0, failed: 0, caller: 0, cancelled: 0 };
  // A code that this page does not know is shown as a failure, not left out.
  for (const [outcome, count] of byOutcome) sums[(OUTCOMES[outcome] ?? ["failed"])[0]] += count;
  const offered = [...byOutcome.values()].reduce((sum, count) => sum + count, 0);
  return {
    ...sums,
    offered,
    perSecond: offered / view.seconds,
    byOutcome,
    lostShare: share(sums.refused + sums.failed, offered),
    degradedShare: share(byOutcome.get("degraded") ?? 0, sums.answered),
  };
}

function latencyOf(view, outcome) {
  const histogram = view.histogram("scoring_request_seconds", { outcome });
  return {
    count: histogram.count,
    mean: mean(histogram),
    p50: quantile(histogram, 0.5),
    p99: quantile(histogram, 0.99),
    p999: quantile(histogram, 0.999),
  };
}

function scoresOf(view) {
  const counts = view.increaseBy("scoring_predicted_probability_count", "output");
  return [...counts.keys()].map((output) => ({
    output,
    histogram: view.histogram("scoring_predicted_probability", { output }),
  }));
}

function featuresOf(view) {
  const missing = view.increaseBy("scoring_feature_missing_total", "feature");
  const unknown = view.increaseBy("scoring_feature_unknown_total", "feature");
  return [...view.increaseBy("scoring_feature_values_total", "feature")].map(([feature, values]) => ({
    feature,
    values,
    // Not every feature can be missing, or has a vocabulary.
    missing: missing.has(feature) ? share(missing.get(feature), values) : NaN,
    unknown: unknown.has(feature) ? share(unknown.get(feature), values) : NaN,
  }));
}

/** Share of the observations above one of the histogram's bounds. */
function shareAbove({ bounds, counts }, limit) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const above = counts.reduce((sum, count, i) => sum + (bounds[i] > limit ? count : 0), 0);
  return share(above, total);
}

function share(part, whole) {
  return whole > 0 ? part / whole : NaN;
}

function largest(gauges) {
  return gauges.length > 0 ? Math.max(...gauges.map(({ value }) => value)) : NaN;
}

function sumOf(gauges) {
  return gauges.length > 0 ? gauges.reduce((sum, { value }) => sum + value, 0) : NaN;
}

function range(gauges) {
  const values = gauges.map(({ value }) => value);
  return values.length > 0 ? [Math.min(...values), Math.max(...values)] : [NaN, NaN];
}
