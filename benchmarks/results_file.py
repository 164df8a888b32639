"""Writes one dated result: JSON for programs, Markdown for people, both with machine, commit and command."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from baton.doctor import cpu_flags
from benchmarks.serving import ROOT

RESULTS = ROOT / "benchmarks" / "results"
_NAMED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def result_path(name: str, suffix: str) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}{suffix}"


def write_result(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    plots: Sequence[Path] = (),
) -> Path:
    """The path of the Markdown file; the JSON lies beside it, and so must the plots."""
    facts = _facts()
    path = result_path(name, ".md")
    document = {"title": title, **facts, "notes": list(notes), "rows": [dict(row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    head = [
        f"# {title}",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        *(f"- {n}" for n in notes),
    ]
    images = [f"![{plot.stem}]({plot.name})" for plot in plots]
    path.write_text("\n".join([*head, "", *table(columns, rows), *(["", *images] if images else []), ""]))
    return path


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return head + ["| " + " | ".join(row) + " |" for row in cells]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _facts() -> dict[str, str]:
    flags = cpu_flags()
    arguments = [f".../{Path(a).name}" if Path(a).is_absolute() else a for a in sys.argv[1:]]
    found = " ".join(flag for flag in _NAMED_FLAGS if flag in flags)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments]),
        "commit": _commit(),
        "processor": f"{_processor()}, {_num_cores()} cores, {found}",
        "python": platform.python_version(),
    }


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _num_cores() -> str:
    from servicekit.process_env import num_usable_cpus

    return f"{num_usable_cpus():g}"
