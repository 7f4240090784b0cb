"""A model made ready for training: loaded, divided, checked, with its loss; and why it is as it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from optimizer.layout import Layout
from psyche_node.planning.context import beyond, context_window
from psyche_node.planning.memory import Attention
from psyche_node.planning.shape import has_experts
from psyche_node.training.attention import NAMES, candidates
from psyche_node.training.device import Device, choose_device
from psyche_node.training.errors import ModelError, NotTheRuns, OutOfMemory, OutOfStep, SeparationError, TrainingError
from psyche_node.training.fit import Site, checkpoint_activations, choose_fit, free_memory
from psyche_node.training.forward import LossFunction, Root
from psyche_node.training.model import build_model
from psyche_node.training.options import DEFAULTS, Options
from psyche_node.training.reader import DataReader
from psyche_node.training.separation import check_separation
from psyche_node.training.weights import load_into
from psyche_node.training.world import ONE_PROCESS, World, is_out_of_memory

Shapes = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Trainable:
    """A model ready for training, on its device. ``only_bf16``: its weights have no fp32 masters."""

    model: Any
    device: Device
    loss: LossFunction
    only_bf16: bool
    reasons: list[str]


def prepare_model(
    folder: Path,
    data: DataReader,
    device: str,
    micro_batch: int,
    threads: int,
    z_loss: float = 0.0,
    world: World = ONE_PROCESS,
    tensor_parallel: int = 1,
    options: Options = DEFAULTS,
    in_bf16: Callable[[Shapes], bool] = lambda shapes: False,
    lookahead: bool = True,
) -> Trainable:
    """Load a model, divide it over the ranks, and make sure that it can be trained on ``data``.

    ``in_bf16`` decides by the shapes of the trained tensors whether its weights are kept in bf16 only.
    ``lookahead``: whether the optimizer will put a copy of them aside.

    Raises:
        ModelError: the folder cannot be loaded, or the model's vocabulary is too small for the data.
        SeparationError: packed documents see each other, or tokens what comes after them.
        TrainingError: there is no such device, or the ranks cannot be divided by ``tensor_parallel``.
    """
    chosen = world.together(lambda: choose_device(world.device(device), data.sequence_length, None, threads))
    model, reasons = world.together(lambda: build_model(folder))
    only_bf16 = in_bf16([(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad])
    if only_bf16:
        model, reasons = world.together(lambda: build_model(folder, torch.bfloat16))
    reasons.append(
        "weights in bf16, rounded by chances that all members share: as the run's layout digest or the settings say"
        if only_bf16
        else "weights in fp32: signed steps are too small for bf16"
    )
    check_vocabulary(folder, model, data.vocabulary)
    reasons += check_places(folder, model, data.sequence_length)
    root = Root(model)
    choices = candidates(model, options.attention, chosen.torch)
    reasons += world.shard(model, root, chosen.torch, tensor_parallel)
    world.together(lambda: load_into(model, folder, chosen.torch))
    if options.compile:
        reasons.append(compile_layers(model))
    loss, found = _with_attention(model, root, choices, data, chosen, z_loss, world, options.compile)
    site = Site(
        world.data_parallel,
        tensor_parallel,
        only_bf16,
        attention=_KEPT.get(model.config._attn_implementation, "lengths"),
        lookahead=lookahead,
        z_loss=bool(z_loss),
    )
    # Ranks go through the same micro-batches, so the one with least memory decides.
    free = world.least(free_memory(model, chosen.torch, world.on_host))
    fit = world.told(choose_fit(model, chosen.torch, data.sequence_length, micro_batch, options, site, free))
    if fit.checkpointing:
        checkpoint_activations(model)
    chosen.micro_batch = fit.micro_batch
    return Trainable(model, chosen, loss, only_bf16, [*chosen.reasons, *reasons, *fit.reasons, *found, loss.reason])


def check_vocabulary(folder: Path, model: Any, tokens: int) -> None:
    """Raises ModelError for a model that has fewer than the ``tokens`` that its data was prepared with."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if vocabulary < tokens:
        raise ModelError(
            f"{folder} has {vocabulary} token embeddings; the data was prepared with {tokens} tokens. Prepare the data "
            "with this model's tokenizer"
        )


