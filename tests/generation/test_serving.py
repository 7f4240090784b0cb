"""The server's parts: batches of those who wait, the key file, the address, and what the engine's failure does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from starlette.applications import Starlette
from typer.testing import CliRunner

from psyche_node import cli
from psyche_node.exits import Exit
from psyche_node.generation import Completion, Engine, Request
from psyche_node.serving.app import create_app
from psyche_node.serving.errors import ApiError, ServeError
from psyche_node.serving.place import bind, read_key
from psyche_node.serving.replies import ChatReply
from psyche_node.serving.scheduler import Scheduler, Work
from psyche_node.serving.schema import ChatRequest, Sampled, TextRequest, parse
from psyche_node.serving.service import Service


class Counting:
    """An engine that notes its batches."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.fits = engine, engine.fits
        self.batches: list[int] = []
        self.done: list[Completion] = []
        self.broken = 0

    def run(self, requests: Sequence[Request], listeners: Any) -> list[Completion]:
        self.batches.append(len(requests))
        if self.broken:
            self.broken -= 1
            raise RuntimeError("out of memory")
        done = self._engine.run(requests, listeners)
        self.done += done
        return done


async def all_of(work: Work) -> list[str]:
    texts = [""] * len(work.requests)
    async for index, piece, done in work.events():
        texts[index] += piece
        assert done is None or done.text == texts[index]
    return texts


def test_those_who_wait_become_one_batch(engine: Engine) -> None:
    """Different lengths, temperatures and stops; a short one is told its end while the others go on."""
    counting = Counting(engine)
    requests = [Request((7, 8), 30), Request((9,), 2), Request((20, 21, 22), 30, 1.5, seed=3), Request((5,), 20)]

    async def serve() -> tuple[list[list[str]], list[int]]:
        scheduler, ended = Scheduler(counting, waiting=8), list[int]()  # type: ignore[arg-type]
        works = [scheduler.submit([request]) for request in requests]
        works[3].cancel()

        async def one(index: int) -> list[str]:
            texts = await all_of(works[index])
            ended.append(index)
            return texts

        async with asyncio.TaskGroup() as group:
            running = group.create_task(scheduler.run())
            texts = await asyncio.gather(*(one(index) for index in range(3)))
            scheduler.stop()
            await running
        return texts, ended

    texts, ended = asyncio.run(serve())
    assert counting.batches == [3], "one batch, without the one whose client had gone"
    assert ended[0] == 1
    assert [text for (text,) in texts] == [engine.run([request])[0].text for request in requests[:3]]


def test_stopping_ends_what_runs_and_refuses_more(engine: Engine) -> None:
    counting = Counting(engine)

    async def serve() -> None:
        scheduler = Scheduler(counting, waiting=8)  # type: ignore[arg-type]
        running = asyncio.create_task(scheduler.run())
        work = scheduler.submit([Request((7, 8), 250)])
        waits: Work | None = None
        async for _ in work.events():
            waits = waits or scheduler.submit([Request((7,), 1), Request((8,), 1)])
            scheduler.stop()
        assert waits is not None
        with pytest.raises(ApiError, match="is stopping"):
            await all_of(waits)
        await running
        with pytest.raises(ApiError, match="is stopping") as caught:
            scheduler.submit([Request((7,), 1)])
        assert caught.value.status == 503

    asyncio.run(serve())
    assert len(counting.done[0].token_ids) < 250


def test_a_batch_that_fails_is_lost_and_the_next_is_not(engine: Engine) -> None:
    counting = Counting(engine)
    counting.broken = 1

    async def serve() -> None:
        scheduler = Scheduler(counting, waiting=8)  # type: ignore[arg-type]
        running = asyncio.create_task(scheduler.run())
        with pytest.raises(RuntimeError, match="out of memory"):
            await all_of(scheduler.submit([Request((7,), 4)]))
        assert await all_of(scheduler.submit([Request((7,), 4)])) == [engine.run([Request((7,), 4)])[0].text]
        scheduler.stop()
        await running

    asyncio.run(serve())


def test_the_queue_counts_every_prompt(engine: Engine) -> None:
    async def serve() -> None:
        scheduler = Scheduler(engine, waiting=3)
        first = scheduler.submit([Request((7,), 4)] * 2)
        with pytest.raises(ApiError, match="2 requests wait already, of 3"):
            scheduler.submit([Request((7,), 4)] * 2)
        first.cancel()
        scheduler.submit([Request((7,), 4)] * 3)
        assert scheduler.load == {"running": 0, "waiting": 3}

    asyncio.run(serve())


