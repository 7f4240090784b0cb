"""What the ranks of a training group do in the tests: each function runs on every rank of a gloo group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_world import RUN, folder, gradients, kinds, layouts, session
from tiny import VOCABULARY, RandomData, bits, terms
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from optimizer.sharding import part_of
from psyche_node.training import Session, load_model
from psyche_node.training import ranks as training_ranks
from psyche_node.training.device import Device
from psyche_node.training.options import Options
from psyche_node.training.preparing import compile_layers
from psyche_node.training.weight_files import OpenFile

READ = OpenFile.read


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
    saved = Path(os.environ["MODEL"]).parent / f"bf16-{dist.get_world_size()}"
    members[-1].save(saved)
    dist.barrier()
    # Begun anew from what one layout saved, all go on as one.
    members = [session(ways, options=only_bf16, saved=saved) for ways in (None, *layouts())]
    for round in range(3, 5):
        blobs = [member.train(round, range(5), run=RUN, member=n).blob for n, member in enumerate(members)]
        for member in members:
            member.apply(round, blobs, True)
        assert len({(member.fingerprint(), member.weights_sha256(), member.model_root()) for member in members}) == 1
        assert {member.optimizer.report().lost for member in members} == {0.0}


def weights_travel_in_bf16_as_on_gpus() -> None:
    """What FSDP2 does on GPUs: gathered in bf16, summed in fp32, while masters and updates stay what they are."""
    with pytest.MonkeyPatch.context() as patch:
        on_gpus = training_ranks._precision(torch.device("cuda"))
        patch.setattr(training_ranks, "_precision", lambda _: on_gpus)
        patch.setattr(Device, "compute", lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
        for options in (Options(), Options(precision="bf16"), Options(activation_checkpointing="on")):
            one = session(None, options=options)
            many = [session(tensor_parallel, options=options) for tensor_parallel in layouts()]
            expected = gradients(one)
            for member in many:
                found = gradients(member)
                assert {p.dtype for p in member.model.parameters()} == {p.dtype for p in one.model.parameters()}
                for name, gradient in expected.items():
                    assert found[name].dtype == gradient.dtype, name
                    error = float((found[name] - gradient).norm() / gradient.norm())
                    assert error < 0.05, f"{name}: {error}"
                member.optimizer.zero_grad()
            one.optimizer.zero_grad()
            for round in range(2):
                made = enumerate((one, *many))
                blobs = [member.train(round, range(8), run=RUN, member=n).blob for n, member in made]
                for member in (one, *many):
                    member.apply(round, blobs, True)
                assert len({member.fingerprint() for member in (one, *many)}) == 1


def one_gradient_makes_one_update() -> None:
    """Of the same gradient every layout makes the same bytes, round by round, and comes to the same weights."""
    for kind in kinds():
        one = session(None, kind)
        many = [session(tensor_parallel, kind) for tensor_parallel in layouts()]
        generator = torch.Generator().manual_seed(5)
        for round in range(3):
            full = {name: torch.randn(p.shape, generator=generator) for name, p in one.model.named_parameters()}
            for member in (one, *many):
                parameters = member.optimizer._weights.parameters
                for placement, parameter in zip(member.optimizer.layout.placements, parameters, strict=True):
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


def compiled_layers_are_captured_once() -> None:
    """Not once for every exchange, until Dynamo gives up, which is an error here."""

    def captured(model: Any) -> str:
        return compile_layers(model, "eager")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psyche_node.training.preparing.compile_layers", captured)
        patch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        one = session(dist.get_world_size(), options=Options(compile=True))
        for round in range(2):
            one.train(round, range(6), run=RUN, member=0)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    counters.clear()


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


def ranks_keep_pace_with_what_rank_0_writes() -> None:
    """One tensor after the other, however long rank 0 takes to hash it: NCCL would not wait for all of them."""
    one, waited = session(1), list[tuple[int, ...]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_ranks, "_wait_for", lambda tensor: waited.append(tuple(tensor.shape)))
        one.model_root()
    shapes = [tuple(p.shape) for _, p in sorted(one.model.named_parameters(), key=lambda pair: pair[0])]
    assert waited == ([] if dist.get_rank() == 0 else shapes)


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
