"""Training groups as the daemon starts them, driven over the socket of rank 0: they work, fail and end as one."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import torch
from tiny import terms

from psyche_node.exits import Exit, exit_for
from psyche_node.ipc import IpcError, Ok, RemoteFailure, encode_frame
from psyche_node.node.config import ConfigError
from psyche_node.node.ranks import Trainer
from psyche_node.training import messages as m

RUN = "ab" * 32


@asynccontextmanager
async def trainer(ranks: int, logs: Path) -> AsyncIterator[Trainer]:
    started = await Trainer.start(ranks, logs, lambda event: None)
    try:
        yield started
    finally:
        await started.stop()


def load(model_dir: Path, packed: Path, tensor_parallel: int = 1, device: str = "cpu") -> m.Load:
    return m.Load(
        model=str(model_dir),
        data=str(packed),
        terms=terms(),
        device=device,
        threads=1,
        tensor_parallel=tensor_parallel,
    )


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "psyche_node.trainer" in one.cmdline()]


async def one_dies(group: Trainer, logs: Path) -> None:
    """Rank 1 dies while rank 0 waits for it, in the middle of a round: the group ends, and the rank is named."""
    log = logs / "rank-1.log"
    (victim,) = [one for one in children() if str(log) in {file.path for file in one.open_files()}]
    log.write_text("its last words\n")
    victim.suspend()
    request = m.Train(round=2, positions=[0, 1], run=RUN, member=0, out_path=str(logs / "update"))
    waiting = [asyncio.create_task(group.died()), asyncio.create_task(group.call(request, m.Trained))]
    await asyncio.wait(waiting, timeout=0.5)
    victim.kill()
    for task in waiting:
        with pytest.raises(IpcError, match=r"Rank 1 of it ended first: killed by SIGKILL .*\nits last words"):
            await task
    with pytest.raises(IpcError, match="Rank 1 of it ended first"):
        await group.call(m.Root(), m.RootIs)


GPUS = pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"))


@pytest.mark.parametrize("device", ["cpu", GPUS])
def test_groups_train_together_and_fail_as_one(model_dir: Path, packed: Path, tmp_path: Path, device: str) -> None:
    """A group with FSDP2 and one with tensor parallelism, which at first are given a folder without a model.

    In the end a rank of the first one dies, which ends that group.
    """

    async def scenario() -> None:
        async with trainer(2, tmp_path / "a") as a, trainer(2, tmp_path / "b") as b:
            with pytest.raises(RemoteFailure, match=r"training: Load: ModelError: .*nowhere has no config"):
                await a.call(load(tmp_path / "nowhere", packed, 1, device), m.Loaded)
            with pytest.raises(RemoteFailure, match="cannot be divided by tensor_parallel, which is 3"):
                await b.call(load(model_dir, packed, 3, device), m.Loaded)
            loaded = await asyncio.gather(
                a.call(load(model_dir, packed, 1, device), m.Loaded),
                b.call(load(model_dir, packed, 2, device), m.Loaded),
            )
            assert len({(one.model_root, one.layout_digest) for one in loaded}) == 1
            assert loaded[0].device.startswith("2 x ")
            assert any(line.startswith("FSDP2 over 2 ranks: 2 layers") for line in loaded[0].reasons)
            assert any(line.startswith("tensor parallel over 2 ranks") for line in loaded[1].reasons)
            for number in range(2):
                paths = [tmp_path / f"{name}{number}" for name in "ab"]
                for endpoint, member, path in ((a, 0, paths[0]), (b, 1, paths[1])):
                    positions = [number * 8 + member * 4 + i for i in range(3)]
                    request = m.Train(round=number, positions=positions, run=RUN, member=member, out_path=str(path))
                    assert (await endpoint.call(request, m.Trained)).tokens > 0
                with pytest.raises(RemoteFailure, match="training: Apply: FileNotFoundError") as missing:
                    await a.call(m.Apply(round=number, paths=[str(tmp_path / "x")], included=True), m.Applied)
                assert exit_for(missing.value) is Exit.FILES
                applied = [
                    await one.call(
                        m.Apply(round=number, paths=[str(path) for path in paths], included=True, digest=True),
                        m.Applied,
                    )
                    for one in (a, b)
                ]
                assert len({(one.fingerprint, one.weights_sha256) for one in applied}) == 1
            (tmp_path / "file").write_text("")
            with pytest.raises(RemoteFailure, match="training: Save: "):
                await a.call(m.Save(folder=str(tmp_path / "file" / "checkpoint")), Ok)
            await a.call(m.Save(folder=str(tmp_path / "checkpoint"), round=2), Ok)
            assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
            evaluated = [await one.call(m.Evaluate(), m.Evaluated) for one in (a, b)]
            assert evaluated[0].loss == pytest.approx(evaluated[1].loss, rel=1e-5 if device == "cpu" else 1e-2)
            await one_dies(a, tmp_path / "a")
        assert children() == []

    asyncio.run(scenario())


def test_all_ranks_end_with_the_supervisor(tmp_path: Path) -> None:
    """Killed, it cannot end them: they notice."""
    script = (
        "import asyncio, sys, pathlib\n"
        "from psyche_node.node.ranks import Trainer\n"
        "from psyche_node.training import messages as m\n"
        "async def main():\n"
        "    group = await Trainer.start(2, pathlib.Path(sys.argv[1]), print)\n"
        "    try:\n"
        "        await group.call(m.Root(), m.RootIs)\n"
        "    except Exception as error:\n"
        "        print(error, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "came before Load" in process.stdout.readline()
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == 2
        process.kill()
    assert psutil.wait_procs(ranks, timeout=500)[1] == []


def test_ranks_of_several_hosts_come_from_torchrun(model_dir: Path, packed: Path, tmp_path: Path) -> None:
    """torchrun starts the command of the node on each: rank 0 has the training process, the others train along."""
    script = tmp_path / "node.py"
    script.write_text(
        "import asyncio, os, pathlib, sys\n"
        "from psyche_node.cli import app\n"
        "from psyche_node.node.ranks import Trainer\n"
        "from psyche_node.training import messages as m\n"
        "async def main():\n"
        "    out = pathlib.Path(sys.argv[1])\n"
        "    group = await Trainer.start(1, out, print)\n"
        "    loaded = await group.call(m.Load.model_validate_json(sys.argv[2]), m.Loaded)\n"
        "    request = m.Train(round=0, positions=[0, 1], run='ab' * 32, member=0, out_path=str(out / 'update'))\n"
        "    await group.call(request, m.Trained)\n"
        "    applied = await group.call(m.Apply(round=0, paths=[str(out / 'update')], included=True), m.Applied)\n"
        "    await group.stop()\n"
        "    (out / 'result').write_text(loaded.device)\n"
        "if os.environ['RANK'] == '0':\n"
        "    asyncio.run(main())\n"
        "else:\n"
        "    app(['run'])\n"
    )
    message = load(model_dir, packed).model_dump_json()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(tmp_path), message],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "result").read_text().startswith("2 x CPU")


@pytest.mark.parametrize("ends", ["well", "killed"])
def test_a_rank_gives_up_its_groups_at_the_end(ends: str) -> None:
    """Also when rank 0 is gone, and it says so and fails."""
    script = (
        "import sys\n"
        "from psyche_node.trainer import main\n"
        "status = main(sys.argv[1:])\n"
        "import torch.distributed as dist\n"
        "print(status, dist.is_initialized())\n"
    )
    meeting, (ours, theirs) = socket.create_server(("127.0.0.1", 0)), socket.socketpair()
    port = str(meeting.getsockname()[1])
    ranks = []
    with meeting, ours, theirs:
        for rank, fds in enumerate([["--fd", str(theirs.fileno()), "--store-fd", str(meeting.fileno())], []]):
            environment = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", script, *fds],
                    pass_fds=[int(fd) for fd in fds[1::2]],
                    env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        ours.sendall(encode_frame(1, m.Root()))
        assert ours.recv(4), "the answer of a group that stands"
        if ends == "killed":
            ranks[0].kill()
    said = [one.communicate(timeout=500)[0].split() for one in ranks]
    assert said == {"well": [["0", "False"], ["0", "False"]], "killed": [[], ["1", "False"]]}[ends]


def test_torchrun_and_ranks_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started the ranks of this node"):
        asyncio.run(Trainer.start(2, tmp_path, lambda event: None))
