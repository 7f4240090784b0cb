"""DisTrO as a torch optimizer: momentum in the transform domain, signed votes out, exact signed steps in.

DeMo (arXiv 2411.19870) with 1-bit votes and a Hadamard transform in place of the DCT. Per member and round, H the
orthonormal transform of 64x64 blocks, M the momentum (private), w the fp32 weights (equal on all members)::

    g  = gradient at w - lr sign(T')               lookahead: T' is the trend with the own update that is travelling
    M  = decay M + lr H g H
    send, per block, the indices and signs of the topk largest of M
    M -= what was sent                             error feedback: signs times the block's mean kept magnitude
    V  = sum of all members' signs, clipped to [-1, 1]
    T  = T - T / 2^window + H V H                  the trend, equal on all members (`trend`)
    w  = w (1 - lr wd) - lr sign(T)                exact: integers up to the last line

    optimizer = DisTrO(model.named_parameters(), lr=0.0025)
    for round in range(rounds):
        with optimizer.lookahead():
            loss(model).backward()
        blob = optimizer.encode(run=run, round=round, member=member)
        blobs = exchange(blob)                         # any transport; the same set on every member
        optimizer.apply(blobs, lr=lr(round))
        if blob not in blobs:
            optimizer.restore(blob)

Where every block lies is in `geometry`, what is done to the blocks in `engine`, sharded models in `sharding`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.agreement import agreeing
from optimizer.codec import Blob, Header, encode_header, open_body
from optimizer.compiled import choose_engine
from optimizer.engine import Energy, Engine, PlainEngine, Rule, Sent, Step
from optimizer.errors import OptimizerError, UnknownRound
from optimizer.geometry import SLAB_BLOCKS, Geometry
from optimizer.gradients import local_gradients
from optimizer.groups import Groups, Rates
from optimizer.layout import BLOCK, HEADER_BYTES, Layout
from optimizer.parameters import Named, check, named_groups, trained_groups
from optimizer.rates import rate
from optimizer.report import Report, Watch
from optimizer.rounding import LOOKAHEAD, STEP, Chance
from optimizer.rounds import open_round
from optimizer.saved import loaded_updates, misfit, saved_updates
from optimizer.settings import Settings
from optimizer.sharding import site_of
from optimizer.weights import Weights


class DisTrO(Groups):
    """See the module's docstring.

    Args:
        parameters: (name, parameter) pairs, as of `model.named_parameters()`, or groups: dicts whose "params" are such
            pairs, with a learning rate and weight decay of their own. Frozen parameters are left out, a tied one counts
            once, under the name that comes first. All on one device, contiguous, fp32 or 16 bits, plain or DTensors
            (FSDP2, tensor parallel). Of 16-bit parameters the optimizer keeps fp32 masters, so load weights before.
        lr: learning rate: the size of every step. Start with a quarter to half of what AdamW likes best.
            It is narrow: twice the best rate costs several percent of loss.
        decay: of the momentum per round. Lower it if the loss oscillates.
        topk: coefficients of 4,096 that are sent. 512: 6 bits each, a loss like AdamW's; 128: 8 bits each; 32: 10 bits.
            Fewer make smaller updates, and a higher loss the smaller a member's batch is.
        weight_decay: decoupled, of all parameters.
        window: the trend forgets over 2^window rounds. 0: each round's votes alone decide its step. Lower it where
            batches are so large that a round's gradient has little noise.
        lookahead: compute gradients at the weights that the trend predicts, together with own updates that are still
            travelling. Needed where updates are applied a round later (overlap).
        clip_votes: a coefficient moves one way, however many members voted for it.
        stochastic_rounding: keep bf16 parameters as the only weights, without fp32 masters, and round every step by
            chances that all members draw alike (`rounding`). Saves 4 bytes per parameter. All members need the same
            setting.
        robust: leave out members whose votes do not agree with most others' (`agreement`). All members need the same
            setting.
        slab_blocks: blocks worked on at a time; bounds scratch memory to about 0.1 MB per block (float16 gradients are
            converted as a whole). None: as many as suit the device.
        engine: "auto" takes the compiled kernels on CPUs where they are built and plain torch operations elsewhere;
            "torch" forces these; "triton" asks for kernels on a CUDA device. The bits are the same.
        group: the process group of this site, if parameters are DTensors; by default all processes.

    Raises ValueError for arguments out of range and LayoutError for parameters that cannot be laid out.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        lr: int | float,
        decay: float = 0.9,
        topk: int = 512,
        weight_decay: float = 0.0,
        window: int = 3,
        lookahead: bool = True,
        clip_votes: bool = True,
        stochastic_rounding: bool = False,
        robust: bool = False,
        slab_blocks: int | None = None,
        engine: str = "auto",
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        settings = Settings(
            decay, topk, window, lookahead, clip_votes, stochastic_rounding, robust, slab_blocks, engine
        )
        defaults = {"lr": rate(lr), "weight_decay": rate(weight_decay, "weight decay")}
        self._build(trained_groups(parameters, defaults), defaults, settings, group)

    def _build(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        settings: Settings,
        processes: "torch.distributed.ProcessGroup | None",
    ) -> None:
        """What a new optimizer and a copy of one have in common. `groups` as of `trained_groups`."""
        named: Named = {name: p for group in groups for name, p in group["params"]}
        check(named, settings.stochastic_rounding)
        group_of = {name: number for number, group in enumerate(groups) for name, _ in group["params"]}
        shapes = [(name, tuple(p.shape)) for name, p in named.items()]
        self.layout = Layout.build(shapes, settings.topk, settings.stochastic_rounding)
        super().__init__(groups, defaults)
        self.decay = rate(settings.decay)
        self._settings, self._processes = settings, processes
        ordered = {placement.name: named[placement.name] for placement in self.layout.placements}
        self._group_of = [group_of[name] for name in ordered]
        self._site = site_of(self.layout, list(ordered.values()), processes)
        self._weights = Weights(ordered, masters=not settings.stochastic_rounding)
        self._device = self._weights.held()[0].device
        at_once = settings.slab_blocks or SLAB_BLOCKS.get(self._device.type, SLAB_BLOCKS["cpu"])
        self._geometry = Geometry.build(self.layout, at_once, self._site.parts, self._site.border)
        self._engine = choose_engine(self._geometry, self._device, settings.engine)
        # Whatever reads and writes weights: kernels know fp32 ones only.
        by_chance = settings.stochastic_rounding
        self._stepper: Engine = PlainEngine(self._geometry, self._device) if by_chance else self._engine
        self._momentum_NC = torch.zeros(len(self._geometry.blocks), BLOCK, dtype=torch.float32, device=self._device)
        self._trend_NC = torch.zeros(len(self._geometry.blocks), BLOCK, dtype=torch.int16, device=self._device)
        self._sent: dict[int, Sent] = {}
        self._next, self._swapped = 0, False
        self._watch = Watch(self._geometry, self._device, by_chance)

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`: copy the model in the same call, so that the copies belong together."""
        self._not_swapped("be copied")
        return {
            "groups": named_groups(self.param_groups),
            "defaults": self.defaults,
            "settings": replace(self._settings, decay=self.decay),
            "processes": self._processes,
            "saved": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(state["groups"], state["defaults"], state["settings"], state["processes"])
        self.load_state_dict(state["saved"])

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes that `layout` was built from, in its order."""
        return [(placement.name, placement.shape) for placement in self.layout.placements]

    @property
    def travelling(self) -> dict[int, bytes]:
        """Own updates that were neither applied nor restored yet, by round. Collective over the site's processes."""
        return {round: self._blob(sent) for round, sent in self._sent.items()}

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        """Within it, parameters hold the weights that the trend predicts; after it, however it ends, w, bit for bit.

        They are overwritten in place (so compiled and sharded models see it) and copied back from a copy of the fp32
        weights, 4 bytes per parameter that are kept from the first time on. Leave optimizer and weights alone
        meanwhile. With FSDP2, give the root module `reshard_after_forward=True` too, or call `model.reshard()` after an
        evaluation: a forward pass without a backward pass leaves a gathered copy that later writes to the shards do not
        reach.
        """
        self._not_swapped("enter lookahead again")
        if not self._settings.lookahead:
            yield
            return
        with self._watch.phase("lookahead"):
            kept = self._weights.set_aside()
        self._swapped = True
        try:
            with self._watch.phase("lookahead"), torch.no_grad():
                travelling = list(self._sent.values())
                step = self._step(self.lr, LOOKAHEAD, b"", self._next)
                self._stepper.ahead(self._trend_NC, travelling, kept, self._weights.held(), step)
            yield
        finally:
            with self._watch.phase("lookahead"):
                self._weights.show(kept)
            self._swapped = False

    @torch.no_grad()
    def encode(self, *, run: bytes = bytes(32), round: int | None = None, member: int = 0) -> bytes:
        """Turn the gradients into this member's update of `round`; `layout.update_bytes` bytes.

        Collective over the site's processes, and the same bytes on each. `round` is by default the one after the last.
        Gradients are set to None; a missing one counts as zero. The update is kept until it is applied or restored.
        Raises NonFiniteGradient (and changes nothing), OptimizerError if an update of `round` is travelling already.
        """
        self._weights.held()  # refuses a model that was converted, before anything changes
        number = self._next if round is None else round
        header = Header(run, number, member)
        encode_header(header, self.layout)
        if number in self._sent:
            raise OptimizerError(f"round {number} was encoded already; apply or restore it first")
        with self._watch.phase("gather"):
            gradients = local_gradients(self._weights, self._site)
            exchanged = self._site.exchange(gradients)
        sent = Sent.empty(header, len(self._geometry.blocks), self.layout.code, self._device)
        # Rates weigh rounds against each other, so one serves for all groups: the largest, as some may be 0.
        rule = Rule(self.decay, max(self.lr), (number + member) & 0xFFFFFFFF)
        with self._watch.phase("encode"):
            energy = self._engine.encode(gradients, exchanged, self._momentum_NC, sent, rule)
        for before in self._sent.values():
            before.factor *= self.decay
        self._sent[number], self._next = sent, number + 1
        self._watch.energy = Energy(self._site.sum(energy.total), self._site.sum(energy.kept))
        self.zero_grad(set_to_none=True)
        with self._watch.phase("assemble"):
            return self._blob(sent)

    @torch.no_grad()
    def apply(self, blobs: Iterable[Blob], *, lr: Rates | None = None) -> tuple[int, ...]:
        """Step by the votes in `blobs`, updates of one round by different members, in any order.

        `lr` is an fp32 bit pattern (int) or a number (float), or a sequence with one for each group; by default the
        groups' own. No blob: a void round, nothing changes, not even by weight decay. An own update among them leaves
        the momentum for good. Everything is checked before anything is changed. Raises MalformedUpdate.

        Returns the members whose votes were left out as hostile; none unless `robust`. An own update among those goes
        back into the momentum.
        """
        self._not_swapped("apply updates")
        rates = self.lr if lr is None else self._per_group(lr)
        with self._watch.phase("check"):
            headers, checked = open_round(blobs, self.layout, self._engine, self._site)
        if not headers:
            return ()
        counted = list(range(len(headers)))
        if self._settings.robust:
            with self._watch.phase("agreement"):
                counted = agreeing(checked, self.layout.code, self._device)
        left_out = [header for number, header in enumerate(headers) if number not in counted]
        bodies = [checked[number] for number in counted]
        with self._watch.phase("apply"):
            step = self._step(rates, STEP, headers[0].run, headers[0].round)
            self._watch.stepping(self._trend_NC, step.rates)
            self._stepper.apply(self._trend_NC, self._weights.stepped(), bodies, step)
            self._weights.show_masters()
        self._watch.voted(bodies)
        for header, body in zip(headers, checked, strict=True):
            if self._is_own(header, body):
                own = self._sent.pop(header.round)
                if header in left_out:
                    self._engine.add(self._momentum_NC, own, own.factor)
        return tuple(header.member for header in left_out)

    @torch.no_grad()
    def restore(self, update: Blob | Header) -> None:
        """My own update was not included: put it back into the momentum, as decayed as if never taken out.

        Its header is enough, so that nobody has to keep its bytes. Raises UnknownRound if it is not one of
        `travelling`.
        """
        if isinstance(update, Header):
            header, own = update, self._sent.get(update.round)
            known = own is not None and own.header == header
        else:
            header, body = open_body(update, self.layout)
            known = self._is_own(header, body)
        if not known:
            kept = ", ".join(map(str, sorted(self._sent))) or "none"
            raise UnknownRound(
                f"no own update of round {header.round} by member {header.member} is kept (rounds kept: {kept}); each "
                "is applied or restored once"
            )
        own = self._sent.pop(header.round)
        self._engine.add(self._momentum_NC, own, own.factor)

    @torch.no_grad()
    def fingerprint(self) -> int:
        """64-bit checksum of the weights as fp32: equal weights, equal number, whatever threads, device or shards."""
        self._not_swapped("take a fingerprint")
        stepped = self._weights.stepped()
        counted = [w if part.counted else None for w, part in zip(stepped, self._site.parts, strict=True)]
        with self._watch.phase("fingerprint"):
            return self._site.total(self._stepper.fingerprint(counted))

    def report(self) -> Report:
        """Figures of the last round, and the seconds spent in each phase since the last report."""
        return self._watch.report(self._weights.stepped(), self._trend_NC)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Train alone: encode and apply the one update. With a closure, evaluate it under lookahead first."""
        self._not_swapped("step")
        loss = None
        if closure is not None:
            with self.lookahead(), torch.enable_grad():
                loss = closure()
        self.apply([self.encode()])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Trend, momentum, updates without a known fate, fp32 masters of 16-bit parameters, rates; not the parameters.

        Of this process: where the model is sharded, each process saves and loads its own. Who joins a run needs the
        trend of another member along with the weights; momentum and updates are private. It shares memory with the
        optimizer: copy or save it before the next step.
        """
        return {
            "layout": self.layout.digest.hex(),
            "blocks": torch.from_numpy(self._geometry.blocks),
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
            "next": self._next,
            "momentum": self._momentum_NC,
            "trend": self._trend_NC,
            "sent": saved_updates(self._sent),
            "masters": self._weights.masters(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state saved with the same layout and sharding.

        Raises ValueError if it is not one, with nothing changed, on all processes of the site if on one.
        """
        self._not_swapped("load a state")
        problem = misfit(state_dict, self.state_dict(), self.layout)
        if not self._site.all(problem is None):
            raise ValueError(problem or "the saved state of another process of this site does not fit")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self._next = int(state_dict["next"])
        self._momentum_NC.copy_(state_dict["momentum"])
        self._trend_NC.copy_(state_dict["trend"])
        self._sent = loaded_updates(state_dict["sent"], self._device)
        self._weights.load(state_dict["masters"])

    def _is_own(self, header: Header, body: NDArray[np.uint8]) -> bool:
        """Whether it is an own update whose fate is open, and no other one under its round and member."""
        sent = self._sent.get(header.round)
        if sent is None or sent.header != header:
            return False
        return self._site.all(np.array_equal(body[self._geometry.blocks], sent.body))

    def _step(self, rates: Sequence[float], stream: int, run: bytes, round: int) -> Step:
        """What `apply` and `lookahead` do, at these rates of the groups; chances are those of the run and round."""
        shares = self._shares(rates)
        of_tensors = [rates[group] for group in self._group_of], [shares[group] for group in self._group_of]
        chance = (
            Chance(int.from_bytes(run[:8], "little"), round, stream) if self._settings.stochastic_rounding else None
        )
        return Step(*of_tensors, int(self._settings.clip_votes), self._settings.window, chance)

    def _blob(self, sent: Sent) -> bytes:
        blob = np.empty(self.layout.update_bytes, np.uint8)
        blob[:HEADER_BYTES] = np.frombuffer(encode_header(sent.header, self.layout), np.uint8)
        self._site.assemble(sent.body, blob[HEADER_BYTES:].reshape(self.layout.blocks, -1))
        return blob.tobytes()

    def _not_swapped(self, what: str) -> None:
        if self._swapped:
            raise OptimizerError(f"cannot {what} inside lookahead(): leave its with-block first")
