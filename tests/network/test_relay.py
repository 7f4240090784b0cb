"""The link relay: what it says a line is, when bytes arrive on it, and that they all do."""

from __future__ import annotations

import errno
import itertools
import json
import math
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from psyche_node.exits import Exit
from psyche_node.relay.__main__ import app
from psyche_node.relay.forward import Forward, Loop, open_link
from psyche_node.relay.line import SEGMENT, Lane, Line
from psyche_node.relay.spec import BadSpec, LinkSpec

MBIT = 1e6 / 8


# What can be said about a line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("100mbit/80ms", LinkSpec(100 * MBIT, 100 * MBIT, 0.08)),
        ("100mbit/80ms/0.5%", LinkSpec(100 * MBIT, 100 * MBIT, 0.08, loss=0.005)),
        ("1.5Gbit/200ms±20ms/1%", LinkSpec(1500 * MBIT, 1500 * MBIT, 0.2, 0.02, 0.01)),
        ("20mbit:100mbit/40ms+-5ms", LinkSpec(20 * MBIT, 100 * MBIT, 0.04, 0.005)),
        ("512kbit/1s/2%/reno", LinkSpec(0.512 * MBIT, 0.512 * MBIT, 1.0, 0.0, 0.02, True)),
        ("unlimited/0", LinkSpec()),
    ],
)
def test_specs_that_are_ones(text: str, spec: LinkSpec) -> None:
    assert LinkSpec.parse(text) == spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no round-trip time"),
        ("100mbit", "no round-trip time"),
        ("fast/80ms", "'fast' is no rate"),
        ("0mbit/80ms", "'0mbit' is no rate"),
        ("100/80ms", "'100' is no rate"),
        ("100mb/80ms", "'100mb' is no rate"),
        ("1mbit:2mbit:3mbit/80ms", "at most two rates"),
        ("100mbit/80", "'80' is no time"),
        ("100mbit/-1ms", "'-1ms' is no time"),
        ("100mbit/60s", "a round trip of more than 10 s"),
        ("100mbit/80ms±50ms", "cannot be more than half"),
        ("100mbit/80ms±", "'' is no time"),
        ("100mbit/80ms/5", "'5' is no loss"),
        ("100mbit/80ms/51%", "is no line any more"),
        ("100mbit/80ms/1%/2%", "'2%' is one part too many"),
        ("100mbit/80ms/reno", "reno is about what losses do"),
    ],
)
def test_specs_that_are_none_say_why(text: str, reason: str) -> None:
    with pytest.raises(BadSpec, match=reason.replace("+", r"\+")):
        LinkSpec.parse(text)


@given(st.text("0123456789./:%±+-kmgbitsreno ", max_size=24))
def test_any_text_is_a_spec_or_refused(text: str) -> None:
    try:
        spec = LinkSpec.parse(text)
    except BadSpec:
        return
    assert spec.jitter <= spec.rtt / 2
    assert 0 <= spec.loss <= 0.5


# When bytes arrive, by a clock that the test holds --------------------------------------------------------------------


def line(rate: float, rtt: float, jitter: float = 0.0, loss: float = 0.0, *, reno: bool = False) -> Line:
    return Line(rate, rtt, jitter, loss, reno=reno, seed=1)


def sent_at_full_speed(lane: Lane, seconds: float) -> list[tuple[float, float, int]]:
    """(left, arrived, bytes) of a sender that always has bytes, and a receiver that takes them as they arrive."""
    now, sent, pending = 0.0, [], []
    while now < seconds:
        for entry in [entry for entry in pending if entry[0] <= now]:
            pending.remove(entry)
            lane.taken(entry[1])
        room = lane.room(now)
        if room and lane.line.free_at() <= now:
            arrives = lane.send(room, now)
            sent.append((now, arrives, room))
            pending.append((arrives, room))
            continue
        times = [lane.line.free_at(), lane.opens(now) or 0.0, *(arrives for arrives, _ in pending[:1])]
        now = min(at for at in times if at > now)
    return sent


