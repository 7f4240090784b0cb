"""One model in many layouts over the processes of the default group, and what a process holds of it, by brute force."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from optimizer.layout import Layout
from optimizer.sharding import local

Named = list[tuple[str, Tensor]]


class Net(nn.Module):
    """Dimensions that no number of processes cuts in whole blocks, tied weights, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(130, 70)
        self.head = nn.Linear(70, 130, bias=False)
        self.head.weight = self.embed.weight
        self.up = nn.Linear(70, 200)
        self.down = nn.Linear(200, 70)
        self.norm = nn.LayerNorm(70)
        self.tall = nn.Parameter(torch.empty(1000, 100))
        self.wide = nn.Parameter(torch.empty(70, 130))
        self.deep = nn.Parameter(torch.empty(6, 5, 70))
        self.long = nn.Parameter(torch.empty(5000))
        self.tiny = nn.Parameter(torch.empty(3))
        self.one = nn.Parameter(torch.empty(1))
        self.frozen = nn.Parameter(torch.ones(33, 65), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        x = x + self.tall[:, :70].mean(0) + (self.wide @ self.tall[:130, 0]) + self.deep.sum((0, 1))
        x = x * (1 + self.long.sum() * self.tiny.sum() + self.one) + self.frozen.mean()
        return self.head(x)


def trained(model: nn.Module) -> Named:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def values(seed: int, like: nn.Module, scale: float = 0.1) -> dict[str, Tensor]:
    """Full tensors for every trained parameter, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) * scale for name, p in trained(like)}


def numbered(like: nn.Module) -> dict[str, Tensor]:
    """Full tensors that say of every value which it is, counted from 1."""
    return {name: torch.arange(1.0, p.numel() + 1).view(p.shape) for name, p in trained(like)}


def net(full: dict[str, Tensor], shard: Callable[[nn.Module], object], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Net with these values, sharded."""
    model = Net()
    with torch.no_grad():
        for name, parameter in trained(model):
            parameter.copy_(full[name])
    model.to(dtype)
    shard(model)
    return model


def mesh(*shape: int) -> DeviceMesh:
    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def alone(model: nn.Module) -> None:
    pass


def fsdp(model: nn.Module, over: DeviceMesh | None = None) -> None:
    over = over or mesh(dist.get_world_size())
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=over)


def tp(model: nn.Module, over: DeviceMesh | None = None) -> None:
    parallelize_module(model, over or mesh(dist.get_world_size()), {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp_tp(model: nn.Module) -> None:
    both = mesh(2, dist.get_world_size() // 2)
    tp(model, both["inner"])
    fsdp(model, both["outer"])


def hsdp(model: nn.Module) -> None:
    fsdp(model, mesh(2, dist.get_world_size() // 2))


LAYOUTS = {1: [fsdp, tp], 2: [fsdp, tp, fsdp_tp, hsdp], 4: [fsdp, tp, fsdp_tp, hsdp]}


def layouts() -> list[Callable[[nn.Module], None]]:
    """Those that fit the number of processes."""
    return LAYOUTS[dist.get_world_size()]


class Shares:
    """Which values of some tensors are here, told by sharded tensors whose values are their own numbers from 1 on."""

    def __init__(self, named: Named) -> None:
        tensors = dict(named)
        self.layout = Layout.build([(name, tuple(p.shape)) for name, p in tensors.items()], topk=4)
        self.parameters = [tensors[placement.name] for placement in self.layout.placements]
        self.places = [local(p).detach().long() - 1 for p in self.parameters]

    @classmethod
    def of_net(cls, shard: Callable[[nn.Module], None]) -> Shares:
        return cls(trained(net(numbered(Net()), shard)))

    def random(self, seed: int) -> list[Tensor]:
        """Full tensors in the order of the placements."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(placement.shape, generator=generator) for placement in self.layout.placements]

    def held(self, full: list[Tensor]) -> list[Tensor | None]:
        """The values of full tensors that are here, in the shapes of the shards."""
        return [tensor.reshape(-1)[places] for tensor, places in zip(full, self.places, strict=True)]

    def mask(self) -> list[Tensor]:
        """Full tensors with 1 where a value is here."""
        return [
            torch.zeros(p.numel).index_fill_(0, places.reshape(-1), 1.0)
            for p, places in zip(self.layout.placements, self.places, strict=True)
        ]

    def shards(self, model: nn.Module, full: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, parameter of a model sharded like this one, and what is here of a full tensor of that name."""
        named = dict(trained(model))
        for placement, places in zip(self.layout.placements, self.places, strict=True):
            yield placement.name, named[placement.name], full[placement.name].reshape(-1)[places]


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """A gradient for a parameter, from what of it belongs here."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
