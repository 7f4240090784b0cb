"""The node's network process: libp2p for discovery and gossip, gRPC with the node's identity for bytes.

The supervisor imports ``messages`` and ``store`` only; neither loads libp2p or gRPC.
"""
