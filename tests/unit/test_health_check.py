import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from service.health_check import main


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status = {"/well": 200, "/unwell": 503}[self.path]
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_200_is_well(server: str) -> None:
    assert main([f"{server}/well"]) == 0


def test_any_other_answer_is_not(server: str) -> None:
    assert main([f"{server}/unwell"]) == 1


def test_no_answer_is_not() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    assert main([f"http://127.0.0.1:{port}/well"]) == 1


def test_it_waits_for_a_service_that_comes_later() -> None:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), Handler, bind_and_activate=False
    ) as late:
        late.server_bind()
        url = f"http://127.0.0.1:{late.server_port}/well"
        codes: list[int] = []
        waiting = threading.Thread(target=lambda: codes.append(main([url, "20"])))
        waiting.start()
        time.sleep(0.1)  # It has asked once by then, and if not, this shows a little less.
        late.server_activate()
        threading.Thread(target=late.serve_forever, args=(0.01,), daemon=True).start()
        waiting.join(20)
        late.shutdown()

    assert codes == [0]
