"""What lies under deploy/ fits the code, and its parts fit each other."""

import itertools
import re
import runpy
from collections import Counter

import pytest
import yaml
from deployed import (
    DASHBOARDS,
    DEPLOY,
    PROMETHEUS,
    ROOT,
    RULE_TESTS,
    RUNBOOK,
    Json,
    alerts,
    as_values,
    dashboards,
    names_in,
    panels,
    queries,
    read_yaml,
    recorded_names,
    rules,
    sections,
)

from service.answers import PROBLEMS
from service.batch_plan import DropReason
from service.observe import Metrics, request_outcomes

GRAFANA = DEPLOY / "grafana"
# Of requests that ended: those that the availability objective counts as answered, as failed, and
# those that it does not judge. `overloaded` is told by the refusals.
ANSWERED = {"ok", "degraded"}
FAILED = {"internal_error", "inference_failed", "deadline_exceeded", "not_ready", "shutting_down"}
NOT_JUDGED = {"invalid_request", "payload_too_large", "too_many_candidates", "cancelled"}
UNITS = {"short", "s", "percentunit", "bytes", "reqps", "cps", "ops"}


def metric_names() -> set[str]:
    """Names as Prometheus has them, those of a histogram's parts among them."""
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", Metrics().render().decode(), re.M):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + part for part in parts}
    return names


# Metrics


def test_every_metric_that_is_asked_for_exists() -> None:
    known = metric_names() | recorded_names()
    unknown = {query.where: names_in(query.expr) - known for query in queries()}
    assert {where: names for where, names in unknown.items() if names} == {}


def test_every_metric_of_the_service_is_on_a_panel_or_in_a_rule() -> None:
    used = {name for query in queries() for name in names_in(query.expr)}
    families = re.findall(r"^# TYPE (\S+)", Metrics().render().decode(), re.M)
    parts = ("", "_bucket", "_sum", "_count")
    assert len(families) > 30
    assert [name for name in families if not {name + part for part in parts} & used] == []


def test_every_metric_that_a_rule_test_feeds_exists() -> None:
    series = [
        each["series"]
        for path in RULE_TESTS
        for case in read_yaml(path)["tests"]
        for each in case["input_series"]
    ]
    assert len(series) > 100
    assert {name for text in series for name in names_in(text)} - metric_names() == set()


def test_every_metric_that_the_runbook_names_exists() -> None:
    named = set(re.findall(r"\bscoring_[a-z_]+\b", RUNBOOK.read_text()))
    families = {name.removesuffix("_bucket") for name in metric_names()}
    assert named - metric_names() - families == set()


def test_every_recorded_value_is_used() -> None:
    used = {name for query in queries() for name in names_in(query.expr)}
    assert recorded_names() - used == set()


# Objectives


def outcomes_of(expr: str, operator: str) -> list[set[str]]:
    return [set(found.split("|")) for found in re.findall(rf'outcome{operator}"([^"]+)"', expr)]


def test_every_outcome_has_a_place_in_the_availability_objective() -> None:
    parts = [ANSWERED, FAILED, NOT_JUDGED, {"overloaded"}]
    assert sorted(itertools.chain(*parts)) == sorted(request_outcomes())
    judged = [r["expr"] for r in rules() if "unanswered" in r.get("record", "")]
    assert len(judged) == 8
    for expr in judged:
        assert outcomes_of(expr, "=~") == [ANSWERED]
        assert outcomes_of(expr, "!~") == [NOT_JUDGED | {"overloaded"}]


def test_refusals_are_the_reasons_that_answer_overloaded() -> None:
    refused = {
        tuple(found.split("|"))
        for query in queries()
        for found in re.findall(r'reason=~"([^"]+)"', query.expr)
    }
    assert refused == {("backlog", "queue_full", "queue_time")}
    assert set(next(iter(refused))) < set(DropReason.__args__)


def test_bounds_of_objectives_are_edges_of_the_histogram() -> None:
    text = Metrics().render().decode()
    edges = set(re.findall(r'scoring_request_seconds_bucket\{.*?le="([^"]+)"', text))
    asked = {
        found
        for query in queries()
        for found in re.findall(r'scoring_request_seconds_bucket\{[^}]*le="([^"]+)"', query.expr)
    }
    assert asked == {"0.05", "1.0"}
    assert asked < edges


