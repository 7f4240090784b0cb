"""Parameter groups and their rates, as torch's schedulers or the terms of a run set them."""

from collections.abc import Sequence
from typing import Any

import torch

from optimizer.errors import OptimizerError
from optimizer.rates import kept_share, rate

Rates = int | float | Sequence[int | float]


class Groups(torch.optim.Optimizer):
    """A torch optimizer whose groups are fixed once it is made, each with a "lr" and a "weight_decay"."""

    _complete = False

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: the layout is part of what members agree on."""
        if self._complete:
            raise OptimizerError("the layout is fixed; give all parameter groups to the constructor")
        super().add_param_group(param_group)

    @property
    def lr(self) -> list[float]:
        """The learning rate of each group as fp32. What `apply` needs a round later, with overlap."""
        return [rate(float(group["lr"])) for group in self.param_groups]

    def set_lr(self, lr: Rates) -> None:
        """Set the rate used by lookahead and momentum from now on: an fp32 bit pattern (int) or a number (float).

        One for all groups, or a sequence with one for each.
        """
        for group, value in zip(self.param_groups, self._per_group(lr), strict=True):
            group["lr"] = value

    def _per_group(self, lr: Rates) -> list[float]:
        groups = len(self.param_groups)
        values = list(lr) if isinstance(lr, Sequence) else [lr] * groups
        if len(values) != groups:
            raise ValueError(f"{len(values)} learning rates for {groups} parameter groups; give one, or one for each")
        return [rate(value) for value in values]

    def _shares(self, rates: Sequence[float]) -> list[float]:
        """What weight decay at these rates leaves of the weights of each group."""
        decays = [rate(float(group["weight_decay"]), "weight decay") for group in self.param_groups]
        return list(map(kept_share, rates, decays))
