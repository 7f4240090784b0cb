"""Gossip among members only: a peer that is none may subscribe, and is sent nothing and not listened to.

Every message of a Pubsub leaves through ``write_msg``. To a peer that is not admitted, only what keeps the protocol
going is written (subscriptions, grafts, prunes), so that gossip begins at once when it becomes a member. What would end
py-libp2p is dropped, and so is what it would keep for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from libp2p.abc import INetStream
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub

log = logging.getLogger(__name__)


class MembersRouter(GossipSub):
    """A mesh of peers that ``admits`` says yes to. The others could fill all its places, and pass nothing on."""

    def __init__(self, *arguments: Any, admits: Callable[[ID], bool], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._admits = admits

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        # No answer: it would keep a member to be away for a minute. The heartbeat takes it once it is one.
        if not self._admits(sender_peer_id):
            return
        # The names of topics are free, and py-libp2p remembers whatever was pruned.
        for named in (rpc.control.graft, rpc.control.prune, rpc.control.ihave):
            ours = [one for one in named if one.topicID in self.mesh]
            del named[:]
            named.extend(ours)  # type: ignore[arg-type]  # each of its own kind
        for prune in rpc.control.prune:
            # Whom to connect to is not for a peer to say.
            del prune.peers[:]
        await super().handle_rpc(rpc, sender_peer_id)

    def mesh_heartbeat(self) -> Any:
        for peers in self.mesh.values():
            # Who was a member, and is none any more.
            peers.intersection_update([peer for peer in peers if self._admits(peer)])
        return super().mesh_heartbeat()

    # The three ways in which py-libp2p itself chooses peers: at a subscription, for a better mesh, for everything else.

    def _is_gossipsub_peer(self, peer_id: ID) -> bool:
        return self._admits(peer_id) and super()._is_gossipsub_peer(peer_id)

    def supports_scoring(self, peer_id: ID) -> bool:
        return self._admits(peer_id) and super().supports_scoring(peer_id)

    def _get_in_topic_gossipsub_peers_from_minus(
        self, topic: str, num_to_select: int, minus: Iterable[ID], backoff_check: bool = False
    ) -> list[ID]:
        known = len(self.peer_protocol)
        candidates = super()._get_in_topic_gossipsub_peers_from_minus(topic, known, minus, backoff_check)
        return self.select_from_minus(num_to_select, filter(self._admits, candidates), ())


class MembersPubsub(Pubsub):
    """``admits`` is asked for every message that goes to a peer, ``allows`` for every one that comes from a peer."""

    def __init__(
        self,
        *arguments: Any,
        admits: Callable[[ID], bool],
        allows: Callable[[ID, rpc_pb2.Message], bool],
        **options: Any,
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
            if msg_forwarder != self.my_id:
                # What is not wanted of a peer is dropped before anything is done with it.
                if not self._allows(msg_forwarder, msg):
                    return
                # Nobody vouches for what is around the statement. py-libp2p takes author and number for its name, so
                # that with those of another's next message that one would not be passed on.
                msg = rpc_pb2.Message(
                    from_id=msg_forwarder.to_bytes(),
                    seqno=self._next_seqno(),
                    data=msg.data,
                    topicIDs=msg.topicIDs,
                )
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:
            # It would end the whole host.
            log.debug("a gossip message of %s was dropped: %r", msg_forwarder, error)