@given(
    rate=st.floats(1e4, 1e9),
    rtt=st.floats(0, 1),
    spread=st.floats(0, 1),
    loss=st.sampled_from([0.0, 0.01, 0.3]),
    blocks=st.lists(st.tuples(st.integers(1, 262_144), st.floats(0, 0.1)), min_size=1, max_size=30),
)
def test_no_line_is_faster_than_its_rate_and_every_connection_is_in_order(
    rate: float, rtt: float, spread: float, loss: float, blocks: list[tuple[int, float]]
) -> None:
    jitter = spread * rtt / 2
    one = line(rate, rtt, jitter, loss)
    lanes = itertools.cycle([Lane(one, 0.0), Lane(one, 0.0)])
    arrivals: list[list[float]] = [[], []]
    now = total = 0.0
    for number, (count, pause) in enumerate(blocks):
        now += pause
        total += count
        arrives = next(lanes).send(count, now)
        arrivals[number % 2].append(arrives)
        assert arrives >= total / rate + rtt / 2 - jitter - 1e-9
        assert arrives >= now + count / rate + rtt / 2 - jitter - 1e-9
    assert all(times == sorted(times) for times in arrivals)


@pytest.mark.parametrize(("rate", "rtt"), [(100 * MBIT, 0.08), (1000 * MBIT, 0.2), (2 * MBIT, 0.6)])
def test_a_full_line_is_full(rate: float, rtt: float) -> None:
    """The window and the turns never leave the line idle, however long it is."""
    sent = sent_at_full_speed(Lane(line(rate, rtt), opened=rtt), seconds=5.0)
    assert sent[0][:2] == (rtt, pytest.approx(1.5 * rtt + sent[0][2] / rate))
    arrived = sum(count for _, arrives, count in sent if arrives <= 5.0)
    assert arrived == pytest.approx(rate * (5.0 - 1.5 * rtt), rel=0.02)


def test_losses_cost_round_trips_and_their_share_of_the_rate() -> None:
    rate, rtt, loss = 100 * MBIT, 0.08, 0.005
    one = line(rate, rtt, loss=loss)
    late = [one.send(SEGMENT, at)[0] - at for at in itertools.islice(itertools.count(0.0, 1.0), 100_000)]
    once = sum(lateness > rtt for lateness in late) / len(late)
    assert once == pytest.approx(loss, rel=0.1)
    assert max(late) <= rtt / 2 + SEGMENT / rate / (1 - loss) + 3 * rtt
    sent = sent_at_full_speed(Lane(line(rate, rtt, loss=loss), 0.0), seconds=20.0)
    arrived = sum(count for _, arrives, count in sent if arrives <= 20.0)
    assert arrived == pytest.approx(rate * (1 - loss) * 20.0, rel=0.03)


def test_reno_is_held_by_its_losses() -> None:
    """Mathis et al. 1997: a connection gets about 1.22 segments per round trip and root of the loss."""
    rtt, loss = 0.08, 0.005
    sent = sent_at_full_speed(Lane(line(1000 * MBIT, rtt, loss=loss, reno=True), 0.0), seconds=120.0)
    rate = sum(count for _, _, count in sent) / 120.0
    assert rate == pytest.approx(1.22 * SEGMENT / (rtt * math.sqrt(loss)), rel=0.4)


def test_jitter_is_around_the_delay() -> None:
    one = line(0.0, 0.1, jitter=0.02)
    late = [one.send(100, at)[0] - at for at in map(float, range(2000))]
    assert 0.03 <= min(late) < 0.032
    assert 0.068 < max(late) <= 0.07


# Real connections -----------------------------------------------------------------------------------------------------


class Echo:
    """A server that sends back what it gets, and ends a connection when its caller does."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@contextmanager
def relayed(spec: str, target: tuple[str, int]) -> Iterator[Forward]:
    loop = Loop()
    forward = open_link(loop, LinkSpec.parse(spec), [target])[0]
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    try:
        yield forward
    finally:
        loop.stopping = True
        thread.join(60)
        loop.close()


@pytest.mark.parametrize("spec", ["unlimited/0", "200mbit/4ms±1ms/5%", "50mbit:400mbit/2ms", "400mbit/2ms/1%/reno"])
def test_every_byte_arrives_in_order_and_so_does_the_end(spec: str, echo: Echo) -> None:
    with relayed(spec, echo.address) as forward:

        @settings(max_examples=8, deadline=None)
        @given(st.lists(st.integers(1, 70_000), max_size=8), st.integers(0, 2**32))
        def check(sizes: list[int], seed: int) -> None:
            parts = list(map(random.Random(seed).randbytes, sizes))
            with socket.create_connection(forward.address, timeout=60) as connection:

                def send() -> None:
                    for part in parts:
                        connection.sendall(part)
                    connection.shutdown(socket.SHUT_WR)

                sender = threading.Thread(target=send)
                sender.start()
                received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
                sender.join()
            assert received == b"".join(parts)

        check()


def test_connections_of_a_line_share_it() -> None:
    """All of them get through, none of them by waiting until the others are done; the clock is the test's."""
    clock = itertools.count(0.0, 0.0005)
    loop = Loop(lambda: next(clock))
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        forward = open_link(loop, LinkSpec.parse("80mbit/2ms"), [server.getsockname()])[0]
        unsent = {}
        for _ in range(4):
            client = stack.enter_context(socket.create_connection(forward.address, timeout=60))
            client.setblocking(False)
            unsent[client] = 200_000
        ends: list[socket.socket] = []
        while len(ends) < 4:
            loop.turn(0.0)
            with suppress(BlockingIOError):
                ends.append(stack.enter_context(server.accept()[0]))
                ends[-1].setblocking(False)
        left, order = [200_000] * 4, list[int]()
        while any(left):
            for client, count in unsent.items():
                with suppress(BlockingIOError):
                    unsent[client] -= client.send(bytes(min(count, 1 << 14)))
            loop.turn(0.0)
            for number, end in enumerate(ends):
                with suppress(BlockingIOError):
                    left[number] -= len(end.recv(1 << 14))
                    order.append(number)
        loop.close()
    firsts, lasts = [[order.index(n) for n in range(4)], [len(order) - 1 - order[::-1].index(n) for n in range(4)]]
    assert max(firsts) < min(lasts)


