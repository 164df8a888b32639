from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import build, engine_config, memory
from engine.build import build_engine, kv_fingerprint, kv_layout, num_parameters
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.checkpoint.random_presets import hub_config
from engine.checkpoint.weights import LoadFormat
from engine.engine_config import EngineConfig, EngineConfigError, check_weights_fit
from engine.kv_layout import KvLayout
from tests.engine.core.engine_driver import generate

MIB = 1 << 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("llama") / "model"
    make_random_checkpoint(target, "llama")
    return target


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_available(num_bytes: int) -> None:
        monkeypatch.setattr(engine_config, "available_memory_bytes", lambda device: num_bytes)

    return set_available


def test_the_cache_takes_no_more_than_max_running_full_sequences_need(
    model_dir: Path, with_memory: Any
) -> None:
    with_memory(1 << 40)
    engine = build_engine(EngineConfig(model_dir=model_dir, max_running=2, max_model_len=100))
    assert engine.num_blocks == 2 * 7
    assert engine.max_model_len == 100


def test_the_cache_takes_a_quarter_of_the_free_memory_at_most(model_dir: Path, with_memory: Any) -> None:
    with_memory(80 * MIB)
    engine = build_engine(EngineConfig(model_dir=model_dir, dtype="float32"))
    assert engine.kv_cache.size_bytes <= 20 * MIB < engine.kv_cache.size_bytes + engine.kv_layout.block_bytes
    assert engine.max_model_len == min(4096, engine.num_blocks * 16)


def test_a_context_that_nobody_asked_for_is_cut_to_what_fits(model_dir: Path) -> None:
    engine = build_engine(EngineConfig(model_dir=model_dir, num_blocks=10))
    assert engine.max_model_len == 160
    assert len(generate(engine, [[5, 6]], 3)[0]) == 3


def test_num_blocks_wins_over_bytes(model_dir: Path) -> None:
    config = EngineConfig(model_dir=model_dir, num_blocks=3, kv_cache_bytes=1 << 30, max_model_len=40)
    assert build_engine(config).num_blocks == 3


def test_the_cache_is_shared_when_asked_for(model_dir: Path) -> None:
    engine = build_engine(EngineConfig(model_dir=model_dir, num_blocks=4, shares_kv_cache=True))
    assert engine.kv_cache.shared_name is not None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_blocks": 10, "max_model_len": 161}, "max_model_len 161 needs 11 KV blocks .* there are 10"),
        ({"kv_cache_bytes": 1000}, "no room for a KV cache"),
        ({"num_blocks": 0}, "no room for a KV cache"),
        ({"max_model_len": 4097}, "between 2 and the model's 4096"),
        ({"max_model_len": 1}, "between 2 and"),
        ({"block_size": 0}, "block_size"),
        ({"token_budget": 20, "max_running": 8}, "token_budget must be at least .* = 24"),
        ({"max_running": -1}, "max_running"),
        ({"dtype": "int4"}, "dtype must be"),
    ],
)
def test_a_configuration_that_cannot_work_gets_one_clear_line(
    model_dir: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(EngineConfigError, match=complaint) as caught:
        build_engine(EngineConfig(model_dir=model_dir, **options))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    model_dir: Path, with_memory: Any
) -> None:
    with_memory(MIB)
    with pytest.raises(EngineConfigError, match=r"the weights take 0\.\d GiB, 0\.0 GiB of memory are free"):
        build_engine(EngineConfig(model_dir=model_dir))


def test_weights_that_fit_pass(with_memory: Any) -> None:
    with_memory(MIB)
    check_weights_fit(MIB, "cpu")


def test_the_number_of_parameters_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path / "v3", "deepseek_v3")
    config = load_model_config(tmp_path / "v3")
    file_bytes = (tmp_path / "v3" / "model.safetensors").stat().st_size
    assert num_parameters(config) * 4 == pytest.approx(file_bytes, rel=0.01)
    half = num_parameters(config, ep_size=2)
    routed = 3 * 16 * 3 * 256 * 128
    assert num_parameters(config) - half == routed // 2


def test_default_budget_grows_with_max_running(model_dir: Path) -> None:
    config = EngineConfig(model_dir=model_dir, max_running=1000, block_size=16)
    assert config.resolve_scheduler().token_budget == 1016
    assert EngineConfig(model_dir=model_dir).resolve_scheduler().token_budget == 512


