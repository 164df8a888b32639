"""The first second of a worker process: settings, environment, logging. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from servicekit.logging import configure_logging
from servicekit.settings import SettingsError, describe_settings, load_settings
from worker.settings import WorkerSettings, ensure_worker_environment

S = TypeVar("S", bound=WorkerSettings)

EXIT_MISTAKE = 2  # in settings or checkpoint: starting again changes nothing


def launch(
    settings_type: type[S], prefix: str, run: Callable[[S], int], argv: Sequence[str] | None = None
) -> int:
    """The exit code. `run` may import torch."""
    parser = argparse.ArgumentParser(description=f"Configured by {prefix}_* variables.")
    parser.add_argument("--print-settings", action="store_true", help="show all settings and end")
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings(settings_type, prefix)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_MISTAKE
    if arguments.print_settings:
        sys.stdout.write(describe_settings(settings, prefix) + "\n")
        return 0
    ensure_worker_environment(settings)
    service = prefix.removeprefix("BATON_").lower()
    identity: dict[str, Any] = {"worker_id": settings.worker_id} if settings.worker_id else {}
    configure_logging(settings.log_format, settings.log_level, service=service, **identity)
    try:
        return run(settings)
    except KeyboardInterrupt:
        return 130
