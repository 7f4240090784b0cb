"""Memory of a training step on one GPU, part by part.

The account is that of `training.session.Session`: fp32 weights, gradients and momentum, the trend of the votes, a copy
of the weights that lookahead puts aside, and what autograd keeps. Tests hold it against the tensors that are alive in
a real step. Letters: D hidden size, F feed-forward size, V vocabulary, T tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Final, Literal

from psyche_node.planning.shape import ModelShape

CHUNK_LOGITS: Final = 1 << 22  # training.loss.CHUNK_LOGITS; a test compares, as torch is not needed here
BLOCK: Final = 4096
GRADIENT: Final = 4
"""Bytes of a sum of gradients, which is in fp32 whatever the weights are in."""
SCRATCH: Final = 2048 * BLOCK * 32
"""What the optimizer needs beside its state at most: on a GPU it works on 2,048 blocks at a time."""
CONTEXT: Final = 1 << 30
"""CUDA context, cuBLAS workspaces and kernels: about 1 GiB on current drivers."""
NCCL: Final = 1 << 30
"""Buffers of NCCL's channels, where a site has several GPUs."""
SPARE: Final = 0.05
"""Share of the memory that fragmentation may take."""

Compute = Literal["fp32", "autocast", "bf16"]
"""How the forward pass computes. fp32: a CPU. autocast: fp32 weights, multiplied in bf16, and an fp32 residual stream:
one GPU, or tensor parallelism alone. bf16: weights are gathered in bf16, and so is everything else: FSDP2."""


Attention = Literal["lengths", "mask", "scores"]


