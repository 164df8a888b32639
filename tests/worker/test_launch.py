from __future__ import annotations

import os
from typing import Any, NoReturn

import pytest

from decode_svc import settings as decode_settings
from prefill_svc import settings as prefill_settings
from worker.launch import EXIT_MISTAKE, launch
from worker.settings import WorkerSettings

_TYPES: dict[str, tuple[type[WorkerSettings], str]] = {
    "prefill": (prefill_settings.PrefillSettings, prefill_settings.PREFIX),
    "decode": (decode_settings.DecodeSettings, decode_settings.PREFIX),
}


def _must_not_run(settings: WorkerSettings) -> NoReturn:
    raise AssertionError("ran")


def _launch(monkeypatch: pytest.MonkeyPatch, role: str, settings: dict[str, Any], *argv: str) -> int:
    settings_type, prefix = _TYPES[role]
    for name in [name for name in os.environ if name.startswith("BATON_")]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(f"{prefix}_{name}", str(value))
    return launch(settings_type, prefix, _must_not_run, argv)


@pytest.mark.parametrize(("role", "num_settings"), [("prefill", 38), ("decode", 42)])
def test_all_settings_can_be_shown(
    role: str, num_settings: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"MODEL": "x", "MAX_RUNNING": 3, "REDIS_URL": "redis://:hidden@host"}
    exit_code = _launch(monkeypatch, role, settings, "--print-settings")

    shown = capsys.readouterr().out
    assert exit_code == 0
    assert f"BATON_{role.upper()}_MAX_RUNNING=3  # " in shown
    assert "hidden" not in shown
    assert len(shown.splitlines()) == num_settings


@pytest.mark.parametrize(
    ("role", "settings", "said"),
    [
        ("prefill", {}, "BATON_PREFILL_MODEL must be set"),
        ("prefill", {"MODEL": "x", "MAX_RUNING": 3}, "unknown setting BATON_PREFILL_MAX_RUNING"),
        ("prefill", {"MODEL": "x", "PORT": "http"}, "BATON_PREFILL_PORT='http'"),
        ("prefill", {"MODEL": "x", "LOG_FORMAT": "xml"}, "console, json"),
        ("prefill", {"MODEL": "x", "BLOCK_SIZE": 0}, "BATON_PREFILL_BLOCK_SIZE must be 1 or more"),
        ("prefill", {"MODEL": "x", "DRAIN_S": "nan"}, "BATON_PREFILL_DRAIN_S"),
        (
            "decode",
            {"MODEL": "x", "EP_RANK": 2, "EP_SIZE": 2},
            "BATON_DECODE_EP_RANK must be in [0, ep_size=2)",
        ),
        (
            "decode",
            {"MODEL": "x", "EP_SIZE": 2},
            "BATON_DECODE_EP_ADDRESS must be set when ep_size is above 1",
        ),
    ],
)
def test_mistake_in_settings_is_one_clear_line(
    role: str,
    settings: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exit_code = _launch(monkeypatch, role, settings)

    complaint = capsys.readouterr().err
    assert exit_code == EXIT_MISTAKE
    assert said in complaint
    assert len(complaint.splitlines()) == 1
