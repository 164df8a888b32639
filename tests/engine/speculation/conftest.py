from __future__ import annotations

from pathlib import Path

import pytest

from engine.checkpoint.random_checkpoint import make_random_checkpoint
from tests.fakes.agreeing_checkpoint import make_agreeing_checkpoint


@pytest.fixture(scope="session")
def disagreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: no draft is ever right."""
    path = tmp_path_factory.mktemp("disagreeing") / "model"
    make_random_checkpoint(path, "deepseek_v3", "tiny_mtp")
    return path


@pytest.fixture(scope="session")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than half of the drafts are right."""
    path = tmp_path_factory.mktemp("agreeing") / "model"
    make_agreeing_checkpoint(path, 0.2)
    return path
