"""`psyche-admin`: deploy the program, own runs, watch and export them, make and fund wallets."""

from coordinator.admin.app import app, main

__all__ = ["app", "main"]
