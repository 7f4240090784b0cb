"""Hostile bytes for the readers of a bulk connection: the server's and the client's."""

from __future__ import annotations

from fuzzing_inputs import DIGEST, Input, changed, mutated

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.bulk import frames
from psyche_node.network.bulk.secure import Broken
from psyche_node.network.sending import PieceServer, Refused, Status
from psyche_node.network.wire import node_pb2 as wire

# Pieces are not so long here that the fuzzer is busy with copying them.
_BUFFER = memoryview(bytearray(PIECE_BYTES))


class Bytes:
    """A source that ends."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def fill(self, view: memoryview) -> None:
        part = self._data[self._at : self._at + len(view)]
        if len(part) < len(view):
            raise Broken("the other side closed it")
        view[:] = part
        self._at += len(part)


def requests(data: Input, pieces: PieceServer, blobs: list[bytes], caller: bytes) -> bool:
    """What a server does with what it reads. Returns whether a request was answered to its end."""
    asked = wire.FetchRequest(digest=data.one([*blobs, DIGEST]), first=data.below(3), count=data.below(4))
    raw = frames.request_frame(mutated(data, asked))
    source, answered = Bytes(changed(data, raw) * data.one([1, 1, 2])), False
    try:
        while True:
            request = frames.read_request(source)
            assert len(request) <= frames.MAX_REQUEST
            sending = pieces.open(caller, request, lambda: None, bulk=True)
            try:
                answered = sum(len(piece) for piece in sending.pieces()) > 0
            finally:
                sending.close()
    except (frames.BadFrame, Broken, Refused):
        return answered


def answers(data: Input) -> bool:
    """What a client does with what it reads. Returns whether it came to an end."""
    said = b"".join(
        frames.piece_header(piece) + piece
        if data.below(3)
        else frames.end_frame(data.one(list(Status)), "x" * len(piece))
        for piece in (data.raw(40) or b"x" for _ in range(data.below(4)))
    )
    source = Bytes(changed(data, said) + data.raw(20))
    try:
        while not isinstance(frame := frames.read_frame(source, _BUFFER), frames.End):
            assert 0 < len(frame) <= PIECE_BYTES
    except (frames.BadFrame, Broken):
        return False
    assert len(frame.reason) <= frames.MAX_REASON
    return True
