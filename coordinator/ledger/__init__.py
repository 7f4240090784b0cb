"""psyche-ledger: a real Solana VM behind Solana's own JSON-RPC and WebSocket API, in one process.

Modules, from the inside out: `bank` (the state: VM, slots, blockhashes, history), `encoding` (Solana's JSON shapes),
`methods` (the JSON-RPC methods), `http` and `pubsub` (the two servers), `cli` (`psyche-ledger`).
"""
