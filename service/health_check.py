"""Asks a service how it is, for health checks: `python -m service.health_check URL [WAIT_S]`.

Exit code 0 if the URL answers 200, else 1; with WAIT_S it asks until it does, or that long. Imports
little: a health check takes its CPU time from the service it asks.
"""

import socket
import sys
import time

_TIMEOUT_S = 3.0
_PAUSE_S = 0.5
_WELL = b"HTTP/1.1 200 "


def is_well(url: str) -> bool:
    """Whether the URL (http, with a port) answers 200 in time."""
    address, _, path = url.removeprefix("http://").partition("/")
    host, _, port = address.rpartition(":")
    request = f"GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_S) as connection:
            connection.sendall(request.encode())
            return connection.recv(len(_WELL), socket.MSG_WAITALL) == _WELL
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    url = arguments[0]
    deadline = time.monotonic() + float(arguments[1] if len(arguments) > 1 else 0)
    while not (found := is_well(url)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
