import json
from pathlib import Path

import pytest

from baton.up.console import Console
from baton.up.log_line import parse_log_line
from baton.up.plan import ProcessSpec
from baton.up.process_status import ProcessStatus


@pytest.fixture
def status():
    spec = ProcessSpec(
        name="decode-0",
        role="decode",
        environment={},
        address="127.0.0.1:41001",
        metrics_address="127.0.0.1:41002",
        num_threads=1,
    )
    return ProcessStatus(spec, "decode-0", Path("log"), state="starting", pid=77)


def event(level, name, **fields):
    return json.dumps({**fields, "time": "t", "level": level, "logger": "x", "event": name})


def test_a_structured_line_becomes_event_and_fields_without_the_bookkeeping():
    parsed = parse_log_line(event("warning", "registry_unavailable", reason="cut"))
    assert parsed.is_warning
    assert parsed.text == "registry_unavailable reason=cut"


def test_progress_is_short():
    parsed = parse_log_line(event("info", "loading_weights", percent=40, num_done=3))
    assert parsed.progress == "loading weights 40 %"


def test_what_a_library_printed_is_kept_as_it_is():
    assert parse_log_line("{not json").text == "{not json"
    assert not parse_log_line("Traceback").is_warning


def test_a_traceback_becomes_its_first_and_last_line():
    parsed = parse_log_line(event("error", "engine_failed", traceback="Traceback:\n  x\nValueError: y"))
    assert parsed.text == "engine_failed traceback=Traceback: ... ValueError: y"


def test_warnings_reach_the_console_and_ordinary_events_do_not(capsys, status):
    console = Console({"decode-0": status}, "m")
    status.state = "ready"
    console.log_line(status, event("info", "handoff_committed"))
    console.log_line(status, event("error", "engine_failed"))
    assert capsys.readouterr().out == "decode-0 | error: engine_failed\n"


def test_each_change_of_state_is_one_line(capsys, status):
    console = Console({"decode-0": status}, "m")
    console.changed(status)
    console.changed(status)
    status.state, status.detail = "restarting", "was killed by SIGKILL"
    console.changed(status)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("decode-0     starting  pid 77")
    assert second.endswith("decode-0     restarting  was killed by SIGKILL")


def test_the_table_shows_whole_addresses(capsys, status):
    Console({"decode-0": status}, "m").show_ready()
    shown = capsys.readouterr().out
    assert "127.0.0.1:41001" in shown
    assert "127.0.0.1:41002" in shown


def test_a_warning_that_repeats_is_shown_once(capsys, status):
    console = Console({"decode-0": status}, "m")
    for attempt in range(5):
        console.log_line(status, event("warning", "link_lost", attempt=attempt))
    console.log_line(status, event("warning", "registry_unavailable"))
    assert capsys.readouterr().out.splitlines() == [
        "decode-0 | warning: link_lost attempt=0",
        "decode-0 | warning: registry_unavailable",
    ]
