"""Connections through a line: an event loop that reads what the line takes and writes what has arrived.

Nothing is read that the line has no room for, so a fast sender, or a receiver that does not read, is held by TCP itself
and this process holds a line's worth of bytes per connection and direction at most.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import logging
import math
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable

from psyche_node.relay.line import Lane, Line
from psyche_node.relay.spec import LinkSpec

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 512
# Reads of a connection that are on the line at once, whatever their size.
_MAX_READS = 8192
_SPARE_BUFFERS = 64
_RESET = struct.pack("ii", 1, 0)
_NOT_NOW = (BlockingIOError, InterruptedError)
Address = tuple[str, int]


class Loop:
    """Sockets and timers of one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._interests: dict[socket.socket, tuple[Callable[[], None] | None, Callable[[], None] | None]] = {}
        self.stopping = False

    def at(self, when: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), then))

    def watch(
        self, sock: socket.socket, readable: Callable[[], None] | None, writable: Callable[[], None] | None
    ) -> None:
        """Call these when the socket is readable or writable; None for both forgets it."""
        before = self._interests.get(sock, (None, None))
        mask = selectors.EVENT_READ * (readable is not None) | selectors.EVENT_WRITE * (writable is not None)
        if not mask:
            if self._interests.pop(sock, None) is not None:
                self._selector.unregister(sock)
            return
        self._interests[sock] = (readable, writable)
        if before == (None, None):
            self._selector.register(sock, mask)
        elif (before[0] is None, before[1] is None) != (readable is None, writable is None):
            self._selector.modify(sock, mask)

    def run(self) -> None:
        """Run until ``stopping`` is set, which a callback or a signal handler does."""
        while not self.stopping:
            self.turn(1.0)

    def turn(self, longest: float) -> None:
        """Wait for what comes next, at most ``longest`` seconds, and do everything that is due."""
        wait = min(max(0.0, self._timers[0][0] - self.clock()), longest) if self._timers else longest
        for key, mask in self._selector.select(wait):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            for bit, side in ((selectors.EVENT_READ, 0), (selectors.EVENT_WRITE, 1)):
                # Looked up again each time: an earlier callback may have closed the socket.
                if mask & bit and (then := self._interests.get(sock, (None, None))[side]) is not None:
                    then()
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        for sock in list(self._interests):
            self.watch(sock, None, None)
            sock.close()
        self._selector.close()


class Direction:
    """One direction of a line, and the flows that wait for their turn on it."""

    def __init__(self, loop: Loop, line: Line) -> None:
        self.loop, self.line = loop, line
        self._waiting: deque[Flow] = deque()
        self._timed = False
        self._spare: list[bytearray] = []

    def queue(self, flow: Flow) -> None:
        """Let the flow read one block when the line is free and all that came before had their turn."""
        self._waiting.append(flow)
        if not self._timed:
            self._take_turns()

    def buffer(self) -> bytearray:
        return self._spare.pop() if self._spare else bytearray(self.line.block)

    def give_back(self, buffer: bytearray) -> None:
        if len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(buffer)

    def _take_turns(self) -> None:
        self._timed, free = False, 0.0
        # One turn for each that waits now: others of the loop have theirs in between.
        for _ in range(len(self._waiting)):
            if (free := self.line.free_at()) > self.loop.clock():
                break
            self._waiting.popleft().read_block()
        if self._waiting and not self._timed:
            self._timed = True
            self.loop.at(max(free, self.loop.clock()), self._take_turns)


