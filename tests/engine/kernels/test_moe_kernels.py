"""The fused MoE, kernel by kernel, against the references beside the kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.checkpoint import fp8
from engine.checkpoint.model_config import MoeConfig
from engine.layers.mlp import load_gated_mlp
from engine.moe.dispatch import LocalDispatcher
from engine.moe.experts import load_experts
from engine.moe.gate import choose_experts, load_gate
from engine.moe.moe_layer import MoeLayer

pytest.importorskip("triton", reason="the kernels need triton")

from engine.kernels.fp8_quantise import dequantise_rows, quantise_rows, quantise_rows_reference
from engine.kernels.moe_choice import Choice, Route
from engine.kernels.moe_combine import combine_pairs, combine_pairs_reference
from engine.kernels.moe_gate import choose_experts_fused, new_gate_state, split_weight
from engine.kernels.moe_gather import gather_rows
from engine.kernels.moe_gemm import ExpertWeights, Tile
from engine.kernels.moe_route import max_tiles, pairs_at_once, route_pairs, route_pairs_reference
from engine.kernels.moe_tiles import MoeTiles, OneTokenTiles, SpecialisedTiles, moe_tiles
from engine.moe import specialised
from engine.moe.expert_products import run_experts, run_experts_reference
from engine.moe.fused_experts import FusedMoeLayer, gate_spec, load_fused_moe

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers, and rounds to FP8 without the
# carry into the exponent, so that a few values in a hundred come out at half their size.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
FP8_ERROR = 0.05 if torch.cuda.is_available() else 0.12
SAME_FP8 = 1.0 if torch.cuda.is_available() else 0.95


def moe_config(**changes: object) -> MoeConfig:
    values = {
        "num_routed_experts": 12,
        "num_shared_experts": 2,
        "num_experts_per_token": 3,
        "moe_intermediate_size": 48,
        "first_dense_layers": 0,
        "moe_layer_freq": 1,
        "scoring": "softmax",
        "topk_method": "greedy",
        "num_groups": 1,
        "topk_groups": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }
    return MoeConfig(**(values | changes))


GATES = {
    "softmax_greedy": moe_config(),
    "normed": moe_config(norm_topk_prob=True, routed_scaling_factor=2.5),
    "group_limited": moe_config(
        topk_method="group_limited_greedy", num_groups=4, topk_groups=2, routed_scaling_factor=16.0
    ),
    "noaux_tc": moe_config(
        scoring="sigmoid", topk_method="noaux_tc", num_groups=4, topk_groups=2, norm_topk_prob=True
    ),
    "no_shared": moe_config(num_shared_experts=0),
}


def choose(
    config: MoeConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[Choice, torch.Tensor]:
    state = new_gate_state(config.num_routed_experts, x.device)
    choice = choose_experts_fused(x, split_weight(weight, x.dtype), bias, gate_spec(config), state)
    assert not state.arrivals_G.any()
    return choice, state.load_E


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gate_chooses_as_the_reference_does(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(1)
    config = GATES[name]
    num_experts, shared = config.num_routed_experts, config.num_shared_experts
    x = torch.randn(21, 80, dtype=dtype, device=device)
    weight = torch.randn(num_experts, 80, device=device)
    bias = torch.randn(num_experts, device=device) if config.topk_method == "noaux_tc" else None

    choice, load = choose(config, x, weight, bias)

    weights, ids = choose_experts(config, x.float() @ weight.t(), bias)
    ids, order = ids.sort(dim=1)
    found, found_order = choice.ids_TK[:, : config.num_experts_per_token].sort(dim=1)
    assert torch.equal(found.long(), ids)
    found_weights = choice.weights_TK[:, : config.num_experts_per_token].gather(1, found_order)
    torch.testing.assert_close(found_weights, weights.gather(1, order), rtol=2e-5, atol=1e-6)
    assert torch.equal(load, torch.bincount(ids.flatten(), minlength=num_experts))
    for s in range(shared):
        assert (choice.ids_TK[:, config.num_experts_per_token + s] == num_experts + s).all()
        assert (choice.weights_TK[:, config.num_experts_per_token + s] == 1.0).all()
    by_group = [
        torch.bincount(part.flatten(), minlength=num_experts + shared) for part in choice.ids_TK.split(16)
    ]
    assert torch.equal(choice.counts_GE.long(), torch.stack(by_group))


@pytest.mark.parametrize("num_tokens", [1, 2, 16])
def test_the_route_of_few_tokens_is_the_sort(num_tokens: int, device: str) -> None:
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, 80, device=device)
    choice, _ = choose(GATES["group_limited"], x, torch.randn(12, 80, device=device), None)
    found = choice.route
    assert found is not None
    cpu = Choice(choice.weights_TK.cpu(), choice.ids_TK.cpu(), choice.counts_GE.cpu(), 16)
    expected = route_pairs_reference(cpu, found.tile_expert_M.shape[0], found.tile_rows)
    assert torch.equal(found.sorted_pairs_P.cpu(), expected.sorted_pairs_P)
    assert torch.equal(found.tile_start_M.cpu(), expected.tile_start_M)
    assert torch.equal(found.tile_end_M.cpu(), expected.tile_end_M)
    used = expected.tile_end_M > expected.tile_start_M
    assert torch.equal(found.tile_expert_M.cpu()[used], expected.tile_expert_M[used])


def test_a_gate_weight_of_bf16_is_one_part_and_any_other_three() -> None:
    weight = torch.randn(4, 8)
    assert split_weight(weight.bfloat16().float(), torch.bfloat16).shape[0] == 1
    parts = split_weight(weight, torch.bfloat16)
    assert parts.shape[0] == 3
    assert torch.equal(parts.float().sum(0), weight)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_gate_never_chooses_an_expert_that_does_not_exist(device: str) -> None:
    x = torch.full((3, 32), float("nan"), device=device)
    choice, _ = choose(GATES["softmax_greedy"], x, torch.randn(12, 32, device=device), None)
    assert choice.ids_TK.min() >= 0
    assert choice.ids_TK.max() < 14


def random_choice(num_tokens: int, config: MoeConfig, device: str, group_size: int = 16) -> Choice:
    """One expert gets most of the tokens, some get none."""
    routed, shared = config.num_routed_experts, config.num_shared_experts
    scores = torch.rand(num_tokens, routed)
    scores[:, 2] += 0.5
    scores[:, 5] = -1.0
    ids = scores.topk(config.num_experts_per_token, dim=1).indices
    ids = torch.cat((ids, torch.arange(routed, routed + shared).expand(num_tokens, -1)), 1).int()
    counts = [torch.bincount(part.flatten(), minlength=routed + shared) for part in ids.split(group_size)]
    weights = torch.rand(num_tokens, ids.shape[1], device=device)
    return Choice(weights, ids.to(device), torch.stack(counts).int().to(device), group_size)


@pytest.mark.parametrize("num_tokens", [1, 16, 37, 200])
@pytest.mark.parametrize("tile_rows", [16, 32])
@pytest.mark.parametrize("group_size", [16, 64])
def test_route_is_a_stable_sort_cut_into_tiles(
    num_tokens: int, tile_rows: int, group_size: int, device: str
) -> None:
    torch.manual_seed(2)
    config = moe_config()
    choice = random_choice(num_tokens, config, device, group_size)
    num_tiles = max_tiles(num_tokens, 3, 2, 12, tile_rows)

    found = route_pairs(choice, num_tiles, tile_rows)

    cpu = Choice(choice.weights_TK.cpu(), choice.ids_TK.cpu(), choice.counts_GE.cpu(), group_size)
    expected = route_pairs_reference(cpu, num_tiles, tile_rows)
    assert torch.equal(found.sorted_pairs_P.cpu(), expected.sorted_pairs_P)
    assert torch.equal(found.tile_start_M.cpu(), expected.tile_start_M)
    assert torch.equal(found.tile_end_M.cpu(), expected.tile_end_M)
    used = expected.tile_end_M > expected.tile_start_M
    assert torch.equal(found.tile_expert_M.cpu()[used], expected.tile_expert_M[used])


@pytest.mark.parametrize("num_experts", [2, 8, 64, 256, 1024])
def test_few_experts_make_no_larger_matrices(num_experts: int) -> None:
    """The compiler unrolls them: 512 pairs at once took it four minutes."""
    at_once = pairs_at_once(4000, num_experts)
    assert 1 <= at_once and at_once * max(at_once, num_experts) <= 128 * 128
    assert pairs_at_once(5, num_experts) == 8


def random_experts(
    num: int, hidden: int, size: int, dtype: torch.dtype, device: str, is_fp8: bool = False
) -> ExpertWeights:
    up_gate = torch.randn(num, 2 * size, hidden, device=device) * hidden**-0.5
    down = torch.randn(num, hidden, size, device=device) * size**-0.5
    if not is_fp8:
        return ExpertWeights(up_gate.to(dtype), down.to(dtype))
    quantised = [[fp8.quantise(weight, (128, 128)) for weight in weights] for weights in (up_gate, down)]
    values, scales = zip(
        *[(torch.stack(a), torch.stack(b)) for a, b in (zip(*q, strict=True) for q in quantised)], strict=True
    )
    return ExpertWeights(values[0], values[1], scales[0], scales[1])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (HALF, 1e-2)])
@pytest.mark.parametrize(("depth", "is_bulk"), [(32, False), (16, True)])
def test_experts_give_the_weighted_sum(
    num_tokens: int, dtype: torch.dtype, tolerance: float, depth: int, is_bulk: bool, device: str
) -> None:
    torch.manual_seed(3)
    config = moe_config()
    choice = random_choice(num_tokens, config, device)
    weights = random_experts(14, 80, 48, dtype, device)
    x = torch.randn(num_tokens, 80, dtype=dtype, device=device)
    tiles = MoeTiles(16, Tile(32, depth, 4, 2, is_bulk=is_bulk), Tile(64, depth, 4, 2, 4, is_bulk))

    found = run_experts(x, choice, gate_spec(config), weights, tiles)

    expected = run_experts_reference(x, choice, gate_spec(config), weights)
    assert found.dtype == dtype
    assert relative_error(found, expected) < tolerance


def test_gathered_rows_are_those_of_the_sorted_pairs(device: str) -> None:
    torch.manual_seed(4)
    choice = random_choice(21, moe_config(), device)
    route = route_pairs(choice, max_tiles(21, 3, 2, 12, 16), 16)
    x = quantise_rows(torch.randn(21, 384, device=device))

    found = gather_rows(x, route, 21 * 3, 5)

    tokens = route.sorted_pairs_P.long() // 5
    assert torch.equal(found.values.float(), x.values[tokens[: 21 * 3]].float())
    assert torch.equal(found.scales, x.scales[tokens])


NEEDS_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)


@NEEDS_HOPPER
@pytest.mark.parametrize(("hidden", "size"), [(512, 256), (384, 128)])
def test_specialised_warps_give_the_weighted_sum(hidden: int, size: int) -> None:
    torch.manual_seed(3)
    config = moe_config(moe_intermediate_size=size)
    weights = random_experts(14, hidden, size, torch.bfloat16, "cuda", is_fp8=True)
    for num_tokens in (17, 300, 1000):
        choice = random_choice(num_tokens, config, "cuda")
        x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16, device="cuda")

        found = run_experts(x, choice, gate_spec(config), weights, SpecialisedTiles())

        expected = run_experts_reference(x, choice, gate_spec(config), weights)
        assert relative_error(found, expected) < FP8_ERROR


@NEEDS_HOPPER
def test_fp8_experts_on_hopper_are_specialised() -> None:
    weights = random_experts(3, 384, 128, torch.bfloat16, "cuda", is_fp8=True)
    assert specialised.can_specialise(weights, torch.bfloat16)
    assert not specialised.can_specialise(weights, torch.float16)
    half = random_experts(3, 384, 128, torch.bfloat16, "cuda")
    assert not specialised.can_specialise(half, torch.bfloat16)


def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "engine.kernels.moe_specialised", None)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise AttributeError("module 'mbarrier' has no attribute 'arrive'")

    monkeypatch.setattr("engine.kernels.moe_specialised.run_products_specialised", fail)


def wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(x: torch.Tensor, route: Route, *args: object) -> torch.Tensor:
        return x.new_zeros(route.sorted_pairs_P.shape[0], x.shape[1])

    monkeypatch.setattr("engine.kernels.moe_specialised.run_products_specialised", zeros)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that says it is one."""
    monkeypatch.setattr(specialised, "_is_hopper", lambda device: True)
    specialised._works.cache_clear()
    yield
    specialised._works.cache_clear()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("breaks", [no_module, no_compiler, wrong_numbers])
