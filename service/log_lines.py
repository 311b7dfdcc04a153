"""The format of the service's log: one JSON object per line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and what `extra` gave.

    `log.info("...", extra={"request_id": ..., "bundle": ...})` adds these keys; a value that is
    no JSON is written as its text.
    """

    _STANDARD = frozenset(
        (*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message")
    )

    def format(self, record: logging.LogRecord) -> str:
        """Renders the record; a traceback goes into the key `exception`."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in self._STANDARD and name not in entry:
                entry[name] = value
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, default=str)


def configure_logging(level: str, *, stream: TextIO | None = None) -> None:
    """Sends the process's whole log, warnings included, to one stream as JSON lines.

    For the command line only; replaces the handlers that the root logger has.

    Args:
        level: Least severe level, such as `info`.
        stream: None is stderr.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
