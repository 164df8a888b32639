"""The way of most tokens: from the link's message to the client's connection in one chain of calls.

The task of the request sleeps meanwhile. It wakes for whatever may have to wait: the first tokens, the end, a
worker that is lost, a client that reads too slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

from proto import link_pb2
from router.answer_format import AnswerFormat
from router.choice import Choice
from router.http_protocol import StreamWriter


class DirectStream:
    """Of one choice of a stream that has begun."""

    def __init__(
        self, choice: Choice, choices: Sequence[Choice], answer: AnswerFormat, writer: StreamWriter
    ) -> None:
        self._choice = choice
        self._choices = choices
        self._answer = answer
        self._writer = writer

    def take(self, update: link_pb2.SequenceUpdate) -> bool:
        """Write these tokens. False: the task of the request must."""
        writer, choice = self._writer, self._choice
        if not writer.is_ready:
            return False
        delta = choice.read(choice.flow.take_tokens(update))
        chunk = self._answer.chunk(choice, delta, self._choices)
        if chunk:
            writer.write(chunk)
        return True


def open_direct_streams(choices: Sequence[Choice], answer: AnswerFormat, writer: StreamWriter) -> None:
    """After the first chunk was sent. A choice that a string may stop can end at any token, and stays."""
    for choice in choices:
        if not choice.has_stops:
            choice.flow.offer_updates(DirectStream(choice, choices, answer, writer).take)
