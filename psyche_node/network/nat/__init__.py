"""Nodes behind NAT: what a node knows about its own reachability, and paths to those that cannot be reached."""
