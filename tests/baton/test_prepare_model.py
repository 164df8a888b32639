from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from baton.__main__ import main
from baton.subprocess_module import CODE_ROOT


def test_a_model_with_experts_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare-model", "tiny-experts", "--into", str(tmp_path)]) == 0
    config = tmp_path / "tiny-experts" / "config.json"
    made_at = config.stat().st_mtime_ns
    assert main(["prepare-model", "tiny-experts", "--into", str(tmp_path)]) == 0
    assert config.stat().st_mtime_ns == made_at
    assert "is there" in capsys.readouterr().out


def test_the_shipped_model_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare-model", "baton-demo", "--into", str(tmp_path / "models")]
    assert main(arguments) == 0
    [made] = (tmp_path / "models").iterdir()
    assert not filecmp.dircmp(CODE_ROOT / "models" / "baton-demo", made).diff_files
    assert {path.name for path in made.iterdir()} >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    made_at = (made / "config.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (made / "config.json").stat().st_mtime_ns == made_at
    assert "is there" in capsys.readouterr().out


def test_a_copy_that_fails_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "baton-demo"
    half.mkdir()
    (half / "of-the-user.txt").write_text("mine")
    assert main(["prepare-model", "baton-demo", "--into", str(tmp_path)]) == 2
    assert "cannot copy" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["baton-demo", "of-the-user.txt"]


def test_a_directory_of_the_user_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert main(["prepare-model", "mine", "--into", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare-model", "mine", "--into", str(tmp_path)]) == 2
    assert f"{tmp_path}/mine has no config.json" in capsys.readouterr().err
