"""`python -m coordinator.admin`."""

from coordinator.admin.app import main

main()