@dataclass(frozen=True, slots=True)
class Work:
    """How one GPU trains: ``data_parallel`` x ``tensor_parallel`` GPUs hold the model.

    ``weight_bytes``: 4, or 2 for bf16 weights, of which the optimizer keeps fp32 masters unless ``masters`` is False
    (stochastic rounding). ``attention`` takes the documents' lengths, or a mask, which is kept per layer, as on a CPU;
    or it keeps the scores of all pairs of tokens, as the eager one does. ``z_loss``: whether there is one.
    """

    sequence: int
    micro_batch: int = 1
    data_parallel: int = 1
    tensor_parallel: int = 1
    compute: Compute = "autocast"
    checkpointing: bool = False
    lookahead: bool = True
    weight_bytes: int = 4
    micro_batches: int = 2
    attention: Attention = "lengths"
    masters: bool = True
    z_loss: bool = False

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the peak of a step."""

    weights: int
    gradients: int
    momentum: int
    trend: int
    aside: int
    activations: int
    head: int
    gathered: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


def memory(shape: ModelShape, work: Work, *, outside: int | None = None, scratch: int = SCRATCH) -> Memory:
    """Bytes at the peak. ``outside`` replaces the estimate of what CUDA and NCCL take."""
    held = _held(shape, work)
    blocks = ceil(held / BLOCK) * BLOCK
    several = work.data_parallel * work.tensor_parallel > 1
    state = Memory(
        weights=held * work.weight_bytes + (4 * held if work.weight_bytes == 2 and work.masters else 0),
        gradients=0,
        momentum=4 * blocks,
        trend=2 * blocks,
        aside=held * work.weight_bytes if work.lookahead and not (work.weight_bytes == 2 and work.masters) else 0,
        activations=0,
        head=0,
        gathered=0,
        workspace=CONTEXT + NCCL * several if outside is None else outside,
    )
    moments = [replace(state, **moment) for moment in _moments(shape, work, held)]
    moments.append(replace(state, gradients=held * GRADIENT, workspace=state.workspace + scratch))
    return max(moments, key=lambda one: one.total)


def _held(shape: ModelShape, work: Work) -> int:
    """Parameters on the fullest GPU: matrices are cut by tensor parallelism, and everything along its rows by FSDP2."""
    total = 0
    for _, tensor in shape.tensors:
        rows, rest = tensor[0], prod(tensor[1:])
        if len(tensor) > 1:
            # Whichever dimension is cut, the count is the same up to a row.
            rows = ceil(rows / work.tensor_parallel)
        total += ceil(rows / work.data_parallel) * rest
    return total


def _moments(shape: ModelShape, work: Work, held: int) -> list[dict[str, int]]:
    """The moments of a step that can be its peak."""
    c, s = _widths(work)
    several = work.data_parallel * work.tensor_parallel
    # Sums of gradients are in fp32, those of bf16 weights from the start; what autograd makes is in the weights' type.
    weight = work.weight_bytes
    gradient = held * GRADIENT
    before = gradient if work.micro_batches > 1 or weight < GRADIENT else 0
    layer = layer_bytes(shape, work)
    kept = s * shape.hidden * work.tokens if work.checkpointing else layer
    ends, last_norm = _ends(work, shape), work.tokens * ((8 if s == 4 else 6) * shape.hidden + 4)
    stack = shape.layers * kept + ends
    table = ceil(shape.vocabulary / work.tensor_parallel) * shape.hidden
    forward_copies, backward_copies = _copies(shape, work, table)
    # The loss makes its gradients in the forward pass, and multiplies them by 1/tokens going backward. From full logits
    # they are all made going backward.
    going_forward, going_backward = (_chunked_loss if shape.loss == "chunked" else _full_loss)(shape, work, table)
    copies = forward_copies if shape.loss == "chunked" else backward_copies
    # Inside of a layer, gradients of the gate's two factors are made before what they came from is freed; and those of
    # attention's scores, in fp32, when the feed-forward is through.
    feed_forward = work.tokens * c * shape.intermediate // work.tensor_parallel
    scores = 8 * _scores(shape, work) - 4 * feed_forward
    inside = (layer if work.checkpointing else 0) + max(2 * feed_forward, scores)
    of_table, of_layer = (weight * n for n in (table, shape.layer_parameters // several))
    first = before or of_table
    last = before or gradient - of_layer - (0 if shape.tied else of_table)
    return [
        {"gradients": before, "activations": stack + last_norm, "head": going_forward, "gathered": copies},
        {"gradients": before, "activations": stack + last_norm, "head": going_backward, "gathered": backward_copies},
        {"gradients": first, "activations": stack + inside, "head": 0, "gathered": backward_copies},
        {"gradients": last, "activations": ends + kept + inside, "head": 0, "gathered": backward_copies},
    ]


def _widths(work: Work) -> tuple[int, int]:
    """Bytes of a number in the matrix units (c), and of one in the residual stream (s)."""
    return 4 if work.compute == "fp32" else 2, 2 if work.compute == "bf16" else 4


def _chunked_loss(shape: ModelShape, work: Work, table: int) -> tuple[int, int]:
    """Of `training.loss`, going forward and backward. ``table``: numbers of the head's matrix that are here."""
    c, s = _widths(work)
    hidden = work.tokens * shape.hidden
    chunk = min(CHUNK_LOGITS, work.tokens * table // shape.hidden)
    # Gradients: fp32 for the matrix, beside logits of a chunk. Autocast has cast hidden states and matrix for it.
    cast = c if work.compute == "autocast" else 0
    forward = (s + cast + c) * hidden + (4 + c + cast) * table + (4 if c == 4 else 6) * chunk
    # They are multiplied into new tensors, and cast to the matrix's type.
    return forward, 2 * c * hidden + (8 + (c if c != 4 else 0)) * table


def _full_loss(shape: ModelShape, work: Work, table: int) -> tuple[int, int]:
    """Of a loss from all logits of a micro-batch, which every rank has whole: two moments of going backward.

    First the cross-entropy's: the logarithms of the probabilities, their gradients, and those of the logits, all fp32,
    and where the logits are capped what the cap has kept; with a z-loss also the logits, which it keeps for itself, and
    its own gradients of them. Then the head's product.
    """
    c, s = _widths(work)
    hidden, logits = work.tokens * shape.hidden, work.tokens * shape.vocabulary
    cast = c if work.compute == "autocast" else 0
    entropy = s * hidden + cast * table + (12 + (c if shape.loss == "capped" else 0) + 8 * work.z_loss) * logits
    return entropy, (s + 2 * c) * hidden + (c + cast + (4 if c != 4 else 0)) * table + c * logits


def layer_bytes(shape: ModelShape, work: Work) -> int:
    """What autograd keeps of one decoder layer.

    A norm keeps its input and the normalized values, in the types that transformers computes them in, and a number per
    row; a matrix its input; attention queries, keys, values, output and a number per head; the gate its four factors.
    Under autocast every matrix casts its input for itself: three copies for attention, two for the feed-forward.
    """
    D, tensor = shape.hidden, work.tensor_parallel
    queries = shape.heads * shape.head_dim // tensor
    keys = shape.kv_heads * shape.head_dim // (tensor if shape.kv_heads >= tensor else 1)
    F = shape.intermediate // tensor
    c, _ = _widths(work)
    exact = c == 4 or work.compute == "autocast" or shape.exact_norms
    norms = shape.norms * ((8 if exact else 6) * D + 4) + ((3 + 2) if work.compute == "autocast" else 2) * c * D
    heads = shape.heads // tensor
    attention = 2 * c * queries + 4 * heads + 2 * c * keys
    if work.attention != "lengths":
        attention += 2 * c * (queries - keys)  # keys and values are repeated for every query head
    if work.attention == "mask":
        attention += c * work.sequence
    if shape.head_norms:
        attention += (8 if c == 4 else 6) * (queries + keys) + 4 * (heads + keys // shape.head_dim)
    # Of scores, the cap's and the softmax's results; the latter in fp32, and as they are multiplied.
    per_score = (c if shape.capped_scores else 0) + 4 + (c if c != 4 else 0)
    return work.tokens * (norms + attention + 4 * c * F) + per_score * _scores(shape, work)


def _scores(shape: ModelShape, work: Work) -> int:
    """Pairs of tokens that attention keeps numbers of."""
    kept = shape.heads // work.tensor_parallel * work.sequence * work.tokens
    return kept if work.attention == "scores" else 0


def _ends(work: Work, shape: ModelShape) -> int:
    """What is kept outside of the layers: tokens, places, marks, angles, mask."""
    c, _ = _widths(work)
    mask = shape.masks * work.sequence * {"lengths": 0, "mask": 1, "scores": c}[work.attention]
    return work.tokens * (3 * 8 + 2 * 4 * shape.head_dim + mask)


def _copies(shape: ModelShape, work: Work, table: int) -> tuple[int, int]:
    """Copies of weights for computing, going forward and going backward.

    FSDP2 has two layers in flight in bf16, and going backward their gradients, which are summed in fp32; and the root's
    embedding and head. Autocast keeps a bf16 copy of every matrix that was multiplied until its graph is gone: with
    checkpointing, until the forward pass is over.
    """
    of_layer = shape.layer_parameters // work.tensor_parallel
    if work.data_parallel > 1:
        root = 2 * (1 if shape.tied else 2) * table
        return 2 * 2 * of_layer + root, 2 * (2 + 4) * of_layer + root
    if work.compute != "autocast":
        return 0, 0
    copies = 2 * shape.layers * of_layer
    return copies, 2 * of_layer if work.checkpointing else copies
