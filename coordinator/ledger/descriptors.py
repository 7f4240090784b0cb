"""How many connections a process can hold: its limit of open files, less what the ledger's own files need.

A connection and a file of the log are both a descriptor. Whoever opens enough connections would stop the log, if the
servers did not leave room for it.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Iterable
from typing import Final

log = logging.getLogger(__name__)

# The log, a snapshot, the loop's own, the standard streams, the listening sockets.
OWN_DESCRIPTORS: Final = 64
# Accepted by a listening socket in one turn of the event loop. A connection beyond the room is open for a few turns
# before it is closed, so what can be accepted in those turns is kept free as well.
ACCEPTED_PER_TURN: Final = 8
_TURNS: Final = 4
_BACKLOG: Final = 256
# More than every server together admits; a system without a limit would otherwise be asked for "infinity".
_ENOUGH: Final = 65_536


def raise_file_limit() -> None:
    """Let this process open as many files as it may (at most 65,536): the soft limit is often 1,024 by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # macOS has a second limit, of the kernel
        log.warning("the limit of open files stays %d: %s", soft, error)


class Room:
    """Places for connections, shared by all servers of a process.

    Args:
        places: how many there are.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0

    def take(self) -> bool:
        """Whether there was a place; it is taken then, until `leave`."""
        if self.taken >= self.places:
            log.warning("refused a connection: %d are open, all that the limit of open files allows", self.taken)
            return False
        self.taken += 1
        return True

    def leave(self) -> None:
        self.taken -= 1


def room_for_connections(listening: int) -> Room:
    """What this process's limit of open files leaves for connections.

    Args:
        listening: the number of servers that accept them.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _ENOUGH if soft == resource.RLIM_INFINITY else soft
    return Room(max(1, limit - OWN_DESCRIPTORS - listening * ACCEPTED_PER_TURN * _TURNS))


def deepen_backlog(sockets: Iterable[socket.socket]) -> None:
    """Let more connections wait in the kernel than asyncio accepts in a turn: for asyncio the two are one number."""
    for listening in sockets:
        with socket.socket(fileno=os.dup(listening.fileno())) as same:
            same.listen(_BACKLOG)
