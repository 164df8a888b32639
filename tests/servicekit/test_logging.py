from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from servicekit.logging import LogFormat, configure_logging, get_logger

log = get_logger("test_logging")


def configured(format: LogFormat = "console", level: str = "INFO", **context: Any) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(format, level, stream, **context)
    return stream


def test_console_shows_the_event_and_its_fields_on_one_line() -> None:
    stream = configured()
    log.info("handoff_committed", request_id="r1", num_blocks=3, elapsed_s=0.0312345678, is_local=True)
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.rstrip().endswith(
        "INFO    test_logging handoff_committed request_id=r1 num_blocks=3 elapsed_s=0.0312346 is_local=True"
    )


def test_json_is_one_object_a_line_with_typed_fields_and_context() -> None:
    stream = configured("json", service="prefill")
    log.warning("retried", num_attempts=2, reason=None, wait_s=0.5)
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "warning",
        "logger": "test_logging",
        "event": "retried",
        "service": "prefill",
        "num_attempts": 2,
        "reason": None,
        "wait_s": 0.5,
    }


@pytest.mark.parametrize("format", ["console", "json"])
def test_line_breaks_in_values_and_messages_stay_on_one_line(format: LogFormat) -> None:
    stream = configured(format)
    log.info("odd_value", text='two\nlines and "quotes"')
    logging.getLogger("library").error("a library says\n  this")
    assert stream.getvalue().count("\n") == 2


@pytest.mark.parametrize("format", ["console", "json"])
def test_secrets_are_masked(format: LogFormat) -> None:
    stream = configured(format, url="redis://:s3cret@cache:6379/0")
    log.info("connected", password="s3cret", api_key="s3cret", token="s3cret", num_tokens=5)
    logging.getLogger("library").warning("cannot reach rediss://user:s3cret@cache:6380")
    try:
        raise ConnectionError("redis://:s3cret@cache refused")
    except ConnectionError:
        log.exception("failed")
    assert "s3cret" not in stream.getvalue()
    assert "cache:6380" in stream.getvalue()
    assert "num_tokens" in stream.getvalue()


def test_json_keeps_a_traceback_in_its_line() -> None:
    stream = configured("json")
    try:
        raise RuntimeError("broken step")
    except RuntimeError:
        log.exception("step_failed")
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert "RuntimeError: broken step" in entry["traceback"]
    assert entry["level"] == "error"


def test_a_field_cannot_pass_for_the_event() -> None:
    stream = configured("json")
    log.info("real", level="fake", logger="fake")
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["event"]) == ("info", "test_logging", "real")


def test_events_below_the_level_are_not_written() -> None:
    stream = configured(level="warning")
    log.debug("detail")
    log.info("detail")
    log.error("shown")
    assert stream.getvalue().count("\n") == 1


def test_configuring_again_replaces_the_output() -> None:
    first, second = configured(), configured()
    log.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