class Flow:
    """Bytes of one connection in one direction, from ``source`` to ``sink``."""

    def __init__(self, pair: Pair, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self._pair, self._direction, self._loop = pair, direction, direction.loop
        self.source, self.sink = source, sink
        self.lane = Lane(direction.line, self._loop.clock() + direction.line.rtt)
        self._way: deque[tuple[float, memoryview, bytearray | None]] = deque()
        self._queued = self._blocked = False
        self._timer_at = math.inf
        self.ended = self.done = False

    @property
    def wants_bytes(self) -> bool:
        """Whether to be told that the source is readable."""
        return not (self.ended or self._queued) and self._room(self._loop.clock()) > 0

    def _room(self, now: float) -> int:
        return self.lane.room(now) if len(self._way) < _MAX_READS else 0

    @property
    def wants_to_write(self) -> bool:
        return self._blocked

    def readable(self) -> None:
        self._queued = True
        self._direction.queue(self)
        self._pair.watch()

    def read_block(self) -> None:
        """Take what the source has and the line has room for, once."""
        self._queued = False
        now = self._loop.clock()
        room = self._room(now)
        if self._pair.closed or not room:
            return
        buffer: bytearray | None = self._direction.buffer()
        assert buffer is not None
        try:
            count = self.source.recv_into(buffer, room)
        except _NOT_NOW:
            self._direction.give_back(buffer)
            self._pair.watch()
            return
        except OSError as error:
            self._pair.close(error)
            return
        view = memoryview(buffer)[:count]
        if 2 * count < len(buffer):
            # So that a buffer of a whole block is not held for a few bytes.
            view = memoryview(bytes(view))
            self._direction.give_back(buffer)
            buffer = None
        self.ended = not count
        self._way.append((self.lane.send(count, now), view, buffer))
        self.deliver()

    def deliver(self) -> None:
        """Give the sink what has arrived, and see when to go on."""
        self._blocked = False
        now = self._loop.clock()
        try:
            while self._way and self._way[0][0] <= now and not self._blocked:
                self._give(*self._way.popleft())
        except OSError as error:
            self._pair.close(error)
            return
        self._pair.watch()
        self._set_timer(now)

    def _give(self, arrived: float, view: memoryview, buffer: bytearray | None) -> None:
        if not view:
            self.done = True
            self.sink.shutdown(socket.SHUT_WR)
            self._pair.done()
            return
        try:
            count = self.sink.send(view)
        except _NOT_NOW:
            count = 0
        self.lane.taken(count)
        if count < len(view):
            self._way.appendleft((arrived, view[count:], buffer))
            self._blocked = True
        elif buffer is not None:
            view.release()
            self._direction.give_back(buffer)

    def _set_timer(self, now: float) -> None:
        if self._pair.closed:
            return
        times = [self._way[0][0]] if self._way and not self._blocked else []
        if not self.ended and not self.lane.room(now) and (opens := self.lane.opens(now)) is not None:
            times.append(opens)
        if times and min(times) < self._timer_at:
            self._timer_at = min(times)
            self._loop.at(self._timer_at, self._timer)

    def _timer(self) -> None:
        self._timer_at = math.inf
        if not self._pair.closed:
            self.deliver()


class Pair:
    """A connection to the relay and the one that the relay made for it."""

    def __init__(self, forward: Forward, near: socket.socket) -> None:
        """Begin to connect. Raises OSError when there is no descriptor left, say."""
        self._forward, self._loop, self._near = forward, forward.loop, near
        self.closed = False
        self._far = _socket(forward.target)
        for sock in (near, self._far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        forward.set_buffers(self._far)
        self._flows: tuple[Flow, ...] = ()
        code = self._far.connect_ex(forward.target)
        if code not in (0, errno.EINPROGRESS):
            self.close(OSError(code, f"{forward.target} cannot be reached"))
        else:
            self._loop.watch(self._far, None, self._connected)

    def _connected(self) -> None:
        if (code := self._far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) != 0:
            self.close(OSError(code, f"{self._forward.target} does not answer"))
            return
        down = Flow(self, self._forward.down, self._near, self._far)
        up = Flow(self, self._forward.up, self._far, self._near)
        self._flows = (down, up)
        for flow in self._flows:
            flow.deliver()

    def watch(self) -> None:
        """Tell the loop what both sockets wait for."""
        if self.closed:
            return
        down, up = self._flows
        for incoming, outgoing in ((down, up), (up, down)):
            self._loop.watch(
                incoming.source,
                incoming.readable if incoming.wants_bytes else None,
                outgoing.deliver if outgoing.wants_to_write else None,
            )

    def done(self) -> None:
        """A flow has brought its last byte."""
        if all(flow.done for flow in self._flows):
            self.close(None)

    def close(self, error: OSError | None) -> None:
        """End both connections; after an error by a reset, as a line that breaks has it."""
        if self.closed:
            return
        self.closed = True
        if error is not None:
            log.debug("connection to %s: %s", self._forward.target, error)
        for sock in (self._near, self._far):
            self._loop.watch(sock, None, None)
            if error is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
        self._forward.gone(self)


class Forward:
    """A port of the relay and where its connections lead."""

    def __init__(self, loop: Loop, down: Direction, up: Direction, target: Address, listen: Address) -> None:
        """Listen at once. Raises OSError when the port cannot be had."""
        self.loop, self.down, self.up, self.target = loop, down, up, target
        self._pairs: set[Pair] = set()
        self._listener = _socket(listen)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.set_buffers(self._listener)
        self._listener.bind(listen)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]
        loop.watch(self._listener, self._accept, None)

    def set_buffers(self, sock: socket.socket) -> None:
        """Keep the queue in front of a slow line short: the kernel would hold megabytes."""
        if self.up.line.limited and self.down.line.limited:
            size = max(64 * 1024, 4 * self.up.line.block, 4 * self.down.line.block)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def gone(self, pair: Pair) -> None:
        self._pairs.discard(pair)

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        if len(self._pairs) >= MAX_CONNECTIONS:
            near.close()
            return
        try:
            pair = Pair(self, near)
        except OSError as error:
            log.warning("a connection to %s is refused: %s", self.target, error)
            near.close()
            return
        if not pair.closed:
            self._pairs.add(pair)


def _socket(address: Address) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)


def open_link(
    loop: Loop, spec: LinkSpec, targets: list[Address], host: str = "127.0.0.1", seed: int = 0
) -> list[Forward]:
    """Open ports that lead to ``targets`` over one line, shared by all of their connections. Raises OSError."""
    down, up = (
        Direction(loop, Line(rate, spec.rtt, spec.jitter, spec.loss, reno=spec.reno, seed=2 * seed + side))
        for side, rate in enumerate((spec.down_rate, spec.up_rate))
    )
    return [Forward(loop, down, up, target, (host, 0)) for target in targets]
