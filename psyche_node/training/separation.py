"""The start-up test that packed documents do not see each other, on the very model and device that will train.

It changes one document of a pack and requires the logits of the others not to move. A test that cannot fail proves
nothing, so it first runs the same change with the documents joined into one and requires that the logits *do* move.

Legend: B sequences (two, of which one is changed), L places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

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


@torch.no_grad()
def check_separation(forward: Forward, vocabulary: int, device: torch.device, mixture: bool = False) -> str:
    """Return a line saying what was found.

    ``mixture``: of experts. How many tokens an expert gets decides by which kernel they are multiplied, and so how they
    are rounded: a token's logits depend on its company without anybody seeing anybody. How much is measured on a
    sequence alone and beside another.

    Raises:
        SeparationError: changing one document moved the logits of another.
    """
    length = sum(_LENGTHS)
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(vocabulary, (2, length), generator=generator)
    changed = tokens.clone()
    first = _LENGTHS[_CHANGED]
    changed[0, :first] = (tokens[0, :first] + 1 + torch.arange(first)) % vocabulary
    separate = torch.cat([torch.arange(n) for n in _LENGTHS]).repeat(2, 1)
    joined = torch.arange(length).repeat(2, 1)

    def moved(places: Tensor) -> tuple[float, float]:
        before, after = (forward(t.to(device), places.to(device)).float() for t in (tokens, changed))
        # Whether rows of a batch see each other is asked along with it.
        before, after = (torch.cat([logits[0, first:], logits[1]]) for logits in (before, after))
        scale = max(float(before.abs().max()), 1e-30)
        return float((before - after).abs().max()) / scale, scale

    control, _ = moved(joined)
    leak, scale = moved(separate)
    rounding = 0.0
    if mixture:
        beside, alone = (forward(tokens[n:].to(device), separate[n:].to(device)).float()[-1] for n in (0, 1))
        rounding = float((beside - alone).abs().max()) / scale
    if _TOLERANCE < leak <= min(_ROUNDING * rounding, _SEEN * control):
        return (
            f"packed documents do not see each other: changing one moves the others by {leak:.0e}, as rounding does in "
            f"a mixture of experts ({rounding:.0e}), joined by {control:.0e}"
        )
    if leak > _TOLERANCE:
        raise SeparationError(
            f"changing one document of a pack moved the logits of the others by {leak:.1e} of the largest one, so "
            "packed documents see each other on this model and device, and training would teach it unrelated text. "
            "Models that remember otherwise than by attention over rotary positions (Mamba, RWKV, hybrids, ALiBi, "
            "learned positions in OPT and BERT) cannot be trained on packs; with any other, set attention to sdpa, or "
            "use another version of transformers"
        )
    if control <= _TOLERANCE:
        return (
            "packed documents: the separation test is blind on these weights (logits do not depend on earlier tokens), "
            "so it proves nothing; this is normal only for a model whose attention starts at zero"
        )
    return (
        f"packed documents do not see each other: changing one moves the others by {leak:.0e}, joined by {control:.0e}"
    )
