"""The server's own log: one JSON object a line, on stderr."""

import json
import logging
import sys
from typing import Any, TextIO


class Lines(logging.Formatter):
    """{"time": ..., "level": ..., "event": ..., and the fields of the record}."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as a line."""
        content: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


def begin(stream: TextIO | None = None) -> logging.Handler:
    """Have all of dptrain's log written so, from now on, until the handler is removed from the logger "dptrain"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Lines())
    logger = logging.getLogger("dptrain")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler


def tell(event: str, **fields: Any) -> None:
    """Say what happened, with fields for programs."""
    level = logging.ERROR if "error" in fields else logging.INFO
    logging.getLogger("dptrain.service").log(level, event, extra={"fields": fields})
