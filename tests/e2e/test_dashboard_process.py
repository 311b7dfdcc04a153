"""The built-in page in a real browser: beside /metrics of a real service, and with trouble."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from chromium import Tab, open_tab, require_chromium
from test_serve_process import BODY, Served, serving
from test_workers_process import QUIET

from service.dashboard.page import load_page
from service.exposition import CONTENT_TYPE
from service.observe import Metrics

pytestmark = pytest.mark.process

PHONE = (360, 740)
FIGURES = """Object.fromEntries([...document.querySelectorAll('[data-figure]')]
    .map(({ dataset }) => [dataset.figure, Number(dataset.value)]))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_tab(require_chromium(), tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, tiny_items: Path, tab: Tab
) -> Iterator[Served]:
    """Two workers, so that the page's figures are sums; after the browser: without it, none."""
    del tab
    settings = {**QUIET, "CTR_WORKERS": 2, "CTR_HEALTH__SAMPLE_EVERY": 1}
    directory = tmp_path_factory.mktemp("dashboard")
    with serving(directory, tiny_bundle, tiny_items, **settings) as process:
        yield process
        process.process.terminate()
        process.wait()  # Workers, too, have its stderr.


class StandIn:
    """Serves the page, and as /metrics whatever a test wants; None hangs up."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.extra = ""
        self.is_there = True
        page = load_page()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805 - the library's name; self is outside
                if not self.is_there:
                    handler.close_connection = True
                    return
                is_page = handler.path.startswith("/dashboard")
                body = page.body if is_page else self.text()
                handler.send_response(200)
                for name, value in page.headers.items() if is_page else ():
                    handler.send_header(name, value)
                handler.send_header("content-type", "text/html" if is_page else CONTENT_TYPE)
                handler.send_header("content-length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, format: str, *args: object) -> None:  # noqa: N805
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def text(self) -> bytes:
        return self.metrics.render() + self.extra.encode()

    @contextmanager
    def running(self) -> Iterator["StandIn"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def serve(self, bundle: str = "b1") -> None:
        self.metrics.bundle_served(bundle=bundle, schema="s1")
        self.metrics.ready_changed(is_ready=True)

    def answer(self, times: int, outcome: str = "ok", seconds: float = 0.003) -> None:
        for _ in range(times):
            scored = 10 if outcome in ("ok", "degraded") else 0
            self.metrics.request_finished(outcome=outcome, seconds=seconds, candidates=scored)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn().running() as started:
        yield started


def open_page(tab: Tab, url: str, *, every: float = 0.1) -> None:
    """Opens it anew, and waits until its first figures are there."""
    tab.events.clear()
    tab.open(f"{url}/dashboard?every={every}")
    look_again(tab, times=2)


def look_again(tab: Tab, *, times: int = 2) -> None:
    """Waits until looks were made that began after this call."""
    looks = tab.value("Number(document.body?.dataset.looks ?? 0)")
    tab.wait_for(f"Number(document.body?.dataset.looks ?? 0) >= {looks + times}")


def headline_of(tab: Tab) -> str:
    return str(tab.value("document.getElementById('headline').textContent"))


def figures(tab: Tab) -> dict[str, float | None]:
    return dict(tab.value(FIGURES))


Series = dict[str, float]


def parse(text: str) -> Series:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


def grown(bodies: list[str]) -> Series:
    first, last = parse(bodies[0]), parse(bodies[-1])
    return {series: value - first.get(series, 0.0) for series, value in last.items()}


def total(growth: Series, name: str, label: str = "") -> float:
    return sum(
        value
        for series, value in growth.items()
        if series.partition("{")[0] == name and label in series
    )


def quantile(growth: Series, name: str, labels: tuple[str, ...], q: float) -> float:
    """As Prometheus defines it, from buckets summed over the labels."""
    buckets: dict[float, float] = {}
    for series, value in growth.items():
        if series.startswith(f"{name}_bucket") and any(label in series for label in labels):
            (bound,) = re.findall(r'le="([^"]+)"', series)
            buckets[float(bound)] = buckets.get(float(bound), 0.0) + value
    bounds = sorted(buckets)
    rank = q * buckets[bounds[-1]]
    for lower, upper in pairwise([0.0, *bounds]):
        below = buckets.get(lower, 0.0)
        if buckets[upper] >= rank and buckets[upper] > below:
            return lower + (upper - lower) * (rank - below) / (buckets[upper] - below)
    raise AssertionError("nothing was observed")


def put_load_on(served: Served) -> Counter[str]:
    """Requests on several connections, some of them mistakes; what the callers saw."""
    seen: Counter[str] = Counter()
    patient = {"x-timeout-ms": "2000"}
    for _ in range(5):
        with httpx.Client(base_url=served.url, headers=patient) as client:
            for i in range(30):
                body = {**BODY, "timeout_ms": 2000} if i % 10 else {"user_id": 7}
                answer = client.post("/score", json=body).json()
                seen[answer.get("code", "degraded" if answer.get("degraded") else "ok")] += 1
    assert seen["ok"] > 0
    return seen


def test_figures_are_those_of_metrics_at_the_same_moment(tab: Tab, served: Served) -> None:
    open_page(tab, served.url, every=0.5)
    seen = put_load_on(served)
    look_again(tab)

    looks, shown = tab.value(f"[Number(document.body.dataset.looks), {FIGURES}]")
    bodies = tab.bodies(f"{served.url}/metrics")[:looks]
    growth = grown(bodies)
    now = parse(httpx.get(f"{served.url}/metrics").text)

    ok = ('outcome="ok"', 'outcome="degraded"')
    seconds = shown["window.seconds"]
    num_scored = seen["ok"] + seen["degraded"]
    expected = {
        **{f"count.{outcome}": float(count) for outcome, count in seen.items()},
        "requests.offered": 150.0,
        "requests.perSecond": 150 / seconds,
        "candidates.perSecond": num_scored * 3 / seconds,
        "candidates.perRequest": 3.0,
        "items.unknown": 1 / 3,
        "latency.p50": quantile(growth, "scoring_request_seconds", ok, 0.5),
        "latency.p99": quantile(growth, "scoring_request_seconds", ok, 0.99),
        "latency.p999": quantile(growth, "scoring_request_seconds", ok, 0.999),
        "batches.rowsMean": total(growth, "scoring_batch_rows_sum")
        / total(growth, "scoring_batch_rows_count"),
        "total.requests": total(now, "scoring_request_seconds_count"),
        "total.candidates": total(now, "scoring_candidates_total"),
        "process.lagP99": quantile(growth, "scoring_event_loop_lag_seconds", ("le",), 0.99),
        "process.ready": 2.0,
        "process.workers": 2.0,
        "items.rows": 4.0,
    }
    for stage in ("parse", "features", "encode", "queue", "run", "respond"):
        label = f'stage="{stage}"'
        spent = total(growth, "scoring_stage_seconds_sum", label)
        count = total(growth, "scoring_stage_seconds_count", label)
        expected[f"stage.mean.{stage}"] = spent / count
        expected[f"stage.p99.{stage}"] = quantile(growth, "scoring_stage_seconds", (label,), 0.99)
    for output in ("pctr", "pcvr", "pctcvr"):
        label = f'output="{output}"'
        told = total(growth, "scoring_predicted_probability_sum", label)
        count = total(growth, "scoring_predicted_probability_count", label)
        expected[f"score.mean.{output}"] = told / count
    missing = [series for series in growth if series.startswith("scoring_feature_missing_total")]
    for series in missing:
        values = growth[series.replace("_missing_", "_values_")]
        (feature,) = re.findall(r'feature="(.*)"', series)
        expected[f"missing.{feature}"] = growth[series] / values
    assert len(missing) > 5
    assert seconds > 0
    assert {name: shown[name] for name in expected} == pytest.approx(expected)


def test_page_asks_nobody_else_and_the_browser_has_no_complaint(tab: Tab, served: Served) -> None:
    open_page(tab, served.url)
    put_load_on(served)
    look_again(tab)

    hosts = {url for url in tab.requested() if not url.startswith((f"{served.url}/", "data:"))}
    assert hosts == set()
    assert tab.complaints() == []


def test_phone_shows_the_page_without_scrolling_sideways(tab: Tab, served: Served) -> None:
    tab.resize(*PHONE)
    open_page(tab, served.url)
    put_load_on(served)
    look_again(tab)

    width = tab.value("document.documentElement.scrollWidth")
    too_wide = tab.value(
        "[...document.querySelectorAll('.scroll, .panel, .tile')]"
        ".filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.textContent)"
    )
    tab.resize(1440, 900)
    assert width == PHONE[0]
    assert too_wide == []


def test_good_service_is_said_to_be_one(tab: Tab, stand_in: StandIn) -> None:
    stand_in.serve()
    open_page(tab, stand_in.url)
    stand_in.answer(100)
    look_again(tab)

    shown = figures(tab)
    assert headline_of(tab) == "Serving well"
    # All within the bucket of 2 to 3 ms.
    assert shown["latency.p50"] == pytest.approx(0.0025)
    assert shown["latency.p99"] == pytest.approx(0.00299)
    assert tab.value("document.getElementById('bundle').textContent") == "b1"


def test_no_traffic_is_said_in_words_and_no_figure_is_nan(tab: Tab, stand_in: StandIn) -> None:
    stand_in.serve()
    stand_in.answer(100)
    open_page(tab, stand_in.url)

    text = tab.value("document.body.innerText")
    assert headline_of(tab) == "Ready, no requests"
    assert "No requests in the last" in text
    assert re.findall(r"NaN|undefined|Infinity|null", text.replace("(NaN)", "")) == []


def test_service_without_a_bundle_is_said_to_wait_for_one(tab: Tab, stand_in: StandIn) -> None:
    open_page(tab, stand_in.url)

    assert headline_of(tab) == "Not ready: no bundle yet"


def test_draining_service_is_said_to_shut_down(tab: Tab, stand_in: StandIn) -> None:
    stand_in.serve()
    stand_in.metrics.ready_changed(is_ready=False)
    open_page(tab, stand_in.url)

    assert headline_of(tab) == "Shutting down: takes no new requests"


@pytest.mark.parametrize(
    ("outcome", "times", "words"),
    [
        ("overloaded", 50, "In trouble: 33.3 % of requests refused or late"),
        ("internal_error", 1, "In trouble: 0.99 % of requests fail"),
        ("degraded", 100, "In trouble: 50 % of answers made without the user's record"),
        (
            "invalid_request",
            25,
            "Serving, but look at this: 20 % of requests are callers' mistakes",
        ),
    ],
)
def test_what_is_wrong_comes_first(
    tab: Tab, stand_in: StandIn, outcome: str, times: int, words: str
) -> None:
    stand_in.serve()
    open_page(tab, stand_in.url)
    stand_in.answer(100)
    stand_in.answer(times, outcome)
    look_again(tab)

    assert headline_of(tab).replace("\u00a0", " ") == words


def judged(tab: Tab, stand_in: StandIn, earlier: str, later: str) -> tuple[str, str]:
    """Headline and reason, 40 s after one outcome and right after another."""
    stand_in.serve()
    open_page(tab, stand_in.url)
    # The page's clock is moved, so that nobody has to wait.
    tab.value("window.realNow = Date.now; window.late = 0; Date.now = () => realNow() + late")
    stand_in.answer(300, earlier)
    look_again(tab)
    tab.value("late += 40000")
    look_again(tab)
    stand_in.answer(100, later)
    look_again(tab)
    told = "['headline', 'why'].map((id) => document.getElementById(id).textContent)"
    headline, why = (text.replace("\u00a0", " ") for text in tab.value(told))
    return headline, why


def test_trouble_that_has_just_begun_is_told_before_the_minute_is_over(
    tab: Tab, stand_in: StandIn
) -> None:
    headline, why = judged(tab, stand_in, "ok", "degraded")

    assert headline == "In trouble: 100 % of answers made without the user's record"
    assert re.match(r"So in the last \d+ s; 25 % over 4\d s\.", why)


def test_trouble_that_has_ended_is_said_to_be_over(tab: Tab, stand_in: StandIn) -> None:
    headline, why = judged(tab, stand_in, "degraded", "ok")

    assert headline == ("Serving, but look at this: 75 % of answers made without the user's record")
    assert re.match(r"It seems to be over: 0 % in the last \d+ s\.", why)


def test_slow_answers_are_measured_against_the_limit_in_the_address(
    tab: Tab, stand_in: StandIn
) -> None:
    stand_in.serve()
    open_page(tab, stand_in.url)
    stand_in.answer(100, seconds=0.06)
    look_again(tab)
    slow = headline_of(tab)
    tab.open(f"{stand_in.url}/dashboard?every=0.1&p99_ms=80")
    look_again(tab)
    stand_in.answer(100, seconds=0.06)
    look_again(tab)

    assert slow.startswith("Serving, but look at this: slow: 1 answer in 100 takes over 74.8")
    assert headline_of(tab) == "Serving well"


def test_drifted_feature_is_named_first_in_the_table(tab: Tab, stand_in: StandIn) -> None:
    stand_in.serve()
    stand_in.extra = (
        "# TYPE scoring_feature_values_total counter\n"
        'scoring_feature_values_total{feature="age"} 200\n'
        'scoring_feature_values_total{feature="shop"} 400\n'
        "# TYPE scoring_feature_missing_total counter\n"
        'scoring_feature_missing_total{feature="age"} 50\n'
        'scoring_feature_missing_total{feature="shop"} 4\n'
        "# TYPE scoring_feature_drift gauge\n"
        'scoring_feature_drift{feature="shop"} 0.4\n'
    )
    open_page(tab, stand_in.url)
    stand_in.extra = stand_in.extra.replace(" 200\n", " 300\n").replace(" 50\n", " 75\n")
    stand_in.answer(100)
    look_again(tab)

    rows = tab.value(
        "[...document.querySelectorAll('#features tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.replace('\\u00a0', ' ')))"
    )
    assert rows == [["shop", "0.4", "\u2013", "\u2013"], ["age", "\u2013", "25 %", "\u2013"]]
    assert headline_of(tab) == "Serving, but look at this: a feature has drifted"


def test_restart_of_the_service_takes_nothing_from_the_figures(tab: Tab, stand_in: StandIn) -> None:
    stand_in.serve()
    stand_in.answer(100)
    open_page(tab, stand_in.url)
    stand_in.answer(20)
    look_again(tab)
    stand_in.metrics = Metrics()
    stand_in.serve()
    stand_in.answer(30)
    look_again(tab)

    shown = figures(tab)
    assert shown["requests.offered"] == 50
    assert shown["total.requests"] == 30
    assert headline_of(tab) == "Serving, but look at this: the service has been restarted"


def test_sum_over_workers_that_is_lower_in_its_last_bits_is_no_restart(
    tab: Tab, stand_in: StandIn
) -> None:
    stand_in.serve()
    stand_in.extra = "# TYPE scoring_other_total counter\nscoring_other_total 0.30000000000000004\n"
    open_page(tab, stand_in.url)
    stand_in.answer(100)
    stand_in.extra = stand_in.extra.replace("0.30000000000000004", "0.3")
    look_again(tab)

    assert headline_of(tab) == "Serving well"


def test_service_that_is_gone_is_told_with_the_time_and_comes_back(
    tab: Tab, stand_in: StandIn
) -> None:
    stand_in.serve()
    open_page(tab, stand_in.url)
    seen = tab.value("document.getElementById('as-of').textContent")
    stand_in.is_there = False
    tab.wait_for("document.body.hasAttribute('data-is-gone')")
    gone = headline_of(tab)
    stand_in.is_there = True
    tab.wait_for("!document.body.hasAttribute('data-is-gone')")

    assert re.fullmatch(r"Not answering since \d\d:\d\d:\d\d", gone)
    assert gone.rpartition(" ")[2] >= seen
    assert headline_of(tab) == "Ready, no requests"


def test_page_does_not_ask_while_it_is_hidden(tab: Tab, stand_in: StandIn) -> None:
    stand_in.serve()
    open_page(tab, stand_in.url)
    hide = (
        "Object.defineProperty(document, 'hidden', { value: %s, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    tab.value(hide % "true")
    # One look may have been under way.
    looks = tab.value("new Promise((done) => setTimeout(done, 200))") or tab.value(
        "document.body.dataset.looks"
    )
    tab.value("new Promise((done) => setTimeout(done, 500))")
    meanwhile = tab.value("document.body.dataset.looks")
    tab.value(hide % "false")
    look_again(tab)

    assert meanwhile == looks
