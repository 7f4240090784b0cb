"""What the ranks of a training group do in the tests: each function runs on every rank of a gloo group.

The folder of a tiny model is in the environment (MODEL), one of each kind in subfolders.
"""

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
from tiny import VOCABULARY, RandomData, bits, serving, terms
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from optimizer.errors import NonFiniteGradient
from optimizer.sharding import part_of
from psyche_node.training import ModelError, Session, TrainingError, load_model
from psyche_node.training import messages as m
from psyche_node.training.errors import OutOfMemory, OutOfStep, RankFailed
from psyche_node.training.forward import Root
from psyche_node.training.model import build_model
from psyche_node.training.options import DEFAULTS, Options
from psyche_node.training.ranks import Ranks
from psyche_node.training.weight_files import OpenFile
from psyche_node.training.world import World

RUN = bytes(range(32))
READ = OpenFile.read
POSITIONS = [3, 1, 4, 15, 9, 26, 5]


def layouts() -> list[int]:
    """How many ranks divide the matrices: none, all, or half of them."""
    size = dist.get_world_size()
    return sorted({1, size, max(1, size // 2)})


def folder(kind: str = "qwen3") -> Path:
    return Path(os.environ["MODEL"]) / kind


def kinds() -> list[str]:
    """All models for two ranks; for more, which take their time, the one that nothing divides."""
    names = sorted(path.name for path in Path(os.environ["MODEL"]).iterdir())
    return names if dist.get_world_size() == 2 else ["qwen3"]


def ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def session(tensor_parallel: int | None, kind: str = "qwen3", options: Options = DEFAULTS, **changes: Any) -> Session:
    """A session of all ranks, or of this process alone if ``tensor_parallel`` is None."""
    world = World() if tensor_parallel is None else ranks()
    return Session(
        folder(kind),
        RandomData(),
        terms(**changes),
        device="cpu",
        micro_batch=2,
        world=world,
        tensor_parallel=tensor_parallel or 1,
        options=options,
    )


def gradients(one: Session) -> dict[str, Tensor]:
    """The whole gradients of a batch, its loss, and the gradients' norm; on every rank."""
    from psyche_node.training.gradient import accumulate

    world = one._world
    loss = accumulate(one._loss, one._data.batch(POSITIONS, b""), one.device, world)
    world.complete(one.model)
    norm = world.clip(one.model, 0.0)
    named = {name: p.grad for name, p in one.model.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in named.items() if g is not None}
    return {**whole, "loss": torch.tensor(loss), "norm": torch.tensor(norm)}


def gradients_are_those_of_one_process() -> None:
    for kind in kinds():
        z_loss = {"z_loss_bits": bits("0.001")}
        expected = gradients(session(None, kind, **z_loss))
        for tensor_parallel in layouts():
            found = gradients(session(tensor_parallel, kind, **z_loss))
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(
                    found[name],
                    gradient,
                    rtol=1e-4,
                    atol=2e-5 * scale,
                    msg=lambda m, what=f"{kind} {name}": f"{what}: {m}",
                )


def ranks_go_through_as_many_chunks() -> None:
    """Where the vocabulary does not divide evenly, by its parts some would need more chunks than others."""
    size = dist.get_world_size()
    parts = [len(part) for part in torch.arange(VOCABULARY + 1).chunk(size)]
    chunk = 7 * parts[-1]
    assert chunk // parts[0] != chunk // parts[-1]
    expected = gradients(session(None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psyche_node.training.loss.CHUNK_LOGITS", chunk)
        found = gradients(session(size))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


def layouts_stay_one_model() -> None:
    """A single process and every layout of the ranks, as members of one run; each trains data of its own.

    Round 1 leaves an update out, round 2 is void. Replicas are compared bit for bit after every round.
    """
    members = [session(None), *(session(tensor_parallel) for tensor_parallel in layouts())]
    roots, first = [member.model_root() for member in members], members[0].evaluate()
    assert len(set(roots)) == 1
    for round in range(4):
        blobs = [
            member.train(round, range(number * 5, number * 5 + 5), run=RUN, member=number).blob
            for number, member in enumerate(members)
        ]
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, blobs)
        assert all(theirs == blobs for theirs in told), "every rank has the same updates"
        counted = {1: blobs[1:], 2: []}.get(round, blobs)
        for number, member in enumerate(members):
            member.apply(round, counted, blobs[number] in counted)
        assert len({member.fingerprint() for member in members}) == 1
        assert len({member.weights_sha256() for member in members}) == 1
    assert len({member.model_root() for member in members}) == 1
    losses = [member.evaluate() for member in members]
    for loss, tokens in losses:
        assert loss == pytest.approx(losses[0][0], rel=1e-5)
        assert loss < first[0]
        assert tokens == first[1]


def bf16_layouts_stay_one_model() -> None:
    """Rounded by chances that do not depend on who holds a weight; the gradients are the ranks' own."""
    only_bf16 = Options(precision="bf16")
    members = [session(None, options=only_bf16), *(session(ways, options=only_bf16) for ways in layouts())]
    for round in range(3):
        blobs = [
            member.train(round, range(number * 5, number * 5 + 5), run=RUN, member=number).blob
            for number, member in enumerate(members)
        ]
        for member in members:
            member.apply(round, blobs, True)
            found = gradients(member)
            assert {values.dtype for name, values in found.items() if name.startswith("model.")} == {torch.float32}
            member.optimizer.zero_grad()
        assert len({(member.fingerprint(), member.weights_sha256()) for member in members}) == 1


def one_gradient_makes_one_update() -> None:
    """Of the same gradient every layout makes the same bytes, round by round, and comes to the same weights."""
    for kind in kinds():
        one = session(None, kind)
        many = [session(tensor_parallel, kind) for tensor_parallel in layouts()]
        generator = torch.Generator().manual_seed(5)
        for round in range(3):
            full = {name: torch.randn(p.shape, generator=generator) for name, p in one.model.named_parameters()}
            for member in (one, *many):
                for placement, parameter in zip(
                    member.optimizer.layout.placements, member.optimizer._parameters, strict=True
                ):
                    parameter.grad = share(full[placement.name], placement, parameter)
            blobs = [member.optimizer.encode(run=RUN, round=round, member=0) for member in (one, *many)]
            assert len(set(blobs)) == 1
            for member in (one, *many):
                member.optimizer.apply(blobs[:1], lr=0.01)
            assert len({member.weights_sha256() for member in (one, *many)}) == 1


def share(full: Tensor, placement: Any, parameter: Tensor) -> Tensor:
    """What belongs here of a whole gradient."""
    if not isinstance(parameter, DTensor):
        return full.clone()
    part = part_of(placement, parameter)
    held = full.reshape(placement.matrix or (1, -1))[slice(*part.rows), slice(*part.cols)]
    held = held.reshape(parameter.to_local().shape).contiguous()
    return DTensor.from_local(
        held, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def a_gradient_that_is_not_finite_is_everybodys() -> None:
    for tensor_parallel in layouts():
        one = session(tensor_parallel)
        before = one.weights_sha256()
        plain = one._loss

        def broken(*batch: Tensor, plain: Any = plain) -> Tensor:
            return plain(*batch) * (float("nan") if dist.get_rank() == 1 else 1.0)

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

    for tensor_parallel in layouts():
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

    class Scarce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for tensor_parallel in layouts():
        if tensor_parallel < dist.get_world_size() and not hasattr(FSDPModule, "reset_iter_state"):
            continue
        expected = session(tensor_parallel)
        expected.device.micro_batch = 1
        blob = expected.train(0, range(4 * dist.get_world_size()), run=RUN, member=0).blob
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
            assert one.train(0, range(4 * dist.get_world_size()), run=RUN, member=0).blob == blob
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


def clipping_is_by_the_norm_of_the_whole() -> None:
    for tensor_parallel in [None, *layouts()]:
        one = session(tensor_parallel)
        accumulated = gradients(one)
        before = float(accumulated["norm"])
        assert one._world.clip(one.model, before / 3) == pytest.approx(before, rel=1e-5)
        assert one._world.clip(one.model, 0.0) == pytest.approx(before / 3, rel=1e-4)


def shares_need_not_fill_the_ranks() -> None:
    """One sequence for many ranks, and none at all."""
    expected = session(None).train(0, [7], run=RUN, member=0)
    for tensor_parallel in layouts():
        one = session(tensor_parallel)
        found = one.train(0, [7], run=RUN, member=0)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
        assert one.train(1, [], run=RUN, member=0).tokens == 0


def a_checkpoint_is_one_model_folder() -> None:
    """Saved by any layout, in several files, it is what one process saves, byte for byte."""
    from psyche_node.training import checkpoint

    checkpoint.FILE_BYTES = 20_000
    place = Path(os.environ["MODEL"]).parent / f"saved{dist.get_world_size()}"
    for kind in kinds():
        for tensor_parallel in [None, *layouts()]:
            one = session(tensor_parallel, kind)
            if tensor_parallel is not None or dist.get_rank() == 0:
                one.save(place / f"{kind}-{tensor_parallel}", {"rounds": "0"})
            again = one._world.told(one.model_root())
            dist.barrier()
            files = {path.name: path.read_bytes() for path in (place / f"{kind}-{tensor_parallel}").iterdir()}
            first = {path.name: path.read_bytes() for path in (place / f"{kind}-None").iterdir()}
            assert "model.safetensors.index.json" in files
            assert files == first
        loaded = Session(place / f"{kind}-None", RandomData(), terms(), device="cpu")
        assert loaded.model_root() == again
        dist.barrier()


def each_rank_reads_what_it_holds() -> None:
    """And no more; buffers that no file has are computed on every rank, and what is tied stays tied."""
    for kind in kinds():
        whole, _ = load_model(folder(kind), torch.device("cpu"))
        for tensor_parallel in layouts():
            read: list[int] = []

            def counted(self: OpenFile, name: str, extents: Any, read: list[int] = read) -> Tensor:
                values = READ(self, name, extents)
                read.append(values.numel())
                return values

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(OpenFile, "read", counted)
                model = session(tensor_parallel, kind).model
            held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
            assert sum(read) == sum(values.numel() for values in held)
            if tensor_parallel == 1:
                assert sum(read) < 1.2 * sum(p.numel() for p in whole.parameters()) / dist.get_world_size()
            for name, buffer in whole.named_buffers():
                assert torch.equal(model.get_buffer(name), buffer)
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tied == (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight)


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
    world = ranks()
    world._one_host, world._local = False, rank % (size // 2)
    with tempfile.TemporaryDirectory() as own:
        folder = world.told(own)
        paths = [Path(folder) / name for name in ("a", "b", "empty")]
        if rank == 0:
            for number, path in enumerate(paths):
                path.write_bytes(bytes(range(256)) * (300 * (1 - number // 2)))
        found = world.files(paths)
        assert [bytes(view) for view in found] == [bytes(range(256)) * 300] * 2 + [b""]
        with pytest.raises((FileNotFoundError, RankFailed)):
            world.files([Path(folder) / "missing"])
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


def heads_that_cannot_be_divided_stay_whole() -> None:
    """Two key and value heads over four ranks: attention is a copy on each, the rest is cut."""
    one = session(4, "seed_oss")
    assert any(line.startswith("self_attn is held whole by each of the 4") for line in one.reasons)
    cut = {name for name, p in one.model.named_parameters() if isinstance(p, DTensor)}
    assert not any("self_attn" in name for name in cut)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= cut
    found, expected = gradients(one), gradients(session(None, "seed_oss"))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


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
