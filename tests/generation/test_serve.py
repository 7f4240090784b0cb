"""`psyche-node serve`, a real process, asked by OpenAI's own client over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from taught import CALLED, LOOK, SANG, TOOL, WHY

KEY = "k" * 32
LONGEST = 20_000

ON = [
    {"reasoning": {"enabled": True}},
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"reasoning_effort": "high"},
]


class Served:
    """The running server, its log, and a client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = self.said(r"taught at (http://\S+)/v1").group(1)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=90)

    def said(self, pattern: str) -> re.Match[str]:
        """Read the log up to a line that has ``pattern``."""
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            seen.append(line)
            if found := re.search(pattern, json.loads(line)["msg"]):
                return found
        raise AssertionError("".join(seen))

    def chat(self, messages: Any, **options: Any) -> Any:
        values = {"model": "taught", "temperature": 0, "max_tokens": 80, **options}
        return self.client.chat.completions.create(messages=messages, **values)

    def load(self) -> tuple[int, int]:
        health = httpx2.get(f"{self.url}/health", timeout=90).json()
        assert health["status"] == "ok"
        return health["running"], health["waiting"]


@pytest.fixture(scope="module")
def served(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Ends with SIGTERM while an answer is being streamed: that one is cut off, and the exit code says why."""
    key = tmp_path_factory.mktemp("keys") / "key"
    key.touch(0o600)
    key.write_text(f"{KEY}\n")
    command = [sys.executable, "-m", "psyche_node.cli", "serve", str(taught_folder), "--port", "0", "--device", "cpu"]
    command += [
        "--api-key-file",
        str(key),
        "--waiting",
        "2",
        "--name",
        "taught",
        "--max-tokens",
        str(LONGEST),
        "--grace",
        "0.5",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    )
    try:
        served = Served(process)
        yield served
        song = served.chat(SANG, stream=True, max_tokens=LONGEST)
        next(song)
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in song][-1] == "length"
        assert process.wait(500) == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_models_health_and_the_key(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["taught"]
    assert served.client.models.retrieve("taught").owned_by == "psyche-node"
    assert served.load() == (0, 0)
    with pytest.raises(openai.AuthenticationError, match="wants its API key"):
        served.client.with_options(api_key="k" * 31).models.list()
    assert httpx2.get(f"{served.url}/v1/models", timeout=90).headers["www-authenticate"] == "Bearer"


def test_an_answer(served: Served) -> None:
    reply = served.chat(WHY)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Because é.", "stop")
    assert not hasattr(choice.message, "reasoning_content")
    assert choice.message.tool_calls is None
    assert (reply.object, reply.model, reply.id[:9]) == ("chat.completion", "taught", "chatcmpl-")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens > reply.usage.completion_tokens > 3
    parts = [{"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "hy"}]}]
    assert served.chat(parts, user="me", store=False, extra_body={"top_k": -1}).choices[0] == choice


@pytest.mark.parametrize("switch", ON, ids=["reasoning", "thinking", "enable_thinking", "effort"])
def test_reasoning_is_apart_from_the_answer(switch: dict[str, Any], served: Served) -> None:
    message = served.chat(WHY, extra_body=switch).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Because é.", "hm, hm", "hm, hm")


def test_reasoning_that_is_cut_off(served: Served) -> None:
    choice = served.chat(WHY, max_completion_tokens=3, extra_body=ON[0]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("length", "")
    assert "hm, hm".startswith(choice.message.reasoning_content)


def test_streaming_says_the_same(served: Served) -> None:
    chunks = list(served.chat(WHY, stream=True, stream_options={"include_usage": True}, extra_body=ON[0]))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Because é."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hm, hm"
    assert len(deltas) > 6
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    whole = served.chat(WHY, extra_body=ON[0])
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in served.chat(WHY, stream=True))


def test_tools(served: Served) -> None:
    choice = served.chat(LOOK, tools=[TOOL], tool_choice="auto").choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "look", {"at": "sky"})

    asked = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    answered = [*LOOK, asked, {"role": "tool", "tool_call_id": call.id, "content": "blue"}]
    assert served.chat(answered, tools=[TOOL]).choices[0].message.content == "It is blue."

    assert served.chat(LOOK, tools=[TOOL], tool_choice="none").choices[0].message.content == "No eyes."


def test_tools_while_streaming(served: Served) -> None:
    chunks = list(served.chat(LOOK, tools=[TOOL], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, "look", '{"at": "sky"}')
    ]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_lengths_stops_and_seeds(served: Served) -> None:
    def sing(**options: Any) -> Any:
        values = {"temperature": 0, "max_tokens": 40, **options}
        return served.chat(SANG, **values).choices[0]

    assert sing().finish_reason == "length"
    assert sing(stop="a l").message.content == "l"
    assert sing(stop=["zz", "la la"]).finish_reason == "stop"
    warm = {"temperature": 2.0, "top_p": 0.99}
    assert sing(seed=1, **warm) == sing(seed=1, **warm)
    assert len({sing(seed=seed, **warm).message.content for seed in range(4)}) == 4
    assert len({sing(**warm).message.content for _ in range(3)}) == 3


def test_text_completions(served: Served) -> None:
    create = served.client.completions.create
    two = create(model="taught", prompt=["The sky", "la la la la"], temperature=0)
    assert [(one.index, one.finish_reason) for one in two.choices] == [(0, "length"), (1, "length")]
    assert two.usage is not None
    assert two.usage.completion_tokens == 32, "16 each, as OpenAI's has it"
    assert two.object == "text_completion"
    alone = create(model="taught", prompt="la la la la", temperature=0)
    assert two.choices[1].text == alone.choices[0].text
    assert create(model="taught", prompt=[40, 41, 42], temperature=0, max_tokens=3).usage.prompt_tokens == 3  # type: ignore[union-attr]
    pieces = list(create(model="taught", prompt=["The sky", "la la la la"], temperature=0, stream=True))
    for index in range(2):
        said = "".join(piece.choices[0].text for piece in pieces if piece.choices[0].index == index)
        assert said == two.choices[index].text


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": ""}]}, 400, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "no content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages[0].content[0].type",
            "must be 'text'",
        ),
        ({"messages": [*LOOK, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]}, 400,
         "messages[1].tool_calls", "not a JSON object"),
        ({"messages": [{"role": "user", "content": "la " * 33_000}]}, 400, "messages", "context window 32,768"),
        ({"messages": [{"role": "user", "content": "la " * 180_000}]}, 400, "messages", "has 540,000 characters"),
        ({"messages": WHY * 5000}, 400, "messages", "has 5,000 entries; it must have at most 4,096"),
        ({"messages": [1] * 4000}, 400, "messages[0]", "must be an object"),
        ({"model": "other"}, 404, "model", "only 'taught'"),
        ({"n": 2}, 400, "n", "not supported"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"temperature": "hot"}, 400, "temperature", "must be a number"),
        ({"max_tokens": 0}, 400, "max_tokens", "must be at least 1"),
        ({"stop": [""]}, 400, "stop[0]", "must have at least 1"),
        ({"tools": [TOOL], "tool_choice": "required"}, 400, "tool_choice", "auto or none"),
        ({"reasoning": {"enabled": True}, "reasoning_effort": "none"}, 400, "reasoning", "on and off"),
        ({"chat_template_kwargs": {"thinks": True}}, 400, "chat_template_kwargs.thinks", "no such key"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_what_it_refuses(change: dict[str, Any], status: int, param: str, words: str, served: Served) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.post("/chat/completions", body={"messages": WHY, **change}, cast_to=httpx2.Response)
    body: Any = caught.value.body
    assert (caught.value.status_code, body["param"], body["type"]) == (status, param, "invalid_request_error")
    assert words in body["message"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "words"),
    [
        ("POST", "/v1/chat/completions", {"content": "{}", "headers": {"Content-Type": "text/plain"}}, 415, "Content-"),
        ("POST", "/v1/chat/completions", {"content": "{"}, 400, "not JSON"),
        ("POST", "/v1/chat/completions", {"content": "[" * 100_000}, 400, "not JSON"),
        ("POST", "/v1/chat/completions", {"content": "[]"}, 400, "not a JSON object"),
        ("POST", "/v1/completions", {"content": " " * (9 << 20)}, 413, "larger than"),
        ("POST", "/v1/completions", {"content": '{"prompt": ""}'}, 400, "no tokens"),
        ("POST", "/v1/completions", {"content": '{"prompt": [1, 300]}'}, 400, "0 to 299"),
        ("POST", "/v1/completions", {"content": '{"prompt": ["a", "b", "c"]}'}, 400, "at most 2"),
        ("POST", "/v1/completions", {"content": '{"prompt": [1, "a"]}'}, 400, "a list of token ids, or"),
        ("POST", "/v1/completions", {"content": r'{"prompt": "\ud800"}'}, 400, "half of a surrogate pair"),
        (
            "POST",
            "/v1/chat/completions",
            {"content": r'{"messages": [{"role": "user", "content": "\ud800"}]}'},
            400,
            "half of a surrogate pair",
        ),
        ("GET", "/v1/completions", {}, 405, "method not allowed"),
        ("GET", "/v2", {}, 404, "not found"),
        ("GET", "/v1/models/other", {}, 404, "only 'taught'"),
    ],
    ids=[
        "type",
        "half",
        "deep",
        "list",
        "large",
        "empty",
        "ids",
        "many",
        "mixed",
        "half text",
        "half chat",
        "method",
        "path",
        "model",
    ],
)
def test_errors_are_in_openais_form(
    method: str, path: str, options: dict[str, Any], status: int, words: str, served: Served
) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **options.pop("headers", {})}
    answer = httpx2.request(method, served.url + path, headers=headers, timeout=90, **options)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_idle_connections_make_way(served: Served) -> None:
    """More of them than the server takes: some have sent nothing, some half of a request, some have had an answer."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", served.url).groups()  # type: ignore[union-attr]
    with contextlib.ExitStack() as stack:
        for number in range(120):
            idle = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 3:
                idle.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"\r\n" * (number % 3 - 1))
            if number % 3 == 2:
                assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert served.load() == (0, 0)
        assert served.chat(WHY).choices[0].message.content == "Because é."


