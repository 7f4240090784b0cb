"""The weights that steps are made on: fp32 parameters themselves, fp32 masters of 16-bit ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optimizer.errors import OptimizerError
from optimizer.sharding import is_sharded, local


class Weights:
    """What this process holds of all trained parameters, in the order of the layout.

    Args:
        parameters: by name, in the order of the layout; contiguous, fp32 or 16 bits, plain or DTensors.
        masters: keep fp32 masters of 16-bit parameters. Without them, 16 bits are all there is.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masters: bool) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        held = [local(p) for p in self.parameters]
        self._born = [(p.dtype, p.shape, p.device) for p in held]
        self._masters = [None if not masters or p.dtype == torch.float32 else p.detach().float() for p in held]
        self._aside: list[Tensor] = []

    def held(self) -> list[Tensor]:
        """What is here of each parameter, without a graph. Asked for anew: FSDP2 moves its shards to other memory.

        Raises OptimizerError if a parameter was converted.
        """
        held = [local(p) if is_sharded(p) else p.detach() for p in self.parameters]
        for name, tensor, born in zip(self.names, held, self._born, strict=True):
            if (tensor.dtype, tensor.shape, tensor.device) != born or not tensor.is_contiguous():
                raise OptimizerError(
                    f"{name} was {born[0]} {tuple(born[1])} on {born[2]} and contiguous; it is now {tensor.dtype} "
                    f"{tuple(tensor.shape)} on {tensor.device}: convert the model before making the optimizer; "
                    "now load a checkpoint, for converting back does not bring lost bits back"
                )
        return held

    def stepped(self) -> list[Tensor]:
        """The tensors that a step changes: the masters where there are some, else what is held."""
        return [w if m is None else m for w, m in zip(self.held(), self._masters, strict=True)]

    def set_aside(self) -> list[Tensor]:
        """Copies of the weights, in memory that is allocated once; masters are copies as they are."""
        held = self.held()
        if not self._aside:
            self._aside = [torch.empty_like(w) if m is None else m for w, m in zip(held, self._masters, strict=True)]
        for copy, weights, master in zip(self._aside, held, self._masters, strict=True):
            if master is None:
                copy.copy_(weights)
        return self._aside

    def show_masters(self) -> None:
        """Round the masters into their parameters."""
        self.show(self._masters)

    @torch.no_grad()
    def show(self, weights: Sequence[Tensor | None]) -> None:
        """Let the parameters hold these weights, rounded to their type; None leaves one alone."""
        for parameter, held in zip(self.held(), weights, strict=True):
            if held is not None:
                parameter.copy_(held)

    def masters(self) -> dict[str, Tensor]:
        """The masters by name: the part of the weights that parameters do not hold."""
        return {name: m for name, m in zip(self.names, self._masters, strict=True) if m is not None}

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor]) -> None:
        """Take over masters as `masters` returned them, and show them."""
        for name, master in self.masters().items():
            master.copy_(masters[name])
        self.show_masters()