# Alerts


def firing_and_silent(alert: str) -> Counter[bool]:
    """How many cases expect it to fire, and how many not."""
    cases = [
        bool(each["exp_samples"])
        for path in RULE_TESTS
        for case in read_yaml(path)["tests"]
        for each in case["promql_expr_test"]
        if f'alertname="{alert}"' in each["expr"]
    ]
    return Counter(cases)


@pytest.mark.parametrize("alert", list(alerts()))
def test_alert_has_a_firing_and_a_silent_case(alert: str) -> None:
    counted = firing_and_silent(alert)
    assert counted[True] >= 1
    assert counted[False] >= 1


@pytest.mark.parametrize(("alert", "rule"), list(alerts().items()), ids=list(alerts()))
def test_alert_says_how_grave_it_is_and_what_to_do(alert: str, rule: Json) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert {"summary", "description", "runbook_url"} <= set(rule["annotations"])
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert ROOT / file == RUNBOOK
    assert anchor == alert.lower()
    assert anchor in sections(RUNBOOK)


@pytest.mark.parametrize(("metric", "budget"), [("unanswered", 0.001), ("slow", 0.01)])
def test_burn_rates_have_the_windows_and_factors_of_the_workbook(
    metric: str, budget: float
) -> None:
    found = [
        (rule["labels"]["severity"], window, float(factor))
        for rule in alerts().values()
        for name, window, factor, share in re.findall(
            r"job:scoring_(\w+):ratio_rate(\w+) > ([\d.]+) \* ([\d.]+)", rule["expr"]
        )
        if name == metric and float(share) == budget
    ]
    assert found == [
        *(("page", window, 14.4) for window in ("1h", "5m")),
        *(("page", window, 6.0) for window in ("6h", "30m")),
        *(("ticket", window, 1.0) for window in ("3d", "6h")),
    ]


# Queries


def test_rates_are_taken_before_sums() -> None:
    wrong = [q.where for q in queries() if re.search(r"(rate|increase)\(\s*(sum|avg|max)", q.expr)]
    assert wrong == []


def test_quantiles_are_not_averaged() -> None:
    wrong = [
        q.where
        for q in queries()
        if re.search(
            r"\b(avg|sum|avg_over_time)\b[^(]*\(\s*(histogram_quantile|job\w*:\w*:p\d)", q.expr
        )
    ]
    assert wrong == []


def test_quantiles_are_taken_over_buckets_added_up() -> None:
    asked = [q.expr for q in queries() if "histogram_quantile" in q.expr]
    assert len(asked) > 15
    assert [expr for expr in asked if not re.search(r"sum by \([^)]*\ble\b", expr)] == []


def test_comparisons_tell_instead_of_filter_when_tested() -> None:
    expr = 'a{x!="1"} > 0.2 + b or absent(up{job="s"}) == 1'
    assert as_values(expr) == 'a{x!="1"} > bool  0.2 + b and (up{job="s"}) == bool  1'


# Dashboards


def test_dashboards_are_what_their_source_makes() -> None:
    built = runpy.run_path(str(GRAFANA / "build_dashboards.py"))["dashboards"]()
    assert {path.name: path.read_text() for path in DASHBOARDS} == {
        path.name: text for path, text in built.items()
    }


def test_dashboards_have_addresses_of_their_own() -> None:
    uids = {name: dashboard["uid"] for name, dashboard in dashboards().items()}
    assert uids == {f"{uid}.json": uid for uid in ("scoring-model", "scoring-service")}
    assert all("id" not in dashboard for dashboard in dashboards().values())


@pytest.mark.parametrize(("where", "panel"), panels(), ids=[w for w, _ in panels()])
def test_panel_can_be_read_by_a_stranger(where: str, panel: Json) -> None:
    assert "**When it looks wrong:** " in panel["description"]
    assert len(panel["description"]) > 80
    assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    assert [t["legendFormat"] for t in panel["targets"] if "{{" in t["legendFormat"]] or len(
        {t["legendFormat"] for t in panel["targets"]}
    ) == len(panel["targets"])


