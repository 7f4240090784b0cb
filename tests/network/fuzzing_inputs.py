"""Messages made from an input's bytes: valid ones, changed in a few places, and signed with a known key."""

from __future__ import annotations

from typing import Any

from psyche_node.identity import NodeKey
from psyche_node.network.wire import node_pb2 as wire

KEYS = [NodeKey(bytes([number]) * 32) for number in range(4)]
# Most statements name the key that signs them.
AUTHORS = [*[KEYS[0]] * 6, *KEYS[1:]]
RUN = bytes(range(32))
DIGEST = bytes(range(200, 232))
INTERESTING = [0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 512, 2**16, 2**20, 2**31 - 1, 2**31]
INTERESTING += [2**32 - 1, 2**32, 2**37, 2**37 + 1, 2**63 - 1, 2**63, 2**64 - 1]


class Input:
    """Reads decisions from an input's bytes; when they are used up everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, bound: int) -> int:
        return (self.byte() if bound <= 256 else self.byte() << 8 | self.byte()) % bound

    def one(self, choices: list[Any]) -> Any:
        return choices[self.below(len(choices))]

    def raw(self, bound: int) -> bytes:
        size = self.below(bound + 1)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def number(self) -> int:
        return self.one(INTERESTING) if self.byte() & 1 else int.from_bytes(self.raw(8), "little")

    def rest(self) -> bytes:
        return self._data[self._at :]


def changed(data: Input, raw: bytes) -> bytes:
    """Change raw bytes in one way: cut, grow, flip, overwrite, repeat; often not at all."""
    kind, at = data.below(8), data.below(len(raw) + 1)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw + data.raw(40)
    if kind == 2 and raw:
        at %= len(raw)
        return raw[:at] + bytes([raw[at] ^ (1 << data.below(8))]) + raw[at + 1 :]
    if kind == 3:
        part = data.raw(12)
        return raw[:at] + part + raw[at + len(part) :]
    if kind == 4:
        return raw[:at] + raw[at // 2 :]
    return raw


def unknown(data: Input) -> bytes:
    """A protobuf field that nobody knows, or one that is known a second time, or half of one."""
    number, kind = data.below(40), data.below(8)
    head = varint(number << 3 | kind)
    return head + (varint(data.number()) if kind == 0 else varint(data.below(300)) + data.raw(40))


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def mutated(data: Input, message: Any) -> bytes:
    """Set some fields of a protobuf message to other values, and serialize it with something added now and then."""
    fields = message.DESCRIPTOR.fields
    for _ in range(data.below(4)):
        field = data.one(list(fields))
        if field.is_repeated:
            values = getattr(message, field.name)
            if data.byte() & 1 and len(values):
                del values[data.below(len(values))]
            else:
                values.extend([_value(data, field)] * data.one([1, 1, 2, 9, 65, 300]))
        else:
            setattr(message, field.name, _value(data, field))
    raw = bytes(message.SerializeToString(deterministic=True))
    return raw + unknown(data) if data.below(4) == 0 else raw


def _value(data: Input, field: Any) -> Any:
    if field.type == field.TYPE_BYTES:
        known = [DIGEST, bytes(32), KEYS[0].public, RUN, b"", bytes(33), bytes(3000)]
        return data.one(known) if data.below(3) else data.raw(64)
    if field.type == field.TYPE_STRING:
        return address(data)
    if field.type == field.TYPE_MESSAGE:
        inner = getattr(wire, field.message_type.name)()
        for one in inner.DESCRIPTOR.fields:
            if not one.is_repeated:
                setattr(inner, one.name, _value(data, one))
        return inner
    if field.type == field.TYPE_BOOL:
        return bool(data.byte() & 1)
    return data.number() % {field.TYPE_UINT32: 2**32, field.TYPE_ENUM: 2**31}.get(field.type, 2**64)


def address(data: Input) -> str:
    """Something like an address, often one."""
    ip = data.one(["127.0.0.1", "192.0.2.1", "::1", "fe80::1%lo", "0.0.0.0", "224.0.0.1", "example.org", "", "1" * 200])
    port = str(data.number()) if data.byte() & 1 else data.one(["1", "65535", "0", "-1", "007", "٣", "", "1e3"])
    text = data.one([f"/ip4/{ip}/tcp/{port}", f"/ip6/{ip}/tcp/{port}", f"{ip}:{port}", f"[{ip}]:{port}", ip, "//" * 80])
    return changed(data, text.encode()).decode(errors="replace")


def signed(data: Input, body: bytes, context: bytes) -> bytes:
    """Sign a body, nearly always with the right key and context, and break the result now and then."""
    key = KEYS[0] if data.below(16) else KEYS[1]
    context = context if data.below(16) else b"psyche-node/nonsense/1:"
    raw = wire.Signed(body=body, signature=key.sign(context + body)).SerializeToString(deterministic=True)
    return changed(data, raw) if data.below(4) == 0 else raw


def announcement(data: Input) -> bytes:
    key = data.one(AUTHORS)
    fields = {"run": RUN, "round": data.below(12), "node_key": key.public, "digest": DIGEST, "length": 1000}
    return signed(data, mutated(data, wire.Announcement(**fields)), b"psyche-node/announcement/1:")


def record(data: Input) -> bytes:
    message = wire.NodeRecord(
        run=RUN,
        node_key=data.one(AUTHORS).public,
        seq=data.number(),
        p2p_addresses=["/ip4/127.0.0.1/tcp/4001"] * data.below(10),
        grpc_address="127.0.0.1:4002",
        tls_leaf=DIGEST,
        tls_expires=data.one([1, 2**40]),
    )
    return signed(data, mutated(data, message), b"psyche-node/record/1:")
