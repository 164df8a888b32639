from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.deploy.kubernetes.rendering import VARIANTS, Manifests, render, unpack_kubectl


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Manifests]:
    """Manifests of a variant, rendered once."""
    kubectl = unpack_kubectl(tmp_path_factory.mktemp("kubectl"))
    return cache(lambda variant: render(kubectl, variant, tmp_path_factory.mktemp("manifests")))


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest, rendered: Callable[[str], Manifests]) -> Manifests:
    return rendered(request.param)


@pytest.fixture
def schemas() -> Path:
    return Path(__file__).parent / "schemas"
