"""What a checkpoint directory can do wrong."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be used: one line for a person, with the file or tensor, what was expected and what was found."""
