from __future__ import annotations

from pathlib import Path

import pytest

from baton.__main__ import main


def test_a_model_with_experts_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare-model", "tiny-experts", "--into", str(tmp_path)]) == 0
    config = tmp_path / "tiny-experts" / "config.json"
    made_at = config.stat().st_mtime_ns
    assert main(["prepare-model", "tiny-experts", "--into", str(tmp_path)]) == 0
    assert config.stat().st_mtime_ns == made_at
    assert "is there" in capsys.readouterr().out


def test_a_directory_of_the_user_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert main(["prepare-model", "mine", "--into", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare-model", "mine", "--into", str(tmp_path)]) == 2
    assert f"{tmp_path}/mine has no config.json" in capsys.readouterr().err
