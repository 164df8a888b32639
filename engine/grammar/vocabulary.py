"""The bytes of every token, as the grammar library wants them: read from tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.grammar.grammar import GrammarError

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def load_vocabulary(model_dir: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> LLTokenizer:
    """About a second for a hundred thousand tokens. GrammarError when this model cannot have grammars."""
    try:
        from llguidance import LLTokenizer  # optional: only structured output needs it
    except ImportError as error:
        raise GrammarError("structured output needs the package llguidance on the worker") from error
    if not eos_token_ids:
        raise GrammarError("structured output needs a model with an end-of-sequence token")
    path = model_dir / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise GrammarError("structured output needs the tokenizer.json of the model on the worker") from error
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
    except ValueError as error:
        raise GrammarError(
            f"the tokenizer.json of the model does not fit structured output: {error}"
        ) from error
