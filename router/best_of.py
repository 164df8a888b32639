"""best_of: of several answers to a prompt only the likeliest are shown."""

from __future__ import annotations

from collections.abc import Sequence

from router.choice import Choice, ChoiceDelta
from router.generation import Generation

Answer = tuple[Choice, list[ChoiceDelta]]


def shown_answers(generation: Generation, answers: Sequence[Answer]) -> list[Answer]:
    """The best of each prompt by mean logprob of a token, as OpenAI defines it, numbered anew."""
    num_shown, num_choices = generation.num_shown, generation.num_choices
    if num_shown == num_choices:
        return list(answers)
    shown: list[Answer] = []
    for begin in range(0, len(answers), num_choices):
        of_prompt = answers[begin : begin + num_choices]
        shown += sorted(of_prompt, key=_mean_logprob, reverse=True)[:num_shown]
    for index, (choice, _) in enumerate(shown):
        choice.index = index
    return shown


def _mean_logprob(answer: Answer) -> float:
    logprobs = [token.logprob for delta in answer[1] for token in delta.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
