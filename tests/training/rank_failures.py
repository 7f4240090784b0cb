"""What goes wrong on ranks of a training group in the tests: each function runs on every rank of a gloo group."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_world import POSITIONS, RUN, folder, layouts, ranks, session
from tiny import RandomData, serving, terms
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from optimizer.errors import NonFiniteGradient
from psyche_node.exits import Exit, exit_for
from psyche_node.training import ModelError, Session, TrainingError
from psyche_node.training import messages as m
from psyche_node.training.errors import OutOfMemory, OutOfStep, RankFailed
from psyche_node.training.forward import Root
from psyche_node.training.model import build_model
from psyche_node.training.options import Options
from psyche_node.training.preparing import compile_layers


def a_gradient_that_is_not_finite_is_everybodys() -> None:
    for tensor_parallel in layouts():
        one = session(tensor_parallel)
        before = one.weights_sha256()
        plain = one._loss

        def broken(*batch: Tensor, plain: Any = plain) -> Tensor:
            return plain(*batch) * (float("nan") if dist.get_rank() == 1 else 1.0)

        broken.model = one.model  # type: ignore[attr-defined]
        one._loss = broken  # type: ignore[assignment]
        with pytest.raises(NonFiniteGradient):
            one.train(0, POSITIONS, run=RUN, member=0)
        assert one.weights_sha256() == before
        one._loss = plain
        blob = one.train(1, POSITIONS, run=RUN, member=0).blob
        one.apply(1, [blob], True)
        assert one.weights_sha256() != before


def a_step_that_breaks_off_everywhere_leaves_the_round() -> None:
    """As when memory runs out on every rank: in the forward pass of a layer, or in its backward pass."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            raise RuntimeError("out of memory")

    def forward(module: Any, arguments: Any, output: Tensor) -> None:
        raise RuntimeError("out of memory")

    def backward(module: Any, arguments: Any, output: Tensor) -> Tensor:
        return Broken.apply(output)

    for tensor_parallel in layouts() if dist.get_world_size() == 2 else [2]:
        one, other = session(tensor_parallel), session(tensor_parallel)
        # Older versions of FSDP2 stay where they were: the group has to end.
        lost = tensor_parallel < dist.get_world_size() and not hasattr(FSDPModule, "reset_iter_state")
        before = one.weights_sha256()
        for hook in (forward, backward):
            handle = one.model.model.layers[1].mlp.register_forward_hook(hook)
            with pytest.raises(OutOfStep if lost else RuntimeError, match="out of memory"):
                one.train(0, POSITIONS, run=RUN, member=0)
            handle.remove()
            if lost:
                return
            assert one.weights_sha256() == before
            assert one.evaluate() == other.evaluate()
        assert one.train(1, POSITIONS, run=RUN, member=0).blob == other.train(1, POSITIONS, run=RUN, member=0).blob


def memory_that_runs_out_on_one_rank_is_everybodys() -> None:
    """In a forward or backward pass of one of several micro-batches: all begin anew with one sequence at a time.

    Of tensor parallelism, it runs out everywhere.
    """
    size = dist.get_world_size()

    class Scarce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for tensor_parallel in layouts() if size == 2 else [2]:
        if tensor_parallel < size and not hasattr(FSDPModule, "reset_iter_state"):
            continue
        expected = session(tensor_parallel)
        expected.device.micro_batch = 1
        blob = expected.train(0, range(4 * size), run=RUN, member=0).blob
        for forward in (True, False):
            one = session(tensor_parallel)
            seen: list[int] = []

            def scarce(
                module: Any,
                arguments: Any,
                output: Tensor,
                forward: bool = forward,
                alone: bool = tensor_parallel == 1,
                seen: list[int] = seen,
            ) -> Tensor:
                seen.append(len(output))
                if len(output) == 1 or len(seen) == 1 or (alone and dist.get_rank() != 1):
                    return output
                if forward:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return Scarce.apply(output)

            one.model.model.layers[1].mlp.register_forward_hook(scarce)
            assert one.train(0, range(4 * size), run=RUN, member=0).blob == blob
            assert one.device.micro_batch == 1


