"""The network process may die: of a signal, of silence, of an error, again and again. Its supervisor is real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from network_driver import RUN, Process

from psyche_node import ipc
from psyche_node.identity import load_or_create_node_key
from psyche_node.ipc import IpcError, Message, Ok
from psyche_node.network.blobs import blob_digest
from psyche_node.network.messages import (
    Announced,
    Configure,
    Fetched,
    Forget,
    GetStats,
    Kind,
    MemberEntry,
    NetworkRestarted,
    PeerDown,
    PeerUp,
    Publish,
    SetMembers,
    Stats,
    Want,
    WantEntry,
)
from psyche_node.network.store import BlobStore
from psyche_node.node import networking
from psyche_node.node.networking import Network
from tests.leaping_loop import Leaping

pytestmark = pytest.mark.timeout(240)


class Supervised:
    """A network process under its supervisor, and what it said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, list[Message]()
        folder.mkdir(exist_ok=True)
        self.network = Network(self._take)
        self._arrived = asyncio.Event()

    def configure(self, bootstrap: list[str] | None = None) -> Configure:
        return Configure(
            folder=str(self.folder),
            node_key_path=str(self.folder / "node.key"),
            bootstrap=bootstrap or [],
            run=RUN.hex(),
        )

    def _take(self, message: Message) -> None:
        self.events.append(message)
        self._arrived.set()

    async def until(self, *wanted: Message) -> None:
        """Wait for these events, in this order, possibly with others between them."""
        async with asyncio.timeout(90):
            while not _in_order(list(wanted), self.events):
                self._arrived.clear()
                await self._arrived.wait()

    async def restarted(self, times: int) -> NetworkRestarted:
        async with asyncio.timeout(90):
            while True:
                for event in self.events:
                    if isinstance(event, NetworkRestarted) and event.restarts == times:
                        return event
                self._arrived.clear()
                await self._arrived.wait()


def _in_order(wanted: list[Message], events: list[Message]) -> bool:
    for event in events:
        if wanted and event == wanted[0]:
            wanted.pop(0)
    return not wanted


@contextlib.asynccontextmanager
async def supervised(folder: Path) -> AsyncIterator[Supervised]:
    one = Supervised(folder)
    try:
        yield one
    finally:
        await one.network.stop()


def test_a_killed_process_comes_back_as_it_was(tmp_path: Path) -> None:
    """Its peer finds it at the same place, hears its announcement again, and it fetches what it wanted before."""

    async def scenario() -> None:
        (tmp_path / "peer").mkdir()
        async with supervised(tmp_path / "own") as own:
            peer = await Process(tmp_path / "peer").start([])
            ready = await own.network.start(own.configure(peer.ready.multiaddrs))
            keeping = asyncio.create_task(own.network.keep())
            keys = (load_or_create_node_key(own.folder / "node.key").public, peer.key.public)
            members = SetMembers(members=[MemberEntry(slot=slot, node_key=key.hex()) for slot, key in enumerate(keys)])
            await own.network.call(members, Ok)
            await peer.ask(members)
            await own.until(PeerUp(slot=1))
            wanted = b"w" * 5000
            want = WantEntry(member=1, digest=blob_digest(wanted).hex(), length=len(wanted))
            copied = want.model_copy(update={"member": 0})
            await own.network.call(Want(round=4, wants=[want, copied]), Ok)
            before = await own.network.call(GetStats(), Stats)
            assert before.connected == [1]

            assert own.network.process_id is not None
            os.kill(own.network.process_id, signal.SIGKILL)
            await own.until(PeerDown(slot=1))
            # Nobody has to wait for the new one: neither to publish, nor to ask how much has been sent.
            digest, length = BlobStore(own.folder / "blobs").put(b"mine" * 1000, 4)
            await own.network.call(Publish(round=4, member=0, digest=digest.hex(), length=length), Ok)
            stats = await own.network.call(GetStats(), Stats)
            assert stats.bytes_sent >= before.bytes_sent

            assert "SIGKILL" in (await own.restarted(1)).reason
            await own.until(PeerUp(slot=1), PeerDown(slot=1), PeerUp(slot=1))
            heard = await peer.wait(Announced, round=4, member=0)
            assert heard.digest == digest.hex()
            peer.store.put(wanted, 4)
            await own.until(Fetched(round=4, member=1, digest=want.digest, length=want.length, source=peer.key.node_id))
            await own.until(Fetched(round=4, member=0, digest=want.digest, length=want.length, source=peer.key.node_id))
            assert not own.network._wants[4, Kind.UPDATE]
            assert own.network._configure is not None
            assert own.network._configure.p2p_port == ready.p2p_port
            assert own.network._configure.grpc_port == ready.grpc_port
            after = await own.network.call(GetStats(), Stats)
            assert after.bytes_received > stats.bytes_received
            assert after.blob_bytes_received == len(wanted)
            await own.network.call(Forget(before_round=5), Ok)
            assert not own.network._wants
            assert not own.network._published
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            assert await peer.stop() == 0

    asyncio.run(scenario())


