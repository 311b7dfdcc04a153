// Puts figures into the page's panels: which figure goes where, and how it is written.

function renderState(state, total) {
  setText(byId("bundle"), state.bundles.map(({ bundle }) => bundle).join(", ") || "none yet");
  const schemas = [...new Set(state.bundles.map(({ schema }) => schema))];
  setText(byId("schema"), schemas.map((schema) => schema.slice(0, 16)).join(", ") || "none yet");
  byId("schema").title = schemas.join(", ");
  put("bundle.age", state.bundleAge, formatAgo, levelOf(state.bundleAge, LIMITS.bundleAgeSeconds, true));
  put("items.rows", state.itemRows, formatCount);
  put("items.age", state.itemAge, formatAgo);
  put("queue.rows", state.queueRows, formatCount);
  put("queue.predictedWait", state.predictedWait, formatSeconds);
  const [least, most] = state.maxBatchRows;
  put("batches.cap", most, (value) =>
    least === most ? formatCount(value) : `${formatCount(least)} to ${formatCount(most)}`);
  put("batches.runFixed", state.runFixed, formatSeconds);
  put("batches.runRow", state.runRow, formatSeconds);
  put("process.ready", state.numReady, formatCount,
    state.numReady < state.workers.length ? "bad" : "ok");
  put("process.workers", state.workers.length, formatCount);
  put("process.memory", state.residentBytes, formatBytes);
  put("process.connections", state.connections, formatCount);
  put("process.files", state.openFiles, formatCount);
  put("process.restarts", total.increase("scoring_worker_restarts_total"), formatCount);
  put("process.silent", total.increase("scoring_silent_workers_total"), formatCount);
  for (const [name, family] of [["swaps.", "scoring_swaps_total"], ["swaps.refused", "scoring_swaps_refused_total"]]) {
    for (const part of ["bundle", "items"]) {
      const count = total.increase(family, { part });
      const isRefused = name === "swaps.refused";
      const figure = isRefused ? `swaps.refused${part[0].toUpperCase()}${part.slice(1)}` : `swaps.${part}`;
      put(figure, count, formatCount, isRefused && count > 0 ? "watch" : "ok");
    }
  }
  put("total.requests", total.increase("scoring_request_seconds_count"), formatCount);
  put("total.candidates", total.increase("scoring_candidates_total"), formatCount);
}

function renderFigures(figures, state, view) {
  const { requests, latency, users, process } = figures;
  put("window.seconds", figures.seconds, formatAge);
  put("requests.perSecond", requests.perSecond);
  put("requests.offered", requests.offered, formatCount);
  put("requests.refused", requests.refused, formatCount);
  put("requests.failed", requests.failed, formatCount);
  put("requests.lostShare", requests.lostShare, formatShare, levelOf(requests.lostShare, LIMITS.lostShare, true));
  put("requests.degradedShare", requests.degradedShare, formatShare,
    levelOf(requests.degradedShare, LIMITS.degradedShare, true));
  put("candidates.perSecond", figures.candidatesPerSecond);
  put("candidates.perRequest", share(figures.candidates, requests.answered));
  put("latency.p50", latency.p50, formatSeconds);
  put("latency.p99", latency.p99, formatSeconds, levelOf(latency.p99, LIMITS.p99Seconds, true));
  put("latency.p999", latency.p999, formatSeconds);
  renderOutcomes(requests, view);
  renderStages(figures.stages);
  renderBatches(figures.batches);
  renderUsers(users, requests);
  const noItem = share(figures.unknownItems, figures.candidates);
  put("items.unknown", noItem, formatShare, levelOf(noItem, LIMITS.unknownItemShare, true));
  put("model.nonFinite", figures.nonFinite, formatCount, figures.nonFinite > 0 ? "bad" : "ok");
  put("model.ignoredFeatures", figures.ignoredFeatures, formatCount);
  renderFeatures(figures.features, state.drift);
  const lagP99 = quantile(process.lag, 0.99);
  put("process.lagP50", quantile(process.lag, 0.5), formatSeconds);
  put("process.lagP99", lagP99, formatSeconds, levelOf(lagP99, LIMITS.lagP99Seconds, true));
  put("process.cores", process.cores);
  put("process.throttled", process.throttled / figures.seconds, formatShare);
}

