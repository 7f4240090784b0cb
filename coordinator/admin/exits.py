"""The exit codes of `psyche-admin`; ``docs/reference/exit-codes.md`` is generated from here.

A number that `psyche-node` has too means the same there (a test compares the two). 80 to 89 are this command's own.
"""

from __future__ import annotations

from coordinator.exit_code import ExitCode

RANGES = (
    (0, 9, "General"),
    (10, 19, "Settings, keys and files"),
    (20, 29, "Chain"),
    (80, 89, "Administration"),
    (128, 159, "Signals"),
)
"""(first, last, component)"""


class AdminExit(ExitCode):
    """How `psyche-admin` ended."""

    OK = (0, "Everything that was asked for is done; with `--dry-run`: it would be.", "Nothing to do.")
    UNEXPECTED = (
        1,
        "Something happened that the command does not know how to handle.",
        "Run it again; if it repeats, report it with the traceback and the version. Look at the chain first if it was "
        "sending something: `run show`.",
    )
    USAGE = (
        2,
        "A flag is unknown or missing, or its value cannot be used.",
        "The message names the flag. `--help` after any command lists all of them.",
    )
    CONFIG = (
        10,
        "A setting, an address or an amount is missing, unknown or out of range. Nothing was sent.",
        "The message names each key and what it must be. All keys of a run: [settings](settings.md).",
    )
    WALLET = (
        11,
        "The wallet cannot be used: no file, not a Solana keypair, or readable by others.",
        "Make one with `psyche-admin keys new FILE`, or run `chmod 600 FILE` on the one you have.",
    )
    FILES = (
        13,
        "A file could not be read or written.",
        "The message names it. Look at the path, permissions and free space; an export never replaces a file.",
    )
    CHAIN_UNAVAILABLE = (
        20,
        "No RPC endpoint answered in time, or a transaction could not be confirmed.",
        "Check the URL with `psyche-admin ledger show --rpc URL`; give several `--rpc` for fail-over. A transaction "
        "that was not confirmed may still have its effect: look with `run show` before you send it again.",
    )
    TRANSACTION_FAILED = (
        21,
        "The cluster refused or failed a transaction before the program could judge it, most often because the wallet "
        "is empty.",
        "`psyche-admin keys show FILE --rpc URL` shows the balance; fund it (`ledger airdrop` on a test chain). "
        "`--dry-run` shows what a command costs.",
    )
    PROGRAM_REFUSED = (
        22,
        "The coordinator program refused an instruction with one of its numbered errors; nothing changed.",
        "The message has the error's number, name and text. `run show` says in which state the run is and who owns it.",
    )
    STATE_UNREADABLE = (
        24,
        "An account does not hold what this version expects.",
        "Check the address. An account of another version of the program needs that version of `psyche-admin`, or "
        "`run migrate` by its owner.",
    )
    RUN_NOT_FOUND = (
        26,
        "There is no run where one was looked for, or several have that name.",
        "`psyche-admin run list --program PROGRAM` lists all of them; give an address instead of a name, or `--owner`.",
    )
    NOT_CONFIRMED = (
        80,
        "What was asked for cannot be undone, and nobody confirmed it. Nothing was sent.",
        "Answer `y`, or give `--yes` where there is no terminal. `--dry-run` shows what would happen.",
    )
    PROGRAM_DIFFERS = (
        81,
        "The program on the chain is missing or is not the one built here, or another key may upgrade it.",
        "Compare versions: `program verify` prints both hashes and who may upgrade it. Its upgrade authority can run "
        "`program upgrade`. Do not join a run whose program you cannot verify.",
    )
    RECORD_INVALID = (
        82,
        "An exported record is not what was signed, contradicts itself or contradicts the chain.",
        "The message names the line and what is wrong there. Get the file again from its exporter, or export the run "
        "yourself with `run export`.",
    )
    HISTORY_INCOMPLETE = (
        83,
        "The endpoint does not have the whole history of the run: a record made from it would have gaps, and one that "
        "reaches further back cannot be compared with it.",
        "Use an archival RPC endpoint, or export with `--partial`: the record then says from where on it is complete.",
    )
    RPC_REFUSED = (
        85,
        "The RPC endpoint understood the request and refused it.",
        "The message is the endpoint's. Public endpoints limit faucets, long histories and lists of accounts: use "
        "another endpoint, or your own.",
    )
    INTERRUPTED = (130, "Stopped by Ctrl-C.", "Nothing to do. What was already sent stays on chain.")