# Answers Configure as the file "how" says for its life, the first, second .. one; then goes on answering, or does not.
# It speaks the framing itself, for it has to start fast.
ODD = """
import json, pathlib, socket, struct, sys, time
channel = socket.socket(fileno=int(sys.argv[2]))
def hear():
    (length,) = struct.unpack(">I", channel.recv(4, socket.MSG_WAITALL))
    return json.loads(channel.recv(length, socket.MSG_WAITALL))
def say(to, kind, **body):
    frame = json.dumps(dict(id=to["id"], kind=kind, body=body)).encode()
    channel.sendall(struct.pack(">I", len(frame)) + frame)
here = pathlib.Path(__file__).parent
life = len(list(here.glob("life*")))
(here / f"life{life}").touch()
how = (here / "how").read_text().split()[life]
configure = hear()
if how == "refuses" or (how == "wants-any-port" and configure["body"]["p2p_port"]):
    say(configure, "Failure", request="Configure", error="NetworkError", message="Is the port taken?")
    sys.exit(2)
node_id = "another" if how == "another-key" else "x"
say(configure, "Ready", node_id=node_id, multiaddrs=[], grpc_address="", p2p_port=4001, grpc_port=4002,
    bulk_port=4003)
if how == "dies":
    sys.exit(3)
while True:
    request = hear()
    if how == "silent":
        time.sleep(60)
    if how == "cannot-count":
        (here / "asked").open("a").write(".")
        say(request, "Failure", request="GetStats", error="IpcError", message="a frame is too long")
        continue
    print(json.dumps(request), file=(here / f"told{life}").open("a"), flush=True)
    if request["kind"] != "GetStats" and how != "cannot-be-told":
        say(request, "Ok")
        continue
    say(request, "Stats", bytes_sent=life + 1, bytes_received=0, blob_bytes_sent=0, blob_bytes_received=0, peers=1,
        connected=[], per_peer=[])
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(networking, "MODULE", "odd_network")
    monkeypatch.setattr(networking, "LONGEST_BACKOFF", 0.01)
    (tmp_path / "odd_network.py").write_text(ODD)
    return tmp_path / "how"


def test_a_process_that_does_not_answer_is_replaced(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(networking, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(networking, "SILENCE_SECONDS", 0.3)

    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            take = own.network._tell

            def forbearing(message: Message) -> None:
                # Before the second life is looked at: it answers, but not within any time.
                if isinstance(message, NetworkRestarted):
                    monkeypatch.setattr(networking, "SILENCE_SECONDS", 60.0)
                take(message)

            own.network._tell = forbearing
            await own.network.start(own.configure())
            keeping = asyncio.create_task(own.network.keep())
            assert "not answered" in (await own.restarted(1)).reason
            assert (await own.network.call(GetStats(), Stats)).bytes_sent == 2
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        assert "starting a new one" in caplog.text

    odd.write_text("silent well")
    asyncio.run(scenario())


def test_a_process_that_answers_outlives_a_stop_of_its_supervisor(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networking, "CHECK_EVERY", 0.01)
    encode = ipc.encode_frame

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Leaping)
        async with supervised(tmp_path) as own:
            await own.network.start(own.configure())

            def stopped(request_id: int, message: Message) -> bytes:
                loop.slept += 10 * networking.SILENCE_SECONDS
                return encode(request_id, message)

            monkeypatch.setattr(ipc, "encode_frame", stopped)
            keeping = asyncio.create_task(own.network.keep())
            while not own.network.restarts and len(_lines(tmp_path / "told0")) < 3:
                await asyncio.sleep(0.01)
            assert (own.network.restarts, keeping.done()) == (0, False)
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    odd.write_text("well well")
    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(scenario())


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_statistics_that_fail_end_nothing(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networking, "CHECK_EVERY", 0.01)

    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            await own.network.start(own.configure())
            keeping = asyncio.create_task(own.network.keep())
            assert (await own.network.call(GetStats(), Stats)).bytes_sent == 0
            async with asyncio.timeout(60):
                while len((tmp_path / "asked").read_text()) < 4:
                    await asyncio.sleep(0.01)
            assert (own.network.restarts, keeping.done()) == (0, False)
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    odd.write_text("cannot-count well")
    asyncio.run(scenario())


def test_it_goes_on_after_some_failures_and_takes_another_port(odd: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            await own.network.start(own.configure())
            keeping = asyncio.create_task(own.network.keep())
            # Its second life asks for the port of the first, is refused, and the third takes any.
            restarted = await own.restarted(1)
            assert "Is the port taken" in restarted.reason
            assert (await own.network.call(GetStats(), Stats)).bytes_sent == 3
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    odd.write_text("dies wants-any-port wants-any-port")
    asyncio.run(scenario())


def test_it_gives_up_when_no_new_process_lives(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networking, "MAX_FAILURES", 2)

    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            await own.network.start(own.configure())
            with pytest.raises(IpcError, match=r"3 times in a row .*a part of its libp2p had died"):
                await own.network.keep()
            with pytest.raises(IpcError, match="3 times"):
                await own.network.call(GetStats(), Stats)

    odd.write_text("dies dies dies")
    asyncio.run(scenario())


def test_what_a_new_process_does_not_take_the_next_one_is_told(odd: Path, tmp_path: Path) -> None:
    """All of it: what is of one round and of different kinds, too."""
    digests = [character * 64 for character in "abcd"]
    said: list[Message] = [
        SetMembers(members=[MemberEntry(slot=0, node_key=digests[0])]),
        Publish(round=4, member=0, digest=digests[0], length=1, kind=Kind.CHECKPOINT),
        Publish(round=4, member=0, digest=digests[1], length=1),
        Want(round=4, wants=[WantEntry(member=0, digest=digests[2], length=1)], kind=Kind.CHECKPOINT),
        Want(round=4, wants=[WantEntry(member=0, digest=digests[3], length=1)]),
    ]

    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            await own.network.start(own.configure())
            for message in said:
                await own.network.call(message, Ok)
            assert own.network.process_id is not None
            keeping = asyncio.create_task(own.network.keep())
            os.kill(own.network.process_id, signal.SIGKILL)
            await own.restarted(2)
            stats = await own.network.call(GetStats(), Stats)
            assert stats.bytes_sent == 3
            told: list[dict[str, object]] = []
            async with asyncio.timeout(60):
                while len(told) <= len(said):
                    await asyncio.sleep(0.01)
                    with contextlib.suppress(OSError, ValueError):
                        told = [json.loads(line) for line in (tmp_path / "told2").read_text().splitlines()]
            bodies = [(one["kind"], one["body"]) for one in told if one["kind"] != "GetStats"]
            assert bodies == [(type(message).__name__, message.model_dump(mode="json")) for message in said]
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    odd.write_text("well cannot-be-told well")
    asyncio.run(scenario())


def test_a_node_key_that_was_rotated_meanwhile_ends_the_node(odd: Path, tmp_path: Path) -> None:
    """A new process would be another node than the one that has joined."""

    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            await own.network.start(own.configure())
            with pytest.raises(IpcError, match=r"another instead of x\): it was rotated. Start the node again"):
                await own.network.keep()
            with pytest.raises(IpcError, match="it was rotated"):
                await own.network.call(GetStats(), Stats)

    odd.write_text("dies another-key")
    asyncio.run(scenario())


def test_the_first_one_that_is_refused_ends_the_node(odd: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(tmp_path) as own:
            with pytest.raises(IpcError, match="Is the port taken"):
                await own.network.start(own.configure())

    odd.write_text("refuses")
    asyncio.run(scenario())
