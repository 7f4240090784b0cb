"""The forward pass over packed documents: the one place that calls the model for training.

transformers separates packed documents by ``position_ids`` only if there is no attention mask and no cache; with
either, documents see each other, and nothing says so. Hence this module, and the test in ``separation.py``.

Legend: B sequences, L places, D hidden size, T trained places, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from psyche_node.training.errors import ModelError
from psyche_node.training.loss import cross_entropy_sum


def hidden_states(model: nn.Module, tokens_BL: Tensor, places_BL: Tensor) -> Tensor:
    """Return the last hidden states (B, L, D), documents separated by the restarts of ``places_BL``."""
    decoder = cast(Any, model).base_model
    output = decoder(input_ids=tokens_BL, position_ids=places_BL, attention_mask=None, use_cache=False)
    return cast(Tensor, output.last_hidden_state)


def logits(model: nn.Module, tokens_BL: Tensor, places_BL: Tensor) -> Tensor:
    """Return the logits (B, L, V), documents separated. For tests and for models whose head is not one matrix."""
    output = cast(Any, model)(input_ids=tokens_BL, position_ids=places_BL, attention_mask=None, use_cache=False)
    return cast(Tensor, output.logits)


class LossFunction:
    """The sum of the loss over the trained places of packed sequences.

    Where the model's logits are its last hidden states times one matrix, only the hidden states at trained places are
    multiplied, in chunks. Whether they are is tried out here, on a few tokens; a model that scales, caps or biases its
    logits takes the long way. ``z_loss``: see ``cross_entropy_sum``. Raises ModelError if the model has no decoder to
    ask for hidden states.
    """

    def __init__(self, model: nn.Module, z_loss: float = 0.0) -> None:
        self._model, self._z_loss = model, z_loss
        head = cast(Any, model).get_output_embeddings()
        self._weight: Tensor | None = None
        if isinstance(head, nn.Linear) and head.bias is None and self._plain(head):
            self._weight = head.weight
        self.reason = (
            "loss from hidden states at trained places only, in chunks"
            if self._weight is not None
            else "loss from full logits: this model's logits are not its hidden states times one matrix"
        )

    def __call__(self, tokens_BL: Tensor, trained_BL: Tensor, places_BL: Tensor) -> Tensor:
        """Return the sum (a fp32 scalar, differentiable) over the places that ``trained_BL`` marks as targets."""
        predicts_BL = trained_BL[:, 1:]
        targets_T = tokens_BL[:, 1:][predicts_BL]
        if self._weight is None:
            logits_TV = logits(self._model, tokens_BL, places_BL)[:, :-1][predicts_BL].float()
            total = functional.cross_entropy(logits_TV, targets_T, reduction="sum")
            if self._z_loss:
                penalty = self._z_loss * logits_TV.logsumexp(dim=1).square().sum()
                total = total + penalty - penalty.detach()
            return total
        hidden_TD = hidden_states(self._model, tokens_BL, places_BL)[:, :-1][predicts_BL]
        # Read at each call: the optimizer's lookahead puts other data behind the parameter.
        return cross_entropy_sum(hidden_TD, self._weight, targets_T, self._z_loss)

    @torch.no_grad()
    def _plain(self, head: nn.Linear) -> bool:
        tokens_BL = (torch.arange(8, device=head.weight.device) % head.weight.shape[0])[None]
        places_BL = torch.arange(8, device=head.weight.device)[None]
        try:
            short = head(hidden_states(self._model, tokens_BL, places_BL))
        except AttributeError as error:
            raise ModelError(
                f"{type(self._model).__name__} has no decoder that returns hidden states ({error}). Use a causal "
                "language model of transformers"
            ) from error
        whole = logits(self._model, tokens_BL, places_BL)
        return short.shape == whole.shape and torch.allclose(short, whole, rtol=1e-4, atol=1e-5)