function renderOutcomes(requests, view) {
  const seen = [...requests.byOutcome].filter(([outcome, count]) => count > 0 || outcome === "ok");
  seen.sort(([, a], [, b]) => b - a);
  fillTable(byId("outcomes"), seen.map(([outcome, count]) => [
    (OUTCOMES[outcome] ?? ["failed", "a code that this page does not know"])[1],
    codeOf(outcome),
    { figure: `count.${outcome}`, value: count, format: formatCount },
    { figure: `share.${outcome}`, value: share(count, requests.offered), format: formatShare },
  ]));
  fillTable(byId("latencies"), seen.map(([outcome]) => {
    const latency = latencyOf(view, outcome);
    const cell = (name) => ({ figure: `${name}.${outcome}`, value: latency[name], format: formatSeconds });
    return [
      codeOf(outcome),
      cell("mean"), cell("p50"), cell("p99"), cell("p999"),
    ];
  }));
}

function codeOf(text) {
  const code = document.createElement("code");
  // May be broken after an underscore, for narrow screens.
  const parts = text.split(/(?<=_)/);
  code.append(...parts.flatMap((part, i) => (i === 0 ? [part] : [document.createElement("wbr"), part])));
  return code;
}

function renderStages(stages) {
  const total = stages.reduce((sum, stage) => sum + (stage.mean || 0), 0);
  let start = 0;
  fillTable(byId("stages"), stages.map(({ stage, mean: average, p99 }) => {
    const end = start + (total > 0 ? (average || 0) / total : 0);
    const bar = makeBar(start, end);
    start = end;
    const name = document.createElement("span");
    const meaning = document.createElement("small");
    meaning.textContent = STAGES[stage];
    name.append(stage, meaning);
    return [
      name,
      bar,
      { figure: `stage.mean.${stage}`, value: average, format: formatSeconds },
      { figure: `stage.p99.${stage}`, value: p99, format: formatSeconds },
    ];
  }));
}

function renderBatches({ rows, requests, perSecond, drops }) {
  put("batches.perSecond", perSecond);
  put("batches.rowsMean", mean(rows));
  put("batches.rowsP50", boundOf(rows, 0.5));
  put("batches.rowsP99", boundOf(rows, 0.99));
  put("batches.requestsMean", mean(requests));
  put("batches.requestsP99", boundOf(requests, 0.99));
  const numDropped = [...drops.values()].reduce((sum, count) => sum + count, 0);
  put("batches.drops", numDropped, () => listCounts(drops) || "none");
  drawBars(document.querySelector('[data-bars="rows"]'), rows, { format: formatNumber });
}

function renderUsers({ degraded, storeErrors, unknown, recordAge }, requests) {
  const replaced = share(degraded.get("user_features") ?? 0, requests.answered);
  put("users.degraded", replaced, formatShare, levelOf(replaced, LIMITS.degradedShare, true));
  const stale = share(degraded.get("stale_user_features") ?? 0, requests.answered);
  put("users.stale", stale, formatShare, levelOf(stale, LIMITS.staleShare, true));
  const noRecord = share(unknown, requests.answered);
  put("users.unknown", noRecord, formatShare, levelOf(noRecord, LIMITS.unknownUserShare, true));
  const numErrors = [...storeErrors.values()].reduce((sum, count) => sum + count, 0);
  put("users.storeErrors", numErrors, () => listCounts(storeErrors) || "none");
  put("users.ageP50", quantile(recordAge, 0.5), formatAge);
  put("users.ageP99", quantile(recordAge, 0.99), formatAge);
  put("users.ageOver", shareAbove(recordAge, STALE_RECORD_S), formatShare);
}

