"""uvicorn's httptools protocol, made to ignore offers to upgrade, as HTTP lets a server do.

Java's client and `curl --http2` offer h2c with their first request. httptools then stops parsing
and the request's body is lost; without the offer it is an ordinary HTTP/1.1 request.
"""

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = re.compile(rb"\r\n(?:upgrade|http2-settings):[^\r\n]*", re.IGNORECASE)


class Http1Protocol(HttpToolsProtocol):
    """Takes the offer out of a request's head before it is parsed."""

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what arrived."""
        if b"pgrade" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _OFFER.sub(b"", head) + end + rest
        super().data_received(data)
