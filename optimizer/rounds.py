"""The updates of one round, opened and checked before any of them counts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from optimizer.codec import Blob, Header, open_body
from optimizer.engine import Bodies, Engine
from optimizer.errors import MalformedUpdate
from optimizer.layout import Layout
from optimizer.sharding import Site
from optimizer.transform import MOST_VOTES


def open_round(blobs: Iterable[Blob], layout: Layout, engine: Engine, site: Site) -> tuple[list[Header], Bodies]:
    """Headers and bodies (all blocks, B) of valid updates of one round of one run, by different members.

    Collective over the site: all processes raise MalformedUpdate, which counts the updates from 0, or none. Raises
    TypeError for what is not a list of bytes, ValueError for more updates than can be summed exactly.
    """
    if isinstance(blobs, Blob):
        raise TypeError("apply takes the updates of a round as a list; for a single one write apply([blob])")
    listed = list(blobs)
    if len(listed) > MOST_VOTES:
        raise ValueError(f"{len(listed)} updates at once cannot be summed exactly; at most {MOST_VOTES} can")
    problem: MalformedUpdate | None = None
    try:
        opened = _opened(listed, layout, engine)
    except MalformedUpdate as error:
        problem = error
    if not site.all(problem is None):
        raise problem or MalformedUpdate("another process of this site found a block at fault")
    return opened


def _opened(blobs: Sequence[Blob], layout: Layout, engine: Engine) -> tuple[list[Header], Bodies]:
    headers, bodies = [], []
    for number, blob in enumerate(blobs):
        with _naming(number):
            header, body = open_body(blob, layout)
        headers.append(header)
        bodies.append(body)
    _require_one_round(headers)
    try:
        engine.check(bodies)
    except MalformedUpdate:
        for number, body in enumerate(bodies):
            with _naming(number):
                engine.check([body])
        raise
    return headers, bodies


@contextmanager
def _naming(number: int) -> Iterator[None]:
    try:
        yield
    except MalformedUpdate as error:
        raise MalformedUpdate(f"update {number}: {error.reason}") from error


def _require_one_round(headers: Sequence[Header]) -> None:
    for number, header in enumerate(headers):
        if (header.run, header.round) != (headers[0].run, headers[0].round):
            raise MalformedUpdate(
                f"update {number} is of round {header.round} of run {header.run.hex()[:16]}…, others are of round "
                f"{headers[0].round} of run {headers[0].run.hex()[:16]}…: apply one round at a time"
            )
    members = [header.member for header in headers]
    if len(set(members)) < len(members):
        raise MalformedUpdate(f"member {max(members, key=members.count)} has more than one update in this round")
