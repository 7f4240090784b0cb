"""Cross-entropy at the trained places only, in chunks: the full logits never exist.

With tensor parallelism every rank has the logits of some words, and three numbers a place are exchanged (Shoeybi et al.
2019, arXiv 1909.08053, section 3).

Legend: T trained places, C places of a chunk, D hidden size, V words of the vocabulary whose logits are made here.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_node.training.exchanges import all_reduce

CHUNK_LOGITS = 1 << 22
"""Logits that exist at once (16 MiB in fp32)."""


class VocabularyCut(Protocol):
    """The words of the vocabulary that are here: ``length`` from ``first`` on; ``group`` has all of them.

    No rank of it has more than ``longest``.
    """

    @property
    def group(self) -> dist.ProcessGroup: ...
    @property
    def first(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def longest(self) -> int: ...


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy; gradients are made chunk by chunk in the forward pass, while the logits are there.

    The gradients are those of the cross-entropy and the z-loss.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float, cut: VocabularyCut | None
    ) -> Tensor:
        # Ranks exchange numbers chunk by chunk: by the longest part, all have as many.
        rows = max(1, CHUNK_LOGITS // (weight_VD.shape[0] if cut is None else cut.longest))
        wanted = any(ctx.needs_input_grad)
        # The loss stays in fp32 whatever the matrix units compute in.
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        hidden_grad_TD = torch.empty_like(hidden_TD) if wanted else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        for start in range(0, hidden_TD.shape[0], rows):
            hidden_CD, targets_C1 = hidden_TD[start : start + rows], targets_T[start : start + rows, None]
            logits_CV = (hidden_CD @ weight_VD.T).float()
            if cut is None:
                here_C1 = None
                normalizer_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
                picked_C1 = logits_CV.gather(1, targets_C1)
            else:
                targets_C1 = targets_C1 - cut.first
                here_C1 = (targets_C1 >= 0) & (targets_C1 < cut.length)
                targets_C1 = targets_C1.masked_fill(~here_C1, 0)
                normalizer_C1, picked_C1 = _over_all_words(logits_CV, targets_C1, here_C1, cut)
            total += (normalizer_C1 - picked_C1).sum()
            if hidden_grad_TD is not None and weight_grad_VD is not None:
                grad_CV = logits_CV.sub_(normalizer_C1).exp_()
                if z_loss:
                    grad_CV.mul_(1 + 2 * z_loss * normalizer_C1)
                minus_C1 = grad_CV.new_full(targets_C1.shape, -1.0) if here_C1 is None else -here_C1.float()
                grad_CV.scatter_add_(1, targets_C1, minus_C1)
                grad_CV = grad_CV.to(hidden_TD.dtype)
                hidden_grad_TD[start : start + rows] = grad_CV @ weight_VD
                weight_grad_VD += grad_CV.T @ hidden_CD
        if cut is not None and hidden_grad_TD is not None:
            all_reduce(hidden_grad_TD, cut.group)
        ctx.save_for_backward(hidden_grad_TD, weight_grad_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad_TD, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_TD * grads[0], weight_grad_VD * grads[0], None, None, None


def _over_all_words(
    logits_CV: Tensor, targets_C1: Tensor, here_C1: Tensor, cut: VocabularyCut
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum of exponentials, and the target's logit, over the words of all ranks."""
    most_C1 = logits_CV.amax(dim=1, keepdim=True)
    all_reduce(most_C1, cut.group, dist.ReduceOp.MAX)
    sums_C2 = torch.cat(
        [(logits_CV - most_C1).exp().sum(dim=1, keepdim=True), logits_CV.gather(1, targets_C1) * here_C1], dim=1
    )
    all_reduce(sums_C2, cut.group)
    return most_C1 + sums_C2[:, :1].log(), sums_C2[:, 1:]


def cross_entropy_sum(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float = 0.0, cut: VocabularyCut | None = None
) -> Tensor:
    """Return the sum of the cross-entropy of ``targets_T`` under the logits ``hidden_TD @ weight_VD.T``: a fp32 scalar.

    Differentiable in the first two. With a ``z_loss`` the gradient is that of the sum over the places of cross-entropy
    plus ``z_loss`` * log(Z)^2, Z being the sum of the exponentials of a place's logits (Chowdhery et al. 2022, PaLM,
    section 5); the value stays the cross-entropy, by which losses are compared. With a ``cut``, ``weight_VD`` are the
    rows that are here; hidden states, targets and the sum are the same on all ranks of its group, which call this
    together. Memory beyond the arguments: their
    gradients and ``CHUNK_LOGITS`` logits.
    """
    if torch.is_autocast_enabled(hidden_TD.device.type):
        compute = torch.get_autocast_dtype(hidden_TD.device.type)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            total: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden_TD.to(compute), weight_VD.to(compute), targets_T, z_loss, cut
            )
            return total
    result: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, z_loss, cut)  # type: ignore[no-untyped-call]
    return result
