"""A model that answers, on transformers' own generation.

One ``generate`` loop serves a batch of requests that differ in length, temperature, seed and stop strings: prompts are
padded on the left, and what is each sequence's own happens in ``PerSequence`` and ``Watch``.
Shapes: B sequences, L tokens of the longest prompt.
"""

from __future__ import annotations

import copy
import queue
import secrets
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from psyche_node.generation.batch import Answer, Listener, Watch, deaf
from psyche_node.generation.errors import PromptError
from psyche_node.generation.loading import Loaded, load
from psyche_node.generation.prompts import Message, Prompts
from psyche_node.generation.request import PLAIN, Advice, Completion, Request
from psyche_node.generation.sampling import PerSequence
from psyche_node.planning.context import context_window

_CUDA_TOKENS, _CPU_TOKENS = 131_072, 16_384
"""Prompt and answer of all sequences of a batch: bounds the key-value cache."""
_SEQUENCES = 256
"""At most in one batch, however short: each costs some work on the host for every token."""
_SEEDS = 1 << 63
_CHARACTERS_PER_TOKEN = 16
"""More than any text has on average: English has 4 to 5, program text with its blanks up to 8."""


class Engine:
    """A loaded model; one generation at a time, from any thread.

    Attributes:
        advice: what the folder's ``generation_config.json`` advises.
        context: tokens that prompt and answer may have together; None if the config does not say.
        eos: tokens that end an answer.
        vocabulary: rows of the embedding; token ids are below it.
        prompts: the tokenizer and its chat template.
        reasons: the choices made while loading (device, dtype), each with its reason.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self.device: torch.device = loaded.device
        self.reasons = loaded.reasons
        # A copy: one thread may make a prompt while another decodes an answer.
        self.prompts = Prompts(copy.deepcopy(loaded.tokenizer), loaded.where)
        self.advice = Advice.of(loaded.generation)
        self.context: int | None = context_window(loaded.model.config.get_text_config().to_dict())
        self.vocabulary: int = loaded.model.get_input_embeddings().weight.shape[0]
        self.eos = _end_tokens(loaded)
        self._hidden = frozenset(loaded.hidden)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: Path, device: str = "auto", dtype: str = "auto") -> Engine:
        """Load a Hugging Face folder: a causal language model with its tokenizer.

        ``dtype`` is auto, float32, bfloat16 or float16; auto takes bfloat16 on a GPU and float32 on a CPU.

        Raises:
            GenerationError: the folder lacks a model or a tokenizer, or cannot be loaded; no such device or dtype.
        """
        return cls(load(folder, device, dtype))

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> tuple[int, ...]:
        """Return the prompt of a conversation as token ids. Raises GenerationError and PromptError as ``Prompts``."""
        return self.prompts.encode(self.prompts.render(messages, tools, thinking))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens: marks such as ``<think>`` stay, other special tokens do not."""
        shown = [token for token in tokens if token not in self._hidden]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        advice: Advice = PLAIN,
    ) -> list[Completion]:
        """Return the completion of each prompt (token ids), in batches that fit.

        Prompt i is sampled with ``seed`` + i; None takes a seed of the system's entropy. See ``Request`` for the rest.

        Raises:
            PromptError: a prompt leaves no room in the context window.
            ValueError: a parameter is outside its range.
        """
        first = secrets.randbelow(_SEEDS) if seed is None else seed
        requests = [
            Request(tuple(prompt), max_new_tokens, temperature, top_p, (first + index) % _SEEDS, tuple(stop), advice)
            for index, prompt in enumerate(prompts)
        ]
        done: list[Completion | None] = [None] * len(requests)
        for batch in self.batches(requests):
            for index, completion in zip(batch, self.run([requests[index] for index in batch]), strict=True):
                done[index] = completion
        return [completion for completion in done if completion is not None]

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Yield the pieces of one answer as they come, and return all of it. Closing the generator ends the answer.

        Raises:
            PromptError: the prompt leaves no room in the context window.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        wanted, result = threading.Event(), list[Completion | BaseException]()
        wanted.set()

        def listen(piece: str, _: Completion | None) -> bool:
            if piece:
                pieces.put(piece)
            return wanted.is_set()

        def work() -> None:
            try:
                result.extend(self.run([request], [listen]))
            except BaseException as error:  # raised again below, in the thread that reads
                result.append(error)
            finally:
                pieces.put(None)

        worker = threading.Thread(target=work, name="generation", daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            wanted.clear()
            worker.join()
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def run(self, requests: Sequence[Request], listeners: Sequence[Listener] | None = None) -> list[Completion]:
        """Generate one batch; ``listeners[i]`` hears request i token by token, and may end it.

        Raises:
            PromptError: a prompt leaves no room in the context window.
        """
        if not requests:
            return []
        room = [self.room(request) for request in requests]
        heard = listeners if listeners is not None else [deaf] * len(requests)
        answers = [
            Answer(request, limit, self.decode, listener)
            for request, limit, listener in zip(requests, room, heard, strict=True)
        ]
        width = max(len(request.prompt) for request in requests)
        pad = self._pad()
        tokens_BL = torch.full((len(requests), width), pad, dtype=torch.long)
        mask_BL = torch.zeros_like(tokens_BL)
        for row, request in enumerate(requests):
            tokens_BL[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask_BL[row, width - len(request.prompt) :] = 1
        config = cast(Any, GenerationConfig)(
            max_new_tokens=max(room),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(self.eos) or None,
        )
        with self._lock, torch.inference_mode():
            self._model.generate(
                input_ids=tokens_BL.to(self.device),
                attention_mask=mask_BL.to(self.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([PerSequence(requests, width, sorted(self.eos), self.device)]),
                stopping_criteria=StoppingCriteriaList([Watch(answers, self.eos)]),
            )
        return [answer.completion() for answer in answers]

    def room(self, request: Request) -> int:
        """Return how many tokens the answer may have.

        Raises:
            PromptError: there is no room for even one.
        """
        if self.context is None:
            return request.max_new_tokens
        left = self.context - len(request.prompt)
        if left < 1:
            raise PromptError(
                f"the prompt has {len(request.prompt):,} tokens, the model's context window {self.context:,}, prompt "
                "and answer together. Shorten the conversation"
            )
        return min(left, request.max_new_tokens)

    def may_fit(self, characters: int) -> None:
        """Raise PromptError for a text of so many characters if it is far beyond the context window: tokenizing it
        only to count its tokens could take long."""
        if self.context is not None and characters > _CHARACTERS_PER_TOKEN * self.context:
            raise PromptError(
                f"the prompt has {characters:,} characters, far more than the model's context window of "
                f"{self.context:,} tokens has room for. Shorten the conversation"
            )

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether these make one batch: prompts and answers padded to the longest are within the bounds."""
        if len(requests) > _SEQUENCES:
            return False
        width = max(len(request.prompt) for request in requests)
        longest = max(self.room(request) for request in requests)
        most = _CUDA_TOKENS if self.device.type == "cuda" else _CPU_TOKENS
        return len(requests) == 1 or len(requests) * (width + longest) <= most

    def batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Yield the indices of the requests in batches that fit: longest prompts first, those alike in length
        together.

        Raises:
            PromptError: a prompt leaves no room in the context window.
        """
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt)):
            if batch and not self.fits([requests[one] for one in (*batch, index)]):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self.eos, default=0)


def _end_tokens(loaded: Loaded) -> frozenset[int]:
    """The tokens that end an answer: the generation config may name several, the tokenizer one."""
    named = loaded.generation.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    if loaded.tokenizer.eos_token_id is not None:
        ends.add(loaded.tokenizer.eos_token_id)
    return frozenset(ends)