def test_a_container_limit_counts_with_page_cache_as_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert memory.available_memory_bytes("cpu", tmp_path) == 450_000


def test_without_a_container_limit_the_machine_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory_bytes("cpu", tmp_path) > MIB
    assert memory.available_memory_bytes("cpu", tmp_path / "absent") > MIB


def test_auto_dtype_is_one_that_the_processor_multiplies(model_dir: Path) -> None:
    assert EngineConfig(model_dir=model_dir).resolve_dtype() in (torch.float32, torch.bfloat16)


def test_fp8_weights_off_cuda_are_refused_in_one_line(model_dir: Path) -> None:
    with pytest.raises(EngineConfigError, match="FP8 weights need a CUDA device"):
        build_engine(EngineConfig(model_dir=model_dir, has_fp8_weights=True))


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_fp8_weights_have_a_fingerprint_of_their_own(
    model_dir: Path, tmp_path: Path, load_format: LoadFormat
) -> None:
    if load_format == "dummy":  # needs no weights
        (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
        model_dir = tmp_path
    found = {
        kv_fingerprint(
            EngineConfig(model_dir=model_dir, load_format=load_format, has_fp8_weights=has_fp8),
            torch.bfloat16,
        )
        for has_fp8 in (False, True)
    }
    assert sorted(map(len, found)) == [16, 16]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def layouts(directory: Path, model_type: str = "deepseek_v3", **changes: Any) -> tuple[KvLayout, KvLayout]:
    """In the dtype of the model, and in FP8."""
    preset = "small576" if model_type == "deepseek_v3" else "tiny"
    (directory / "config.json").write_text(json.dumps(hub_config(model_type, preset, "bfloat16") | changes))
    model = load_model_config(directory)
    auto = EngineConfig(model_dir=directory, load_format="dummy", device="cuda")
    auto_layout, fp8_layout = (
        kv_layout(config, model, torch.bfloat16, has_mtp=False)
        for config in (auto, replace(auto, kv_cache_dtype="fp8"))
    )
    return auto_layout, fp8_layout


def test_a_cache_in_fp8_has_room_for_more_and_is_no_cache_for_others(on_hopper: None, tmp_path: Path) -> None:
    auto, fp8 = layouts(tmp_path)
    assert (auto.token_bytes, fp8.token_bytes) == (1152, 656)
    difference = auto.difference(fp8)
    assert difference is not None and "dtype: 'bfloat16' != 'fp8'" in difference
    assert auto.model_fingerprint != fp8.model_fingerprint  # so no router takes its blocks for the others'


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "llama"}, "latent attention, not llama"),
        ({"v_head_dim": 96}, "powers of two from 16"),
    ],
)
def test_kv_in_fp8_needs_latent_attention_by_kernels(
    on_hopper: None, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(EngineConfigError, match=complaint) as caught:
        layouts(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_kv_in_fp8_needs_a_device_that_has_it(
    on_hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(EngineConfigError, match=r"a CUDA device of capability 8\.9 and Triton, not cuda"):
        layouts(tmp_path)


def test_kv_in_fp8_off_cuda_is_refused_in_one_line(model_dir: Path) -> None:
    with pytest.raises(EngineConfigError, match=r"^KV in FP8 needs a CUDA device .*, not cpu$"):
        build_engine(EngineConfig(model_dir=model_dir, kv_cache_dtype="fp8"))


def test_a_gpu_takes_larger_steps_unless_told_otherwise(model_dir: Path) -> None:
    config = EngineConfig(model_dir=model_dir, device="cuda").resolve_scheduler()
    assert (config.token_budget, config.max_running, config.mixed_budget) == (8192, 256, 2048)
    config = EngineConfig(
        model_dir=model_dir, device="cuda", max_running=3, token_budget=40
    ).resolve_scheduler()
    assert (config.token_budget, config.max_running) == (40, 3)
    assert EngineConfig(model_dir=model_dir).resolve_scheduler().mixed_budget is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_prompts_beside_decodes_get_the_budget_that_is_asked_for(model_dir: Path, device: str) -> None:
    config = EngineConfig(model_dir=model_dir, device=device, mixed_budget=160)
    assert config.resolve_scheduler().mixed_budget == 160
    with pytest.raises(EngineConfigError, match="mixed_budget must be at least a block of 16, got 15"):
        EngineConfig(model_dir=model_dir, device=device, mixed_budget=15).resolve_scheduler()
