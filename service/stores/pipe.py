"""One open connection to Redis: commands go out as they come, replies return in the same order.

Commands that are sent while others are under way share round trips with them. A caller that has
gone leaves its command in its place, so that the reply which belongs to it is dropped and no other.
Knows neither what opens a connection nor what an error means.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

import hiredis


class Command(Protocol):
    """Something that waits for one reply; exactly one of its methods is called, once."""

    sent_at: float
    deadline: float

    def reply(self, value: object) -> None:
        """The reply came: bytes, None, or a `hiredis.ReplyError`."""
        ...

    def lose(self, error: Exception, *, was_proven: bool) -> None:
        """The connection ended first.

        Args:
            error: Why.
            was_proven: Whether it had answered before: then the server may merely have closed a
                connection that lay idle, and is worth asking once more.
        """
        ...

    def expire(self, now: float) -> float | None:
        """The deadline is reached, no reply yet; the command stays under way.

        Returns:
            A later deadline if this one cannot be held against the server.
        """
        ...


class ProtocolError(Exception):
    """The server answers, but not as Redis does."""


class Pipe(asyncio.Protocol):
    """The protocol of one transport. For one event loop; deadlines of commands never fall."""

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        patience_s: float,
        on_lost: Callable[[], None],
    ) -> None:
        """Takes over a transport on which nothing is under way.

        Args:
            transport: Open, the handshake done.
            patience_s: A command without reply for so long ends the connection.
            on_lost: Called once when it has ended.
        """
        self._transport = transport
        self._patience_s = patience_s
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._pending: deque[Command] = deque()
        # Commands whose deadline is still to come, oldest first; some have their reply already.
        self._timed: deque[Command] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_proven = False
        self._error: Exception = ConnectionError("the connection was closed by the server")
        transport.set_protocol(self)

    @property
    def num_pending(self) -> int:
        """Commands without a reply."""
        return len(self._pending)

    def send(self, command: Command, data: bytes) -> None:
        """Sends one packed command; `command` hears of its end."""
        self._pending.append(command)
        self._timed.append(command)
        if self._timer is None:
            self._timer = self._loop.call_at(command.deadline, self._tick)
        self._transport.write(data)

    def close(self, error: Exception) -> None:
        """Ends the connection at once; commands under way are lost with this error."""
        self._error = error
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Hands each reply to its command."""
        self._reader.feed(data)
        try:
            while (value := self._reader.gets()) is not False:
                if not self._pending:
                    raise ProtocolError("a reply to no command")
                self._is_proven = True
                self._pending.popleft().reply(value)
        except (hiredis.ProtocolError, ProtocolError) as exc:
            self.close(ProtocolError(str(exc)))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the commands under way."""
        if self._timer is not None:
            self._timer.cancel()
        error = self._error if exc is None else exc
        self._on_lost()
        self._timed.clear()
        while self._pending:
            self._pending.popleft().lose(error, was_proven=self._is_proven)

    def _tick(self) -> None:
        """One timer for all commands: it costs a request nothing, however many there are."""
        self._timer = None
        now = self._loop.time()
        if self._pending and now - self._pending[0].sent_at >= self._patience_s:
            self.close(TimeoutError(f"no reply within {self._patience_s * 1000:.0f} ms"))
            return
        next_at = self._pending[0].sent_at + self._patience_s if self._pending else None
        extended = []
        while self._timed and self._timed[0].deadline <= now:
            command = self._timed.popleft()
            later = command.expire(now)
            if later is not None:
                command.deadline = later
                extended.append(command)
        self._timed.extendleft(reversed(extended))
        if self._timed:
            head = self._timed[0].deadline
            next_at = head if next_at is None else min(head, next_at)
        if next_at is not None:
            self._timer = self._loop.call_at(max(next_at, now), self._tick)
