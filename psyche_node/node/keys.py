"""A node's two keys: the wallet that pays, and the key that it has in the network."""

from __future__ import annotations

import logging

from solders.keypair import Keypair

from coordinator.wallet import create_keypair, load_keypair
from psyche_node.identity import NodeKey, load_or_create_node_key
from psyche_node.node.config import NodeConfig
from psyche_node.node.folder import LOCK

log = logging.getLogger(__name__)


def own_keys(config: NodeConfig) -> tuple[Keypair, NodeKey]:
    """Read the wallet and the node key; make what the node's folder lacks, and say so: the folder may be a slip.

    A wallet that the settings name has to be there. Raises WalletError and IdentityError.
    """
    folder, new = config.folder, not config.node_key_path.exists()
    unused = {one.name for one in folder.iterdir()} <= {LOCK}
    if config.wallet is not None or config.wallet_path.exists():
        wallet, made = load_keypair(config.wallet_path), False
    else:
        wallet, made = create_keypair(config.wallet_path), True
    node_key = load_or_create_node_key(config.node_key_path)
    if made:
        log.warning(
            "%s: made a new wallet, %s, in %s. It has no funds yet; back it up. If this node has a wallet already, "
            "this is the wrong --folder: name the one that holds it%s",
            f"{folder.absolute()} is a new folder" if unused else f"there was no wallet in {folder.absolute()}",
            wallet.pubkey(),
            config.wallet_path,
            ", and remove this one" if unused else "",
        )
    if new:
        log.info("made a new node key, %s, in %s", node_key.node_id, config.node_key_path)
    return wallet, node_key