def test_a_target_that_is_not_there_is_a_connection_that_breaks() -> None:
    def attempt(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address, timeout=60) as connection:
            return connection.recv(1)

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with relayed("unlimited/0", nobody.getsockname()) as forward, pytest.raises(ConnectionError):
            attempt(forward.address)


def test_a_target_of_the_other_family_is_reached() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, relayed("unlimited/0", server.getsockname()[:2]) as forward:
        server.settimeout(60)
        with socket.create_connection(forward.address, timeout=60), server.accept()[0]:
            pass


def test_a_connection_for_which_no_descriptor_is_left_costs_that_connection_only(
    echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    none_left = OSError(errno.EMFILE, "Too many open files")
    with relayed("unlimited/0", echo.address) as forward:
        with monkeypatch.context() as patch:
            patch.setattr("psyche_node.relay.forward._socket", Mock(side_effect=none_left))
            with socket.create_connection(forward.address, timeout=60) as connection:
                assert connection.recv(1) == b""
        with socket.create_connection(forward.address, timeout=60) as connection:
            connection.sendall(b"hello")
            assert connection.recv(5, socket.MSG_WAITALL) == b"hello"


@pytest.mark.parametrize("moves", [False, True])
def test_a_receiver_that_does_not_read_holds_the_sender(moves: bool) -> None:
    """However much is sent, the relay holds a line's worth: nothing moves, or time does and nobody reads."""
    clock = itertools.count(0.0, 0.0005 if moves else 0.0)
    loop = Loop(lambda: next(clock))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        forward = open_link(loop, LinkSpec.parse("80mbit/40ms"), [server.getsockname()])[0]
        client.connect(forward.address)
        client.setblocking(False)
        sent = idle = most = 0
        while idle < 200:
            try:
                sent += client.send(bytes(1 << 16))
                idle = 0
            except BlockingIOError:
                idle += 1
            loop.turn(0.0)
            held = [flow.lane.under_way for pair in forward._pairs for flow in pair._flows]
            most = max([most, *held])
        window = forward.down.line.window
        assert 0 < most <= window if moves else most == 0
        assert window < 1_000_000
        loop.close()


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_relays_until_it_is_told_to_stop(echo: Echo) -> None:
    target = "{}:{}".format(*echo.address)
    command = [sys.executable, "-m", "psyche_node.relay", "--link", "100mbit/2ms", "--to", f"{target},{target}"]
    process = subprocess.Popen([*command, "--to", target], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        assert [entry["to"] for entry in ports] == [target] * 3
        assert len({entry["at"] for entry in ports}) == 3
        for entry in ports:
            host, port = entry["at"].split(":")
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(b"hello")
                assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--link", "100mbit", "--to", "127.0.0.1:1"], "no round-trip time"),
        (["--to", "localhost"], "'localhost' is not IP:PORT"),
        (["--to", "localhost:1"], "'localhost:1' is not IP:PORT"),
        (["--to", "127.0.0.1:1", "--listen", "192.0.2.1"], "cannot listen on 192.0.2.1"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == Exit.USAGE
    assert reason in done.stderr


def test_help_shows_the_form_of_a_line() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0, done.output
    assert "LOSS%" in done.output
