"""The OpenAPI document: what `POST /score` takes and answers, with examples that work."""

from typing import Any

# Any: JSON values, here and below.
_Json = dict[str, Any]

_ID: _Json = {
    "anyOf": [{"type": "integer"}, {"type": "string", "minLength": 1}, {"type": "number"}],
    "description": 'An id. The integer 123, the number 123.0 and the string "123" are one id; '
    "other strings stay as they are. Answered exactly as sent.",
}

_FEATURES: _Json = {
    "type": "object",
    "additionalProperties": True,
    "description": "Raw values by feature name. null says that the value is missing. Names that "
    "the bundle does not know are ignored and listed in the answer.",
}

REQUEST_EXAMPLES: dict[str, _Json] = {
    "ids": {
        "summary": "Item ids alone; their features are in the item table",
        "value": {
            "user_id": 1249,
            "time": "2017-11-20T18:30:00Z",
            "candidates": [819063, "995242", 1029743],
        },
    },
    "objects": {
        "summary": "Items with features that only the caller knows",
        "value": {
            "user_id": "1249",
            "time": "2017-11-20T18:30:00+01:00",
            "context": {"store_id": "318"},
            "candidates": [
                {"item_id": 819063, "display_location": "5"},
                {"item_id": 995242, "display_location": None},
            ],
        },
    },
    "columns": {
        "summary": "The same as columns, answered as columns: faster for many candidates",
        "value": {
            "user_id": 1249,
            "request_id": "page-view-7f3a",
            "timeout_ms": 200,
            "layout": "columns",
            "candidates": {"item_id": [819063, 995242], "display_location": ["5", None]},
        },
    },
}

ANSWER_EXAMPLE: _Json = {
    "request_id": "page-view-7f3a",
    "bundle": "0123456789abcdef",
    "degraded": [],
    "user_status": "ok",
    "ignored_features": [],
    "items": [
        {"item_id": 819063, "pctr": 0.0312, "pctcvr": 0.0011, "pcvr": 0.0353, "status": "ok"},
        {
            "item_id": 995242,
            "pctr": 0.0127,
            "pctcvr": 0.0001,
            "pcvr": 0.0079,
            "status": "unknown_item",
        },
    ],
}

COLUMNS_ANSWER_EXAMPLE: _Json = {
    **{name: value for name, value in ANSWER_EXAMPLE.items() if name != "items"},
    "columns": {
        "item_id": [819063, 995242],
        "pctr": [0.0312, 0.0127],
        "pctcvr": [0.0011, 0.0001],
        "pcvr": [0.0353, 0.0079],
        "status": ["ok", "unknown_item"],
    },
}

_REQUEST: _Json = {
    "type": "object",
    "required": ["user_id", "candidates"],
    "additionalProperties": False,
    "properties": {
        "user_id": _ID,
        "candidates": {
            "description": "What to score, at least one. Repeats are allowed.",
            "oneOf": [
                {"type": "array", "minItems": 1, "items": _ID},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["item_id"],
                        "properties": {"item_id": _ID},
                        "additionalProperties": True,
                        "description": "An item and raw values that replace those of the item "
                        "table, or are known to the caller only.",
                    },
                },
                {
                    "type": "object",
                    "required": ["item_id"],
                    "properties": {"item_id": {"type": "array", "minItems": 1, "items": _ID}},
                    "additionalProperties": {"type": "array"},
                    "description": "Columns of equal length.",
                },
            ],
        },
        "time": {
            "type": ["string", "null"],
            "format": "date-time",
            "description": "When the candidates are shown, with an offset; now if not given. "
            "Stored events after it do not count.",
        },
        "context": {**_FEATURES, "type": ["object", "null"]},
        "user_features": {
            **_FEATURES,
            "type": ["object", "null"],
            "description": "Raw values that replace those of the user record. A history is a list "
            "of ids, newest first, with a list of unix seconds beside it under NAME_time.",
        },
        "request_id": {
            "type": ["string", "null"],
            "minLength": 1,
            "maxLength": 128,
            "description": "Printable ASCII; wins over the header x-request-id. Made up if absent.",
        },
        "layout": {
            "enum": ["rows", "columns", None],
            "description": "Of the answer: one object per candidate (`items`, the default), or one "
            "list per name (`columns`), which is cheaper to write, to send and to read.",
        },
        "timeout_ms": {
            "type": ["integer", "null"],
            "minimum": 1,
            "description": "Time for this request, up to the service's limit; see the header "
            "x-timeout-ms.",
        },
    },
}

_PROBABILITY: _Json = {"type": ["number", "null"], "minimum": 0, "maximum": 1}

_STATUS: _Json = {
    "enum": ["ok", "unknown_item", "non_finite"],
    "description": "unknown_item: scored with defaults. non_finite: the model gave no number, so "
    "the probabilities are null.",
}
_OUTPUTS: _Json = {
    "pctr": {**_PROBABILITY, "description": "P(click)"},
    "pcvr": {**_PROBABILITY, "description": "P(conversion given click)"},
    "pctcvr": {**_PROBABILITY, "description": "P(click and conversion)"},
}
_OTHER_OUTPUTS = (
    "A bundle with other steps answers with its own output names: p_STEP, and "
    "p_LAST_given_PREVIOUS."
)

