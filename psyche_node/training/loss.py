"""Cross-entropy at the trained places only, in chunks: the full logits never exist.

Legend: T trained places, C places of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 22
"""Logits that exist at once (16 MiB in fp32)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy; gradients are made chunk by chunk in the forward pass, while the logits are there.

    The gradients are those of the cross-entropy and the z-loss.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float) -> Tensor:
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        wanted = any(ctx.needs_input_grad)
        # The loss stays in fp32 whatever the matrix units compute in.
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        hidden_grad_TD = torch.empty_like(hidden_TD) if wanted else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        for start in range(0, hidden_TD.shape[0], rows):
            hidden_CD, targets_C1 = hidden_TD[start : start + rows], targets_T[start : start + rows, None]
            logits_CV = (hidden_CD @ weight_VD.T).float()
            normalizer_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
            total += (normalizer_C1 - logits_CV.gather(1, targets_C1)).sum()
            if hidden_grad_TD is not None and weight_grad_VD is not None:
                grad_CV = logits_CV.sub_(normalizer_C1).exp_()
                if z_loss:
                    grad_CV.mul_(1 + 2 * z_loss * normalizer_C1)
                grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, -1.0))
                grad_CV = grad_CV.to(hidden_TD.dtype)
                hidden_grad_TD[start : start + rows] = grad_CV @ weight_VD
                weight_grad_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(hidden_grad_TD, weight_grad_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad_TD, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_TD * grads[0], weight_grad_VD * grads[0], None, None


def cross_entropy_sum(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the sum of the cross-entropy of ``targets_T`` under the logits ``hidden_TD @ weight_VD.T``: a fp32 scalar.

    Differentiable in the first two. With a ``z_loss`` the gradient is that of the sum over the places of cross-entropy
    plus ``z_loss`` * log(Z)^2, Z being the sum of the exponentials of a place's logits (Chowdhery et al. 2022, PaLM,
    section 5); the value stays the cross-entropy, by which losses are compared. Memory beyond the arguments: their
    gradients and ``CHUNK_LOGITS`` logits.
    """
    if torch.is_autocast_enabled(hidden_TD.device.type):
        compute = torch.get_autocast_dtype(hidden_TD.device.type)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            total: Tensor = _ChunkedCrossEntropy.apply(hidden_TD.to(compute), weight_VD.to(compute), targets_T, z_loss)  # type: ignore[no-untyped-call]
            return total
    result: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, z_loss)  # type: ignore[no-untyped-call]
    return result
