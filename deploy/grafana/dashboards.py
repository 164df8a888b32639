"""Writes deploy/grafana/dashboards/*.json from boards.py. --check: exit 1 when they are not up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from boards import BOARDS
from panels import to_json

DIRECTORY = Path(__file__).resolve().parent / "dashboards"


def main() -> int:
    wanted = {f"{board.uid}.json": to_json(board) for board in BOARDS}
    if "--check" in sys.argv:
        found = {path.name: path.read_text() for path in DIRECTORY.glob("*.json")}
        if found != wanted:
            sys.stderr.write("deploy/grafana/dashboards: run python deploy/grafana/dashboards.py\n")
        return int(found != wanted)
    for path in DIRECTORY.glob("*.json"):
        path.unlink()
    for name, text in wanted.items():
        (DIRECTORY / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
