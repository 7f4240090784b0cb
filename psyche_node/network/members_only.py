"""Gossip for members only: a peer that is none may subscribe, and gets no message. What would end py-libp2p is dropped.

Every message of a Pubsub leaves through ``write_msg``. To a peer that is not admitted, only what keeps the protocol
going is written (subscriptions, grafts, prunes), so that gossip begins at once when it becomes a member.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from libp2p.abc import INetStream
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub

log = logging.getLogger(__name__)


class MembersPubsub(Pubsub):
    """``admits`` is asked for every message that goes to a peer, ``allows`` for every one that comes from a peer."""

    def __init__(
        self, *arguments: Any, admits: Callable[[ID], bool], allows: Callable[[ID], bool], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._admits, self._allows = admits, allows

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        if not self._admits(stream.muxed_conn.peer_id) and (rpc_msg.publish or rpc_msg.control.ihave):
            reduced = rpc_pb2.RPC()
            reduced.CopyFrom(rpc_msg)
            reduced.ClearField("publish")
            reduced.control.ClearField("ihave")
            return await super().write_msg(stream, reduced)
        return await super().write_msg(stream, rpc_msg)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            # Of a peer that sends too many, the rest is dropped before anything is done with it.
            if msg_forwarder == self.my_id or self._allows(msg_forwarder):
                await super().push_msg(msg_forwarder, msg)
        except Exception as error:
            # It would end the whole host.
            log.debug("a gossip message of %s was dropped: %r", msg_forwarder, error)
