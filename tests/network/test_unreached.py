"""Why a node is not reached is said in words that help, whatever libp2p says."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
import trio

from psyche_node.identity import NodeKey
from psyche_node.network.host import dial, listening, make_host
from psyche_node.network.unreached import why_unreached

HOST = "127.0.0.1"


async def reason(key: NodeKey, port: int, seconds: float = 30.0) -> str:
    host = make_host(NodeKey.generate())
    async with listening(host, HOST, 0):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever libp2p raises)
            await dial(host, key.public, f"/ip4/{HOST}/tcp/{port}", seconds)
    return why_unreached(caught.value)


def test_nothing_is_there() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind((HOST, 0))
        assert trio.run(reason, NodeKey.generate(), taken.getsockname()[1]) == "nothing listens there"


def test_another_node_is_there() -> None:
    async def test() -> None:
        async with listening(make_host(NodeKey.generate()), HOST, 0) as port:
            assert await reason(NodeKey.generate(), port) == "another node is there, with another key"

    trio.run(test)


def test_something_else_is_there() -> None:
    with socket.create_server((HOST, 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):  # the test is over
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
                        connection.recv(1024)

        threading.Thread(target=answer, daemon=True).start()
        said = trio.run(reason, NodeKey.generate(), server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    assert said == "what is there does not speak as a node does"


def test_what_is_there_says_nothing() -> None:
    with socket.create_server((HOST, 0)) as server:
        assert trio.run(reason, NodeKey.generate(), server.getsockname()[1], 0.2) == "no answer in time"


def test_the_system_says_why() -> None:
    error = OSError(113, "No route to host")
    assert why_unreached(ExceptionGroup("all attempts failed", [error])) == "no route to host"
