"""What the supervisor and the network process say to each other (framing: ``psyche_node.ipc``)."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from psyche_node.ipc import Message

MAX_MEMBERS = 256
MAX_ROUND = 2**63 - 1
# A bound on what a run may ever ask for; the real length of an update comes from the chain.
MAX_BLOB_BYTES = 1 << 37

_HEX32 = r"^[0-9a-f]{64}$"


class Kind(StrEnum):
    """What a blob is, the most urgent first. Uploads and downloads of the less urgent wait for the others."""

    UPDATE = "update"
    """A member's update of a round: wanted by all members at once, and passed on by them along a tree."""
    CHECKPOINT = "checkpoint"
    MODEL = "model"


class Configure(Message):
    """The first request: bring the network up. Answered by ``Ready``, or by a Failure after which the process ends."""

    folder: str
    """The node's folder; the blob store is its ``blobs`` subfolder."""
    node_key_path: str
    listen_host: str = "127.0.0.1"
    """IP address to listen on. For 0.0.0.0 or ::, the interface towards the bootstrap node is what is announced."""
    p2p_port: int = Field(default=0, ge=0, le=65535)
    grpc_port: int = Field(default=0, ge=0, le=65535)
    bulk_port: int = Field(default=0, ge=0, le=65535)
    announce_bulk: str = ""
    """As ``announce_grpc``, for the bulk port. With ``announce_grpc`` and without this one, none is announced."""
    announce_grpc: str = ""
    """``IP:port`` that others reach the gRPC port at, if it is another than where it listens: a forwarded port."""
    announce_p2p: str = ""
    """The same for the libp2p port."""
    bootstrap: list[str] = Field(default_factory=list)
    """libp2p addresses (``/ip4/.../tcp/.../p2p/...``) of nodes that are already there. Empty: this one is the first."""
    reachable: Literal["auto", "yes", "no"] = "auto"
    """Whether others can open connections to this node. ``auto`` asks some members to try."""
    run: str
    """The run account's address: 32 bytes in hex, or in base58 as Solana prints it."""
    mdns: bool = False
    """Announce this node on the local network, and look for other members there."""
    faults: list[str] = Field(default_factory=list)


class Ready(Message):
    """The reply to ``Configure``."""

    node_id: str
    multiaddrs: list[str]
    grpc_address: str
    p2p_port: int
    """The TCP ports on which it listens."""
    grpc_port: int
    bulk_port: int


class MemberEntry(Message):
    slot: int = Field(ge=0, lt=MAX_MEMBERS)
    node_key: str = Field(pattern=_HEX32)
    wallet: str = Field(default="", max_length=64)
    """Whose node it is, in base58: what is held against a node goes with the wallet to its next node key."""


class SetMembers(Message):
    """The members of the run, from the chain; replaces the earlier list, and counts from the next call of any peer."""

    members: list[MemberEntry] = Field(max_length=MAX_MEMBERS)


class Publish(Message):
    """Offer a blob that is in the store. An update is announced: by gossip, and to every member that can be reached."""

    round: int = Field(ge=0, le=MAX_ROUND)
    member: int = Field(ge=0, lt=MAX_MEMBERS)
    digest: str = Field(pattern=_HEX32)
    length: int = Field(ge=1, le=MAX_BLOB_BYTES)
    kind: Kind = Kind.UPDATE


class WantEntry(Message):
    member: int = Field(ge=0, lt=MAX_MEMBERS)
    digest: str = Field(pattern=_HEX32)
    length: int = Field(ge=1, le=MAX_BLOB_BYTES)


class Want(Message):
    """Fetch these committed blobs, from their author or from whoever holds them, until ``Forget``."""

    round: int = Field(ge=0, le=MAX_ROUND)
    """The round of the updates. A blob of another kind is filed under it, and goes with it."""
    wants: list[WantEntry] = Field(max_length=MAX_MEMBERS)
    kind: Kind = Kind.UPDATE


class Forget(Message):
    """Drop wants, announcements and blobs of rounds before ``before_round``."""

    before_round: int = Field(ge=0, le=MAX_ROUND)


