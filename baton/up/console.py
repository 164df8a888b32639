"""What `baton up` shows: a live table while it starts (lines when the output is no terminal), then events."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.up.log_line import parse_log_line
from baton.up.process_status import ProcessStatus

_FILE_WIDTH = 160
_DETAIL_EVERY_S = 2.0
_REPEAT_EVERY_S = 10.0  # of one warning of one process
_STYLES = {"ready": "green", "starting": "yellow", "restarting": "red", "failed": "red", "stopping": "yellow"}


class Console:
    def __init__(self, statuses: Mapping[str, ProcessStatus], model: str) -> None:
        self._rich = RichConsole(file=sys.stdout, highlight=False)
        if not self._rich.is_terminal:
            self._rich.width = _FILE_WIDTH  # nothing to fit into: cut nothing
        self._statuses = statuses
        self._model = model
        self._started_at = time.monotonic()
        self._live: Live | None = None
        self._shown: dict[str, tuple[str, str]] = {}
        self._next_detail_at: dict[str, float] = {}
        self._quiet_until: dict[tuple[str, str], float] = {}  # process, event

    def start(self) -> None:
        if self._rich.is_terminal:
            self._live = Live(
                get_renderable=self._starting_table, console=self._rich, refresh_per_second=4, transient=True
            )
            self._live.start()

    def stop(self) -> None:
        """Ends the live table; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        self._rich.print(Text(text), soft_wrap=True)

    def _show_detail(self, status: ProcessStatus) -> None:
        """In lines not at every step, only now and then."""
        now = time.monotonic()
        if now >= self._next_detail_at.get(status.spec.name, 0.0):
            self._next_detail_at[status.spec.name] = now + _DETAIL_EVERY_S
            self.changed(status)

    def changed(self, status: ProcessStatus) -> None:
        shown = (status.state, status.detail)
        if self._live is not None or self._shown.get(status.spec.name) == shown:
            return
        self._shown[status.spec.name] = shown
        elapsed_s = time.monotonic() - self._started_at
        pid = f"  pid {status.pid}" if status.state == "starting" and not status.detail else ""
        detail = f"  {status.detail}" if status.detail else ""
        self.line(f"{elapsed_s:7.1f} s  {status.spec.name:<12} {status.state}{pid}{detail}")

    def log_line(self, status: ProcessStatus, line: str) -> None:
        """Warnings of every process come to one place, a repeated one now and then; the files have all."""
        parsed = parse_log_line(line)
        if parsed.is_warning:
            now = time.monotonic()
            key = (status.spec.name, parsed.event)
            if now < self._quiet_until.get(key, 0.0):
                return
            self._quiet_until[key] = now + _REPEAT_EVERY_S
            self.line(f"{status.spec.name} | {parsed.level}: {parsed.text}")
        elif parsed.event and status.state == "starting":
            status.detail = parsed.progress
            self._show_detail(status)

    def show_ready(self) -> None:
        """The table of what runs where."""
        self.stop()
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("process", "role", "pid", "address", "metrics", "threads", "state"):
            table.add_column(column, no_wrap=True)
        for s in self._statuses.values():
            row = [s.spec.name, s.spec.role, str(s.pid or "-"), s.spec.address, s.spec.metrics_address]
            table.add_row(*row, str(s.spec.num_threads), _styled(s.state))
        self.line(f"\n{self._model} is ready after {time.monotonic() - self._started_at:.1f} s\n")
        self._rich.print(table)

    def _starting_table(self) -> Table:
        elapsed_s = time.monotonic() - self._started_at
        table = Table(box=None, header_style="bold", pad_edge=False, title=f"starting, {elapsed_s:.0f} s")
        for column in ("process", "pid", "state", "now"):
            table.add_column(column, no_wrap=True)
        for s in self._statuses.values():
            table.add_row(s.spec.name, str(s.pid or "-"), _styled(s.state), Text(s.detail))
        return table


def _styled(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))
