"""Runs the stack of docker-compose.yml for real, from a clean state, and says what it saw.

    python tests/e2e/compose_stack.py

Needs `docker compose`, or podman and podman-compose; nothing of the project need be installed. Uses
a project name and volumes of its own, and removes them at the end. Exit code 0 if all is as
promised.

No request fails by SIGTERM: that means here that each one which was sent on an open connection got
a whole answer, be it a 503 with Retry-After. Not to send new ones once /readyz fails, or a
connection is refused, is the part of whoever balances the load; the callers here do not do it, they
go on asking a closed port.
"""

import argparse
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "ctr-stack-check"
SERVED = ("redis", "service", "prometheus")
LOAD = Path(__file__).with_name("compose_load.py").read_text()
LOAD_RATE = 50
NUM_REQUESTS = 20
# The same each time: another index would be another layer to build.
WHEELS_PORT = 8997
MAX_SERVE_MB = 450
# A few shopping trips, a few steps: a model that means little, soon.
DEMO = {
    "DEMO_OPTIONS": "--keep-trips 0.01 --set optimizer.min_steps=300",
    "TRAINER_CPUS": "1",
}
BOOTSTRAP_LIMIT_S, LIMIT_S, BUILD_LIMIT_S = 1200.0, 90.0, 3600.0

JSON = dict[str, Any]  # Any: JSON values


class CheckFailed(Exception):
    """Something is not as promised."""


