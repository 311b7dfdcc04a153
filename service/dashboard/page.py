"""Puts the built-in page together from its files, and says what a browser may do with it.

One document, with its style and its script in it, so that nothing else has to be fetched; the
policy names both by their hash and allows no address but the service's own.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

_STYLE, _SCRIPT = "/*STYLE*/", "/*SCRIPT*/"

# In this order: later ones use what earlier ones define, and the last one begins.
_SCRIPTS = (
    "exposition.js",
    "history.js",
    "figures.js",
    "format.js",
    "verdict.js",
    "draw.js",
    "panels.js",
    "main.js",
)


@dataclass(frozen=True, slots=True)
class Page:
    """An HTML document and the headers that go with it."""

    body: bytes
    headers: Mapping[str, str]


def load_page() -> Page:
    """Reads the page's files, which are part of the package; about 70 kB."""
    style = _read("style.css")
    # One scope of its own, without a name in the window's.
    script = "(() => {\n'use strict';\n" + "\n".join(map(_read, _SCRIPTS)) + "})();\n"
    document = _read("page.html").replace(_STYLE, style).replace(_SCRIPT, script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{what} {where}" for what, where in policy.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Page(document.encode(), headers)


def _read(name: str) -> str:
    return (files("service.dashboard") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