class Why(StrEnum):
    """The class of a refusal's reason, for counting; the reason itself is in the log and in ``Rejected``."""

    NOT_A_MEMBER = "not-a-member"
    IDENTITY = "identity"
    """It does not prove the node key it names, or names none, or another one than was meant."""
    EXPIRED = "expired"
    PROTOCOL = "protocol"
    """Not TLS 1.3, no deadline, a handshake that does not end."""
    MALFORMED = "malformed"
    CONTRADICTION = "contradiction"
    """A second, different word on what was said before."""
    WRONG_BYTES = "wrong-bytes"
    TOO_MANY = "too-many"
    """More at once, or within a second, than one peer, one address or all together may have."""
    OTHER = "other"


class GetStats(Message):
    """Ask for ``Stats``."""


class PeerStats(Message):
    """Traffic with one peer, as ``Stats`` counts it."""

    node_id: str
    slot: int | None
    connected: bool
    bytes_sent: int
    bytes_received: int
    banned: bool
    punched: bool = False
    """There is a path to it through two NATs."""


class RefusalCount(Message):
    """How often something of this kind was refused for this class of reasons, since the process began."""

    what: str
    why: Why
    count: int


class Stats(Message):
    """The reply to ``GetStats``. Bytes are of message bodies, gossip and direct calls together, without TLS and TCP."""

    bytes_sent: int
    bytes_received: int
    blob_bytes_sent: int
    """Of ``bytes_sent``, the pieces of blobs."""
    blob_bytes_received: int
    bulk_bytes_sent: int = 0
    """Of ``blob_bytes_sent``, what went over bulk connections."""
    bulk_bytes_received: int = 0
    peers: int
    """Peers with a libp2p connection, members or not."""
    private: bool | None = None
    """Nobody can open a connection to this node. None: not known yet."""
    connected: list[int]
    """Slots of the members with a libp2p connection that answers pings."""
    per_peer: list[PeerStats]
    refusals: list[RefusalCount] = Field(default_factory=list)
    """Every refusal, those that the log left out included."""


class NetworkShutdown(Message):
    """End the process. Closing the socket does the same."""


# The messages of all processes share one table of names, and another process has its own Shutdown.
Shutdown = NetworkShutdown


class Announced(Message):
    """A member's signed announcement arrived; what it says is checked against the chain by the supervisor."""

    round: int
    member: int
    digest: str
    length: int


class Fetched(Message):
    """A wanted blob is in the store, complete and verified. ``source`` is the PeerId that served its last piece.

    Each member for whom it was wanted gets one, also when several committed to the same bytes.
    """

    round: int
    member: int
    digest: str
    length: int
    source: str


class FetchFailed(Message):
    """An attempt at a wanted blob failed; sent once per cause and want. Fetching goes on, unless it is ``final``."""

    round: int
    member: int
    digest: str
    reason: str
    final: bool = False
    """There is no such blob: what the digest stands for has another length. The want has ended."""


class Rejected(Message):
    """Something from a peer was refused.

    ``what``: piece, manifest, commitment, announcement, record, call, certificate, handshake, connection or flood.
    """

    what: str
    peer: str
    member: int | None
    reason: str
    why: Why = Why.OTHER


class PeerUp(Message):
    """A libp2p connection with this member is up."""

    slot: int


class PeerDown(Message):
    """The last libp2p connection with this member is gone, or it stopped answering pings."""

    slot: int


class NetworkRestarted(Message):
    """The network process ended and a new one has taken its place. The supervisor says this to itself."""

    restarts: int
    """How many there have been since the node started."""
    reason: str


__all__ = [
    "MAX_BLOB_BYTES",
    "MAX_MEMBERS",
    "MAX_ROUND",
    "Announced",
    "Configure",
    "FetchFailed",
    "Fetched",
    "Forget",
    "GetStats",
    "Kind",
    "MemberEntry",
    "NetworkRestarted",
    "NetworkShutdown",
    "PeerDown",
    "PeerStats",
    "PeerUp",
    "Publish",
    "Ready",
    "RefusalCount",
    "Rejected",
    "SetMembers",
    "Shutdown",
    "Stats",
    "Want",
    "WantEntry",
    "Why",
]
