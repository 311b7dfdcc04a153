"""Makes Grafana's dashboards from the TOML files beside it; knows Grafana's JSON, not the service.

`python deploy/grafana/build_dashboards.py` writes them. A panel takes three lines there and sixty
here: only the TOML is edited.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DASHBOARDS = HERE / "dashboards"

_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_PLACEHOLDERS = {
    "<in>": 'job="$job",instance=~"$instance"',
    "<job>": 'job="$job"',
    "<w>": "$__rate_interval",
}
# Events that explain a step in any panel. `step` is how often Grafana asks.
_ANNOTATIONS = (
    ("Swapped", "green", "sum by (part) (increase(scoring_swaps_total{<in>}[1m])) > 0", "{{part}}"),
    (
        "Refused",
        "orange",
        "sum by (part) (increase(scoring_swaps_refused_total{<in>}[1m])) > 0",
        "{{part}}",
    ),
    (
        "Worker restarted",
        "red",
        "sum by (instance) (increase(scoring_worker_restarts_total{<in>}[1m])) > 0",
        "{{instance}}",
    ),
    (
        "Service restarted",
        "red",
        "sum by (instance) (resets(scoring_process_cpu_seconds_total{<in>}[1m])) > 0",
        "{{instance}}",
    ),
)

Json = dict[str, Any]  # Any: JSON values


def dashboards() -> dict[Path, str]:
    """Text of every dashboard by the file that it belongs in."""
    return {
        DASHBOARDS / f"{source['uid']}.json": json.dumps(dashboard(source), indent=2) + "\n"
        for source in (tomllib.loads(p.read_text()) for p in sorted(HERE.glob("*.toml")))
    }


def dashboard(source: Json) -> Json:
    """Grafana's JSON of one dashboard.

    Raises:
        KeyError: A panel lacks its title, unit, width, queries, or what to do about it.
    """
    return {
        "uid": source["uid"],
        "title": source["title"],
        "description": source["description"],
        "tags": ["scoring"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        "templating": {"list": _variables(source.get("variables", []))},
        "annotations": {"list": [_annotation(*event) for event in _ANNOTATIONS]},
        "links": [_link()],
        "panels": _panels(source["rows"]),
    }


def _panels(rows: list[Json]) -> list[Json]:
    panels: list[Json] = []
    y = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row["title"],
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        x, y, height = 0, y + 1, row["height"]
        for panel in row["panels"]:
            if x + panel["width"] > _COLUMNS:
                x, y = 0, y + height
            place = {"x": x, "y": y, "w": panel["width"], "h": height}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_panel(panel)})
            x += panel["width"]
        y += height
    return panels


def _panel(panel: Json) -> Json:
    kind = panel.get("kind", "timeseries")
    made = {
        "type": kind,
        "title": panel["title"],
        "description": f"{panel['shows']}\n\n**When it looks wrong:** {panel['if_wrong']}",
        "datasource": _DATASOURCE,
        "targets": [_target(kind, i, query) for i, query in enumerate(panel["queries"])],
        "fieldConfig": {"defaults": _field_defaults(kind, panel), "overrides": []},
        "options": _OPTIONS[kind],
    }
    if kind == "heatmap":
        made["options"] = {**_OPTIONS[kind], "yAxis": {"unit": panel["unit"]}}
    if kind == "table":
        hidden = {"excludeByName": {"Time": True}, "renameByName": {"Value": "workers"}}
        made["transformations"] = [{"id": "organize", "options": hidden}]
    if "repeat" in panel:
        made |= {"repeat": panel["repeat"], "repeatDirection": "h", "maxPerRow": 3}
    return made


def _target(kind: str, index: int, query: Json) -> Json:
    is_instant = query.get("instant", False)
    shape = "heatmap" if kind == "heatmap" else "table" if kind == "table" else "time_series"
    return {
        "refId": chr(ord("A") + index),
        "datasource": _DATASOURCE,
        "expr": expand(query["expr"]).strip(),
        "legendFormat": query.get("legend", "__auto"),
        "format": shape,
        "instant": is_instant,
        "range": not is_instant,
    }


def expand(expr: str) -> str:
    """A query with Grafana's variables in place of the placeholders."""
    for placeholder, text in _PLACEHOLDERS.items():
        expr = expr.replace(placeholder, text)
    return expr


def _field_defaults(kind: str, panel: Json) -> Json:
    defaults: Json = {"unit": panel["unit"]} if kind != "table" else {}
    if kind == "timeseries":
        defaults["min"] = 0 if panel.get("stack") else None
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.get("stack") else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.get("stack") else "none", "group": "A"},
        }
    if "thresholds" in panel:
        first, *rest = panel["thresholds"]
        steps = [{"color": first, "value": None}]
        steps += [
            {"color": color, "value": value}
            for value, color in zip(rest[::2], rest[1::2], strict=True)
        ]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["color"] = {"mode": "thresholds"}
    return {name: value for name, value in defaults.items() if value is not None}


_LAST: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _LAST, "colorMode": "value", "graphMode": "area"},
    "bargauge": {
        "reduceOptions": _LAST,
        "displayMode": "basic",
        "orientation": "horizontal",
        "showUnfilled": False,
    },
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "tooltip": {"show": True, "yHistogram": False},
    },
    "table": {"showHeader": True},
}


def _variables(further: list[Json]) -> list[Json]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource"}
    return [
        {**source, "query": "prometheus", "current": {}, "hide": 0},
        _query_variable("job", "label_values(scoring_ready, job)"),
        {
            **_query_variable("instance", 'label_values(scoring_ready{job="$job"}, instance)'),
            **_ALL,
            # An instance that is gone has no label any more, and is wanted all the same.
            "allValue": ".*",
        },
        *({**_query_variable(v["name"], v["query"]), **_ALL} for v in further),
    ]


_ALL: Json = {
    "includeAll": True,
    "multi": True,
    "current": {"text": "All", "value": "$__all"},
}


def _query_variable(name: str, query: str) -> Json:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "hide": 0,
    }


def _annotation(name: str, color: str, expr: str, title: str) -> Json:
    return {
        "name": name,
        "datasource": _DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "expr": expand(expr),
        "step": "30s",
        "titleFormat": name,
        "textFormat": title,
    }


def _link() -> Json:
    return {
        "type": "dashboards",
        "title": "Scoring",
        "tags": ["scoring"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
    }


if __name__ == "__main__":
    for path, text in dashboards().items():
        path.write_text(text)
