"""Load on a service from inside its network, and what became of each request.

`python compose_load.py HOST PORT SECONDS REQUESTS_PER_SECOND < BODY` says `running` once requests
are answered, and at the end one line of JSON with the counts below. It runs in a container, so it
takes the standard library alone.

    answered      200
    degraded      of these, without the user's record
    refused       503 with Retry-After: said clearly, to be sent elsewhere
    unconnected   no connection could be made: nobody listens (any more)
    broken        sent on an open connection, and no whole answer came back
    other         any other answer
"""

import http.client
import json
import socket
import sys
import threading
import time
from collections import Counter

NUM_CALLERS = 8
TIMEOUT_S = 5.0
# A connection that is not to be had is not asked for in a busy loop.
PAUSE_S = 0.05

HEADERS = {"content-type": "application/json", "x-timeout-ms": "2000"}


class Caller(threading.Thread):
    """Sends one request after another, each at its time; keeps its connection while it may."""

    def __init__(
        self, address: tuple[str, int], body: bytes, *, end: float, interval_s: float, first: float
    ) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self.is_answered = threading.Event()
        self._address, self._body = address, body
        self._end, self._interval_s, self._next = end, interval_s, first
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        while (now := time.monotonic()) < self._end:
            if now < self._next:
                time.sleep(self._next - now)
            # Late callers send at once, and do not catch up.
            self._next = max(self._next + self._interval_s, time.monotonic())
            self.counts[self._outcome()] += 1

    def _outcome(self) -> str:
        if self._connection is None:
            connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT_S)
            try:
                connection.connect()
            except OSError:
                time.sleep(PAUSE_S)
                return "unconnected"
            self._connection = connection
        connection = self._connection
        try:
            connection.request("POST", "/score", self._body, HEADERS)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as exc:
            self.examples.append(repr(exc))
            connection.close()
            self._connection = None
            return "broken"
        if response.will_close:
            connection.close()
            self._connection = None
        return self._kind(response, data)

    def _kind(self, response: http.client.HTTPResponse, data: bytes) -> str:
        if response.status == 200:
            self.is_answered.set()
            self.counts["degraded"] += bool(json.loads(data)["degraded"])
            return "answered"
        if response.status == 503 and response.headers["retry-after"]:
            return "refused"
        self.examples.append(f"{response.status} {data[:200]!r}")
        return "other"


def main(host: str, port: str, seconds: str, rate: str) -> None:
    body = sys.stdin.buffer.read()
    # Looked up once: names of containers that have ended are nobody's.
    address = (socket.gethostbyname(host), int(port))
    start = time.monotonic()
    interval_s = NUM_CALLERS / float(rate)
    callers = [
        Caller(
            address,
            body,
            end=start + float(seconds),
            interval_s=interval_s,
            first=start + interval_s * number / NUM_CALLERS,
        )
        for number in range(NUM_CALLERS)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.is_answered.wait(float(seconds))
    print("running", flush=True)
    for caller in callers:
        caller.join()
    counts = {"answered": 0, "degraded": 0, "refused": 0, "unconnected": 0, "broken": 0, "other": 0}
    for caller in callers:
        for kind, number in caller.counts.items():
            counts[kind] += number
    examples = [example for caller in callers for example in caller.examples][:5]
    print(json.dumps(counts | {"examples": examples}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
