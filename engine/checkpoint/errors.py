"""What a checkpoint directory can do wrong."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be used. One line: which file or tensor, what was expected, what was found."""
