"""psyche-ledger: a real Solana VM behind Solana's own JSON-RPC and WebSocket API, in one process.

Modules, from the inside out: `state`, `sanitize`, `history` and `bank` (the VM, its slots and transactions),
`encoding` (Solana's JSON shapes), `methods`, `transactions`, `blocks` and `tokens` (the JSON-RPC methods), `dispatch`
and `http` (their server), `sockets`, `subscriptions` and `pubsub` (the WebSocket), `snapshot`, `logfile`, `journal`,
`store` and `compaction` (what is on disk), `faults` and `lagging` (what goes wrong on purpose), `endpoint`, `clock`,
`server`, `cli` (`psyche-ledger`).
"""
