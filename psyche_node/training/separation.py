"""The start-up test that logits depend on what they may only, on the very model and device that will train.

It changes one document of a pack and requires the logits of the others not to move; then only the places of that
document, since some rotary frequencies follow the longest document of a micro-batch; then the last tokens of documents,
which the logits before them must not see, or training would learn to read the answer. A test that cannot fail proves
nothing, so the first change is also made with the documents joined into one, where the logits *must* move.

Legend: B sequences (two, of which one is changed), L places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_node.training.errors import SeparationError

Forward = Callable[[Tensor, Tensor], Tensor]
"""(tokens_BL, places_BL) -> logits_BLV"""

_LENGTHS = (19, 23, 17)
_CHANGED = 0
# What a different order of summation could move, relative to the largest logit. Masked attention adds exact zeros.
_TOLERANCE = 1e-5
# How much more than rounding does, and how little of what seeing each other does, rounding may account for.
_ROUNDING, _SEEN = 4.0, 0.05
# Tokens at the end of documents that earlier ones must not see.
_LAST = 5


@torch.no_grad()
def check_separation(
    forward: Forward, vocabulary: int, device: torch.device, length: int, mixture: bool = False
) -> str:
    """Return a line saying what was found.

    Args:
        length: tokens of the sequences that will be trained.
        mixture: of experts. How many tokens an expert gets decides by which kernel they are multiplied, and so how they
            are rounded: a token's logits depend on its company without anybody seeing anybody. How much is measured on
            a sequence alone and beside another.

    Raises:
        SeparationError: changing one document, or how far its places reach, moved the logits of another; a document's
            last tokens moved those before them; or they are moved by chance.
    """
    return _verdict(_measured(forward, vocabulary, device, length, mixture), length)


@dataclass(frozen=True, slots=True)
class _Moved:
    """How far logits moved, relative to the largest one."""

    leak: float
    """Those of other documents, when one changed."""
    control: float
    """The same where they are joined, and do see each other."""
    reach: float
    """Those of other documents, when one reached further."""
    ahead: float
    """Those before the last tokens of a document, when these changed."""
    rounding: float
    """Those of a sequence in other company; of a mixture only."""
    chance: float
    """All of them, when nothing changed."""


def _measured(forward: Forward, vocabulary: int, device: torch.device, length: int, mixture: bool) -> _Moved:
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(vocabulary, (2, sum(_LENGTHS)), generator=generator)
    first, last = _LENGTHS[_CHANGED], _LENGTHS[-1]
    other = (tokens + 1 + torch.arange(sum(_LENGTHS))) % vocabulary
    changed, ending, far = tokens.clone(), tokens.clone(), torch.cat([torch.arange(n) for n in _LENGTHS]).repeat(2, 1)
    separate, joined = far.clone(), torch.arange(sum(_LENGTHS)).repeat(2, 1)
    changed[0, :first] = other[0, :first]
    ending[:, -_LAST:] = other[:, -_LAST:]
    far[0, 1:first] += max(0, length - first)  # it still begins at 0, by which some kernels know documents

    def found(tokens: Tensor, places: Tensor) -> Tensor:
        return forward(tokens.to(device), places.to(device)).float()

    def others(logits: Tensor) -> Tensor:
        # Whether rows of a batch see each other is asked along with it.
        return torch.cat([logits[0, first:], logits[1]])

    def moved(before: Tensor, after: Tensor) -> float:
        return float((before - after).abs().max()) / max(float(before.abs().max()), 1e-30)

    whole = found(tokens, separate)
    return _Moved(
        leak=moved(others(whole), others(found(changed, separate))),
        control=moved(others(found(tokens, joined)), others(found(changed, joined))),
        reach=moved(others(whole), others(found(tokens, far))),
        ahead=moved(whole[:, -last:-_LAST], found(ending, separate)[:, -last:-_LAST]),
        rounding=moved(found(tokens[1:], separate[1:])[0], whole[1]) if mixture else 0.0,
        chance=moved(whole, found(tokens, separate)),  # in any case: ranks that disagreed would wait for each other
    )


def _verdict(by: _Moved, length: int) -> str:
    """What ``check_separation`` returns or raises."""
    most = max(_TOLERANCE, min(_ROUNDING * by.rounding, _SEEN * by.control))
    if by.leak > most and by.chance > _TOLERANCE:
        raise SeparationError(
            f"the same tokens have other logits each time, by {by.chance:.1e} of the largest one: this model draws "
            "lots while it trains, so that nothing can be said of packed documents. Set what does it to 0 in "
            "config.json (such as router_jitter_noise), or use another kind of model"
        )
    if by.leak > most:
        raise SeparationError(
            f"changing one document of a pack moved the logits of the others by {by.leak:.1e} of the largest one, so "
            "packed documents see each other on this model and device, and training would teach it unrelated text. "
            "Models that remember otherwise than by attention over rotary positions (Mamba, RWKV, hybrids, ALiBi, "
            "learned positions in OPT and BERT) cannot be trained on packs; with any other, set attention to sdpa, or "
            "use another version of transformers"
        )
    if by.reach > most:
        raise SeparationError(
            f"a document that reaches place {length - 1} moved the logits of the others by {by.reach:.1e} of the "
            "largest one: the rotary frequencies of this model (rope type dynamic or longrope) follow the longest "
            "document of a micro-batch. Prepare the data with a sequence length within what the model was made for "
            "(original_max_position_embeddings, or max_position_embeddings, in config.json), or give it another rope "
            "type there"
        )
    if by.ahead > most:
        raise SeparationError(
            f"changing the last tokens of a document moved the logits before them by {by.ahead:.1e} of the largest "
            "one: this model sees the tokens that it is to predict. Set is_decoder to true or "
            "use_bidirectional_attention to false in config.json, whichever it has, or use a causal language model"
        )
    if by.control <= _TOLERANCE:
        return (
            "packed documents: the separation test is blind on these weights (logits do not depend on earlier tokens), "
            "so it proves nothing; this is normal only for a model whose attention starts at zero"
        )
    rounded = f", as rounding does in a mixture of experts ({by.rounding:.0e})" if by.leak > _TOLERANCE else ""
    return (
        f"packed documents do not see each other: changing one moves the others by {by.leak:.0e}{rounded}, "
        f"joined by {by.control:.0e}"
    )
