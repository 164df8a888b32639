"""deploy/install-locked, which fills the images' package directories."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.deploy.compose_project import ROOT

EPOCH = 1735689600
_FILES = {
    "sample/__init__.py": "def f(x): return x in {'red', 'green', 'blue'}\n",
    "sample/other_python.py": "def f[T](x: T) -> T: return x\n",
    "sample/tests/test_nothing.py": "",
    "sample-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n",
    "sample-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "sample-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in _FILES.items():
            archive.writestr(name, text)
    return path


def install(wheel: Path, target: Path) -> dict[str, tuple[str, int, int]]:
    """Relative path -> digest, mode, time in seconds."""
    programs = wheel.parent / "bin"
    programs.mkdir(exist_ok=True)
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONHASHSEED": "0"}
    subprocess.run(
        [ROOT / "deploy" / "install-locked", target, "--no-index", wheel],
        env=environment | {"SOURCE_DATE_EPOCH": str(EPOCH)},
        check=True,
        capture_output=True,
        timeout=50,
    )
    found = {}
    for path in sorted(target.rglob("*")):
        status = path.stat()
        digest = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(target))] = (digest, status.st_mode, int(status.st_mtime))
    return found


def test_installing_twice_gives_the_same_files_bytes_and_times(wheel: Path, tmp_path: Path) -> None:
    first = install(wheel, tmp_path / "packages")
    shutil.rmtree(tmp_path / "packages")
    assert install(wheel, tmp_path / "packages") == first
    assert {seconds for _, _, seconds in first.values()} == {EPOCH}


def test_bytecode_is_there_and_tests_are_not(wheel: Path, tmp_path: Path) -> None:
    found = install(wheel, tmp_path / "packages")
    compiled = [name for name in found if name.endswith(".pyc")]
    # The one in another version's syntax is left as it is and ends nothing.
    assert [Path(name).name.split(".")[0] for name in compiled] == ["__init__"]
    assert "sample/other_python.py" in found
    assert [name for name in found if "tests" in name] == []