def what_fails_within_a_step_on_one_rank_fails_on_all() -> None:
    """The others are not left waiting, and the next step works."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        return
    one, other = session(1), session(1)

    def broken(module: Any, arguments: Any, output: Tensor) -> None:
        if dist.get_rank() == 1 and output.shape[1] > 8:
            raise RuntimeError("an odd thing")

    handle = one.model.model.layers[1].mlp.register_forward_hook(broken)
    with pytest.raises(RuntimeError if dist.get_rank() == 1 else RankFailed, match="an odd thing"):
        one.train(0, POSITIONS, run=RUN, member=0)
    handle.remove()
    assert one.train(0, POSITIONS, run=RUN, member=0).blob == other.train(0, POSITIONS, run=RUN, member=0).blob


def motions_that_fail_before_the_step_did_leave_nothing_behind() -> None:
    """Memory runs out everywhere in a layer, and in going through the motions in the layer before it."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        return
    one, other = session(1), session(1)
    one.device.micro_batch = other.device.micro_batch = 1
    failed: list[int] = []

    def scarce(module: Any, arguments: Any, output: Tensor) -> None:
        failed.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def scarcer(module: Any, arguments: Any, output: Tensor) -> None:
        if failed:
            scarce(module, arguments, output)

    layers = one.model.model.layers
    handles = [layers[1].mlp.register_forward_hook(scarce), layers[0].mlp.register_forward_hook(scarcer)]
    with pytest.raises(OutOfMemory):
        one.train(0, POSITIONS, run=RUN, member=0)
    assert len(failed) == 2
    for handle in handles:
        handle.remove()
    # All-gathers that are left out would leave memory as it was allocated.
    assert one.evaluate() == other.evaluate()


def all_ranks_take_the_same_attention() -> None:
    """It fails on one of them, within a forward pass; and memory that runs out says nothing of it."""
    plain = torch.nn.functional.scaled_dot_product_attention
    for tensor_parallel in layouts():
        if tensor_parallel < dist.get_world_size() and not hasattr(FSDPModule, "reset_iter_state"):
            continue
        for error in (RuntimeError("no such kernel"), torch.OutOfMemoryError("CUDA out of memory.")):
            calls: list[int] = []

            def one_fails(*arguments: Any, error: Any = error, calls: list[int] = calls, **named: Any) -> Tensor:
                calls.append(1)
                if len(calls) == 2 and dist.get_rank() == 1:
                    raise error
                return plain(*arguments, **named)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", one_fails)
                if isinstance(error, torch.OutOfMemoryError):
                    with pytest.raises(OutOfMemory, match="when attention was tried out"):
                        session(tensor_parallel)
                    continue
                one = session(tensor_parallel)
            assert one.model.config._attn_implementation == "eager"
            assert any("attention sdpa does not work here: " in line for line in one.reasons)


