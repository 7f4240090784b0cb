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
from psyche_node.node.daemon import Node, _linger
from psyche_node.node.membership import RunFinished


class FinishedRun:
    """The client of a chain where the wallet is empty, and the run over."""

    rpc = SimpleNamespace(urls=("http://127.0.0.1:1",))

    async def pulse(self) -> Any:
        return pulse_of(Phase.FINISHED, 4, final_rounds=4)

    async def balance(self, key: Pubkey) -> int:
        return 0

    async def close(self) -> None:
        pass


def test_whoever_comes_after_the_end_is_not_asked_for_funds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened(*arguments: Any, **named: Any) -> FinishedRun:
        return FinishedRun()

    monkeypatch.setattr("psyche_node.node.daemon.open_run", opened)
    config = NodeConfig(run="1" * 32, rpc=("http://127.0.0.1:1",), folder=tmp_path, model=tmp_path, data=tmp_path)
    with pytest.raises(RunFinished, match="finished after 4 rounds"):
        asyncio.run(Node(config).run())


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