def test_panels_name_no_instance_and_no_data_source() -> None:
    for where, panel in panels():
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", where
            assert not re.search(r'(job|instance)=~?"[^$"]', target["expr"]), where
            assert not re.search(r"\[\d+s\]", target["expr"]), where


def test_every_selector_of_a_panel_follows_the_choice_of_job() -> None:
    for where, panel in panels():
        for target in panel["targets"]:
            selectors = re.findall(r"(?:scoring_|up|:)\w*\{([^}]*)\}", target["expr"])
            assert selectors, where
            assert all('job="$job"' in selector for selector in selectors), where
            assert len(selectors) == len(
                re.findall(r"\bscoring_\w+|\bjob\w*:[\w:]+|\bup\b", target["expr"])
            ), where


@pytest.mark.parametrize("name", [path.name for path in DASHBOARDS])
def test_panels_do_not_overlap(name: str) -> None:
    places = Counter(
        (x, y)
        for panel in dashboards()[name]["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(places.values()) == 1
    assert max(x for x, _ in places) == 23
    ids = [panel["id"] for panel in dashboards()[name]["panels"]]
    assert len(set(ids)) == len(ids)


def test_alerts_that_panels_name_exist() -> None:
    named = {
        name
        for _, panel in panels()
        for name in re.findall(r"\bScoring[A-Z]\w+", panel["description"])
    }
    assert len(named) > 20
    assert named - set(alerts()) == set()


def test_data_source_and_dashboards_are_provisioned() -> None:
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yaml")["datasources"]
    (provider,) = read_yaml(GRAFANA / "provisioning/dashboards/scoring.yaml")["providers"]
    assert (source["type"], source["uid"]) == ("prometheus", "scoring-prometheus")
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == interval["scrape_interval"]


# Compose


def compose() -> Json:
    services: Json = read_yaml(ROOT / "docker-compose.yml")["services"]
    return services


def test_prometheus_scrapes_the_service_of_the_compose_file() -> None:
    (job,) = read_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert compose()[name]["ports"][0].endswith(f":{port}")
    assert set(compose()[name]["networks"]) & set(compose()["prometheus"]["networks"])


def test_files_are_mounted_where_they_are_looked_for() -> None:
    (provider,) = read_yaml(GRAFANA / "provisioning/dashboards/scoring.yaml")["providers"]
    dashboards_in = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{dashboards_in}:ro" in compose()["grafana"]["volumes"]
    assert read_yaml(PROMETHEUS / "prometheus.yml")["rule_files"] == ["/etc/prometheus/rules/*.yml"]
    assert "./deploy/prometheus:/etc/prometheus:ro" in compose()["prometheus"]["volumes"]
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_alert_on_memory_knows_the_limit_of_the_container() -> None:
    limit = compose()["service"]["deploy"]["resources"]["limits"]["memory"]
    assert limit == "${SERVICE_MEMORY:-2G}"
    assert alerts()["ScoringMemoryHigh"]["expr"].rstrip().endswith("> 0.9 * 2 * 1024 * 1024 * 1024")


# Runbook


@pytest.mark.parametrize("code", sorted(PROBLEMS))
def test_error_code_has_a_section(code: str) -> None:
    assert code in sections(RUNBOOK)


@pytest.mark.parametrize("section", ["deploy", "size", "tune", "upgrade", "roll-back"])
def test_runbook_says_how_to(section: str) -> None:
    assert section in sections(RUNBOOK)


def test_links_to_sections_resolve() -> None:
    links = [
        (ROOT / "README.md", RUNBOOK, r"\]\(deploy/RUNBOOK\.md#([^)]+)\)"),
        (RUNBOOK, RUNBOOK, r"\]\(#([^)]+)\)"),
        (RUNBOOK, ROOT / "README.md", r"\]\(\.\./README\.md#([^)]+)\)"),
    ]
    for source, target, pattern in links:
        anchors = re.findall(pattern, source.read_text())
        assert [anchor for anchor in anchors if anchor not in sections(target)] == []


def test_sections_of_alerts_are_of_alerts_that_exist() -> None:
    titles = set(re.findall(r"^### (Scoring\w+)$", RUNBOOK.read_text(), re.M))
    assert titles == set(alerts())
