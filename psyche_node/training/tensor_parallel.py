"""Tensor parallelism: which matrices of a model are cut, and the layers that work on a part of one.

The plan is the one that transformers ships with a model's config. A column-parallel matrix has some of its outputs
here, a row-parallel one some of its inputs (Shoeybi et al. 2019, arXiv 1909.08053, section 3); embedding and head are
cut along the vocabulary. Parts are those of `torch.chunk`, so that they need not be of one size.

Legend: B sequences, L places, D hidden size, V vocabulary, I inputs and O outputs of a matrix; small letters are parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from psyche_node.training.errors import ModelError
from psyche_node.training.exchanges import all_gather, all_reduce

_COLUMNS, _ROWS, _PARTIAL = "colwise", "rowwise", "replicated_with_grad_allreduce"
# Norms over each head: on every rank they see its own heads only. Some versions of transformers leave them out of the
# plan.
_HEAD_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True, slots=True)
class Cut:
    """One part of a dimension of ``size``, on the ranks of ``mesh``, which has one axis."""

    mesh: DeviceMesh
    size: int

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def longest(self) -> int:
        return -(-self.size // self.mesh.size())

    @property
    def first(self) -> int:
        return min(self.longest * self.mesh.get_local_rank(), self.size)

    @property
    def length(self) -> int:
        return min(self.longest, self.size - self.first)


class _Copy(torch.autograd.Function):
    """The same on every rank going forward; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """Summed going forward; the gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """Parts of the last dimension put together; of the gradient, the own part is taken."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        padded = functional.pad(part, (0, cut.longest - cut.length)).contiguous()
        parts = [torch.empty_like(padded) for _ in range(cut.mesh.size())]
        all_gather(parts, padded, cut.group)
        return torch.cat(parts, dim=-1)[..., : cut.size].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, ctx.cut.first, ctx.cut.length).contiguous(), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A new tensor: autograd's own must stay as it is.
    total = x.clone(memory_format=torch.contiguous_format)
    all_reduce(total, group)
    return total


