"""Kernels are compiled side by side before they are needed, and none of them runs meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernel tests need the package triton (pip install triton)")

import triton
from triton.runtime.jit import KernelInterface

from engine.checkpoint.random_presets import hub_config
from engine.kernels import compile_ahead as module
from engine.kernels.compile_ahead import compile_ahead

ROOT = Path(__file__).parents[3]
TINY = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 128}
TINY |= {"intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 512}
TINY |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}


class Kernel(KernelInterface):  # type: ignore[misc]
    """Notes launches: their arguments, and whether they only compile."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, int], bool]] = []

    def run(self, *args: int, grid: tuple[int, ...], warmup: bool, **options: int) -> None:
        self.launches.append(((*grid, *args), options, warmup))


@pytest.fixture
def can_rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_can_rehearse", lambda: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


@pytest.mark.usefixtures("can_rehearse")
def test_launches_only_compile_while_they_are_rehearsed() -> None:
    kernel = Kernel()

    compile_ahead(lambda: kernel[(3,)](7, num_warps=4))
    kernel[(3,)](7, num_warps=4)

    assert kernel.launches == [((3, 7), {"num_warps": 4}, True), ((3, 7), {"num_warps": 4}, False)]


@pytest.mark.usefixtures("can_rehearse")
def test_another_thread_launches_meanwhile() -> None:
    kernel = Kernel()

    def rehearse() -> None:
        thread = threading.Thread(target=lambda: kernel[(1,)](1))
        thread.start()
        thread.join()
        kernel[(1,)](2)

    compile_ahead(rehearse)

    assert kernel.launches == [((1, 1), {}, False), ((1, 2), {}, True)]


@pytest.mark.usefixtures("can_rehearse")
def test_a_rehearsal_that_fails_is_left_to_the_launch(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel()
    before = KernelInterface.__getitem__

    def rehearse() -> None:
        kernel[(1,)](1)
        raise RuntimeError("no\nsuch kernel")

    compile_ahead(rehearse)
    kernel[(1,)](2)

    assert [warmup for _, _, warmup in kernel.launches] == [True, False]
    assert KernelInterface.__getitem__ is before
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are compiled when they are first launched: RuntimeError: no"
    ]


@pytest.mark.usefixtures("can_rehearse")
def test_one_processor_rehearses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    kernel = Kernel()

    compile_ahead(lambda: kernel[(1,)](1))

    assert kernel.launches == []


def test_what_an_older_triton_lacks_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert module._can_rehearse()

    monkeypatch.delattr(triton, "AsyncCompileMode")

    assert not module._can_rehearse()


def test_the_interpreter_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)

    assert not module._can_rehearse()


def run_program(*args: str, cache_dir: Path) -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache_dir)}
    command = [sys.executable, "-m", "tests.engine.kernels.compile_ahead_program", *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor compiles one kernel at a time")
def test_threads_compile_each_kernel_once_and_the_next_process_finds_it(tmp_path: Path) -> None:
    """A kernel that does not compile is left to its launch. Events are (kernel, was in the cache, by the
    main thread)."""
    first = run_program("kernels", cache_dir=tmp_path)
    second = run_program("kernels", cache_dir=tmp_path)

    assert first["ahead"] == 3 * [["_double_kernel", False, False]]
    assert second["ahead"] == 3 * [["_double_kernel", True, False]]
    for found in (first, second):
        assert found["launchers"] == 3 * [["_double_kernel", False]]
        assert (found["later"], found["error"], found["failures"]) == ([], "CompilationError", [])


@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor compiles one kernel at a time")
@pytest.mark.parametrize(
    ("arch", "preset", "changes", "expected"),
    [
        (
            "deepseek_v2",
            "tiny",
            {},
            {"_prefill_kernel", "_decode_kernel", "_grouped_kernel", "_draw_kernel", "_specialised_kernel"},
        ),
        (
            "deepseek_v3",
            "tiny_mtp",
            {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 32,
            },
            {"_decode_kernel", "_grouped_kernel", "_greedy_kernel"},
        ),
    ],
    ids=["plain", "drafts"],
)
def test_steps_are_rehearsed_whatever_is_in_memory(
    arch: str, preset: str, changes: dict[str, int], expected: set[str], tmp_path: Path
) -> None:
    """What kernels would have written is the largest integer or no number: an operator that took an
    index from there would fail, on a GPU for good."""
    config = hub_config(arch, preset, "bfloat16") | TINY | changes
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = run_program("steps", str(tmp_path), cache_dir=tmp_path)

    assert found["failures"] == []
    assert expected <= set(found["compiled"])
    assert found["missed"] == []  # by a rehearsal with one layer of each kind
    assert found["phases"][0] == "kernels"