_ANSWER: _Json = {
    "type": "object",
    "required": ["request_id", "bundle", "degraded", "user_status", "ignored_features"],
    "oneOf": [{"required": ["items"]}, {"required": ["columns"]}],
    "properties": {
        "request_id": {"type": "string"},
        "bundle": {"type": "string", "description": "Id of the bundle that scored."},
        "degraded": {
            "type": "array",
            "items": {"enum": ["user_features"]},
            "description": "What was replaced by defaults because it could not be had in time.",
        },
        "user_status": {
            "enum": ["ok", "unknown", "stale", "degraded"],
            "description": "The user record was used; is not there; was used although it is old; "
            "or could not be read.",
        },
        "ignored_features": {"type": "array", "items": {"type": "string"}},
        "items": {
            "type": "array",
            "description": "One per candidate, in the order asked; the layout `rows`.",
            "items": {
                "type": "object",
                "required": ["item_id", "status"],
                "properties": {"item_id": _ID, **_OUTPUTS, "status": _STATUS},
                "additionalProperties": {**_PROBABILITY, "description": _OTHER_OUTPUTS},
            },
        },
        "columns": {
            "type": "object",
            "description": "One list per name, all in the order asked; the layout `columns`.",
            "required": ["item_id", "status"],
            "properties": {
                "item_id": {"type": "array", "items": _ID},
                **{name: {"type": "array", "items": value} for name, value in _OUTPUTS.items()},
                "status": {"type": "array", "items": _STATUS},
            },
            "additionalProperties": {
                "type": "array",
                "items": _PROBABILITY,
                "description": _OTHER_OUTPUTS,
            },
        },
    },
}

_PROBLEM: _Json = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "Stable; for machines."},
        "detail": {"type": "string", "description": "For people; may change."},
        "field": {"type": "string", "description": "Path of the field at fault, if there is one."},
        "request_id": {"type": ["string", "null"]},
        "trace_id": {
            "type": "string",
            "description": "Of the request's `traceparent`, if it has a valid one.",
        },
    },
}


def openapi_document() -> _Json:
    """The document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Click and conversion scoring",
            "version": "1",
            "description": "Calibrated probabilities of click and conversion per candidate item.",
        },
        "paths": {
            "/score": {"post": _score()},
            "/explain": {"post": _explain()},
            "/healthz": {"get": _plain("Whether the process is alive", {"200": "It is."})},
            "/readyz": {
                "get": _plain(
                    "Whether requests should be sent here; does not depend on the online store",
                    {"200": "They should.", "503": "No bundle yet, or shutting down."},
                )
            },
            "/metrics": {"get": _plain("Prometheus metrics", {"200": "Text exposition format."})},
            "/dashboard": {"get": _plain("The metrics as a page for people", {"200": "HTML."})},
        },
        "components": {
            "schemas": {"ScoreRequest": _REQUEST, "ScoreAnswer": _ANSWER, "Problem": _PROBLEM}
        },
    }


def _score() -> _Json:
    return {
        "summary": "Score candidates for one user",
        "operationId": "score",
        "parameters": [
            {
                "name": "x-request-id",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "maxLength": 128},
            },
            {
                "name": "x-timeout-ms",
                "in": "header",
                "required": False,
                "schema": {"type": "integer", "minimum": 1},
                "description": "Milliseconds left for this request, up to the service's limit. "
                "The shorter of this and the body's timeout_ms holds. A loaded service decides by "
                "this header, or by its default without it, before it reads the body.",
            },
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("ScoreRequest"), "examples": REQUEST_EXAMPLES}
            },
        },
        "responses": {
            "200": {
                "description": "Scored; see `degraded` for what was missing.",
                "content": {
                    "application/json": {
                        "schema": _ref("ScoreAnswer"),
                        "examples": {
                            "rows": {"value": ANSWER_EXAMPLE},
                            "columns": {"value": COLUMNS_ANSWER_EXAMPLE},
                        },
                    }
                },
            },
            "413": _problem("Too many candidates, or too long a body."),
            "422": _problem("Malformed JSON, or a field is missing, unknown, or of a wrong type."),
            "500": _problem("The model failed on this request, or the service has a bug."),
            "503": _problem("Not ready, overloaded (see Retry-After), or shutting down."),
            "504": _problem("Not finished within the time-out."),
        },
    }


def _explain() -> _Json:
    scored = _score()
    item = _ANSWER["properties"]["items"]["items"]
    contributions = {
        "type": "object",
        "description": "By output and feature, largest first: by how much the logit is higher than "
        "without the feature.",
        "additionalProperties": {
            "type": "object",
            "additionalProperties": {"type": ["number", "null"]},
        },
    }
    answer = {
        **_ANSWER,
        "properties": {
            **{name: value for name, value in _ANSWER["properties"].items() if name != "columns"},
            "items": {
                "type": "array",
                "items": {
                    **item,
                    "required": [*item["required"], "contributions"],
                    "properties": {**item["properties"], "contributions": contributions},
                },
            },
        },
    }
    del answer["oneOf"]
    return {
        **scored,
        "summary": "Say what each feature adds to the probabilities of a few candidates",
        "operationId": "explain",
        "responses": {
            **scored["responses"],
            "200": {
                "description": "Scored as by /score, in rows, with contributions.",
                "content": {"application/json": {"schema": answer}},
            },
        },
    }


def _plain(summary: str, responses: dict[str, str]) -> _Json:
    return {
        "summary": summary,
        "responses": {
            status: {"description": text} if status == "200" else _problem(text)
            for status, text in responses.items()
        },
    }


def _problem(text: str) -> _Json:
    return {
        "description": text,
        "content": {"application/problem+json": {"schema": _ref("Problem")}},
    }


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}
