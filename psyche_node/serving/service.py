"""Answering requests: from a parsed body to work for the engine, and from its text to a response."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from psyche_node.generation import GenerationError, PromptError, Request, begins_inside
from psyche_node.serving.body import gone, largest_body, read_json
from psyche_node.serving.errors import ApiError
from psyche_node.serving.replies import DONE, ChatReply, Delta, Envelope, Usage, delta_body, event, message
from psyche_node.serving.scheduler import Event, Scheduler, Work
from psyche_node.serving.schema import ChatRequest, Sampled, TextRequest, parse

if TYPE_CHECKING:
    from psyche_node.generation import Engine

log = logging.getLogger(__name__)

_TEXT_TOKENS = 16
"""Longest answer of /v1/completions where the request does not say: OpenAI's default."""


class Service:
    """One model under one name.

    Args:
        longest: tokens of the longest answer that a request can get.
    """

    def __init__(self, engine: Engine, name: str, scheduler: Scheduler, longest: int) -> None:
        self.engine, self.name, self.scheduler, self._longest = engine, name, scheduler, longest
        self._since, self._largest = int(time.time()), largest_body(engine.context)

    async def health(self, _: HttpRequest) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok", "model": self.name, **self.scheduler.load})

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(http.path_params["name"])
        return JSONResponse(self._card())

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        asked = parse(ChatRequest, await read_json(http, self._largest))
        self._check_model(asked.model)
        messages = [one.for_template(f"messages[{index}]") for index, one in enumerate(asked.messages)]
        tools, thinking = asked.offered(), asked.thinking()
        prompts = self.engine.prompts
        self._check_size(1, sum(len(one["content"]) for one in messages), "messages")
        prompt = await _in_thread(prompts.render, messages, tools, None if thinking is None else thinking.on)
        reasons = begins_inside(prompt.text)
        if thinking is not None and not prompts.thinks and thinking.on != (reasons is not None):
            raise ApiError(
                400,
                f"{thinking.param} is not supported with this model: its chat template has no switch for reasoning. "
                "Leave it out",
                param=thinking.param,
                code="unsupported_parameter",
            )
        self._check_size(1, len(prompt.text), "messages")
        work = self._submit(asked, [await _in_thread(prompts.encode, prompt)], asked.length, "messages")
        reply, envelope = ChatReply(reasons, bool(tools)), Envelope("chat", self.name)
        if asked.stream:
            return _stream(self._chat_chunks(http, work, reply, envelope, asked.usage_asked))
        deltas, usage, reason = list[Delta](), Usage(), "stop"
        async for _, piece, done in _until_gone(http, work):
            deltas.append(reply.feed(piece))
            if done is not None:
                usage.add(done)
                reason = done.finish_reason
        deltas.append(reply.finish())
        self._note(work, usage, envelope)
        choice = {
            "index": 0,
            "message": message(deltas, bool(tools)),
            "logprobs": None,
            "finish_reason": "tool_calls" if reply.calls else reason,
        }
        return JSONResponse(envelope.whole([choice], usage))

    async def complete(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        asked = parse(TextRequest, await read_json(http, self._largest))
        self._check_model(asked.model)
        self._check_size(len(asked.prompts), max(map(len, asked.prompts)), "prompt")
        encoded = [await self._tokens(one) for one in asked.prompts]
        length = asked.max_tokens if asked.max_tokens is not None else _TEXT_TOKENS
        work = self._submit(asked, encoded, length, "prompt")
        envelope = Envelope("text", self.name)
        if asked.stream:
            return _stream(self._text_chunks(http, work, envelope, asked.usage_asked))
        choices, usage = list[dict[str, Any]](), Usage()
        async for index, _, done in _until_gone(http, work):
            if done is not None:
                usage.add(done)
                choices.append(_text_choice(index, done.text, done.finish_reason))
        self._note(work, usage, envelope)
        return JSONResponse(envelope.whole(sorted(choices, key=lambda one: int(one["index"])), usage))

    async def _chat_chunks(
        self, http: HttpRequest, work: Work, reply: ChatReply, envelope: Envelope, with_usage: bool
    ) -> AsyncIterator[str]:
        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return envelope.chunk([choice], None, with_usage=with_usage)

        usage = Usage()
        yield chunk({"role": "assistant", "content": ""})
        async for _, piece, done in _until_gone(http, work):
            calls = reply.calls
            if delta := reply.feed(piece):
                yield chunk(delta_body(delta, calls))
            if done is None:
                continue
            usage.add(done)
            calls = reply.calls
            if delta := reply.finish():
                yield chunk(delta_body(delta, calls))
            yield chunk({}, "tool_calls" if reply.calls else done.finish_reason)
        if with_usage:
            yield envelope.chunk([], usage.body(), with_usage=True)
        self._note(work, usage, envelope)
        yield DONE

    async def _text_chunks(
        self, http: HttpRequest, work: Work, envelope: Envelope, with_usage: bool
    ) -> AsyncIterator[str]:
        usage = Usage()
        async for index, piece, done in _until_gone(http, work):
            reason = None if done is None else done.finish_reason
            yield envelope.chunk([_text_choice(index, piece, reason)], None, with_usage=with_usage)
            if done is not None:
                usage.add(done)
        if with_usage:
            yield envelope.chunk([], usage.body(), with_usage=True)
        self._note(work, usage, envelope)
        yield DONE

    def _submit(self, asked: Sampled, prompts: Sequence[tuple[int, ...]], length: int | None, param: str) -> Work:
        """Queue prompts (token ids). Raises ApiError if one does not fit the context window, or the queue is full."""
        advice = self.engine.advice
        if not all(prompts):
            raise ApiError(400, "the prompt has no tokens", param=param)
        first = secrets.randbits(62) if asked.seed is None else asked.seed
        requests = [
            Request(
                prompt,
                min(length or self._longest, self._longest),
                _first_of(asked.temperature, advice.temperature, 1.0),
                _first_of(asked.top_p, advice.top_p, 1.0),
                (first + index) % (1 << 63),
                asked.stops,
                advice,
            )
            for index, prompt in enumerate(prompts)
        ]
        try:
            for request in requests:
                self.engine.room(request)
        except PromptError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
        return self.scheduler.submit(requests)

    async def _tokens(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            tokens: tuple[int, ...] = await _in_thread(partial(self.engine.prompts.encode_text, special=True), prompt)
        else:
            tokens = tuple(prompt)
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.engine.vocabulary:
                raise ApiError(400, f"token ids are 0 to {self.engine.vocabulary - 1}", param="prompt")
        return tokens

    def _check_size(self, count: int, characters: int, param: str) -> None:
        """Refuse what has no chance before work is put into it."""
        self.scheduler.check(count)
        try:
            self.engine.may_fit(characters)
        except PromptError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None

    def _check_model(self, asked: str | None) -> None:
        if asked not in (None, self.name):
            what = f"there is no model {asked[:200]!r} here, only {self.name!r}"
            raise ApiError(404, what, param="model", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._since,
            "owned_by": "psyche-node",
            "max_model_len": self.engine.context,
        }

    def _note(self, work: Work, usage: Usage, envelope: Envelope) -> None:
        seconds = asyncio.get_running_loop().time() - work.since
        log.info("%s: %d + %d tokens in %.1f s", envelope.id, usage.prompt, usage.completion, seconds)


async def _in_thread(function: Any, *arguments: Any) -> Any:
    """Render or encode beside the event loop: a long conversation takes a while."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except GenerationError as error:
        raise ApiError(400, str(error), param="messages") from None


async def _until_gone(http: HttpRequest, work: Work) -> AsyncIterator[Event]:
    """Yield the events of a client's work; end it as soon as the client has hung up."""
    ended = asyncio.create_task(gone(http))
    events, heard, finished = aiter(work.events()), 0, False
    step: asyncio.Future[Event] | None = None
    try:
        while True:
            step = asyncio.ensure_future(anext(events))
            await asyncio.wait((step, ended), return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                raise ApiError(499, "the client has closed the connection")
            try:
                happened = step.result()
            except StopAsyncIteration:
                finished = True
                return
            except ApiError:
                raise
            except Exception as error:
                raise ApiError(500, f"the answer could not be generated: {error}", kind="server_error") from error
            heard += 1
            yield happened
    finally:  # also when the response is cancelled, as Starlette does for one that streams
        ended.cancel()
        if step is not None:
            step.cancel()
        work.cancel()
        if not finished:
            log.info("a client is gone; its answer was ended after %d pieces", heard)


def _stream(chunks: AsyncIterator[str]) -> Response:
    return StreamingResponse(
        _with_error(chunks),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _with_error(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """The chunks; an error in the middle is an event, since the status has been sent."""
    try:
        async for chunk in chunks:
            yield chunk
    except ApiError as error:
        yield event(error.body())


def _text_choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _first_of(*values: float | None) -> float:
    return next(value for value in values if value is not None)