def test_layers_take_other_tiles_where_specialised_ones_fail(
    breaks: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    torch.manual_seed(7)
    breaks(monkeypatch)
    monkeypatch.setattr("engine.kernels.moe_tiles._SPECIALISED_TOKENS", 2)
    spec = gate_spec(moe_config(num_routed_experts=3, num_shared_experts=0, moe_intermediate_size=128))
    weights = random_experts(3, 128, 128, torch.bfloat16, device, is_fp8=True)
    gate, x = torch.randn(3, 128, device=device), torch.randn(2, 128, device=device).bfloat16()

    layers = [FusedMoeLayer(spec, gate, None, weights, torch.bfloat16) for _ in range(2)]

    warnings = [record for record in caplog.records if record.name == specialised.__name__]
    assert [record.levelname for record in warnings] == ["WARNING"]
    for layer in layers:
        assert layer(x).shape == x.shape


@pytest.mark.usefixtures("hopper")
def test_layers_take_specialised_tiles_from_many_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialised, "_trial_error", lambda device: 0.01)
    weights = random_experts(14, 384, 128, torch.bfloat16, "cpu", is_fp8=True)
    assert specialised.can_specialise(weights, torch.bfloat16)
    assert not specialised.can_specialise(weights, torch.float32)
    odd = random_experts(14, 384, 64, torch.bfloat16, "cpu", is_fp8=True)
    assert not specialised.can_specialise(odd, torch.bfloat16)
    below, above = (
        moe_tiles(num_tokens, torch.float8_e4m3fn, is_specialised=True) for num_tokens in (767, 768)
    )
    assert isinstance(below, MoeTiles)
    assert isinstance(above, SpecialisedTiles)


