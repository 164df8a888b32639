"""`baton up` as `make serve` starts it: no model is named."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.stack import running_stack, wait_until

QUESTION = "Write a short story about a lighthouse."


def test_a_checkout_serves_the_model_that_it_ships(tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--num-blocks", "600", "--threads", "1", "--ask", QUESTION)
    with running_stack(None, tmp_path, *options) as stack:
        [listed] = stack.client.get("/v1/models").json()["data"]
        assert listed["id"] == "baton-demo"
        [choice] = stack.chat(QUESTION, temperature=0, max_tokens=200).json()["choices"]
        assert choice["finish_reason"] == "stop"
        story = choice["message"]["content"]
        assert "lighthouse" in story
        assert len(story.split()) > 40
        # What was asked at the start is answered on the console, by the same greedy tokens.
        wait_until(lambda: story in stack.console, "the answer is shown", timeout_s=30)
        stack.assert_no_block_is_lost()
