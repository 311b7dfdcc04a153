"""The built-in page as it is served: one document that may ask nobody else for anything."""

import base64
import hashlib
import re

import httpx
import pytest

from service.dashboard.page import load_page
from service.observe import Metrics

# The name space of pictures; nothing is fetched from there.
NAMES = {"http://www.w3.org/2000/svg"}


def parts_of(policy: str) -> dict[str, str]:
    pairs = (part.strip().partition(" ") for part in policy.split(";"))
    return {what: where for what, _, where in pairs}


@pytest.mark.anyio
async def test_page_is_served_before_there_is_a_bundle(client: httpx.AsyncClient) -> None:
    answer = await client.get("/dashboard")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == load_page().body


def test_policy_allows_this_page_its_own_service_and_no_one_else() -> None:
    page = load_page()
    document = page.body.decode()
    policy = parts_of(page.headers["content-security-policy"])

    def hash_of(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", document, re.S)
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy == {
        "default-src": "'none'",
        "script-src": f"'sha256-{hash_of('script')}'",
        "style-src": f"'sha256-{hash_of('style')}'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_page_names_no_address_outside() -> None:
    assert set(re.findall(r"https?://[^\"'\s>)]+", load_page().body.decode())) <= NAMES


def test_every_metric_that_the_page_names_is_there() -> None:
    families = set(re.findall(r"^# TYPE (\S+) ", Metrics().render().decode(), re.M))
    named = set(re.findall(r"\bscoring_[a-z_]+", load_page().body.decode()))

    assert len(named) > 30
    assert {re.sub(r"_(count|sum|bucket)$", "", name) for name in named} - families == set()