@pytest.mark.parametrize(
    ("quantises_inside", "is_swapped", "is_bulk"),
    [(True, False, False), (False, True, True), (True, True, False)],
)
def test_fp8_experts_stay_near_their_dequantised_weights(
    quantises_inside: bool, is_swapped: bool, is_bulk: bool, device: str
) -> None:
    torch.manual_seed(4)
    config = moe_config(moe_intermediate_size=128)
    choice = random_choice(17, config, device)
    weights = random_experts(14, 256, 128, torch.bfloat16, device, is_fp8=True)
    x = torch.randn(17, 256, dtype=torch.bfloat16, device=device)
    tile = Tile(64, 128, 4, 2, is_bulk=is_bulk, is_swapped=is_swapped)
    tiles = MoeTiles(16, tile, tile, quantises_inside)

    found = run_experts(x, choice, gate_spec(config), weights, tiles)

    expected = run_experts_reference(x, choice, gate_spec(config), weights)
    assert relative_error(found, expected) < FP8_ERROR


def test_all_ways_to_quantise_give_the_same_bits(device: str) -> None:
    torch.manual_seed(5)
    config = moe_config(num_routed_experts=6, num_shared_experts=0, moe_intermediate_size=256)
    choice = random_choice(5, config, device)
    weights = random_experts(6, 128, 256, torch.bfloat16, device, is_fp8=True)
    x = torch.randn(5, 128, dtype=torch.bfloat16, device=device)
    first, *others = (
        run_experts(
            x,
            choice,
            gate_spec(config),
            weights,
            MoeTiles(16, Tile(128, 128, 4, 2), Tile(32, 128, 4, 2), quantises_inside, quantises_h),
        )
        for quantises_inside in (True, False)
        for quantises_h in (False, True)
    )
    for other in others:
        assert torch.equal(first, other)