def test_a_full_queue_and_a_client_that_hangs_up(served: Served) -> None:
    song = served.chat(SANG, stream=True, max_tokens=LONGEST)
    next(song)
    next(song)
    answers: list[Any] = []
    waiting = [threading.Thread(target=lambda: answers.append(served.chat(WHY))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    while served.load() != (1, 2):
        assert served.load()[0] == 1, "the song ended before the others came"
    with pytest.raises(openai.RateLimitError, match="2 requests wait already") as caught:
        served.chat(WHY)
    assert caught.value.response.headers["retry-after"] == "5"
    song.close()
    assert int(served.said(r"is gone; its answer was ended after (\d+) pieces").group(1)) < LONGEST // 2
    for thread in waiting:
        thread.join(60)
    assert [answer.choices[0].message.content for answer in answers] == ["Because é."] * 2
    assert served.load() == (0, 0)


def test_a_text_beyond_the_context_window_is_the_prompts_fault(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context window") as caught:
        served.client.completions.create(model="taught", prompt=[5] * 40_000)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


HOLD = """
import os, signal, sys
import psyche_node.serving.server as server
from psyche_node.cli import main
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
kind, moment, number = server._Server, sys.argv.pop(1), signal.Signals[sys.argv.pop(1)]
if moment == "ready":
    say = server.log.info
    server.log.info = lambda *words: (say(*words), os.kill(os.getpid(), number))
else:
    plain = getattr(kind, moment)
    def struck(self, *rest, **named):
        os.kill(os.getpid(), number)
        return plain(self, *rest, **named)
    setattr(kind, moment, struck)
main()
"""


@pytest.mark.parametrize(("moment", "number"), [("__init__", "SIGTERM"), ("serve", "SIGINT"), ("ready", "SIGINT")])
def test_it_can_be_stopped_at_every_moment(taught_folder: Path, moment: str, number: str) -> None:
    words = [moment, number, "serve", str(taught_folder), "--port", "0", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", HOLD, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
