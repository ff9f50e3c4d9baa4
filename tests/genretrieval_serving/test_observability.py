"""The log: lines that are JSON, and that cost nobody an answer."""

from __future__ import annotations

import io
import json
import logging

import structlog

from genretrieval_serving.client import Client


def test_our_lines_and_those_of_libraries_are_json_with_level_time_and_name(logged: io.StringIO) -> None:
    structlog.get_logger("ours").warning("happened", number=3)
    structlog.get_logger("ours").debug("hidden")
    logging.getLogger("theirs").error("also %s", "this")
    logging.getLogger("httpx").info("hidden")
    ours, theirs = map(json.loads, logged.getvalue().splitlines())
    assert {name: ours[name] for name in ("event", "number", "level", "logger")} == {
        "event": "happened",
        "number": 3,
        "level": "warning",
        "logger": "ours",
    }
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("also this", "error", "theirs")
    assert ours.keys() - {"number"} == theirs.keys()


def test_a_failure_is_logged_with_its_traceback(logged: io.StringIO) -> None:
    try:
        raise KeyError("missing")
    except KeyError as error:
        structlog.get_logger("ours").error("failed", exc_info=error)
    assert "KeyError: 'missing'" in json.loads(logged.getvalue())["exception"]


def test_a_log_that_cannot_be_written_takes_no_request_with_it(start, logged: io.StringIO) -> None:
    logged.close()
    with start(quiet=False) as running, Client(running.http) as client:
        assert client.retrieve().items