def test_quantised_rows_equal_the_reference(device: str) -> None:
    x = torch.randn(5, 384, device=device)[:, :256]
    x[1] = 0.0
    found, expected = quantise_rows(x), quantise_rows_reference(x)
    assert torch.equal(found.scales, expected.scales)
    is_same = found.values.float() == expected.values.float()
    assert float(is_same.float().mean()) >= SAME_FP8
    assert relative_error(dequantise_rows(found), x) < FP8_ERROR


def test_combine_sums_in_the_order_of_experts(device: str) -> None:
    y = torch.randn(21, 70, dtype=torch.bfloat16, device=device)
    weights = torch.rand(7, 3, device=device)
    torch.testing.assert_close(
        combine_pairs(y, weights), combine_pairs_reference(y, weights), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_layer_gives_the_same_for_two_tokens_alone_and_in_a_batch(is_fp8: bool, device: str) -> None:
    torch.manual_seed(6)
    config = moe_config(moe_intermediate_size=128)
    weights = random_experts(14, 128, 128, HALF, device, is_fp8)
    layer = FusedMoeLayer(gate_spec(config), torch.randn(12, 128, device=device), None, weights, HALF)
    x = torch.randn(12, 128, dtype=HALF, device=device)

    together = layer(x)

    assert torch.equal(layer(x[3:5]), together[3:5])
    assert layer(x[:0]).shape == (0, 128)
    assert int(layer.take_load().sum()) == 14 * 3
    assert int(layer.take_load().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_tiles_exist_for_every_number_of_tokens(dtype: torch.dtype) -> None:
    assert isinstance(moe_tiles(1, dtype), OneTokenTiles) == (dtype == torch.bfloat16)
    for num_tokens in (2, 3, 5, 16, 17, 1000, 100_000):
        tiles = moe_tiles(num_tokens, dtype)
        assert isinstance(tiles, MoeTiles)
        assert tiles.rows >= 16
        assert dtype != torch.float8_e4m3fn or tiles.up_gate.depth == tiles.down.depth == 128


class RandomWeights:
    """The same tensor for a name whenever it is asked for."""

    def __init__(self, device: str) -> None:
        self._device = device

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        weight = torch.randn(shape, generator=generator).div_(shape[-1] ** 0.5)
        return weight.to(self._device, dtype or torch.float32)

    def has(self, name: str) -> bool:
        return not name.endswith("bias")


@pytest.mark.parametrize(("is_fp8", "tolerance"), [(False, 1e-5), (True, 1.6 * FP8_ERROR)])
def test_a_loaded_layer_equals_the_layer_without_kernels(is_fp8: bool, tolerance: float, device: str) -> None:
    """In FP8 the weights are rounded beside the rows."""
    config = moe_config(moe_intermediate_size=128)
    weights = RandomWeights(device)
    shared = load_gated_mlp(weights, "mlp.shared_experts", 128, 2 * 128, False)
    experts = load_experts(config, weights, "mlp.experts", 128, range(12))
    gate = load_gate(config, weights, "mlp.gate", 128)
    plain = MoeLayer(gate, LocalDispatcher(12), experts, shared, 12)
    x = torch.randn(9, 128, device=device)

    fused = load_fused_moe(config, weights, "mlp", 128, is_fp8=is_fp8)

    assert relative_error(fused(x), plain(x)) < tolerance
    assert torch.equal(fused.take_load(), plain.take_load())
