"""What can go wrong in a command, and the exit status that it ends with."""

from __future__ import annotations

from typing import Final

from coordinator.admin.exits import AdminExit
from coordinator.chain import ChainError, ChainUnavailable, ProgramError, RpcError, TransactionFailed
from coordinator.client import RunExists, RunNotFound
from coordinator.deploy import DeployError
from coordinator.history import HistoryIncomplete
from coordinator.run_config import ConfigError
from coordinator.state import MalformedAccount
from coordinator.urls import BadUrl
from coordinator.wallet import WalletError


class AdminError(Exception):
    """A command that ends in a message and `status`."""

    status = AdminExit.UNEXPECTED


class NotConfirmed(AdminError):
    """What cannot be undone was not confirmed."""

    status = AdminExit.NOT_CONFIRMED


class ProgramDiffers(AdminError):
    """Another program than the expected one is on the chain."""

    status = AdminExit.PROGRAM_DIFFERS


class UnusableFile(AdminError):
    """A file that cannot be read or written."""

    status = AdminExit.FILES


# The nearest class counts: a ProgramError is a TransactionFailed, and both are ChainErrors.
_STATUS: Final[dict[type[Exception], AdminExit]] = {
    ConfigError: AdminExit.CONFIG,
    BadUrl: AdminExit.CONFIG,
    WalletError: AdminExit.WALLET,
    MalformedAccount: AdminExit.STATE_UNREADABLE,
    RunNotFound: AdminExit.RUN_NOT_FOUND,
    RunExists: AdminExit.CONFIG,
    DeployError: AdminExit.PROGRAM_DIFFERS,
    ProgramError: AdminExit.PROGRAM_REFUSED,
    TransactionFailed: AdminExit.TRANSACTION_FAILED,
    RpcError: AdminExit.RPC_REFUSED,
    HistoryIncomplete: AdminExit.HISTORY_INCOMPLETE,
    ChainUnavailable: AdminExit.CHAIN_UNAVAILABLE,
    ChainError: AdminExit.TRANSACTION_FAILED,
}


def status_of(error: Exception) -> AdminExit | None:
    """The exit status for an error that a user can do something about; None for a defect."""
    if isinstance(error, AdminError):
        return error.status
    return next((_STATUS[one] for one in type(error).__mro__ if one in _STATUS), None)


def message_of(error: Exception) -> str:
    """What is printed for it."""
    return f"the program refused: {error}" if isinstance(error, ProgramError) else str(error)
