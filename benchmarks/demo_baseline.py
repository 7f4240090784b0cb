"""A straightforward DeMo step, written from the paper (arXiv 2411.19870, algorithm 1) for comparison in benchmarks.

Per tensor: momentum += gradient; a two-dimensional DCT of chunks of at most 64x64 values by einsum; the topk of each
chunk; what was sent is transformed back and subtracted; the messages of all members are averaged over those who sent a
coefficient, transformed back, and the weights step by its sign. Messages of the other members are copies of the own one
with their indices shifted, so that they cost what real ones cost.

Legend: Y X chunks along rows and columns, H W values of a chunk, K kept coefficients.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


class DeMoStep:
    """One member's optimizer state; `step` does everything but the transport."""

    def __init__(
        self, parameters: Sequence[Tensor], *, lr: float, topk: int, members: int, decay: float = 0.999, chunk: int = 64
    ) -> None:
        self._parameters, self._lr, self._topk, self._members, self._decay = parameters, lr, topk, members, decay
        self._momenta = [torch.zeros_like(p) for p in parameters]
        self._sides = [tuple(_divisor(length, chunk) for length in p.shape) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, momentum, sides in zip(self._parameters, self._momenta, self._sides, strict=True):
            momentum.mul_(self._decay).add_(parameter.grad, alpha=self._lr)
            coefficients = _forward(momentum, sides)
            flat = coefficients.reshape(-1, math.prod(sides))
            indices = flat.abs().topk(min(self._topk, flat.shape[1]), dim=1, sorted=False).indices
            values = flat.gather(1, indices)
            sent = torch.zeros_like(flat).scatter_(1, indices, values).view_as(coefficients)
            momentum.sub_(_backward(sent, sides, parameter.shape))
            received = [(indices + member) % flat.shape[1] for member in range(self._members)]
            mean = torch.zeros_like(flat).scatter_reduce_(
                1, torch.cat(received, 1), torch.cat([values] * self._members, 1), "mean", include_self=False
            )
            parameter.add_(_backward(mean.view_as(coefficients), sides, parameter.shape).sign_(), alpha=-self._lr)


def _forward(values: Tensor, sides: tuple[int, ...]) -> Tensor:
    if values.ndim == 1:
        return torch.einsum("xw,wv->xv", values.view(-1, sides[0]), _dct(sides[0], values.device))
    height, width = sides
    chunks_YHXW = values.view(values.shape[0] // height, height, values.shape[1] // width, width)
    return torch.einsum("yhxw,hu,wv->yxuv", chunks_YHXW, _dct(height, values.device), _dct(width, values.device))


def _backward(coefficients: Tensor, sides: tuple[int, ...], shape: torch.Size) -> Tensor:
    if len(sides) == 1:
        return torch.einsum("xv,wv->xw", coefficients, _dct(sides[0], coefficients.device)).reshape(shape)
    height, width = (_dct(side, coefficients.device) for side in sides)
    return torch.einsum("yxuv,hu,wv->yhxw", coefficients, height, width).reshape(shape)


def _divisor(length: int, most: int) -> int:
    return next(side for side in range(min(length, most), 0, -1) if length % side == 0)


@cache
def _dct(size: int, device: torch.device) -> Tensor:
    """Orthonormal DCT-II as a matrix (values, coefficients)."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (places[:, None] + 0.5) * places) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix.float().to(device)
