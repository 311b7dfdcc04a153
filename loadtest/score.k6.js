// A second opinion on the load generator: the same bodies at a constant arrival rate, by k6.
//   k6 run -e URL=http://127.0.0.1:8000/score -e BODIES=bodies.jsonl -e RATE=500 -e SECONDS=10
//          -e OUT=k6.json loadtest/score.k6.js
// Durations are k6's http_req_duration: from the first byte sent to the last one received. k6 does
// not count what it was late by; `dropped_iterations` says how often it could not keep the rate.
import http from "k6/http";
import { SharedArray } from "k6/data";

const bodies = new SharedArray("bodies", () =>
  open(__ENV.BODIES)
    .split("\n")
    .filter((line) => line.length > 0),
);
const headers = { headers: { "content-type": "application/json" } };

export const options = {
  scenarios: {
    score: {
      executor: "constant-arrival-rate",
      rate: Number(__ENV.RATE),
      timeUnit: "1s",
      duration: `${__ENV.SECONDS}s`,
      preAllocatedVUs: 64,
      maxVUs: 512,
    },
  },
  discardResponseBodies: true,
  summaryTrendStats: ["med", "p(90)", "p(99)", "max"],
};

export default function () {
  http.post(__ENV.URL, bodies[Math.floor(Math.random() * bodies.length)], headers);
}

export function handleSummary(data) {
  const value = (name, field) => (data.metrics[name] ? data.metrics[name].values[field] : 0);
  const duration = data.metrics.http_req_duration.values;
  const result = {
    requests: value("http_reqs", "count"),
    rate: value("http_reqs", "rate"),
    failed_share: value("http_req_failed", "rate"),
    dropped: value("dropped_iterations", "count"),
    p50: duration.med,
    p90: duration["p(90)"],
    p99: duration["p(99)"],
    max: duration.max,
  };
  return { [__ENV.OUT]: JSON.stringify(result) };
}