def all_ranks_take_the_same_attention_in_compiled_layers() -> None:
    """It fails on one of them, in the second layer."""
    plain, calls = torch.nn.functional.scaled_dot_product_attention, list[int]()

    def one_fails(*arguments: Any, **named: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no such kernel")
        return plain(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        compile_by("eager", patch)
        if dist.get_rank() == 1:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", one_fails)
        one = session(dist.get_world_size(), options=Options(compile=True))
    assert one.model.config._attn_implementation == "eager"
    assert any("attention sdpa does not work here: " in line for line in one.reasons)


def a_rank_that_cannot_compile_is_everybodys() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("no compiler")
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        compile_by(broken, patch)
        with pytest.raises(TrainingError, match=r"no compiler(.|\n)*Set compile to false"):
            session(dist.get_world_size(), options=Options(compile=True))
    assert session(dist.get_world_size()).model.config._attn_implementation == "sdpa"


def compile_by(backend: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("psyche_node.training.preparing.compile_layers", lambda model: compile_layers(model, backend))


def the_rank_with_least_memory_decides() -> None:
    """And each counts on its share of what the host has."""
    size, asked = dist.get_world_size(), list[int]()

    def measured(model: Any, device: torch.device, sharers: int) -> int:
        asked.append(sharers)
        return 1 if dist.get_rank() == size - 1 else 1 << 50

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psyche_node.training.preparing.free_memory", measured)
        one = session(1)
    assert asked == [size]
    assert any("activations are computed again" in line for line in one.reasons)


def a_step_that_fails_on_one_rank_fails_on_all() -> None:
    world = ranks()

    def step() -> int:
        if dist.get_rank() == 1:
            raise TrainingError("no such thing")
        return 5

    expected = TrainingError if dist.get_rank() == 1 else RankFailed
    with pytest.raises(expected, match="no such thing"):
        world.together(step)
    assert world.together(lambda: 6) == 6
    assert world.told(dist.get_rank()) == 0


def an_update_that_cannot_be_written_is_taken_back() -> None:
    """Only rank 0 writes; on every rank its failure leaves the round out."""
    for tensor_parallel in layouts():
        trainer, one = serving(folder(), RandomData(), ranks(), tensor_parallel=tensor_parallel)
        train = m.Train(round=0, positions=POSITIONS, run=RUN.hex(), member=0, out_path="/dev/null/update")
        with pytest.raises((OSError, RankFailed), match="/dev/null/update"):
            trainer.handle(train)
        assert one.optimizer.travelling == {}


def files_reach_other_hosts() -> None:
    """Ranks of two hosts, which here share a disk but do not know it."""
    size, rank = dist.get_world_size(), dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank % (size // 2)))
        patch.setenv("LOCAL_WORLD_SIZE", str(size // 2))
        world = ranks()
    with tempfile.TemporaryDirectory() as own:
        folder = world.told(own)
        paths = [Path(folder) / name for name in ("a", "b", "empty")]
        if rank == 0:
            for number, path in enumerate(paths):
                path.write_bytes(bytes(range(256)) * (300 * (1 - number // 2)))
        with pytest.MonkeyPatch.context() as patch:
            sent = list[tuple[int, ...]]()
            plain = dist.broadcast
            patch.setattr(dist, "broadcast", lambda t, **kwargs: (sent.append(tuple(t.shape)), plain(t, **kwargs)))
            found = world.files(paths)
        shapes = [(256 * 300,)] * 2 if rank % (size // 2) == 0 else []
        assert [shape for shape in sent if shape == (256 * 300,)] == shapes, "one rank of each host has them"
        assert [bytes(view) for view in found] == [bytes(range(256)) * 300] * 2 + [b""]
        with pytest.raises((FileNotFoundError, RankFailed)) as missing:
            world.files([Path(folder) / "missing"])
        assert exit_for(missing.value) is Exit.FILES
        with pytest.raises((FileNotFoundError, RankFailed)) as missing:
            world.together(lambda: os.stat("/nowhere") if rank == 1 else None)
        assert exit_for(missing.value) is Exit.FILES, "also where it was another rank"
        # As on a full disk: the other host can keep the first file's beginning only.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == size // 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises((OSError, RankFailed), match=f"host {socket.gethostname()} cannot keep a copy .*/0: "):
            world.files(paths)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", "/nowhere" if rank == size // 2 else own)
            with pytest.raises((FileNotFoundError, RankFailed), match="/nowhere/psyche-updates-"):
                world.files(paths)
        assert len(world.files(paths)) == 3


def what_cannot_be_divided_is_refused() -> None:
    for plan, why in (({}, "has no tensor-parallel plan"), ({"layers.*.mlp.up_proj": "strange"}, "by 'strange'")):
        model, _ = build_model(folder())
        model.config.base_model_tp_plan = plan
        with pytest.raises(ModelError, match=why):
            ranks().shard(model, Root(model), torch.device("cpu"), dist.get_world_size())
    model, _ = build_model(folder())
    model.model.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match=r"does not say what layers\.1\.mlp\.extra is for"):
        ranks().shard(model, Root(model), torch.device("cpu"), dist.get_world_size())
    with pytest.raises(TrainingError, match="cannot be divided by tensor_parallel, which is 3"):
        session(3)
    with pytest.raises(TrainingError, match="one training process"):
        Session(folder(), RandomData(), terms(), device="cpu", tensor_parallel=2)
    with pytest.raises(TrainingError, match="set device to cuda"):
        ranks().device("cuda:1")
