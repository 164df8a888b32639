"""Requests made up from the OpenAPI document, valid and not: none of them may be an error of the server's."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from router.endpoint import ENDPOINTS
from router.token_endpoints import TOKEN_BODIES
from tests.fakes.fake_decode_worker import cycling_script
from tests.fakes.tiny_tokenizer import EOS_ID
from tests.router.conftest import running_router

pytestmark = pytest.mark.slow

_TIMEOUT_S = 10.0  # of any one request
_REQUIRED = {"messages", "prompt", "input", "tokens", "max_tokens"}  # the rest of a body is thinned out


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
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    schema.config.update(base_url=url)
    return schema


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", [*(endpoint.path for endpoint in ENDPOINTS), *TOKEN_BODIES])
def test_no_request_is_an_error_of_the_server(
    document: schemathesis.BaseSchema, path: str, mode: GenerationMode
) -> None:
    statuses = Counter[int]()

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode), data=st.data())
    def ask(case: schemathesis.Case, data: st.DataObject) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            optional = sorted(set(case.body) - _REQUIRED)
            kept = data.draw(st.sets(st.sampled_from(optional), max_size=3)) if optional else set()
            case.body = {k: v for k, v in case.body.items() if k in _REQUIRED | kept} | {"model": "test"}
        response = case.call(timeout=_TIMEOUT_S)
        case.validate_response(response, checks=[not_a_server_error])
        statuses[response.status_code] += 1

    ask()
    if mode is GenerationMode.POSITIVE:
        assert statuses[200], statuses  # some got past the checks of the body
