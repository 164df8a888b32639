"""What passes the router's checks may still be more than an engine can do: that is no 5xx either."""

from __future__ import annotations

import pytest
from schemathesis.generation import GenerationMode

from tests.e2e.stack import Stack
from tests.fakes.api_fuzz import fuzz, load_document


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_no_valid_request_is_an_error_of_the_server(stack: Stack, path: str) -> None:
    document = load_document(stack.url)
    statuses = fuzz(document, path, GenerationMode.POSITIVE, model="tiny", num_examples=25, max_tokens=6)
    assert statuses[200], statuses


def test_nothing_is_left_behind(stack: Stack) -> None:
    stack.assert_no_block_is_lost()