def test_blanks_around_the_parts_of_a_reply_are_left_out() -> None:
    reply = ChatReply(None, tools=True)
    text = '\n<think> a\n\nb \n</think>\n\nI  look. \n<tool_call>{"name": "f"}</tool_call>\n<tool_call>{}</tool_call> '
    deltas = [reply.feed(one) for one in text] + [reply.finish()]
    assert "".join(delta.reasoning for delta in deltas) == "a\n\nb"
    assert "".join(delta.content for delta in deltas) == "I  look. \n\n<tool_call>{}</tool_call>"
    assert [call.name for delta in deltas for call in delta.calls] == ["f"]


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1 port {port}: .* Choose another --host"):
            bind("127.0.0.1", port)
    with pytest.raises(ServeError, match=r"cannot listen on 203\.0\.113\.1"):
        bind("203.0.113.1", 0)
    with bind("::1", 0) as six:
        assert six.getsockname()[0] == "::1"


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("abcdefgh12345678\n")
    assert read_key(path) == "abcdefgh12345678"
    path.chmod(0o640)
    with pytest.raises(ServeError, match="has mode 0640: others can read the key"):
        read_key(path)
    path.chmod(0o600)
    for text in ("", "short", "two words that are long enough", "x" * 5000):
        path.write_text(text)
        with pytest.raises(ServeError, match="holds no key"):
            read_key(path)
    (tmp_path / "link").symlink_to(path)
    for name in ("link", "gone"):
        with pytest.raises(ServeError, match="cannot be read"):
            read_key(tmp_path / name)


def test_the_command_ends_with_a_reason(model_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["serve", *arguments])
        return done.exit_code, done.stderr

    code, words = run(str(tmp_path), "--port", "0")
    assert (code, "has no config.json" in words) == (Exit.MODEL, True)
    code, words = run(str(model_folder), "--port", "0", "--api-key-file", os.devnull)
    assert (code, "others can read the key" in words) == (Exit.SERVE, True)
    code, words = run(str(model_folder), "--host", "203.0.113.1")
    assert (code, "cannot listen" in words) == (Exit.SERVE, True)
    code, words = run(str(model_folder), "--port", "0", "--dtype", "int3")
    assert (code, "int3" in words) == (Exit.MODEL, True)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"reasoning": {"enabled": True}}, "reasoning"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"effort": "none"}}, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning": {"enabled": False}}, None),
        ({"reasoning_effort": "none"}, None),
        ({}, None),
    ],
)
def test_reasoning_that_the_template_cannot_switch_is_refused(
    engine: Engine, wish: dict[str, Any], param: str | None
) -> None:
    status, body = asyncio.run(
        posted(engine, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **wish})
    )
    if param is None:
        assert status == 200
    else:
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, "unsupported_parameter")
        assert "no switch for reasoning" in body["error"]["message"]


def test_reasoning_that_the_template_always_begins_cannot_be_turned_off(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    monkeypatch.setattr(engine.prompts._tokenizer, "chat_template", template)
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    statuses = [
        asyncio.run(posted(engine, {**asked, "reasoning": {"enabled": enabled}}))[0] for enabled in (True, False)
    ]
    assert statuses == [200, 400]


def test_an_error_that_quotes_half_of_a_surrogate_pair_can_be_sent(engine: Engine) -> None:
    call = {"function": {"name": json.loads('"\\ud800"'), "arguments": "["}}
    asked = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]}
    status, body = asyncio.run(posted(engine, asked))
    assert (status, body["error"]["param"]) == (400, "messages[1].tool_calls")
    assert r"arguments of \ud800 are not" in body["error"]["message"]


async def posted(engine: Engine, body: dict[str, Any]) -> tuple[int, Any]:
    """The answer of /v1/chat/completions."""
    scheduler = Scheduler(engine, waiting=4)
    app = create_app(Service(engine, "model", scheduler, 100), None, nothing)
    running = asyncio.create_task(scheduler.run())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://host") as client:
        headers = {"Content-Type": "application/json"}
        reply = await client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    scheduler.stop()
    await running
    return reply.status_code, reply.json()


@contextlib.asynccontextmanager
async def nothing(_: Starlette) -> AsyncIterator[None]:
    """A server's life in which nothing is to be done."""
    yield


@pytest.mark.parametrize(
    ("kind", "params", "asked"),
    [
        (ChatRequest, chat_params.CompletionCreateParamsBase, {"messages": [{"role": "user", "content": "why"}]}),
        (TextRequest, text_params.CompletionCreateParamsBase, {"prompt": "why"}),
    ],
    ids=["chat", "text"],
)
def test_parameters_that_nobody_knows_are_refused(kind: type[Sampled], params: Any, asked: dict[str, Any]) -> None:
    """And all of OpenAI's are known, as its own client has them; null asks for nothing."""
    with pytest.raises(ApiError, match=r"argument supplied: max_tokns\. Did you mean max_tokens\?") as caught:
        parse(kind, asked | {"max_tokns": 8})
    assert (caught.value.status, caught.value.body()["error"]["param"]) == (400, "max_tokns")
    with pytest.raises(ApiError, match=r"argument supplied: zzzz$"):
        parse(kind, asked | {"zzzz": None})
    with pytest.raises(ApiError, match="top_k is not supported"):
        parse(kind, asked | {"top_k": 40})
    parse(kind, dict.fromkeys(params.__annotations__) | asked)
