"""What can go wrong between a folder and an answer; every message says what, where, and what to do."""

from __future__ import annotations


class GenerationError(Exception):
    """A model folder cannot be talked to."""


class PromptError(GenerationError):
    """A conversation cannot be turned into a prompt: the template refuses it, or the context window is too small."""
