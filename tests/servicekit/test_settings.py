from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from servicekit.settings import SettingsError, describe_settings, load_settings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    model: Path = setting(doc="model directory")
    name: str = setting("", doc="served name")
    port: int = setting(0, doc="TCP port")
    drain_s: float = setting(30.0, doc="seconds")
    num_threads: int | None = setting(None, doc="unset: chosen")
    is_shared: bool = setting(True, doc="share memory")
    log_format: Literal["console", "json"] = setting("console", doc="console or json")
    redis_url: str = setting("redis://127.0.0.1", doc="registry")
    api_key: str = setting("", doc="of clients", secret=True)

    def __post_init__(self) -> None:
        if self.port < 0:
            raise ValueError(f"port must be 0 or more, got {self.port}")
        if self.name == self.log_format:
            raise ValueError("a name like the format makes no sense")


def load(**variables: str) -> Example:
    return load_settings(Example, "BATON_X", {"BATON_X_MODEL": "/models/m", "HOME": "/"} | variables)


def test_defaults_hold_for_what_is_not_set() -> None:
    assert load() == Example(model=Path("/models/m"))


def test_every_type_is_read() -> None:
    settings = load(
        BATON_X_NAME="tiny",
        BATON_X_PORT="8000",
        BATON_X_DRAIN_S="2.5",
        BATON_X_NUM_THREADS="3",
        BATON_X_IS_SHARED="Off",
        BATON_X_LOG_FORMAT="json",
        BATON_X_API_KEY="k",
    )
    assert settings == Example(
        model=Path("/models/m"),
        name="tiny",
        port=8000,
        drain_s=2.5,
        num_threads=3,
        is_shared=False,
        log_format="json",
        api_key="k",
    )


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_words_for_true(text: str) -> None:
    assert load(BATON_X_IS_SHARED=text).is_shared is True


def test_an_empty_optional_value_is_unset() -> None:
    assert load(BATON_X_NUM_THREADS="").num_threads is None


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("BATON_X_PORT", "http", "BATON_X_PORT='http': must be a whole number"),
        ("BATON_X_PORT", "80.5", "BATON_X_PORT='80.5': must be a whole number"),
        ("BATON_X_PORT", "", "BATON_X_PORT='': must be a whole number"),
        ("BATON_X_PORT", "-1", "BATON_X_PORT must be 0 or more, got -1"),
        ("BATON_X_DRAIN_S", "soon", "BATON_X_DRAIN_S='soon': must be a number"),
        ("BATON_X_DRAIN_S", "nan", "BATON_X_DRAIN_S='nan': must be a number"),
        ("BATON_X_NUM_THREADS", "two", "BATON_X_NUM_THREADS='two': must be a whole number"),
        ("BATON_X_IS_SHARED", "maybe", "BATON_X_IS_SHARED='maybe': must be true or false"),
        ("BATON_X_LOG_FORMAT", "xml", "BATON_X_LOG_FORMAT='xml': must be one of console, json"),
        ("BATON_X_MODEL", "", "BATON_X_MODEL='': must be a path"),
        ("BATON_X_NAME", "console", "BATON_X_*: a name like the format makes no sense"),
        ("BATON_X_PROT", "1", "unknown setting BATON_X_PROT; did you mean BATON_X_PORT?"),
    ],
)
def test_a_bad_value_is_one_line_with_variable_value_and_what_is_accepted(
    variable: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**{variable: value})
    assert str(caught.value) == expected


def test_an_unknown_variable_with_no_likely_meaning_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting BATON_X_COLOUR; known: .*BATON_X_PORT"):
        load(BATON_X_COLOUR="red")


def test_variables_of_others_are_ignored() -> None:
    assert load(BATON_XY_PORT="1", BATON_DECODE_PORT="2") == load()


def test_a_missing_required_variable_is_named_with_its_meaning() -> None:
    with pytest.raises(SettingsError, match="BATON_X_MODEL must be set: model directory"):
        load_settings(Example, "BATON_X", {})


def test_description_shows_every_setting_and_no_secret() -> None:
    settings = load(BATON_X_API_KEY="s3cret", BATON_X_REDIS_URL="redis://u:s3cret@c:1/0")
    lines = describe_settings(settings, "BATON_X").splitlines()
    assert lines[0] == "BATON_X_MODEL=/models/m  # model directory"
    assert "BATON_X_REDIS_URL=redis://u:***@c:1/0  # registry" in lines
    assert "BATON_X_API_KEY=***  # of clients" in lines
    assert len(lines) == 9


def test_a_bad_secret_is_not_shown() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class WithPin:
        pin: int = setting(0, doc="secret number", secret=True)

    with pytest.raises(SettingsError) as caught:
        load_settings(WithPin, "BATON_Y", {"BATON_Y_PIN": "12x4"})
    assert str(caught.value) == "BATON_Y_PIN=***: must be a whole number"


def test_a_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    settings = load(BATON_X_API_KEY_FILE=str(tmp_path / "key"))
    assert settings.api_key == "s3cret"
    assert "s3cret" not in describe_settings(settings, "BATON_X")


def test_only_secrets_may_lie_in_files(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("80")
    with pytest.raises(SettingsError, match="unknown setting BATON_X_PORT_FILE"):
        load(BATON_X_PORT_FILE=str(tmp_path / "port"))


def test_a_secret_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret")
    with pytest.raises(SettingsError) as caught:
        load(BATON_X_API_KEY="other", BATON_X_API_KEY_FILE=str(tmp_path / "key"))
    assert str(caught.value) == "BATON_X_API_KEY and BATON_X_API_KEY_FILE are both set: set one of them"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "No such file or directory"), (b"\n", "the file is empty"), (b"\xff\xfe", "not text")],
)
def test_a_secret_file_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load(BATON_X_API_KEY_FILE=str(path))
    assert str(caught.value) == f"BATON_X_API_KEY_FILE={path}: {expected}"
