from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from node_stage import child, run_async

from psyche_node.exits import in_words
from psyche_node.ipc import (
    MAX_FRAME,
    BlockingChannel,
    Endpoint,
    IpcError,
    Message,
    Ok,
    RemoteFailure,
    decode_frame,
    encode_frame,
)
from psyche_node.training.errors import ModelError
from tests.leaping_loop import Leaping


class Question(Message):
    text: str
    number: int = 0


class Answer(Message):
    text: str


HOSTILE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b'{"id": 1, "kind": "Ok"}',
    b'{"id": 1, "kind": "NoSuchMessage", "body": {}}',
    b'{"id": 1, "kind": ["Ok"], "body": {}}',
    b'{"id": 1, "kind": "Ok", "body": 7}',
    b'{"id": 1, "kind": "Ok", "body": {"more": 1}}',
    b'{"id": 1, "kind": "Question", "body": {"text": 5}}',
    b'{"id": "1", "kind": "Ok", "body": {}}',
    b'{"id": true, "kind": "Ok", "body": {}}',
    b'{"id": 1.5, "kind": "Ok", "body": {}}',
    b'{"id": 1e999, "kind": "Ok", "body": {}}',
    b'{"id": -1, "kind": "Ok", "body": {}}',
    b"[" * 200_000,
]


@given(st.integers(0, 2**40), st.text(), st.integers())
def test_frames_round_trip(request_id: int, text: str, number: int) -> None:
    message = Question(text=text.encode(errors="replace").decode(), number=number)
    frame = encode_frame(request_id, message)
    assert struct.unpack(">I", frame[:4])[0] == len(frame) - 4
    assert decode_frame(frame[4:]) == (request_id, message)


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:40]))
def test_hostile_frames_are_refused_and_shown_in_part(body: bytes) -> None:
    with pytest.raises(IpcError, match="not a message") as caught:
        decode_frame(body)
    assert len(str(caught.value)) < 1500


@given(st.binary(max_size=200))
@example(json.dumps({"id": 10**30, "kind": "Ok", "body": {}}).encode())
def test_any_bytes_are_a_message_or_an_ipc_error(body: bytes) -> None:
    try:
        request_id, message = decode_frame(body)
    except IpcError:
        return
    assert request_id >= 0
    assert isinstance(message, Message)


def test_message_too_large_for_a_frame_is_not_sent() -> None:
    with pytest.raises(IpcError, match="Pass a file instead"):
        encode_frame(1, Question(text="x" * MAX_FRAME))


def test_two_messages_of_one_name_are_a_mistake() -> None:
    with pytest.raises(TypeError, match="two messages are called Ok"):
        type("Ok", (Message,), {"__module__": "elsewhere"})


@pytest.fixture
def pair() -> tuple[BlockingChannel, socket.socket]:
    ours, theirs = socket.socketpair()
    return BlockingChannel(ours.detach()), theirs


def test_child_sees_the_end_also_in_the_middle_of_a_frame(pair: tuple[BlockingChannel, socket.socket]) -> None:
    channel, peer = pair
    peer.sendall(encode_frame(1, Ok()) + encode_frame(2, Ok())[:-1])
    peer.close()
    assert channel.receive() == (1, Ok())
    assert channel.receive() is None
    channel.close()


def test_child_does_not_take_memory_for_a_frame_that_is_announced_too_large(
    pair: tuple[BlockingChannel, socket.socket],
) -> None:
    channel, peer = pair
    peer.sendall(struct.pack(">I", MAX_FRAME + 1))
    with pytest.raises(IpcError, match="exceeds"):
        channel.receive()
    peer.close()
    channel.close()


def test_requests_are_answered_and_errors_do_not_end_the_child() -> None:
    def handle(message: Message) -> Message:
        assert isinstance(message, Question)
        if message.text == "fail":
            raise ValueError("no such page\n" * 1000)
        if message.text == "large":
            return Answer(text="x" * MAX_FRAME)
        return Answer(text=message.text.upper())

    async def test() -> None:
        async with child(handle) as (endpoint, _):
            with pytest.raises(RemoteFailure, match="Question: ValueError: no such page") as caught:
                await endpoint.call(Question(text="fail"), Answer)
            assert len(str(caught.value)) < 5000
            with pytest.raises(RemoteFailure, match="a frame holds"):
                await endpoint.call(Question(text="large"), Answer)
            with pytest.raises(IpcError, match="answered Question with Answer"):
                await endpoint.call(Question(text="a"), Ok)
            replies = await asyncio.gather(*(endpoint.call(Question(text=c), Answer) for c in "abc"))
            assert [reply.text for reply in replies] == ["A", "B", "C"]

    run_async(test())


