"""What commands print, and the amounts and addresses that they read."""

from __future__ import annotations

import json
import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console
from solders.pubkey import Pubkey

from coordinator.admin.failures import NotConfirmed, UnusableFile
from coordinator.funds import LAMPORTS_PER_SOL
from coordinator.run_config import ConfigError
from coordinator.wallet import load_keypair

_PLAIN_WIDTH: Final = 100


def console() -> Console:
    """Standard output; a pipe has no width, so it gets one that fits a page."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result: the object with --json, else the text (rich markup)."""
    if as_json:
        print(json.dumps(result))
    else:
        console().print(text, highlight=False, soft_wrap=True)


def confirm(what: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone; `what` is a sentence that says what is lost.

    Raises:
        NotConfirmed: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise NotConfirmed(f"{what} Nobody is at a terminal to confirm it: give --yes. Nothing was sent.")
    try:
        confirmed = typer.confirm(f"{what} Go on?", err=True)
    except typer.Abort:  # Ctrl-C, or the end of the input
        confirmed = False
    if not confirmed:
        raise NotConfirmed("not confirmed; nothing was sent")


def read_file(path: Path) -> bytes:
    """Raises UnusableFile."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFile(f"{path} cannot be read: {error.strerror or error}") from error


def pubkey(text: str, what: str) -> Pubkey:
    """An address as typed. Raises ConfigError."""
    try:
        return Pubkey.from_string(text)
    except ValueError:
        raise ConfigError(f"{what} {text!r} is not an address (32 bytes in base58)") from None


def address_of(text: str, what: str) -> Pubkey:
    """An address, or that of a wallet file. Raises ConfigError, WalletError."""
    path = Path(text)
    if path.is_file():
        return load_keypair(path).pubkey()
    try:
        return pubkey(text, what)
    except ConfigError as error:
        raise ConfigError(f"{error}, and not a wallet file that exists") from None


def lamports_of(text: str) -> int:
    """An amount of SOL as typed, above 0 and with at most 9 decimals. Raises ConfigError."""
    try:
        lamports = Decimal(text) * LAMPORTS_PER_SOL
        whole = int(lamports)
    except (InvalidOperation, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not an amount of SOL") from None
    if whole <= 0:
        raise ConfigError(f"{text} SOL cannot be sent: an amount must be above 0")
    if whole != lamports or whole >= 2**64:
        raise ConfigError(f"{text} SOL cannot be sent: an amount has at most 9 decimals, and less than 2^64 lamports")
    return whole
