"""Several processes that train one replica: the mesh, FSDP2 and tensor parallelism, and what is summed over whom.

The mesh has up to two axes: "data", over which the batch is divided and weights are sharded by FSDP2, and "tensor",
over which matrices are cut (`tensor_parallel`). Neighbouring ranks are on one tensor axis, so that it stays inside a
host.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from psyche_node.exits import Exit, exit_for
from psyche_node.mapping import mapped
from psyche_node.training.control import Control
from psyche_node.training.copies import Part, copy_files
from psyche_node.training.errors import OutOfMemory, OutOfStep, RankFailed, TrainingError
from psyche_node.training.exchanges import EXCHANGES, CountedAllGather, CountedReduceScatter
from psyche_node.training.tensor_parallel import TensorParallel, cut_model
from psyche_node.training.world import Rows, World, is_out_of_memory

if TYPE_CHECKING:
    from psyche_node.training.forward import Root

T = TypeVar("T")
# It warns of every tensor that is gathered over both axes, which is as it has to be.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

log = logging.getLogger(__name__)
_PATIENCE = timedelta(seconds=30)
"""How long a rank that failed within a step waits for others that may wait for it there."""
_START = timedelta(minutes=10)
"""How long the ranks of a site may take to come together."""
_PARTING_SECONDS = 5.0


def join(listening: int | None = None) -> tuple[World, Control | None]:
    """Meet the other ranks, if the environment says that there are any (as torchrun or the daemon set it).

    ``listening``: a socket that already listens at MASTER_ADDR:MASTER_PORT, for rank 0 to serve the meeting place at.
    Raises TrainingError if the environment is incomplete or the others do not come.
    """
    environ = os.environ
    size = int(environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), None
    try:
        rank, address, port = int(environ["RANK"]), environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise TrainingError(
            f"WORLD_SIZE is {size}, and RANK, MASTER_ADDR or MASTER_PORT is missing or wrong ({error}). Start several "
            "ranks by torchrun, or by the ranks or gpus setting of psyche-node run"
        ) from error
    serves = listening is not None or (rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        server = TCPStore(
            address,
            port,
            size if serves else None,
            is_master=serves,
            timeout=_START,
            wait_for_workers=False,
            master_listen_fd=listening,
        )
        # Requests are waited for over a connection of their own: a wait holds its connection, which others need.
        waiting = TCPStore(address, port, is_master=False, timeout=_START, wait_for_workers=False)
        control = Control(PrefixStore(f"control{attempt}", waiting), rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore(f"group{attempt}", server), rank=rank, world_size=size, timeout=_START
        )
    except RuntimeError as error:
        raise TrainingError(
            f"rank {rank} of {size} did not meet the others at {address}:{port}: {error}. Look at the logs of the "
            "other ranks, and at firewalls between the hosts"
        ) from error
    return Ranks(rank, size), control


def part() -> None:
    """Give up what ``join`` has made, if anything, before this process ends: torch warns of groups that are left.

    In a thread, for a bounded time: after a failure NCCL may wait for an exchange that the others never come to.
    """
    if dist.is_initialized():
        parting = threading.Thread(target=dist.destroy_process_group, name="parting", daemon=True)
        parting.start()
        parting.join(_PARTING_SECONDS)


class Ranks(World):
    """This process as one of several, whose default group is up."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._local = int(os.environ.get("LOCAL_RANK", rank))
        self.on_host = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        self._one_host = self.on_host == size
        self._talk = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._hosts = None if self._one_host else self._first_of_hosts()
        self._mesh: DeviceMesh
        self._cut = TensorParallel()
        self._copies: set[str] = set()
        self._root: Root | None = None  # what FSDP2 shards

    def _first_of_hosts(self) -> dist.ProcessGroup:
        """The group of each host's first rank; the others know of it, and are not in it."""
        numbers = [0] * self.size
        dist.all_gather_object(numbers, self._local, group=self._talk)
        first = [rank for rank, number in enumerate(numbers) if number == 0]
        return cast(dist.ProcessGroup, dist.new_group(first, backend="gloo"))

    def device(self, name: str) -> str:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda:"):
            raise TrainingError(f"device {name} is one GPU, and this node has {self.size} ranks: set device to cuda")
        if name == "cuda":
            if self._local >= (seen := torch.cuda.device_count()):
                raise TrainingError(
                    f"rank {self.rank} is number {self._local} of its host, where PyTorch sees {seen} GPUs: set "
                    "gpus to that, or device to cpu"
                )
            torch.cuda.set_device(self._local)
            name = f"cuda:{self._local}"
        return name

    def shard(self, model: Any, root: Root, device: torch.device, tensor_parallel: int) -> list[str]:
        if tensor_parallel < 1 or self.size % tensor_parallel:
            raise TrainingError(f"{self.size} ranks cannot be divided by tensor_parallel, which is {tensor_parallel}")
        self.data_parallel = self.size // tensor_parallel
        self._mesh = init_device_mesh(
            device.type, (self.data_parallel, tensor_parallel), mesh_dim_names=("data", "tensor")
        )
        reasons = []
        if tensor_parallel > 1:
            self._cut = cut_model(model, self._mesh["tensor"])
            reasons += self._cut.reasons
        self._copies = {name for name, p in model.named_parameters() if not isinstance(p, DTensor)}
        if self.data_parallel > 1:
            reasons.append(self._shard_fully(model, root, device))
        return reasons

    def _shard_fully(self, model: Any, root: Root, device: torch.device) -> str:
        policy, mesh = _precision(device), self._mesh["data"]
        self._root = root
        kinds = set(model._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        for module in [*layers, root]:
            # After an evaluation, nothing may stay gathered: the next update is written to the shards.
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            sharded.set_custom_all_gather(CountedAllGather())
            sharded.set_custom_reduce_scatter(CountedReduceScatter())
        return f"FSDP2 over {self.data_parallel} ranks: {len(layers)} layers, and the rest as one"

    def divide(self, rows: Rows, size: int) -> Iterator[tuple[Rows, bool]]:
        mine = rows[self._mesh.get_local_rank("data") :: self.data_parallel]
        most = -(-len(rows) // self.data_parallel)
        for start in range(0, most, size):
            some = mine[start : start + size]
            yield (some, True) if len(some) else (rows[:1], False)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._root is not None:
                if (reset := getattr(self._root, "reset_iter_state", None)) is None:
                    raise OutOfStep(
                        f"after {type(error).__name__} ({error}) FSDP2 of PyTorch {torch.__version__} cannot go on. "
                        "PyTorch 2.13 can"
                    ) from error
                # Before it is sharded again: what gathered parameters have of a gradient would be added to the next.
                self._root.zero_grad()
                reset()
            raise

    @torch.no_grad()
    def complete(self, model: nn.Module) -> None:
        """Of what every tensor-parallel rank holds: sum where each saw a part, else take the first one's.

        The copies are equal already where kernels are deterministic, which not all are on a GPU.
        """
        if self._mesh["tensor"].size() == 1:
            return
        group = self._mesh["tensor"].get_group()
        for name, parameter in model.named_parameters():
            if parameter.grad is None or name not in self._copies:
                continue
            gradient = _held(parameter.grad)
            if name in self._cut.partial:
                dist.all_reduce(gradient, group=group)
            else:
                dist.broadcast(gradient, group=group, group_src=0)

    @torch.no_grad()
    def clip(self, model: nn.Module, norm: float) -> float:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self._mesh.device_type)
        for gradient in gradients:
            # Every value counts once, however many ranks hold it.
            copies = self.size // _parts(gradient)
            squares += torch.linalg.vector_norm(_held(gradient)).double() ** 2 / copies
        dist.all_reduce(squares)
        before = math.sqrt(float(squares)) if math.isfinite(float(squares)) else math.nan
        if 0 < norm < before:
            for gradient in gradients:
                _held(gradient).mul_(norm / before)
        return before

    def sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self._mesh.device_type)
        dist.all_reduce(total, group=self._mesh["data"].get_group())
        return float(total)

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if self.rank == 0:
            return full.detach().cpu()
        _wait_for(full)
        return None

    def least(self, value: int) -> int:
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self._talk)
        return min(values)

    def told(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._talk)
        return box[0]

    def jointly(self, step: Callable[[], T], motions: Callable[[], object] | None = None) -> T:
        EXCHANGES.reset()
        try:
            failure, result = self._tried(step)
            others_wait = failure is not None and (motions is None or not self._goes_through(motions))
            self._arrive(failure, _PATIENCE if others_wait else _START)
            self._agree(failure)
        finally:
            # Motions may have ended before they came to where the step was: the next exchange is not one of theirs.
            EXCHANGES.reset()
        return cast(T, result)

    def _tried(self, step: Callable[[], T]) -> tuple[Exception | None, T | None]:
        try:
            with self.attempt():
                return None, step()
        except OutOfStep:
            raise
        except Exception as error:
            log.info("a step failed on this rank", exc_info=True)
            # Without what the frames hold, which may be all the memory that there is.
            return error.with_traceback(None), None

    def _goes_through(self, motions: Callable[[], object]) -> bool:
        """Bring the others to the end of a step that failed here; say whether that went well."""
        if self._mesh.device_type == "cuda":
            torch.cuda.synchronize()  # what is on its way still writes to memory
            torch.cuda.empty_cache()
        EXCHANGES.again()
        try:
            with self.attempt():
                motions()
        except OutOfStep:
            raise
        except Exception:
            log.info("what this rank does for the others failed too", exc_info=True)
            return False
        return True

    def _arrive(self, failure: Exception | None, patience: timedelta) -> None:
        """Wait for the others at the end of a step."""
        try:
            dist.monitored_barrier(group=self._talk, timeout=patience)
        except RuntimeError as error:
            here = "is there" if failure is None else f"failed within it ({type(failure).__name__}: {failure})"
            raise OutOfStep(
                f"ranks did not come to the end of a step, and cannot go on together; rank {self.rank} {here}"
            ) from error

    def together(self, step: Callable[[], T]) -> T:
        failure: Exception | None = None
        result: T | None = None
        try:
            result = step()
        except Exception as error:
            failure = error
        self._agree(failure)
        return cast(T, result)

    def _agree(self, failure: Exception | None) -> None:
        """Raise on all ranks if something failed on one: lack of memory only if nothing else was the matter."""
        said: list[tuple[bool, str, int | None] | None] = [None] * self.size
        words = failure and (is_out_of_memory(failure), f"{type(failure).__name__}: {failure}", _exit_code(failure))
        dist.all_gather_object(said, words, group=self._talk)
        failed = [(*one, rank) for rank, one in enumerate(said) if one is not None]
        if not failed:
            return
        short, first, code, rank = min(failed, key=lambda one: (one[0], one[3]))
        if failure is not None and is_out_of_memory(failure) == short:
            raise failure
        what = f"rank {rank} of {self.size}: {first}"
        raise OutOfMemory(what) if short else RankFailed(what, code)

    def files(self, paths: Sequence[Path]) -> list[memoryview]:
        if self._one_host:
            return self.together(lambda: [mapped(path) for path in paths])
        sizes = self.together(lambda: [path.stat().st_size for path in paths] if self.rank == 0 else [])
        with contextlib.ExitStack() as stack:
            # Unlinked once it is mapped everywhere on this host: the memory goes when nobody looks at it any more.
            folder = self.together(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="psyche-updates-")))
            places = self._fetched(paths, self.told(sizes), Path(folder))
            return self.together(lambda: [mapped(place) for place in places])

    def _fetched(self, paths: Sequence[Path], sizes: Sequence[int], folder: Path) -> list[Path]:
        """Send rank 0's files to every other host; return where they are on this one. Raises OSError, on all ranks."""
        told: list[Any] = [None] * self.size
        host = self.rank - self._local
        dist.all_gather_object(told, (host, str(folder)), group=self._talk)
        there = Path(next(place for first, place in told if first == host))
        places = list(paths) if host == 0 else [there / str(number) for number in range(len(paths))]
        failure: OSError | None = None
        if self._local == 0 and self._hosts is not None:
            part: Part = "reads" if self.rank == 0 else "writes"
            failure = copy_files(part, list(zip(paths, places, sizes, strict=True)), self._hosts)

        def check() -> None:
            if failure is not None:
                raise failure

        self.together(check)
        return places


def _exit_code(failure: Exception) -> int | None:
    code = exit_for(failure)
    return None if code is Exit.UNEXPECTED else int(code)


def _precision(device: torch.device) -> MixedPrecisionPolicy:
    """On a GPU weights travel in bf16, as they are multiplied; gradients are summed in fp32."""
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if device.type == "cuda" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def _wait_for(gathered: Tensor) -> None:
    """Until rank 0 has taken its part: it hashes and writes meanwhile, and NCCL ends a process whose exchange has been
    waiting for more than its patience. So no rank may ask for the whole model at once."""
    if gathered.is_cuda:
        torch.cuda.synchronize(gathered.device)


def _held(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _parts(tensor: Tensor) -> int:
    """Into how many parts a tensor is divided; all other ranks hold copies."""
    if not isinstance(tensor, DTensor):
        return 1
    axes = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(axis) for axis, how in axes if not how.is_replicate())
