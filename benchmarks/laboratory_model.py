"""What the convergence benchmark trains: a small SeedOss model on the standard library's documentation, all parameters
flat in blocks of 4,096.

Legend: N blocks of the layout, C = 4096 values of one block. `Subject` keeps the model's parameters as views of one
flat vector, so that weights and gradients move between model and blocks by one index.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import SeedOssConfig, SeedOssForCausalLM

from optimizer.layout import BLOCK, SIDE, Layout
from psyche_node.data import PackedDataset, build_stdlib_chat, prepare, train_tokenizer

_ORDER = b"convergence benchmark".ljust(32, b"\0")
_MICRO_BATCH = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """Model and data of a comparison. Without `assistant_only` every token is a target: more signal per operation."""

    hidden: int = 192
    layers: int = 6
    vocabulary: int = 2048
    length: int = 256
    std: float = 0.06
    assistant_only: bool = False


class Text:
    """The tokens: training sequences in an order of the seed, reshuffled every epoch, and held-out ones."""

    def __init__(self, scale: Scale, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            build_stdlib_chat(root / "chat.jsonl")
            train_tokenizer(root / "chat.jsonl", scale.vocabulary, root / "tokenizer")
            prepare(root / "chat.jsonl", root / "tokenizer", root / "data", scale.length)
            data = PackedDataset(root / "data")
            batch, heldout = data.batch(range(len(data)), _ORDER), data.heldout()
            self.entropy, pad = data.manifest.unigram_entropy, data.manifest.pad
            self._tokens, self._places = torch.from_numpy(batch.tokens), torch.from_numpy(batch.places)
            self._held, self._held_places = torch.from_numpy(heldout.tokens), torch.from_numpy(heldout.places)
            wanted, held = torch.from_numpy(batch.trained), torch.from_numpy(heldout.trained)
        self._targets = wanted if scale.assistant_only else self._tokens != pad
        self._held_targets = held if scale.assistant_only else self._held != pad
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, places and target flags, each (B, L), of sequences first:first+count of the endless stream."""
        at = [self._at(position) for position in range(first, first + count)]
        return self._tokens[at], self._places[at], self._targets[at]

    def heldout(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """At most so many held-out sequences, spread evenly: they lie in order of cost, the long answers together."""
        count = len(self._held)
        at = [number * count // min(most, count) for number in range(min(most, count))]
        return self._held[at], self._held_places[at], self._held_targets[at]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self._tokens))
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self._tokens))
        return int(self._orders[epoch][index])


class Subject:
    """A model whose weights are set from blocks and whose gradients are read as blocks."""

    def __init__(self, scale: Scale, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = SeedOssForCausalLM(_config(scale))
        named = dict(self.model.named_parameters())
        self.layout = Layout.build([(name, tuple(p.shape)) for name, p in named.items()], topk=1)
        self._parameters = [named[placement.name] for placement in self.layout.placements]
        self.flat = torch.cat([p.detach().flatten() for p in self._parameters])
        self.gradient = torch.zeros_like(self.flat)
        sizes = [p.numel() for p in self._parameters]
        for parameter, part in zip(self._parameters, torch.split(self.flat, sizes), strict=True):
            parameter.data = part.view(parameter.shape)
        self._parts = [g.view_as(p) for g, p in zip(torch.split(self.gradient, sizes), self._parameters, strict=True)]
        self._positions = _positions(self.layout)

    @property
    def parameters(self) -> int:
        return len(self.flat)

    def blocks(self, flat: Tensor) -> Tensor:
        """A flat vector as blocks (N, C), zeros where a block has no parameter."""
        blocks = torch.zeros(self.layout.blocks * BLOCK)
        blocks[self._positions] = flat
        return blocks.view(-1, BLOCK)

    def groups(self) -> Tensor:
        """Of each block (N,): 0 part of a matrix, 1 of the embedding, 2 of vectors."""
        groups = torch.zeros(self.layout.blocks, dtype=torch.int64)
        for placement in self.layout.placements:
            kind = 2 if placement.matrix is None else int("embed" in placement.name)
            groups[placement.first : placement.first + placement.blocks] = kind
        return groups

    def load(self, blocks_NC: Tensor) -> None:
        torch.index_select(blocks_NC.reshape(-1), 0, self._positions, out=self.flat)

    def backward(self, rows: tuple[Tensor, Tensor, Tensor], clip: float = 1.0) -> float:
        """Put the gradient of the mean loss, clipped to a norm of `clip`, into `gradient`; returns the loss."""
        self.gradient.zero_()
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.grad = part  # an optimizer may have set it to None
        tokens, total = int(rows[2][:, 1:].sum()), 0.0
        for start in range(0, len(rows[0]), _MICRO_BATCH):
            loss = self._loss(rows, slice(start, start + _MICRO_BATCH)) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self.gradient.mul_(min(1.0, clip / (self.gradient.norm().item() + 1e-6)))
        return total

    @torch.no_grad()
    def evaluate(self, rows: tuple[Tensor, Tensor, Tensor]) -> float:
        """Mean loss over all targets of some sequences."""
        parts = [self._loss(rows, slice(i, i + _MICRO_BATCH)).item() for i in range(0, len(rows[0]), _MICRO_BATCH)]
        return sum(parts) / int(rows[2][:, 1:].sum())

    def _loss(self, rows: tuple[Tensor, Tensor, Tensor], part: slice) -> Tensor:
        tokens, places, targets = (tensor[part] for tensor in rows)
        hidden = self.model.model(input_ids=tokens, position_ids=places, use_cache=False).last_hidden_state[:, :-1]
        wanted = targets[:, 1:]
        logits = self.model.lm_head(hidden[wanted])
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="sum")


def _config(scale: Scale) -> SeedOssConfig:
    return SeedOssConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=3 * scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=scale.hidden // 4,
        initializer_range=scale.std,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        residual_dropout=0.0,
        attention_bias=False,
        use_cache=False,
    )


def _positions(layout: Layout) -> Tensor:
    """Where every value of the flat vector lies among all values of all blocks, int64."""
    parts = []
    for placement in layout.placements:
        count = torch.arange(placement.numel)
        if placement.matrix is None:
            parts.append(placement.first * BLOCK + placement.offset + count)
            continue
        width = placement.matrix[1]
        wide = -(-width // SIDE)
        row, column = count // width, count % width
        block = placement.first + row // SIDE * wide + column // SIDE
        parts.append(block * BLOCK + row % SIDE * SIDE + column % SIDE)
    return torch.cat(parts)
