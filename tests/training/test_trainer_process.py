"""The real training process, with real prepared data, driven over its socket as the supervisor drives it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tiny import terms

from optimizer.layout import Layout
from psyche_node.data import PackedDataset
from psyche_node.ipc import Endpoint, IpcError, Message, Ok, RemoteFailure
from psyche_node.training import messages as m

RUN = "ab" * 32


@asynccontextmanager
async def trainer() -> AsyncIterator[tuple[Endpoint, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_node.trainer", "--fd", str(theirs.fileno()), "--threads", "1"],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
    )
    theirs.close()
    endpoint = await Endpoint.over("training", ours, lambda event: None)
    try:
        yield endpoint, process
    finally:
        await endpoint.close()
        await asyncio.to_thread(process.communicate, timeout=90)


def load(model_dir: Path, packed: Path, **changes: object) -> m.Load:
    return m.Load(model=str(model_dir), data=str(packed), terms=terms(), device="cpu", **changes)  # type: ignore[arg-type]


def test_two_processes_train_together(model_dir: Path, packed: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with trainer() as (a, process_a), trainer() as (b, process_b):
            with pytest.raises(RemoteFailure, match="came before Load"):
                await a.call(m.Root(), m.RootIs)
            with pytest.raises(RemoteFailure, match="but the run trains on 1111"):
                await a.call(load(model_dir, packed, data_manifest="11" * 32), m.Loaded)
            digest = PackedDataset(packed).digest.hex()
            loaded, other = await asyncio.gather(
                a.call(load(model_dir, packed, data_manifest=digest, threads=1), m.Loaded),
                b.call(load(model_dir, packed, micro_batch=3, threads=2), m.Loaded),
            )
            layout = Layout.build([(name, tuple(shape)) for name, shape in loaded.shapes], terms().topk)
            assert (layout.digest.hex(), layout.update_bytes) == (loaded.layout_digest, loaded.update_bytes)
            assert loaded.model_root == other.model_root
            assert loaded.data_manifest == digest
            assert any("packed documents do not see each other" in line for line in loaded.reasons)
            before = await a.call(m.Evaluate(), m.Evaluated)
            for process in (process_a, process_b):
                for number in (signal.SIGINT, signal.SIGTERM):  # they are the supervisor's business
                    process.send_signal(number)
            for number in range(3):
                trained = await asyncio.gather(
                    *(
                        endpoint.call(
                            m.Train(
                                round=number,
                                positions=[i, i + 2, i + 4],
                                run=RUN,
                                member=i,
                                out_path=str(tmp_path / f"{i}"),
                            ),
                            m.Trained,
                        )
                        for i, endpoint in enumerate((a, b))
                    )
                )
                assert all(t.tokens > 0 and t.loss > 0 for t in trained)
                assert trained[0].fingerprint_before == trained[1].fingerprint_before
                assert (tmp_path / "0").stat().st_size == layout.update_bytes
                applied = await asyncio.gather(
                    *(
                        e.call(
                            m.Apply(
                                round=number, paths=[str(tmp_path / str(k)) for k in order], included=True, digest=True
                            ),
                            m.Applied,
                        )
                        for e, order in ((a, (0, 1)), (b, (1, 0)))
                    )
                )
                assert applied[0].weights_sha256 == applied[1].weights_sha256 is not None
                assert applied[0].fingerprint == applied[1].fingerprint != trained[0].fingerprint_before
            (tmp_path / "1").write_bytes((tmp_path / "0").read_bytes()[:-1])
            with pytest.raises(RemoteFailure, match="MalformedUpdate"):
                await a.call(m.Apply(round=3, paths=[str(tmp_path / "1")]), m.Applied)
            weights = await a.call(m.Weights(), m.WeightsAre)
            assert weights.sha256 == applied[0].weights_sha256, "a refused update changed nothing"
            after = await a.call(m.Evaluate(), m.Evaluated)
            assert after.loss < before.loss
            assert after.tokens == before.tokens > 0
            await b.call(m.Save(folder=str(tmp_path / "model"), round=3, provenance={"run": "test"}), Ok)
            assert "| rounds | `3` |" in (tmp_path / "model" / "README.md").read_text()
            assert (await b.call(m.Root(), m.RootIs)).model_root != loaded.model_root
            await a.call(m.Shutdown(), Ok)
            assert await asyncio.to_thread(process_a.wait, 20) == 0
            await asyncio.wait_for(a.closed.wait(), 90)
            with pytest.raises(IpcError, match="gone"):
                await a.call(m.Root(), m.RootIs)
        assert process_b.returncode == 0, "closing the socket ends the process"

    asyncio.run(asyncio.wait_for(scenario(), 500))


def test_messages_import_without_torch() -> None:
    code = "import sys, psyche_node.training.messages, psyche_node.training.schedule; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == "False\n"


def test_every_message_survives_the_wire() -> None:
    from psyche_node.ipc import decode_frame, encode_frame

    messages: list[Message] = [
        m.Load(model="m", data="d", terms=terms(data_seed="00ff")),
        m.Train(round=2**31, positions=[2**62], run=RUN, member=255, out_path="x"),
        m.Trained(loss=1.5, tokens=3, seconds=0.1, fingerprint_before=2**64 - 1, gradient_norm=0.5),
        m.Apply(round=1, paths=["a", "b"], included=None),
        m.OpenTasks(files=["a.toml"]),
        m.HoldWeights(round=3),
        m.WorkOnTasks(seconds=0.5),
        m.TasksWorked(results=None, seconds=0.25),
    ]
    for message in messages:
        assert decode_frame(encode_frame(1, message)[4:]) == (1, message)
