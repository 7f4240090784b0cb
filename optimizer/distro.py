"""DisTrO as a torch optimizer: momentum in the transform domain, signed votes out, exact signed steps in.

DeMo (arXiv 2411.19870) with 1-bit votes and a Hadamard transform in place of the DCT. Per member and round, H the
orthonormal transform of 64x64 blocks, M the momentum (private), w the fp32 weights (equal on all members)::

    g  = gradient at w - lr sign(H M H)            lookahead: M still holds the own update that is travelling
    M -= own update of the round before            error feedback: signs times the block's mean kept magnitude
    M  = decay M + lr H g H
    send, per block, the indices and signs of the topk largest of M
    V  = sum of all members' signs, clipped to [-1, 1]
    w  = w (1 - lr wd) - lr sign(H V H)            exact: integers up to the last line

    optimizer = DisTrO(model.named_parameters(), lr=0.005, topk=32)
    for round in range(rounds):
        with optimizer.lookahead():
            loss(model).backward()
        blob = optimizer.encode(run=run, round=round, member=member)
        blobs, included = exchange(blob)               # any transport; the same set on every member
        optimizer.apply(blobs, lr=lr(round))
        optimizer.settle(round) if included else optimizer.restore(round)

Legend: N blocks of a slab, C = 4096 coefficients per block, K = topk of them sent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from optimizer.blocks import gather, in_blocks, in_tensor
from optimizer.codec import Header, MalformedUpdate, encode_blocks, encode_header, open_body, validate
from optimizer.errors import NonFiniteGradient, OptimizerError, UnknownRound
from optimizer.fingerprint import fingerprint
from optimizer.layout import BLOCK, SIDE, Layout, Slab
from optimizer.rates import kept_share, rate
from optimizer.transform import MOST_VOTES, invert_votes, transform
from optimizer.votes import clip_votes, select, sum_votes

# A larger gradient could overflow fp32 in the transform.
_LARGEST_GRADIENT = 1e30


@dataclass(slots=True)
class _Sent:
    """An update of this member whose fate is not known. `within`: it is still part of the momentum.

    `factor` is what decay has left of it since it was subtracted.
    """

    indices: Tensor  # (blocks, K) int16
    negative: Tensor  # (blocks, K) bool
    scale: Tensor  # (blocks, 1) fp32
    within: bool = True
    factor: float = 1.0


class DisTrO(torch.optim.Optimizer):
    """See the module's docstring.

    Args:
        named_parameters: (name, parameter) pairs, as of `model.named_parameters()`. Frozen ones are left out, a tied
            one counts once, under the name that comes first. All on one device, contiguous, fp32 or 16 bits. Of 16-bit
            parameters the optimizer keeps fp32 masters, so load weights before.
        lr: learning rate: the size of every step. Change it with `set_lr` and the argument of `apply`.
        decay: of the momentum per round. Lower it if the loss oscillates.
        topk: coefficients of 4,096 that are sent. 32: 10 bits each; 128: 8 bits each and a loss near to no compression.
        weight_decay: decoupled, of all parameters.
        overlap: the update of a round is applied one round later. Decides when the own update leaves the momentum.
        lookahead: compute gradients at the weights that the own momentum predicts. Needed with overlap.
        clip_votes: a coefficient moves one way, however many members voted for it.
        slab_blocks: blocks worked on at a time; bounds scratch memory to about 0.1 MB per block.

    Raises ValueError for arguments out of range and LayoutError for parameters that cannot be laid out.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        lr: int | float,
        decay: float = 0.999,
        topk: int = 32,
        weight_decay: float = 0.0,
        overlap: bool = True,
        lookahead: bool = True,
        clip_votes: bool = True,
        slab_blocks: int = 256,
    ) -> None:
        trained: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                trained.setdefault(id(parameter), (name, parameter))
        named = dict(trained.values())
        if len(named) < len(trained):
            raise ValueError("two different parameters have one name; every parameter needs its own")
        _check(named)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")
        if not 0.0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {weight_decay}; it must be finite and not negative")
        self.layout = Layout.build([(name, tuple(p.shape)) for name, p in named.items()], topk)
        self._parameters = [named[placement.name] for placement in self.layout.placements]
        super().__init__(self._parameters, {"lr": rate(lr)})
        self.decay, self.weight_decay = decay, weight_decay
        self._overlap, self._lookahead, self._clip = overlap, lookahead, clip_votes
        self._slab_blocks = slab_blocks
        self._slabs = self.layout.slabs(slab_blocks)
        self._device = self._parameters[0].device
        self._momentum_NC = torch.zeros(self.layout.blocks, BLOCK, device=self._device)
        self._masters = [None if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self._sent: dict[int, _Sent] = {}
        self._swapped = False
        self._steps = 0

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes that `layout` was built from, in its order."""
        return [(placement.name, placement.shape) for placement in self.layout.placements]

    @property
    def lr(self) -> float:
        return float(self.param_groups[0]["lr"])

    def set_lr(self, lr: int | float) -> None:
        """Set the rate used by lookahead and momentum from now on: an fp32 bit pattern (int) or a number (float)."""
        self.param_groups[0]["lr"] = rate(lr)

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        """Within it, parameters hold w - lr sign(H M H); after it, however it ends, w again, bit for bit.

        fp32 parameters point to a working copy meanwhile (so optimizer and weights must be left alone); 16-bit ones are
        rounded from their masters anew.
        """
        self._not_swapped("enter lookahead again")
        if not self._lookahead:
            yield
            return
        self._swapped = True
        originals = [p.data for p in self._parameters]
        try:
            working = [p.data if m is not None else torch.empty_like(p) for p, m in self._pairs()]
            for slab in self._slabs:
                step = transform(self._momentum_NC[slab.rows].view(-1, SIDE, SIDE)).sign_().mul_(self.lr)
                for region in slab.regions:
                    ahead = in_tensor(self._weights(region.tensor), region) - in_blocks(step, region)
                    in_tensor(working[region.tensor], region).copy_(ahead)
            for parameter, ahead in zip(self._parameters, working, strict=True):
                parameter.data = ahead
            yield
        finally:
            for parameter, original, (_, master) in zip(self._parameters, originals, self._pairs(), strict=True):
                parameter.data = original
                if master is not None:
                    parameter.data.copy_(master)
            self._swapped = False

    @torch.no_grad()
    def encode(self, *, run: bytes, round: int, member: int) -> bytes:
        """Turn the gradients into this member's update of `round`; `layout.update_bytes` bytes.

        Gradients are set to None. The update is kept until `settle` or `restore` says what became of it. A missing
        gradient counts as zero. Raises NonFiniteGradient (and changes nothing), OptimizerError if `round` was encoded
        already.
        """
        header = encode_header(Header(run, round, member), self.layout)
        if round in self._sent:
            raise OptimizerError(f"round {round} was encoded already; settle or restore it first")
        gradients = self._gradients()
        for sent in self._sent.values():
            if not sent.within:
                sent.factor *= self.decay
        leaving = [sent for sent in self._sent.values() if sent.within]
        body = np.empty((self.layout.blocks, self.layout.code.bytes), np.uint8)
        sent = self._empty_message()
        for slab in self._slabs:
            for before in leaving:
                self._add_message(slab, before, -1.0)
            momentum_NC = self._momentum_NC[slab.rows]
            gradient_NC = transform(gather(slab, gradients, self._device)).view(-1, BLOCK)
            momentum_NC.mul_(self.decay).add_(gradient_NC, alpha=self.lr)
            indices_NK = select(momentum_NC.abs(), self.layout.topk)
            values_NK = momentum_NC.gather(1, indices_NK)
            # A block without any gradient must vote, too; let such votes cancel out over members and rounds.
            zero_NK = (values_NK == 0) & (((indices_NK + (round + member)) & 1) == 1)
            sent.indices[slab.rows] = indices_NK.short()
            sent.negative[slab.rows] = (values_NK < 0) | zero_NK
            sent.scale[slab.rows] = values_NK.abs().mean(dim=1, keepdim=True)
            indices = indices_NK.cpu().numpy().astype(np.uint16)
            body[slab.rows] = encode_blocks(indices, sent.negative[slab.rows].cpu().numpy(), self.layout.code)
            if not self._overlap:
                self._add_message(slab, sent, -1.0)
        for before in leaving:
            before.within, before.factor = False, self.decay
        sent.within = self._overlap
        self._sent[round] = sent
        self.zero_grad(set_to_none=True)
        return header + body.tobytes()

    @torch.no_grad()
    def apply(self, blobs: Sequence[bytes | memoryview], *, lr: int | float) -> None:
        """Step by the votes in `blobs`, updates of one round by different members. Order and grouping do not matter.

        `lr` is an fp32 bit pattern (int) or a number (float). No blob: a void round, nothing changes, not even by
        weight decay. Everything is checked before anything is changed. Raises MalformedUpdate.
        """
        self._not_swapped("apply updates")
        size = rate(lr)
        if len(blobs) > MOST_VOTES:
            raise ValueError(f"{len(blobs)} updates at once cannot be summed exactly; at most {MOST_VOTES} can")
        _check_together([validate(blob, self.layout) for blob in blobs])
        if not blobs:
            return
        bodies = [open_body(blob, self.layout)[1] for blob in blobs]
        bound = 1 if self._clip else len(blobs)
        share = kept_share(size, self.weight_decay)
        for slab in self._slabs:
            votes_NC = sum_votes(bodies, slab, self.layout.code, self._device)
            if self._clip:
                clip_votes(votes_NC)
            # Adding 0 turns -0 into +0, so that a coefficient without a move leaves -0 weights alone everywhere.
            step = invert_votes(votes_NC, bound).sign_().mul_(size).add_(0.0)
            for region in slab.regions:
                weights = in_tensor(self._weights(region.tensor), region)
                if share != 1.0:
                    weights.mul_(share)
                weights.sub_(in_blocks(step, region))
        for parameter, master in self._pairs():
            if master is not None:
                parameter.copy_(master)

    @torch.no_grad()
    def settle(self, round: int) -> None:
        """My own update of `round` was included: it is in the weights, so it leaves the momentum for good.

        Raises UnknownRound if none is kept.
        """
        sent = self._take(round)
        if sent.within:
            for slab in self._slabs:
                self._add_message(slab, sent, -1.0)

    @torch.no_grad()
    def restore(self, round: int) -> None:
        """My own update of `round` was not included: put it back into the momentum, as decayed as if never taken out.

        Raises UnknownRound if none is kept.
        """
        sent = self._take(round)
        if not sent.within:
            for slab in self._slabs:
                self._add_message(slab, sent, sent.factor)

    def fingerprint(self) -> int:
        """64-bit checksum of the fp32 weights: equal weights, equal number, whatever the threads, device or slabs."""
        self._not_swapped("take a fingerprint")
        weights = [self._weights(tensor) for tensor in range(len(self._parameters))]
        return fingerprint(weights, self.layout, self._device, self._slab_blocks)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Train alone: encode, apply the one update, settle. With a closure, evaluate it under lookahead first."""
        loss = None
        if closure is not None:
            with self.lookahead(), torch.enable_grad():
                loss = closure()
        blob = self.encode(run=bytes(32), round=self._steps, member=0)
        self.apply([blob], lr=self.lr)
        self.settle(self._steps)
        self._steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Momentum, updates without a known fate, fp32 masters of 16-bit parameters, rate; not the parameters."""
        return {
            "layout": self.layout.digest.hex(),
            "lr": self.lr,
            "steps": self._steps,
            "momentum": self._momentum_NC,
            "sent": {
                round: {
                    "indices": sent.indices,
                    "negative": sent.negative,
                    "scale": sent.scale,
                    "within": sent.within,
                    "factor": sent.factor,
                }
                for round, sent in self._sent.items()
            },
            "masters": {p.name: m for p, m in zip(self.layout.placements, self._masters, strict=True) if m is not None},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state saved with the same layout. Raises ValueError if it is of another one."""
        self._not_swapped("load a state")
        if state_dict["layout"] != self.layout.digest.hex():
            raise ValueError(
                f"the saved state is of layout {state_dict['layout'][:16]}…, this optimizer's is "
                f"{self.layout.digest.hex()[:16]}…: model or topk differ; start from the same configuration"
            )
        self.set_lr(float(state_dict["lr"]))
        self._steps = int(state_dict["steps"])
        self._momentum_NC.copy_(state_dict["momentum"])
        self._sent = {
            int(round): _Sent(
                sent["indices"].to(self._device, copy=True),
                sent["negative"].to(self._device, copy=True),
                sent["scale"].to(self._device, copy=True),
                bool(sent["within"]),
                float(sent["factor"]),
            )
            for round, sent in state_dict["sent"].items()
        }
        for placement, (parameter, master) in zip(self.layout.placements, self._pairs(), strict=True):
            if master is not None:
                master.copy_(state_dict["masters"][placement.name])
                parameter.copy_(master)

    def _pairs(self) -> list[tuple[Tensor, Tensor | None]]:
        return list(zip(self._parameters, self._masters, strict=True))

    def _weights(self, tensor: int) -> Tensor:
        """fp32 weights of a placement. While lookahead swaps, the originals are still in place when this is used."""
        master = self._masters[tensor]
        return self._parameters[tensor].detach() if master is None else master

    def _gradients(self) -> list[Tensor | None]:
        gradients: list[Tensor | None] = []
        for placement, parameter in zip(self.layout.placements, self._parameters, strict=True):
            gradient = parameter.grad
            if gradient is not None and not bool(gradient.abs().amax() < _LARGEST_GRADIENT):
                raise NonFiniteGradient(
                    f"the gradient of {placement.name} is not finite (or above {_LARGEST_GRADIENT:g}); "
                    "leave this round out, and look at its data and learning rate"
                )
            gradients.append(None if gradient is None else gradient.contiguous())
        return gradients

    def _empty_message(self) -> _Sent:
        shape, device = (self.layout.blocks, self.layout.topk), self._device
        return _Sent(
            torch.empty(shape, dtype=torch.int16, device=device),
            torch.empty(shape, dtype=torch.bool, device=device),
            torch.empty(shape[0], 1, device=device),
        )

    def _add_message(self, slab: Slab, sent: _Sent, factor: float) -> None:
        values_NK = (sent.scale[slab.rows] * factor).expand(-1, self.layout.topk)
        values_NK = torch.where(sent.negative[slab.rows], -values_NK, values_NK)
        self._momentum_NC[slab.rows].scatter_add_(1, sent.indices[slab.rows].long(), values_NK)

    def _take(self, round: int) -> _Sent:
        if round not in self._sent:
            kept = ", ".join(map(str, sorted(self._sent))) or "none"
            raise UnknownRound(
                f"no own update of round {round} is kept (kept: {kept}); each is settled or restored once"
            )
        return self._sent.pop(round)

    def _not_swapped(self, what: str) -> None:
        if self._swapped:
            raise OptimizerError(f"cannot {what} inside lookahead(): leave its with-block first")


def _check(named: dict[str, Tensor]) -> None:
    if not named:
        raise ValueError("no parameter requires a gradient; pass model.named_parameters() of a model to train")
    device = next(iter(named.values())).device
    for name, parameter in named.items():
        if not parameter.is_floating_point() or parameter.dtype == torch.float64:
            raise ValueError(f"{name} is {parameter.dtype}; parameters must be float32, bfloat16 or float16")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory; store it with .contiguous()")
        if parameter.device != device:
            raise ValueError(f"{name} is on {parameter.device}, others on {device}; put all of them on one device")


def _check_together(headers: Sequence[Header]) -> None:
    for header in headers[1:]:
        if (header.run, header.round) != (headers[0].run, headers[0].round):
            raise MalformedUpdate(
                f"it is of round {header.round} of run {header.run.hex()[:16]}…, others are of round "
                f"{headers[0].round} of run {headers[0].run.hex()[:16]}…: apply one round at a time"
            )
    members = [header.member for header in headers]
    if len(set(members)) < len(members):
        raise MalformedUpdate(f"member {max(members, key=members.count)} has more than one update in this round")
