"""Log lines on stderr, for people (console) or for machines (json), with the frame's name wherever there is one.

A call gives facts as `extra=facts(frame=..., camera=...)`, never inside the sentence, so that both forms carry the
same. Secrets and pictures are never facts. What a peer wrote (a reason, an error) stays inside its line: a fact with
blanks or control characters is quoted, and no fact takes the place of a line's own fields.
"""

import json
import logging
import sys
import time
from typing import Any

_FACTS = "sightline_facts"


def facts(**values: object) -> dict[str, Any]:
    """`extra` of a log call: names and values that belong to the line."""
    return {_FACTS: values}


def frame_id(camera_id: str, epoch: int, seq: int) -> str:
    """One word that names a frame in logs, from camera to detection."""
    return f"{camera_id}/{epoch:016x}/{seq}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            **getattr(record, _FACTS, {}),
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f"  {name}={_quoted(value)}" for name, value in getattr(record, _FACTS, {}).items())
        message = record.getMessage()
        if not message.isprintable():
            message = json.dumps(message)
        line = f"{_utc(record.created)} {record.levelname.lower():7} {record.name}: {message}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _quoted(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def configure(level: str, form: str) -> None:
    """`level` debug|info|warning|error, `form` console|json. Once a process. Other packages speak from warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _ConsoleFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("sightline").setLevel(level.upper())
