from __future__ import annotations

from pathlib import Path

import pytest

from decode_svc.settings import DecodeSettings
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from worker.build_engine import EpMembership, resolve_membership

ASKED = EpMembership(group_id="decode", rank=1, size=2, address="rank-0:29500")


@pytest.mark.parametrize(("arch", "expected"), [("deepseek_v3", ASKED), ("llama", EpMembership())])
def test_only_a_model_with_experts_is_served_by_a_group(
    tmp_path: Path, arch: str, expected: EpMembership
) -> None:
    make_random_checkpoint(tmp_path / "model", arch)
    assert resolve_membership(DecodeSettings(model=tmp_path / "model"), ASKED) == expected


def test_a_checkpoint_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve_membership(DecodeSettings(model=tmp_path), ASKED)
