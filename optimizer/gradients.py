"""The gradients of one round as an update needs them: here, placed like their parameters, and finite."""

import torch
from torch import Tensor

from optimizer.errors import NonFiniteGradient
from optimizer.layout import LayoutError
from optimizer.sharding import Site, local
from optimizer.weights import Weights

# Euclidean norm of a tensor's gradient: the transform and the sums of squares of a larger one could overflow fp32.
_LARGEST_GRADIENT = 1e18


def local_gradients(weights: Weights, site: Site) -> list[Tensor | None]:
    """Return what is here of each gradient, None where there is none. Collective: all processes raise, or none.

    Those of DTensors are brought to the placements of their parameters. Raises NonFiniteGradient, and LayoutError for
    one that is sparse or not shaped as its parameter.
    """
    gradients: list[Tensor | None] = []
    misplaced: LayoutError | None = None
    for name, parameter in zip(weights.names, weights.parameters, strict=True):
        gradient = parameter.grad
        try:
            if gradient is not None and gradient.layout != torch.strided:
                raise LayoutError(f"the gradient of {name} is sparse; make its layer with sparse=False")
            gradients.append(None if gradient is None else local(gradient, like=parameter).contiguous())
        except LayoutError as error:
            misplaced = error
    if not site.all(misplaced is None):
        raise misplaced or LayoutError("a gradient on another process of this site is sparse or not of the right shape")
    filled = {name: g for name, g in zip(weights.names, gradients, strict=True) if g is not None and g.numel()}
    # Of the norms this one is several times as fast as the maximum, and not finite either if a value is not.
    norms = torch._foreach_norm(list(filled.values()), 2.0, torch.float32) if filled else []
    largest = [float(norm) for norm in torch.stack(list(norms)).tolist()] if norms else []
    if not site.all(all(value < _LARGEST_GRADIENT for value in largest)):
        bad = [name for name, value in zip(filled, largest, strict=True) if not value < _LARGEST_GRADIENT]
        raise NonFiniteGradient(
            f"the gradient of {bad[0] if bad else 'a parameter on another process'} is not finite (or above "
            f"{_LARGEST_GRADIENT:g}); leave this round out, and look at its data and learning rate"
        )
    return gradients
