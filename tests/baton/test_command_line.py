import socket
import subprocess
import sys

import pytest

from baton.__main__ import main
from baton.subprocess_module import CODE_ROOT


@pytest.fixture(autouse=True)
def own_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return str(directory)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def assert_one_clear_line(capsys, arguments, expected, exit_code=2):
    assert main(arguments) == exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert expected in printed.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve"], "no command 'serve'"),
        (["up", "--bogus"], "unrecognized arguments: --bogus"),
        (["up", "--port", "eight"], "invalid int value: 'eight'"),
        (["up", "--prefill", "1", "--aggregated"], "not allowed with"),
        (["bench", "--url", "nonsense"], "is not a URL"),
        (["bench", "--concurrency", "0"], "--concurrency 0"),
        (["bench", "--prompt-len", "0"], "must be at least 1"),
        (["make-checkpoint", "somewhere"], "--arch"),
        (["make-checkpoint", "somewhere", "--arch", "gpt2"], "invalid choice: 'gpt2'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, expected):
    assert_one_clear_line(capsys, arguments, expected)


def test_a_model_directory_that_is_not_there_is_one_line(capsys):
    assert_one_clear_line(capsys, ["up", "--port", free_port(), "--model", "/nowhere"], "no such directory")


def test_a_directory_without_a_model_is_one_line(capsys, tmp_path):
    assert_one_clear_line(capsys, ["up", "--port", free_port(), "--model", str(tmp_path)], "no config.json")


def test_a_wrong_count_is_found_before_anything_starts(capsys, model_dir):
    arguments = ["up", "--port", free_port(), "--model", model_dir, "--ep-size", "0"]
    assert_one_clear_line(capsys, arguments, "--ep-size 0")


def test_a_port_in_use_is_one_line(capsys, model_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_clear_line(capsys, ["up", "--port", port, "--model", model_dir], f"port {port}")


def test_a_redis_that_does_not_answer_is_one_line(capsys, monkeypatch, model_dir):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    assert_one_clear_line(capsys, ["up", "--port", free_port(), "--model", model_dir], "unset REDIS_URL")


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_no_server_is_one_line_and_exit_code_1(capsys, command):
    arguments = [command, "--url", "http://127.0.0.1:1"] + (["-m", "hello"] if command == "chat" else [])
    assert_one_clear_line(capsys, arguments, "no server at 127.0.0.1:1", exit_code=1)


def test_help_lists_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("up", "chat", "bench", "doctor", "make-checkpoint"))


@pytest.mark.parametrize("command", ["up", "chat", "bench", "doctor", "make-checkpoint"])
def test_each_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: baton {command}" in capsys.readouterr().out


def test_no_command_imports_torch():
    program = (
        "import sys, importlib, baton.__main__ as m\n"
        "for module, _ in m.COMMANDS.values(): importlib.import_module(module)\n"
        "assert not {'torch', 'transformers', 'engine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=CODE_ROOT, check=True)
