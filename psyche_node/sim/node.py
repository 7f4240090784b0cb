"""One node of the simulation: its place, the command line that starts it, and what its journal says."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.instructions import DEFAULT_SHARE
from psyche_node.faults import Fault
from psyche_node.node.journal import JournalReader
from psyche_node.sim.processes import Managed
from psyche_node.sim.settings import SimSettings

HOST = "127.0.0.1"
# Of a node: libp2p, gRPC, bulk.
PORTS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """The ports of a node, and those that the others reach them by; 0 is its own choice."""

    p2p: int = 0
    grpc: int = 0
    bulk: int = 0
    announced_p2p: int = 0
    announced_grpc: int = 0
    announced_bulk: int = 0


@dataclass(slots=True)
class SimNode:
    """One node of the simulation and what its journal has said so far."""

    name: str
    index: int
    wallet: str
    node_id: str
    process: Managed
    journal: JournalReader
    fault: Fault | None = None
    killed: bool = False
    ended_at: float | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any] | None:
        return next((line for line in reversed(self.lines) if line["kind"] == kind), None)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be expected of it."""
        return self.fault is Fault.OUTSIDER or not self.process.running or self.last("finished") is not None


def fault_of(settings: SimSettings, index: int) -> Fault | None:
    """Return what is wrong with a node on purpose; the adversaries come after the others."""
    return None if index < settings.nodes else settings.adversaries[index - settings.nodes]


def node_flags(settings: SimSettings, index: int, name: str, folder: Path, place: Place) -> list[str]:
    """Return the flags of ``psyche-node run``, without those that say where the run and the others are."""
    fault = fault_of(settings, index)
    arguments = {
        "--name": name,
        "--folder": str(folder),
        "--model": str(folder / "model"),
        "--data": str(folder / "data"),
        "--p2p-port": str(place.p2p),
        "--grpc-port": str(place.grpc),
        "--bulk-port": str(place.bulk),
        "--device": settings.device,
        "--ranks": str(settings.ranks_of(index).ranks),
        "--tensor-parallel": str(settings.ranks_of(index).tensor_parallel),
        "--threads": str(settings.threads_of(index)),
        "--micro-batch": str(settings.micro_batch_of(index)),
        # The nodes share this machine's cores: who happens to run alone would measure itself to be fast.
        "--share": str(DEFAULT_SHARE),
        "--check-every": str(settings.check_every),
        "--evaluate-every": str(settings.evaluate_every if index == 0 else 0),
    }
    if place.announced_grpc:
        arguments["--announce-p2p"] = f"{HOST}:{place.announced_p2p}"
        arguments["--announce-grpc"] = f"{HOST}:{place.announced_grpc}"
        arguments["--announce-bulk"] = f"{HOST}:{place.announced_bulk}"
    if settings.nodes - settings.private <= index < settings.nodes:
        arguments["--reachable"] = "no"
    if fault is not None:
        arguments["--fault"] = str(fault)
    flags = [part for pair in arguments.items() for part in pair]
    for task in settings.tasks if index == 0 else ():
        flags += ["--tasks", str(task)]
    return flags


def reserve_port(stack: contextlib.AsyncExitStack) -> int:
    """Return a free port that nobody else is given: it stays bound here, and a node can listen on it all the same."""
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    return int(sock.getsockname()[1])
