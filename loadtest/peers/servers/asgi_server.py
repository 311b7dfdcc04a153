"""A yardstick: a bare ASGI app on uvicorn that runs the model inline, one request at a time."""

import json
import sys
from typing import Any

import uvicorn
from graph import Graph, to_lists

_JSON = [(b"content-type", b"application/json")]


def make_app() -> Any:
    """The app; the model is read at once."""
    graph = Graph()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        content = b"{}"
        if scope["path"] == "/score":
            (answer,) = graph.run([graph.parse(json.loads(body)["request"])])
            content = json.dumps(to_lists(answer)).encode()
        length = (b"content-length", str(len(content)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON, length]})
        await send({"type": "http.response.body", "body": content})

    return app


if __name__ == "__main__":
    config = uvicorn.Config(
        make_app(),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )
    uvicorn.Server(config).run()
