"""Requests made up from the OpenAPI document, valid and not: none of them may be an error of the server's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from schemathesis.generation import GenerationMode

from router.endpoint import ENDPOINTS
from router.token_endpoints import TOKEN_BODIES
from tests.fakes.api_fuzz import fuzz, load_document
from tests.fakes.fake_decode_worker import cycling_script
from tests.fakes.tiny_tokenizer import EOS_ID
from tests.router.conftest import running_router

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    """A router with one worker, in a thread of its own: schemathesis is synchronous."""
    ready, done = threading.Event(), threading.Event()
    urls: list[str] = []

    async def serve() -> None:
        async with running_router(model_dir) as router:
            await router.add_worker("decode-0", script=cycling_script([*range(60, 70), EOS_ID]))
            urls.append(str(router.client.base_url))
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield urls[0]
    finally:
        done.set()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def document(url: str) -> schemathesis.BaseSchema:
    return load_document(url)


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", [*(endpoint.path for endpoint in ENDPOINTS), *TOKEN_BODIES])
def test_no_request_is_an_error_of_the_server(
    document: schemathesis.BaseSchema, path: str, mode: GenerationMode
) -> None:
    statuses = fuzz(document, path, mode, model="test", num_examples=30)
    if mode is GenerationMode.POSITIVE:
        assert statuses[200], statuses  # some got past the checks of the body
