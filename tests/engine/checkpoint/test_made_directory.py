import multiprocessing
import time
from pathlib import Path

import pytest

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.made_directory import make_directory

ORIGIN = {"from": "a"}


def fill(directory: Path) -> None:
    (directory / "content").write_text("whole")


def fill_slowly(directory: Path) -> None:
    (directory / "begun").touch()
    time.sleep(0.3)  # long enough for the second process to come while the first is at work
    fill(directory)


def never(directory: Path) -> None:
    raise AssertionError("made a second time")


def make_in_process(target: Path, results: "multiprocessing.Queue[bool]") -> None:
    results.put(make_directory(target, ORIGIN, fill_slowly))


def test_second_call_finds_the_directory_made(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    assert make_directory(target, ORIGIN, fill)
    assert not make_directory(target, ORIGIN, never)
    assert (target / "content").read_text() == "whole"


def test_another_origin_replaces_the_directory(tmp_path: Path) -> None:
    make_directory(tmp_path / "model", ORIGIN, fill)
    assert make_directory(tmp_path / "model", {"from": "b"}, lambda d: (d / "other").touch())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["origin.json", "other"]


def test_failure_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        make_directory(tmp_path / "model", ORIGIN, never)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    make_directory(tmp_path / "model", ORIGIN, fill)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["content", "origin.json"]


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(CheckpointError, match="was not made by this command"):
        make_directory(tmp_path, ORIGIN, fill)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=make_in_process, args=(tmp_path / "model", results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    made = sorted(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert made == [False, True]