class Engine:
    """`docker compose` or podman with podman-compose; what both can do, called alike."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self._environment = environment
        self._compose = ["docker", "compose"]
        if name == "podman":
            # Builds without the rights that a machine of a build farm seldom has; and images in
            # the format that keeps health checks.
            options = "--podman-build-args=--isolation chroot --network host"
            self._compose = ["podman-compose", options]
            self._environment = environment | {"BUILDAH_FORMAT": "docker"}

    def compose(self, *arguments: str, limit_s: float = LIMIT_S) -> None:
        """Runs a compose command; what it says is shown only if it fails."""
        self._run([*self._compose, "-p", PROJECT, *arguments], limit_s=limit_s)

    def __call__(self, *arguments: str, limit_s: float = LIMIT_S) -> str:
        """Runs a command of the engine and returns what it printed."""
        return self._run([self.name, *arguments], limit_s=limit_s).strip()

    def container(self, service: str) -> str:
        """The id of the service's container."""
        labels = _labels("project", PROJECT) + _labels("service", service)
        found = self("ps", "-aq", *labels).split()
        if len(found) != 1:
            raise CheckFailed(f"{service}: {len(found)} containers, expected one")
        return found[0]

    def state(self, service: str, field: str) -> str:
        return self("inspect", "-f", "{{.State." + field + "}}", self.container(service))

    def is_healthy(self, service: str) -> bool:
        if self.name == "docker":
            return self.state(service, "Health.Status") == "healthy"
        # There may be no timer for podman's checks, so each is run from here.
        command = ["podman", "healthcheck", "run", self.container(service)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def image_bytes(self, image: str) -> int:
        if subprocess.run(
            [self.name, "image", "inspect", image], capture_output=True, check=False
        ).returncode:
            self("pull", image, limit_s=BUILD_LIMIT_S)
        return int(self("image", "inspect", "-f", "{{.Size}}", image))

    def left_over(self) -> list[str]:
        """Names of containers and volumes of the project."""
        label = _labels("project", PROJECT)
        return (self("ps", "-aq", *label) + "\n" + self("volume", "ls", "-q", *label)).split()

    @contextmanager
    def load(self, body: bytes, *, seconds: float) -> Iterator[JSON]:
        """Puts load on the service while the block runs; the counts are there after it."""
        process = subprocess.Popen(
            [
                *(self.name, "run", "--rm", "-i", "--network", f"{PROJECT}_watch"),
                *("ctr-scoring:train", "python", "-c", LOAD),
                *("service", "8000", str(seconds), str(LOAD_RATE)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018 - one fact
        process.stdin.write(body)
        process.stdin.close()
        counts: JSON = {}
        try:
            if process.stdout.readline() != b"running\n":
                raise CheckFailed("the load did not begin: " + _text(process))
            yield counts
            counts |= json.loads(process.stdout.readline())
            process.wait(LIMIT_S)
        finally:
            if process.poll() is None:
                process.kill()

    def _run(self, command: list[str], *, limit_s: float) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        if done.returncode:
            tail = (done.stdout + done.stderr)[-4000:]
            raise CheckFailed(f"{' '.join(command)[:200]} ended with {done.returncode}\n{tail}")
        return done.stdout


class Stack:
    """The running stack: its service's address, and Prometheus behind it."""

    def __init__(self, engine: Engine, url: str) -> None:
        self.engine = engine
        self.url = url

    def get(self, path: str) -> int:
        """The status of an answer; 0 without one."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as exc:
            return exc.code
        except OSError:
            return 0

    def score(self, body: bytes) -> JSON:
        request = urllib.request.Request(
            f"{self.url}/score", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: JSON = json.load(response)
        return answer

    def prometheus(self, query: str) -> float:
        """The value of a query, by Prometheus's API; 0 without one. It is not published."""
        code = (
            "import sys, urllib.request as u, urllib.parse as p; print(u.urlopen("
            "'http://prometheus:9090/api/v1/query?' + p.urlencode({'query': sys.argv[1]}))"
            ".read().decode())"
        )
        container = self.engine.container("service")
        answer = json.loads(self.engine("exec", container, "python", "-c", code, query))
        result = answer["data"]["result"]
        return float(result[0]["value"][1]) if result else 0.0

    def request_body(self) -> bytes:
        """The request that `bootstrap` left beside the bundle."""
        container = self.engine.container("service")
        return self.engine("exec", container, "cat", "/models/request.json").encode()


def check(engine: Engine, stack: Stack) -> None:
    """Everything, in order.

    Raises:
        CheckFailed: At the first thing that is not as promised.
    """
    say("building the images")
    engine.compose("build", "service", limit_s=BUILD_LIMIT_S)
    engine.compose("build", "bootstrap", limit_s=BUILD_LIMIT_S)
    check_sizes(engine)

    say("starting redis, service and prometheus on empty volumes")
    engine.compose("up", "-d", *SERVED, limit_s=300)
    wait_until("the service lives", lambda: stack.get("/healthz") == 200)
    expect("not ready without a bundle", stack.get("/readyz"), 503)
    for service in SERVED:
        wait_until(f"{service} is healthy", functools.partial(engine.is_healthy, service))
    started = engine.state("service", "StartedAt")

    say("starting bootstrap")
    engine.compose("up", "-d", "bootstrap", limit_s=300)
    wait_until(
        "the service is ready", lambda: stack.get("/readyz") == 200, limit_s=BOOTSTRAP_LIMIT_S
    )
    expect("the service was not started again", engine.state("service", "StartedAt"), started)
    engine("wait", engine.container("bootstrap"))
    expect("exit code of bootstrap", engine.state("bootstrap", "ExitCode"), "0")

    body = stack.request_body()
    check_counts(stack, body)
    check_bootstrap_again(engine)
    check_redis_restart(engine, stack, body)
    check_sigterm(engine, stack, body)


def check_sizes(engine: Engine) -> None:
    base = engine.image_bytes(os.environ.get("PYTHON_IMAGE", "python:3.11-slim"))
    for name in ("serve", "train"):
        size = engine.image_bytes(f"ctr-scoring:{name}")
        say(f"  {name}: {size / 1e6:.0f} MB, {(size - base) / 1e6:.0f} MB over its base")
        if name == "serve" and size - base > MAX_SERVE_MB * 1e6:
            raise CheckFailed(f"serve is more than {MAX_SERVE_MB} MB over its base")


def check_counts(stack: Stack, body: bytes) -> None:
    """What is scored is in the answers, and in Prometheus."""
    num_candidates = len(json.loads(body)["candidates"]["item_id"])
    say(f"posting {NUM_REQUESTS} requests of {num_candidates} candidates")
    for _ in range(NUM_REQUESTS):
        answer = stack.score(body)
        expect_quietly("candidates answered", len(answer["items"]), num_candidates)
        if not all(0 < item["pctcvr"] <= item["pctr"] < 1 for item in answer["items"]):
            raise CheckFailed(f"these are no probabilities: {answer['items'][:3]}")
    say(f"  the first of them: {json.dumps(answer['items'][0])}")
    expected = NUM_REQUESTS * num_candidates
    wait_until(
        f"Prometheus counts {expected} candidates",
        lambda: stack.prometheus("sum(scoring_candidates_total)") == expected,
    )


def check_bootstrap_again(engine: Engine) -> None:
    say("starting bootstrap once more")
    container = engine.container("bootstrap")
    engine("start", container)
    engine("wait", container)
    expect("exit code of bootstrap", engine.state("bootstrap", "ExitCode"), "0")
    if "nothing to do" not in engine("logs", "--tail", "1", container):
        raise CheckFailed("bootstrap did not leave alone what was there")


def check_redis_restart(engine: Engine, stack: Stack, body: bytes) -> None:
    say(f"restarting redis under {LOAD_RATE} requests/s")
    before = stack.prometheus("sum(scoring_degraded_total)")
    with engine.load(body, seconds=10) as counts:
        time.sleep(2)
        engine.compose("restart", "redis")
    say(f"  {counts}")
    expect("requests without an answer", num_failed(counts), 0)
    if not 0 < counts["degraded"] < counts["answered"]:
        raise CheckFailed("some answers, and not all, should have been degraded")
    wait_until(
        "answers have the user's record again",
        lambda: stack.score(body)["user_status"] == "ok",
    )
    # And more, if an answer before or after was degraded: the machine may be busy.
    wait_until(
        f"Prometheus counts the {counts['degraded']} degraded answers",
        lambda: stack.prometheus("sum(scoring_degraded_total)") - before >= counts["degraded"],
    )


def check_sigterm(engine: Engine, stack: Stack, body: bytes) -> None:
    say(f"SIGTERM for the service under {LOAD_RATE} requests/s")
    with engine.load(body, seconds=6) as counts:
        time.sleep(2)
        engine.compose("stop", "service")
    say(f"  {counts}")
    expect("requests without an answer", num_failed(counts), 0)
    expect("exit code of the service", engine.state("service", "ExitCode"), "0")
    if not counts["unconnected"]:
        raise CheckFailed("the load ended before the service did: this showed nothing")
    engine.compose("start", "service")
    wait_until("the service is ready again", lambda: stack.get("/readyz") == 200)
    expect("user's record, after all restarts", stack.score(body)["user_status"], "ok")


def num_failed(counts: JSON) -> int:
    return int(counts["broken"] + counts["other"])


def take_down(engine: Engine) -> None:
    engine.compose("down", "-v", limit_s=300)
    # podman-compose keeps volumes that only a service it did not start names.
    for name in engine.left_over():
        say(f"  left over, removed now: {name}")
        engine("volume", "rm", name)


def wait_until(what: str, is_so: Callable[[], bool], *, limit_s: float = LIMIT_S) -> None:
    start = time.monotonic()
    while not is_so():
        if time.monotonic() - start > limit_s:
            raise CheckFailed(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.5)
    say(f"  {what} (after {time.monotonic() - start:.0f} s)")


def expect(what: str, found: object, expected: object) -> None:
    expect_quietly(what, found, expected)
    say(f"  {what}: {found}")


def expect_quietly(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise CheckFailed(f"{what}: {found}, expected {expected}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _labels(kind: str, value: str) -> tuple[str, ...]:
    return ("--filter", f"label=com.docker.compose.{kind}={value}")


def _text(process: "subprocess.Popen[bytes]") -> str:
    process.kill()
    return process.communicate()[1].decode()[-1000:]


def _find_engine() -> str:
    for name, command in (
        ("docker", ["docker", "info"]),
        ("podman", ["podman-compose", "version"]),
    ):
        if shutil.which(command[0]) is not None:
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0:
                return name
    sys.exit("neither a Docker engine nor podman-compose is there")


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def _torch_index(wheels: Path | None) -> Iterator[dict[str, str]]:
    """The environment that names an index of torch's wheels: of our own, if they are given."""
    if wheels is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "torch").mkdir()
        for wheel in wheels.glob("torch-*.whl"):
            (Path(directory) / "torch" / wheel.name).symlink_to(wheel.resolve())
        handler = functools.partial(_QuietHandler, directory=directory)
        with http.server.ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield {"TORCH_INDEX": f"http://127.0.0.1:{WHEELS_PORT}/"}
            server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the stack of docker-compose.yml for real.")
    parser.add_argument("--engine", choices=["docker", "podman"], help="default: what is there")
    parser.add_argument(
        "--torch-wheels",
        type=Path,
        help="directory with a wheel of torch, where download.pytorch.org is out of reach (podman)",
    )
    arguments = parser.parse_args()
    address = _free_address()
    with _torch_index(arguments.torch_wheels) as index:
        settings = {"SERVICE_ADDRESS": address, **DEMO, **index}
        engine = Engine(arguments.engine or _find_engine(), {**os.environ, **settings})
        say(f"with {engine.name}; taking down what an earlier check may have left")
        take_down(engine)
        try:
            check(engine, Stack(engine, f"http://{address}"))
        except CheckFailed as exc:
            say(f"FAILED: {exc}")
            for service in (*SERVED, "bootstrap"):
                show_log(engine, service)
            return 1
        finally:
            say("taking all down")
            take_down(engine)
    if left := engine.left_over():
        say(f"FAILED: left over: {left}")
        return 1
    say("passed")
    return 0


def show_log(engine: Engine, service: str) -> None:
    try:
        container = engine.container(service)
    except CheckFailed:
        return
    command = [engine.name, "logs", "--tail", "20", container]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"--- {service}\n{done.stdout}{done.stderr}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
