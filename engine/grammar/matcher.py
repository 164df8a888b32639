"""Where one sequence stands in its grammar.

It follows the sequence's own list of output tokens, from whatever point it has read: preemption changes
nothing, and a sequence that moved here with output starts by reading it.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarMatcher:
    def __init__(self, matcher: LLMatcher, *, num_mask_bytes: int, begin_after: tuple[int, ...] = ()) -> None:
        """Takes `matcher` over, which must be at the start of its grammar. num_mask_bytes: a bit for each
        token of the vocabulary, in words of 32."""
        self.matcher = matcher
        self.num_mask_bytes = num_mask_bytes
        self.error: str | None = None  # the output cannot go on under the grammar
        self.is_open = not begin_after  # the grammar holds: its beginning was reached
        self._begin_after = begin_after
        self._num_read = 0  # output tokens

    def follow(self, token_ids: array[int], num_prompt_tokens: int) -> None:
        """Read the output tokens that are new; an end-of-sequence token must not be among them."""
        begin = num_prompt_tokens + self._num_read
        new_ids = token_ids[begin:].tolist()
        self._num_read += len(new_ids)
        if not self.is_open:
            new_ids = self._read_free(token_ids, begin, num_prompt_tokens)
        if new_ids and self.error is None and not self.matcher.consume_tokens(new_ids):
            self.error = "the output so far does not match the grammar"

    @property
    def may_end(self) -> bool:
        """The output is complete, and could also go on."""
        return self.is_open and self.matcher.is_accepting() and not self.matcher.is_stopped()

    def check(self) -> None:
        """Ask the library whether it could follow so far: some grammars are too much for its limits only at
        certain places."""
        if self.error is None and self.matcher.is_error():
            self.error = f"the grammar is too much to follow: {self.matcher.stop_reason()}"

    def _read_free(self, token_ids: array[int], begin: int, num_prompt_tokens: int) -> list[int]:
        """Look for the beginning; the tokens after it. It may have begun before `begin`."""
        length = len(self._begin_after)
        wanted = array("q", self._begin_after)
        for end in range(max(begin + 1, num_prompt_tokens + length), len(token_ids) + 1):
            if token_ids[end - length : end] == wanted:
                self.is_open = True
                return token_ids[end:].tolist()
        return []
