"""`python -m coordinator.ledger`: the same as `psyche-ledger`."""

from coordinator.ledger.cli import main

main()