const NUM_FEATURES_SHOWN = 8;

function renderFeatures(features, drift) {
  const rows = features.map((feature) => ({ ...feature, drift: drift.get(feature.feature) ?? NaN }));
  const worst = (row) => [row.drift || 0, (row.missing || 0) + (row.unknown || 0)];
  rows.sort((a, b) => {
    const [[driftA, goneA], [driftB, goneB]] = [worst(a), worst(b)];
    return driftB - driftA || goneB - goneA;
  });
  const cells = rows.map(({ feature, drift: psi, missing, unknown }) => [
    feature,
    { figure: `drift.${feature}`, value: psi, format: formatNumber, level: levelOf(psi, LIMITS.drift, true) },
    { figure: `missing.${feature}`, value: missing, format: formatShare },
    { figure: `unknown.${feature}`, value: unknown, format: formatShare },
  ]);
  fillTable(byId("features"), cells.length > 0
    ? cells.slice(0, NUM_FEATURES_SHOWN)
    : [["nothing sampled yet", "", "", ""]]);
  fillTable(byId("other-features"), cells.slice(NUM_FEATURES_SHOWN));
  byId("more-features").hidden = cells.length <= NUM_FEATURES_SHOWN;
}

/** One picture per output; the line is the service's whole life. */
function renderScores(scores, totals) {
  const box = byId("scores");
  byId("no-scores").hidden = totals.some(({ histogram }) => histogram.count > 0);
  for (const { output, histogram } of totals) {
    if (histogram.count === 0) continue;
    let part = [...box.children].find((child) => child.dataset.output === output);
    if (part === undefined) {
      part = document.createElement("div");
      part.dataset.output = output;
      const title = document.createElement("h4");
      title.append(codeOf(output), ", mean ");
      const average = document.createElement("span");
      average.dataset.figure = `score.mean.${output}`;
      title.append(average);
      const bars = document.createElement("div");
      bars.className = "bars";
      part.append(title, bars);
      box.append(part);
    }
    const recent = scores.find((score) => score.output === output)?.histogram;
    const shown = recent !== undefined && recent.count > 0 ? recent : histogram;
    put(`score.mean.${output}`, mean(shown), formatNumber);
    const line = histogram.counts.map((count) => share(count, histogram.count));
    drawBars(part.querySelector(".bars"), shown, { format: formatNumber, line });
  }
  renderScoreTable(scores);
}

function renderScoreTable(scores) {
  const table = byId("score-table");
  const head = ["probability", ...scores.map(({ output }) => output)].map((text) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    return cell;
  });
  table.tHead.rows[0].replaceChildren(...head);
  const bounds = scores[0]?.histogram.bounds ?? [];
  fillTable(table, bounds.map((_, i) => [
    bucketName(bounds, i, formatNumber),
    ...scores.map(({ histogram }) => formatShare(share(histogram.counts[i], histogram.count))),
  ]));
}

/** `points` are what happened between looks, oldest first. */
function renderPictures(points) {
  if (points.length === 0) return;
  const times = points.map(({ at }) => at);
  const valuesOf = (name) => points.map((point) => (point.isGap ? NaN : point[name]));
  for (const svg of document.querySelectorAll("[data-spark]")) {
    drawSpark(svg, times, valuesOf(svg.dataset.spark));
  }
  const lines = (names) => names.map((name) => ({ name, values: valuesOf(name) }));
  drawChart(document.querySelector('[data-chart="requests"]'), {
    times,
    series: lines(["answered", "degraded", "lost", "other"]),
    isStacked: true,
    format: (value) => `${formatNumber(value)}/s`,
  });
  drawChart(document.querySelector('[data-chart="latency"]'), {
    times,
    series: lines(["p999", "p50", "p99"]),
    format: formatSeconds,
    limit: LIMITS.p99Seconds[0],
  });
}
