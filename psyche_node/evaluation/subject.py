"""The model that is evaluated: loaded for it, or one that is being trained and is lent between its rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from psyche_node.generation import Engine
from psyche_node.generation.loading import around, load
from psyche_node.training.device import Device, choose_device


class Subject:
    """A model with its tokenizer, on its device.

    Attributes:
        engine: generates, and encodes prompts.
        device: where and in which precision it computes, and how many sequences a forward pass takes.
        context: tokens of its context window; None if the config does not say.
        exact: the weights are the run's own or fp32, so that their root is the one on chain.
    """

    def __init__(self, model: Any, engine: Engine, device: Device) -> None:
        self.model, self.engine, self.device = model, engine, device
        self.context = engine.context
        self.exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, sequence_length: int) -> Subject:
        """Load a model folder. Raises GenerationError, TrainingError."""
        loaded = load(folder, device, dtype)
        place = choose_device(str(loaded.device), sequence_length, micro_batch=0, threads=0)
        return cls(loaded.model, Engine(loaded), place)

    @classmethod
    def lent(cls, model: Any, folder: Path, device: Device) -> Subject:
        """A model that is being trained; ``folder`` has its tokenizer. Raises GenerationError."""
        subject = cls(model, Engine(around(model, folder, device.torch)), device)
        subject.exact = True  # whatever its precision, it is the run's
        return subject

    def opening(self, text: str) -> tuple[int, ...]:
        """The tokens before plain text: bos where the tokenizer adds it; before no text at all bos or eos, so that its
        first word has something to follow."""
        prompts, eos = self.engine.prompts, self.engine.eos
        added = tuple(token for token in prompts.encode_text("", special=True) if token not in eos)
        return added if added or text.strip() else tuple(sorted(eos)[:1])

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Within it the model computes as for an answer; after it everything is as it was."""
        training, generation = self.model.training, self.model.generation_config
        self.model.eval()
        neutral: Any = GenerationConfig
        self.model.generation_config = neutral()  # else the folder's advice would apply
        try:
            with torch.no_grad(), self.device.compute():
                yield
        finally:
            self.model.train(training)
            self.model.generation_config = generation
