"""The answer to one HTTP request, as the layers above the sockets see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Reply(NamedTuple):
    """A status and a body; `retry_after` is seconds for the header of that name.

    Status 0: no answer at all, the connection is reset.
    """

    body: bytes = b""
    status: int = 200
    retry_after: int | None = None


RESET = Reply(status=0)

Deliver = Callable[[Reply], None]
Answer = Callable[[bytes, Deliver], None]
"""Takes a request's body and delivers exactly one reply, now or later, in the event loop's thread."""
