"""What gRPC's C core writes to standard error, as refusals and log lines of this process.

A client whose certificate BoringSSL refuses (expired, not issued by the null CA, without its key, none at all) never
reaches a call, and Python's gRPC has no hook that would tell: the core only writes a line. So file descriptor 2 becomes
a pipe that a thread reads, and Python's own output goes to where descriptor 2 led before. The pipe never blocks who
writes: lines beyond what it holds are lost, and so is what is in it when the process crashes. Where it crashed is told
nevertheless, by Python's fault handler, past the pipe.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import sys
import threading
from collections.abc import Callable

from psyche_node.network.messages import Why

log = logging.getLogger(__name__)
# absl's format: severity and date, time, thread, file:line] text.
_LINE = re.compile(rb"^([IWEF])\d{4} [0-9:.]+ +\d+ ([\w./-]+:\d+)\] (.*)$")
# Lines that belong to the one before, which are the core's source files; and absl's preface to its first line.
_TRACE = re.compile(rb"=== Source Location Trace: ===\s*|[\w./-]+\.(?:cc|h):\d+\s*|\s*")
_PREFACE = b"WARNING: All log messages before absl::InitializeLog()"
_HANDSHAKE = b"Handshake failed with error"
_PROBE = "PEER_DID_NOT_RETURN_A_CERTIFICATE"
_MAX_LINE = 4096
_EXPIRED = ("certificate has expired", "certificate is not yet valid")
_PROOF = ("CERTIFICATE", "SIGNATURE", "certificate")


def classify(text: str) -> Why:
    """Return the class of a failed TLS handshake from what BoringSSL said."""
    if any(words in text for words in _EXPIRED):
        return Why.EXPIRED
    return Why.IDENTITY if any(words in text for words in _PROOF) else Why.PROTOCOL


class CoreLog:
    """The reader of descriptor 2.

    ``refused(reason, why)`` is told of every TLS handshake that failed, and ``probed`` of those without a certificate:
    that is how nodes look up each other's, before each of their first calls.
    """

    def __init__(self) -> None:
        self.refused: Callable[[str, Why], None] = lambda reason, why: None
        self.probed: Callable[[], None] = lambda: None
        self._within = False  # a message of the core, which may go on in the next line
        self._outside = os.dup(2)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        os.dup2(writing, 2)
        os.close(writing)
        # Line by line, as standard error is; and not through the pipe, which ends with this process.
        sys.stderr = os.fdopen(self._outside, "w", buffering=1, errors="backslashreplace", closefd=False)
        faulthandler.enable(self._outside)
        threading.Thread(target=self._read, args=(reading,), name="corelog", daemon=True).start()

    def _read(self, reading: int) -> None:
        left = b""
        while chunk := os.read(reading, 65536):
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                self._take(line)
            left = left[-_MAX_LINE:]

    def _take(self, line: bytes) -> None:
        found = _LINE.match(line)
        goes_on, self._within = self._within, found is not None
        if found is None:
            if goes_on and _TRACE.fullmatch(line):
                self._within = True
                return
            if line.startswith(_PREFACE):
                return
            # Not the core's: of the interpreter itself, or of a library. It belongs where it would have gone.
            os.write(self._outside, line + b"\n")
            return
        severity, where, text = found[1], found[2].decode(), found[3].decode(errors="backslashreplace")
        if text.encode(errors="replace").startswith(_HANDSHAKE):
            reason = text[len(_HANDSHAKE) :].strip()
            if _PROBE in reason:
                self.probed()
                return
            self.refused(f"its TLS handshake failed: {reason[:300]}", classify(reason))
        else:
            level = logging.WARNING if severity in b"EF" else logging.DEBUG
            log.log(level, "calls between nodes: %s (gRPC, %s)", text[:500], where)