def check_places(folder: Path, model: Any, length: int) -> list[str]:
    """Return a line where sequences of ``length`` tokens reach beyond what the model was made for.

    Raises ModelError for one whose table of learned positions ends before them.
    """
    for name, module in model.named_modules():
        is_table = isinstance(module, torch.nn.Embedding) and re.search(r"wpe$|position", name.rpartition(".")[2])
        if is_table and module.num_embeddings < length:
            raise ModelError(
                f"{folder} has learned positions for {module.num_embeddings} tokens ({name}), and the data's sequences "
                f"have {length}. Prepare the data with a sequence length of at most {module.num_embeddings}"
            )
    unseen = beyond(context_window(model.config.get_text_config().to_dict()), length)
    return [] if unseen is None else [unseen]


_KEPT: Final[dict[str, Attention]] = {"sdpa": "mask", "eager": "scores"}


def runs_in_bf16(wanted: str, shapes: Shapes, topk: int, layout_digest: bytes | None) -> bool:
    """Whether weights are kept in bf16 only: as asked, or as the run's layout digest says."""
    if wanted != "auto" or layout_digest is None:
        return wanted == "bf16"
    return Layout.build(shapes, topk, only_bf16=True).digest == layout_digest


def check_tensors(folder: Path, shapes: Shapes, topk: int, layout_digest: bytes, root: str) -> None:
    """Raises NotTheRuns for a model that has other tensors than the run's, whatever its weights are kept in.

    Takes no weights: a model of the same tensors is told apart by its root, once it is loaded. ``root``: the run's.
    """
    found = [Layout.build(shapes, topk, only_bf16=only_bf16).digest for only_bf16 in (False, True)]
    if layout_digest not in found:
        raise NotTheRuns(
            f"the model in {folder} is not the run's, whose model root is {root}: its tensors have other names or "
            f"shapes (layout digest {found[0].hex()}, in bf16 {found[1].hex()}; the run has {layout_digest.hex()}). "
            f"Get the run's model into {folder}"
        )


def compile_layers(model: Any, backend: str = "inductor") -> str:
    """Compile each decoder layer in place, names and all; return a line on it. Happens when they are first called."""
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds] or [model.base_model]
    for layer in layers:
        layer.compile(backend=backend)
    return f"torch.compile of {len(layers)} layers: as asked; its updates may differ in bits from those without"


def _with_attention(
    model: Any,
    root: Root,
    choices: Sequence[tuple[str, str]],
    data: DataReader,
    device: Device,
    z_loss: float,
    world: World,
    compiled: bool,
) -> tuple[LossFunction, list[str]]:
    """The loss, with the first implementation of attention that works and separates documents on all ranks; and why.

    Where layers are ``compiled``, each is tried without that first: ranks' exchanges are not counted in compiled
    layers, so that an attention that does not work in the second layer of one rank would leave the others waiting.
    """
    reasons: list[str] = []
    mixture = has_experts(model.config.get_text_config().to_dict())
    for number, (name, reason) in enumerate(choices):
        model.set_attn_implementation(NAMES[name])

        def tried() -> tuple[LossFunction, str]:
            with device.compute():
                loss = LossFunction(model, z_loss, root)
                length = data.sequence_length
                return loss, check_separation(loss.logits, data.vocabulary, device.torch, length, mixture)

        def uncompiled() -> tuple[LossFunction, str]:
            with torch.compiler.set_stance("force_eager"):
                return tried()

        def motions() -> None:
            model.set_attn_implementation(NAMES["eager"])  # which needs nothing that may be missing
            with contextlib.suppress(SeparationError):
                uncompiled()

        try:
            if compiled:
                world.jointly(uncompiled, motions)
            loss, separation = world.jointly(tried, motions)
        except (ModelError, OutOfStep):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"memory ran out on {device.words} when attention was tried out on a few tokens ({error}). Divide "
                    "the model over more GPUs, or end what else uses the memory"
                ) from error
            if number + 1 == len(choices):
                if isinstance(error, SeparationError):
                    raise
                raise TrainingError(
                    f"the model cannot be run on {device.words}: {type(error).__name__}: {error}. Set compile to false "
                    "and attention to sdpa; if it is memory, divide the model over more GPUs"
                ) from error
            reasons.append(
                f"attention {name} does not work here: {(str(error) or type(error).__name__).splitlines()[0]}"
            )
            continue
        return loss, [*reasons, reason, separation]
    raise TrainingError(f"{type(model).__name__} has no implementation of attention that can be used here")