def local(tensor: Tensor) -> Tensor:
    """What is here of a parameter, differentiably; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(full: Tensor, mesh: DeviceMesh, dimension: int) -> nn.Parameter:
    """A parameter of which every rank of ``mesh`` holds its part along ``dimension``."""
    cut = Cut(mesh, full.shape[dimension])
    held = full.detach().narrow(dimension, cut.first, cut.length).clone(memory_format=torch.contiguous_format)
    sharded = DTensor.from_local(
        held, mesh, [Shard(dimension)], run_check=False, shape=full.shape, stride=full.stride()
    )
    return nn.Parameter(sharded, requires_grad=full.requires_grad)


class ColumnLinear(nn.Module):
    """``nn.Linear`` with some of its outputs: (..., I) -> (..., o), or (..., O) if they are to be gathered."""

    def __init__(self, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, mesh: DeviceMesh, gather: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O
        self.cut, self._gather = Cut(mesh, weight_OI.shape[0]), gather

    def forward(self, x: Tensor) -> Tensor:
        copied: Tensor = _Copy.apply(x, self.cut.group)  # type: ignore[no-untyped-call]
        y = functional.linear(copied, local(self.weight), None if self.bias is None else local(self.bias))
        return cast(Tensor, _Gather.apply(y, self.cut)) if self._gather else y  # type: ignore[no-untyped-call]


class RowLinear(nn.Module):
    """``nn.Linear`` with some of its inputs: (..., i) -> (..., O), summed over the ranks, the same on each."""

    def __init__(self, weight_OI: nn.Parameter, bias_O: nn.Parameter | None, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O
        self._group = mesh.get_group()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Sum.apply(functional.linear(x, local(self.weight)), self._group)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(nn.Module):
    """``nn.Embedding`` with some of its rows: tokens (B, L) -> (B, L, D), the same on each rank."""

    def __init__(self, weight_VD: nn.Parameter, padding: int | None, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight, self.cut = weight_VD, Cut(mesh, weight_VD.shape[0])
        inside = padding is not None and 0 <= padding - self.cut.first < self.cut.length
        self._padding = cast(int, padding) - self.cut.first if inside else None

    def forward(self, tokens_BL: Tensor) -> Tensor:
        rows_BL = tokens_BL - self.cut.first
        absent_BL = (rows_BL < 0) | (rows_BL >= self.cut.length)
        x_BLD = functional.embedding(rows_BL.masked_fill(absent_BL, 0), local(self.weight), self._padding)
        x_BLD = x_BLD.masked_fill(absent_BL[..., None], 0)
        return cast(Tensor, _Sum.apply(x_BLD, self.cut.group))  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class TensorParallel:
    """What was cut. ``partial``: parameters held by every rank whose gradients there are parts of a sum."""

    partial: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)


def cut_model(model: nn.Module, mesh: DeviceMesh) -> TensorParallel:
    """Cut the matrices of a causal language model over the ranks of ``mesh``, in place.

    Raises ModelError if transformers has no plan for its kind, or one that is not understood here.
    """
    plan = _plan(model)
    done, made = TensorParallel(), dict[int, nn.Parameter]()
    base = cast(nn.Module, model.base_model)
    of_parents: dict[str, dict[str, str]] = {}
    for name, module in base.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style in (_COLUMNS, _ROWS):
            if type(module) is not nn.Linear:
                raise ModelError(f"tensor parallelism cannot cut {name}, a {type(module).__name__}. {_INSTEAD}")
            of_parents.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = style
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    whole = set[str]()
    for path, children in of_parents.items():
        parent = base.get_submodule(path)
        if not _heads_fit(parent, children, mesh.size()):
            whole.add(path.rpartition(".")[2])
            continue
        done.partial |= {names[id(parameter)] for parameter in _beside(parent, path, children, plan)}
        for child, style in children.items():
            setattr(parent, child, _cut_linear(getattr(parent, child), style, mesh, made))
    done.reasons += [
        f"{name} is held whole by each of the {mesh.size()} tensor-parallel ranks: its heads cannot be divided by that"
        for name in sorted(whole)
    ]
    done.reasons.append(_cut_vocabulary(model, mesh, made))
    return done


_INSTEAD = "Leave tensor_parallel at 1: FSDP2 shards any model"


def _plan(model: nn.Module) -> dict[str, str]:
    config = cast(Any, model).config
    plan = dict(getattr(config, "base_model_tp_plan", None) or {})
    if not plan:
        raise ModelError(f"transformers has no tensor-parallel plan for {config.model_type} models. {_INSTEAD}")
    for name, style in plan.items():
        if style not in (_COLUMNS, _ROWS, _PARTIAL):
            raise ModelError(f"the tensor-parallel plan of {config.model_type} cuts {name} by {style!r}. {_INSTEAD}")
    return plan


def _heads_fit(parent: nn.Module, children: dict[str, str], ranks: int) -> bool:
    """Whether every rank gets whole heads, and each key and value head along with its queries."""
    width = getattr(parent, "head_dim", 1)
    columns = [cast(nn.Linear, parent.get_submodule(child)) for child, style in children.items() if style == _COLUMNS]
    return width == 1 or all(linear.out_features % (width * ranks) == 0 for linear in columns)


def _beside(parent: nn.Module, path: str, children: dict[str, str], plan: dict[str, str]) -> list[nn.Parameter]:
    """Parameters beside cut matrices, which see parts only. Raises ModelError if what they do is not known."""
    found = []
    for name, parameter in parent.named_parameters():
        owner = name.partition(".")[0]
        if owner in children:
            continue
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", f"{path}.{owner}"))
        if style != _PARTIAL and not (owner in _HEAD_NORMS and parameter.shape[-1] == getattr(parent, "head_dim", 0)):
            raise ModelError(f"the tensor-parallel plan does not say what {path}.{name} is for. {_INSTEAD}")
        found.append(parameter)
    return found


def _cut_linear(linear: nn.Linear, style: str, mesh: DeviceMesh, made: dict[int, nn.Parameter]) -> nn.Module:
    bias = cast(nn.Parameter | None, linear.bias)
    if style == _ROWS:
        return RowLinear(_once(linear.weight, mesh, 1, made), bias, mesh)
    return _columns(linear, mesh, made, gather=False)


def _columns(linear: nn.Linear, mesh: DeviceMesh, made: dict[int, nn.Parameter], *, gather: bool) -> ColumnLinear:
    bias = cast(nn.Parameter | None, linear.bias)
    cut_bias = None if bias is None else _once(bias, mesh, 0, made)
    return ColumnLinear(_once(linear.weight, mesh, 0, made), cut_bias, mesh, gather)


def _cut_vocabulary(model: nn.Module, mesh: DeviceMesh, made: dict[int, nn.Parameter]) -> str:
    """Cut embedding and head along the vocabulary; return a line on it. Tied ones stay tied."""
    embedding, head = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or type(head) is not nn.Linear:
        return "embedding and head are held whole by each tensor-parallel rank: they are of a kind of their own"
    weight = _once(embedding.weight, mesh, 0, made)
    cast(Any, model).set_input_embeddings(VocabularyEmbedding(weight, embedding.padding_idx, mesh))
    cast(Any, model).set_output_embeddings(_columns(head, mesh, made, gather=True))
    return f"tensor parallel over {mesh.size()} ranks: matrices by transformers' plan, embedding and head by vocabulary"


def _once(full: Tensor, mesh: DeviceMesh, dimension: int, made: dict[int, nn.Parameter]) -> nn.Parameter:
    """``part``, but the same one for the same parameter."""
    if id(full) not in made:
        made[id(full)] = part(full, mesh, dimension)
    return made[id(full)]
