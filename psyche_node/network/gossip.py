"""Gossip of announcements and node records over libp2p's gossipsub."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import trio
from blake3 import blake3
from libp2p.abc import IHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID, PROTOCOL_ID_V11, PROTOCOL_ID_V12
from libp2p.pubsub.pb import rpc_pb2
from libp2p.tools.anyio_service import Service, background_trio_service

from psyche_node.network.host import Handlers, key_of
from psyche_node.network.members_only import MembersPubsub, MembersRouter
from psyche_node.network.messages import Why


class Gossip:
    """Two topics of one run. What arrives goes to the handlers, which say whether it is passed on."""

    def __init__(
        self,
        host: IHost,
        run: bytes,
        own_key: bytes,
        handlers: Handlers,
        admits: Callable[[ID], bool] = lambda peer: True,
    ) -> None:
        """``admits``: with whom messages are exchanged."""
        prefix = f"/psyche/1/{run.hex()[:32]}"
        self._announcements, self._records = f"{prefix}/announcements", f"{prefix}/records"
        self._own_key, self._handlers, self._admits = own_key, handlers, admits
        self._router = MembersRouter(
            [PROTOCOL_ID_V12, PROTOCOL_ID_V11, PROTOCOL_ID],
            degree=4,
            degree_low=3,
            degree_high=6,
            heartbeat_interval=1,  # the default is 120 s
            spam_protection_enabled=False,  # it drops all but 10 messages a second and forwarder, without an error
            eclipse_protection_enabled=False,  # it wants three IP networks in the mesh; members are on a list anyway
            adaptive_gossip_enabled=False,
            admits=admits,
        )
        self._pubsub = MembersPubsub(
            host,
            self._router,
            admits=admits,
            allows=self._allows,
            msg_id_constructor=_message_id,
            validation_cache_ttl=1,  # a refusal must not outlive the next list of members
            max_inbound_rpc_size=256 * 1024,
            max_subscriptions_per_peer=8,
            allowed_topics={self._announcements, self._records},
            strict_signing=False,  # what travels is signed by its author; py-libp2p's own signature costs as much again
        )
        self.services: dict[str, Service] = {"pubsub": self._pubsub, "gossip router": self._router}
        for topic, take in (
            (self._announcements, handlers.gossip_announcement),
            (self._records, handlers.gossip_record),
        ):
            self._pubsub.set_topic_validator(topic, self._validator(take), False)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with background_trio_service(self._pubsub), background_trio_service(self._router):
            await self._pubsub.wait_until_ready()
            async with trio.open_nursery() as nursery:
                for topic in (self._announcements, self._records):
                    nursery.start_soon(self._drain, topic)
                yield
                nursery.cancel_scope.cancel()

    async def announcement(self, raw: bytes) -> None:
        await self._publish(self._announcements, raw)

    async def record(self, raw: bytes) -> None:
        await self._publish(self._records, raw)

    async def _publish(self, topic: str, raw: bytes) -> None:
        listening = filter(self._admits, self._pubsub.peer_topics.get(topic, ()))
        listeners = [key for peer in listening if (key := key_of(peer)) is not None]
        await self._pubsub.publish(topic, raw)
        for key in listeners[: self._router.degree]:
            self._handlers.gossip_bytes(key, len(raw), 0)

    def _allows(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Return whether to look at a message; before anything of it is kept, as all its topics would be, for ever."""
        peer = key_of(forwarder) or str(forwarder)
        if list(message.topicIDs) not in ([self._announcements], [self._records]):
            reason = "a gossip message is on one of this run's two topics, and on nothing else"
            self._handlers.refused("announcement", peer, reason, Why.MALFORMED)
            return False
        if not self._admits(forwarder):
            # A newcomer's own record may come this way, for nothing: it is asked for records when it connects.
            if message.topicIDs[0] == self._announcements:
                self._handlers.refused("announcement", peer, "it is not a member of the run", Why.NOT_A_MEMBER)
            return False
        return self._handlers.allows(peer)

    def _validator(self, take: Callable[[bytes, bytes | str], bool]) -> Callable[[ID, rpc_pb2.Message], bool]:
        def validate(forwarder: ID, message: rpc_pb2.Message) -> bool:
            key = key_of(forwarder)
            if key == self._own_key:
                return True
            if key is not None:
                self._handlers.gossip_bytes(key, 0, len(message.data))
            return take(message.data, str(forwarder) if key is None else key)

        return validate

    async def _drain(self, topic: str) -> None:
        # The validators have done all the work; an unread subscription would only log that it is full.
        subscription = await self._pubsub.subscribe(topic)
        async for _ in subscription:
            pass


def _message_id(message: rpc_pb2.Message) -> bytes:
    # A signed statement has exactly one encoding. With the topic in it, a statement that was refused because somebody
    # sent it on the wrong topic does not count as seen on its own. ASCII, because ids travel as protobuf strings.
    digest = blake3(message.data)
    for topic in message.topicIDs:
        digest.update(b"\0" + topic.encode())
    return digest.hexdigest().encode()
