"""The forward pass over packed documents: the one place that calls the model for training.

transformers separates packed documents by ``position_ids`` only if there is no attention mask and no cache; with
either, documents see each other, and nothing says so. Hence this module, and the test in ``separation.py``.

Legend: B sequences, L places, D hidden size, T trained places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from psyche_node.planning.shape import CHANGES_LOGITS
from psyche_node.training.attention import lays_end_to_end
from psyche_node.training.errors import ModelError
from psyche_node.training.loss import VocabularyCut, cross_entropy_sum

T = TypeVar("T")


class Root(nn.Module):
    """What is called for every forward pass. It runs a job on the model it holds.

    FSDP2 gathers weights when a module is called. So whatever reads some outside of the decoder's layers, as the loss
    does, has to run in the forward pass of a module that has them: this one, which FSDP2 takes as its root.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, job: Callable[..., T], *arguments: Any) -> T:
        return job(self.model, *arguments)


def hidden_states(model: nn.Module, tokens_BL: Tensor, places_BL: Tensor) -> Tensor:
    """Return the last hidden states (B, L, D), documents separated by the restarts of ``places_BL``."""
    return _called(model, cast(Any, model).base_model, "last_hidden_state", tokens_BL, places_BL)


def logits(model: nn.Module, tokens_BL: Tensor, places_BL: Tensor) -> Tensor:
    """Return the logits (B, L, V), documents separated. For tests and for models whose head is not one matrix."""
    return _called(model, model, "logits", tokens_BL, places_BL)


def _called(model: nn.Module, module: nn.Module, what: str, tokens_BL: Tensor, places_BL: Tensor) -> Tensor:
    shape = tokens_BL.shape
    if lays_end_to_end(model):
        tokens_BL, places_BL = tokens_BL.reshape(1, -1), places_BL.reshape(1, -1)
    output = module(input_ids=tokens_BL, position_ids=places_BL, attention_mask=None, use_cache=False)
    found: Tensor = getattr(output, what)
    return found.reshape(*shape, found.shape[-1])


class LossFunction:
    """The sum of the loss over the trained places of packed sequences.

    Where the model's logits are its last hidden states times one matrix, only the hidden states at trained places are
    multiplied, in chunks. Whether they are is tried out here, on a few tokens; a model that scales, caps or biases its
    logits takes the long way. ``z_loss``: see ``cross_entropy_sum``. ``root``: what holds the model, if sharded.
    Raises ModelError if the model has no decoder to ask for hidden states.
    """

    def __init__(self, model: nn.Module, z_loss: float = 0.0, root: Root | None = None) -> None:
        self._root, self._z_loss = root or Root(model), z_loss
        self._short = bool(self._root(_logits_are_one_product))
        self.reason = (
            "loss from hidden states at trained places only, in chunks"
            if self._short
            else "loss from full logits: this model's logits are not its hidden states times one matrix"
        )

    @property
    def model(self) -> nn.Module:
        return self._root.model

    def __call__(self, tokens_BL: Tensor, trained_BL: Tensor, places_BL: Tensor) -> Tensor:
        """Return the sum (a fp32 scalar, differentiable) over the places that ``trained_BL`` marks as targets."""
        job = _loss_sum if self._short else _loss_sum_of_logits
        return cast(Tensor, self._root(job, tokens_BL, trained_BL, places_BL, self._z_loss))

    def logits(self, tokens_BL: Tensor, places_BL: Tensor) -> Tensor:
        """See ``logits``."""
        return cast(Tensor, self._root(logits, tokens_BL, places_BL))


def _loss_sum(model: nn.Module, tokens_BL: Tensor, trained_BL: Tensor, places_BL: Tensor, z_loss: float) -> Tensor:
    predicts_BL = trained_BL[:, 1:]
    hidden_TD = hidden_states(model, tokens_BL, places_BL)[:, :-1][predicts_BL]
    # Read at each call: FSDP2 and the optimizer's lookahead put other data behind the parameter.
    head = cast(Any, model).get_output_embeddings()
    cut = _cut(head)
    weight = head.weight if cut is None else head.weight.to_local()
    return cross_entropy_sum(hidden_TD, weight, tokens_BL[:, 1:][predicts_BL], z_loss, cut)


def _loss_sum_of_logits(
    model: nn.Module, tokens_BL: Tensor, trained_BL: Tensor, places_BL: Tensor, z_loss: float
) -> Tensor:
    predicts_BL = trained_BL[:, 1:]
    logits_TV = logits(model, tokens_BL, places_BL)[:, :-1][predicts_BL].float()
    total = functional.cross_entropy(logits_TV, tokens_BL[:, 1:][predicts_BL], reduction="sum")
    if z_loss:
        penalty = z_loss * logits_TV.logsumexp(dim=1).square().sum()
        total = total + penalty - penalty.detach()
    return total


def _cut(head: nn.Module) -> VocabularyCut | None:
    """The part of the vocabulary whose rows are here, if tensor parallelism has cut the head."""
    return cast(VocabularyCut | None, getattr(head, "cut", None))


@torch.no_grad()
def _logits_are_one_product(model: nn.Module) -> bool:
    head = cast(Any, model).get_output_embeddings()
    if not (isinstance(head, nn.Linear) or _cut(head)) or head.bias is not None:
        return False
    # A cap shows on large logits only, which a model that is not trained has not.
    config = cast(Any, model).config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1.0) for name in CHANGES_LOGITS):
        return False
    tokens_BL = (torch.arange(8, device=head.weight.device) % head.weight.shape[0])[None]
    places_BL = torch.arange(8, device=head.weight.device)[None]
    try:
        short = head(hidden_states(model, tokens_BL, places_BL))
    except AttributeError as error:
        raise ModelError(
            f"transformers' {type(model).__name__} does not say which part of it is the decoder that returns hidden "
            f"states ({error}). Use another kind of model"
        ) from error
    whole = logits(model, tokens_BL, places_BL)
    return short.shape == whole.shape and torch.allclose(short, whole, rtol=1e-4, atol=1e-5)