class Raw:
    """The other end of an endpoint, in the hands of the test."""

    def __init__(self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.endpoint, self.writer = endpoint, writer
        self._reader = reader
        self.events: list[Message] = []

    async def read(self) -> tuple[int, Message]:
        (length,) = struct.unpack(">I", await self._reader.readexactly(4))
        return decode_frame(await self._reader.readexactly(length))


@asynccontextmanager
async def raw(patience: float | None = None) -> AsyncIterator[Raw]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    events: list[Message] = []

    def on_event(message: Message) -> None:
        if message == Answer(text="poison"):
            raise RuntimeError("the handler broke")
        events.append(message)

    peer = Raw(await Endpoint.over("odd", ours, on_event, patience), reader, writer)
    peer.events = events
    try:
        yield peer
    finally:
        await peer.endpoint.close()
        writer.close()


def test_replies_find_their_request_in_any_order_and_strays_are_ignored() -> None:
    async def test() -> None:
        async with raw() as peer:
            calls = [asyncio.create_task(peer.endpoint.call(Question(text=text), Answer)) for text in "ab"]
            asked = [await peer.read() for _ in calls]
            peer.writer.write(encode_frame(999, Ok()))
            for request_id, question in reversed(asked):
                assert isinstance(question, Question)
                peer.writer.write(encode_frame(request_id, Answer(text=question.text * 2)))
                peer.writer.write(encode_frame(request_id, Answer(text="a second reply")))
            assert [reply.text for reply in await asyncio.gather(*calls)] == ["aa", "bb"]
            peer.writer.write(encode_frame(0, Answer(text="news")))
            third = asyncio.create_task(peer.endpoint.call(Question(text="c"), Answer))
            peer.writer.write(encode_frame((await peer.read())[0], Answer(text="c")))
            await third
            assert peer.events == [Answer(text="news")]

    run_async(test())


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (b"", "it closed its end"),
        (encode_frame(1, Ok())[:-1], "it closed its end"),
        (struct.pack(">I", MAX_FRAME + 1), "exceeds"),
        (struct.pack(">I", 2) + b"{}", "not a message"),
        (struct.pack(">I", 0), "not a message"),
        (encode_frame(0, Answer(text="poison")), "the handler broke"),
    ],
    ids=["closed", "half a frame", "too large", "no message", "empty", "event handler"],
)
def test_what_ends_the_conversation_fails_the_call_with_the_reason(poison: bytes, reason: str) -> None:
    async def test() -> None:
        async with raw() as peer:
            call = asyncio.create_task(peer.endpoint.call(Question(text="?"), Answer))
            await peer.read()
            peer.writer.write(poison)
            if reason == "it closed its end":
                peer.writer.close()
            with pytest.raises(IpcError, match=reason):
                await call
            await peer.endpoint.closed.wait()
            with pytest.raises(IpcError, match="the odd process is gone"):
                await peer.endpoint.call(Question(text="still there?"), Answer)

    run_async(test())


def test_silent_process_is_given_up() -> None:
    async def test() -> None:
        async with raw(patience=0.01) as peer:
            with pytest.raises(IpcError, match="has not answered Question within"):
                await peer.endpoint.call(Question(text="?"), Answer)

    run_async(test())


def test_an_answer_that_came_while_this_process_was_stopped_counts() -> None:
    async def test() -> None:
        async with raw(patience=100.0) as peer:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, Leaping)
            for patience, slept in ((None, 1000.0), (50.0, 60.0)):
                call = asyncio.create_task(peer.endpoint.call(Question(text="?"), Answer, patience))
                peer.writer.write(encode_frame((await peer.read())[0], Answer(text="here")))
                loop.slept += slept
                assert (await call).text == "here"
            call = asyncio.create_task(peer.endpoint.call(Question(text="?"), Answer))
            await peer.read()
            while not call.done():
                loop.slept += 30.0
                await asyncio.sleep(0)
            with pytest.raises(IpcError, match="has not answered Question within 100 s"):
                await call

    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(test())


def test_closing_fails_what_is_pending() -> None:
    async def test() -> None:
        async with raw() as peer:
            call = asyncio.create_task(peer.endpoint.call(Question(text="?"), Answer))
            await peer.read()
            await peer.endpoint.close()
            with pytest.raises(IpcError, match="gone"):
                await call

    run_async(test())


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (ModelError("empty has no config.json"), logging.DEBUG, "empty has no config.json"),
        (ModelError("at /a: b: Load: is\nnone"), logging.DEBUG, "at /a: b: Load: is\nnone"),
        (ZeroDivisionError("by zero"), logging.ERROR, "ZeroDivisionError: by zero"),
    ],
)
def test_only_what_nobody_foresaw_is_logged_with_a_traceback(
    caplog: pytest.LogCaptureFixture, error: Exception, level: int, words: str
) -> None:
    """What is foreseen becomes the supervisor's one line."""

    def fail(message: Message) -> Message:
        raise error

    async def test() -> None:
        async with child(fail) as (endpoint, _):
            with caplog.at_level(logging.DEBUG), pytest.raises(RemoteFailure) as caught:
                await endpoint.call(Ok(), Ok)
        assert in_words(ExceptionGroup("", [caught.value])) == words
        assert [one.levelno for one in caplog.records if one.message == "Ok failed"] == [level]

    run_async(test())
