"""A node that has nothing to do says so before it asks for anything."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from node_values import pulse_of
from solders.pubkey import Pubkey

from coordinator.state import Phase
from psyche_node.node.config import NodeConfig
from psyche_node.node.daemon import Node, _end, _linger
from psyche_node.node.membership import RunFinished

KEY = "1" * 32


class FinishedRun:
    """The client of a chain where the wallet is empty, and the run over."""

    rpc = SimpleNamespace(urls=("http://127.0.0.1:1",))
    addresses = SimpleNamespace(run=Pubkey.from_bytes(bytes([7] * 32)))
    program_id = Pubkey.from_bytes(bytes([8] * 32))

    async def pulse(self) -> Any:
        return pulse_of(Phase.FINISHED, 4, final_rounds=4)

    async def balance(self, key: Pubkey) -> int:
        return 0

    async def close(self) -> None:
        pass


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened(*arguments: Any, **named: Any) -> FinishedRun:
        return FinishedRun()

    monkeypatch.setattr("psyche_node.node.daemon.open_run", opened)


def take_part(folder: Path, run: str, **settings: Any) -> None:
    rpc = ("http://127.0.0.1:1",)
    asyncio.run(Node(NodeConfig(run=run, rpc=rpc, folder=folder, model=folder, data=folder, **settings)).run())


def test_whoever_comes_after_the_end_is_not_asked_for_funds(tmp_path: Path, finished: None) -> None:
    with pytest.raises(RunFinished, match="finished after 4 rounds"):
        take_part(tmp_path, KEY)


@pytest.mark.parametrize(
    ("run", "settings", "warned"),
    [
        ("demo", {}, True),
        ("demo", {"program": KEY}, True),
        ("demo", {"owner": KEY}, True),
        ("demo", {"program": KEY, "owner": KEY}, False),
        (KEY, {}, False),
    ],
)
def test_a_name_that_a_stranger_may_take_is_warned_of(
    tmp_path: Path, finished: None, caplog: pytest.LogCaptureFixture, run: str, settings: dict[str, str], warned: bool
) -> None:
    with pytest.raises(RunFinished):
        take_part(tmp_path, run, **settings)
    said = [one.getMessage() for one in caplog.records if "by its name" in one.getMessage()]
    assert len(said) == warned
    assert all(f'run = "{FinishedRun.addresses.run}", or program = "{FinishedRun.program_id}"' in one for one in said)


class Process:
    """One that takes as long to end as it is let."""

    def __init__(self) -> None:
        self.stopping, self.killed = asyncio.Event(), False

    async def stop(self) -> None:
        self.stopping.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.killed = True


def test_whoever_asks_twice_waits_for_no_process() -> None:
    async def stopped() -> None:
        processes = Process(), Process()
        ending = asyncio.create_task(_end(*processes))  # type: ignore[arg-type]
        for one in processes:
            await one.stopping.wait()
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert all(one.killed for one in processes)

    asyncio.run(stopped())


def test_whoever_is_done_is_not_interrupted_by_being_stopped() -> None:
    async def stopped() -> str:
        async def node() -> str:
            await _linger()
            await asyncio.sleep(0)  # its processes end in good order
            return "done"

        task = asyncio.create_task(node())
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(stopped()) == "done"
