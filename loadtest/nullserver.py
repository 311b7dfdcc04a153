"""An HTTP server that does nothing but answer: what the generator can send at most is seen on it.

python -m loadtest.nullserver PORT
"""

import asyncio
import sys
from typing import cast

import uvloop

_ANSWER = b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{"degraded":[]}'


class _Null(asyncio.Protocol):
    """Counts bodies by their announced length and answers each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an instance test: uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._left = 0

    def data_received(self, data: bytes) -> None:
        if not self._left:
            end = data.index(b"\r\n\r\n")
            head = data[: end + 2].lower()
            place = head.index(b"content-length:") + 15
            length = int(head[place : head.index(b"\r\n", place)])
            self._left = end + 4 + length
        self._left -= len(data)
        if not self._left:
            self._transport.write(_ANSWER)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Null, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
