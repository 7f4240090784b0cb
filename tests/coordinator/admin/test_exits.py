"""The exit codes of `psyche-admin`: in their ranges, explained, and the same numbers as those of `psyche-node`."""

from __future__ import annotations

import logging

import pytest
import typer

from coordinator.admin import exits
from coordinator.admin.exits import AdminExit
from coordinator.admin.failures import status_of
from coordinator.admin.session import go
from coordinator.chain import ChainUnavailable, ProgramError
from coordinator.client import RunNotFound
from coordinator.urls import BadUrl
from psyche_node.exits import Exit, exit_for


def test_they_fit_their_ranges() -> None:
    ends = [end for first, last, _ in exits.RANGES for end in (first, last)]
    assert ends == sorted(ends), "ranges overlap"
    for code in AdminExit:
        assert sum(first <= code <= last for first, last, _ in exits.RANGES) == 1, code
        assert code < 126 or code is AdminExit.INTERRUPTED
        assert len(code.meaning.split()) > 2
        assert code.resolve.strip()


def test_a_number_means_the_same_everywhere() -> None:
    theirs = {code.value: code.name for code in Exit}
    for code in AdminExit:
        assert theirs.get(code.value, code.name) == code.name
    assert {code.name for code in AdminExit if code.value not in theirs}.isdisjoint(theirs.values())


def test_both_commands_tell_a_missing_run_from_a_refused_transaction() -> None:
    assert exit_for(RunNotFound("x")).name == "RUN_NOT_FOUND"
    assert exit_for(BadUrl("x")) is Exit.CONFIG


def test_the_nearest_class_counts() -> None:
    assert status_of(ProgramError(6046, ())) is AdminExit.PROGRAM_REFUSED
    assert status_of(ChainUnavailable("x")) is AdminExit.CHAIN_UNAVAILABLE
    assert status_of(RunNotFound("x")) is AdminExit.RUN_NOT_FOUND
    assert status_of(KeyError("x")) is None, "a defect keeps its traceback"


def test_a_line_of_the_log_looks_like_every_other_message(capsys: pytest.CaptureFixture[str]) -> None:
    async def act() -> None:
        logging.getLogger("coordinator.rpc").error("endpoint \x1b[31m%s", "is behind")
        raise BadUrl("no URL")

    handlers = logging.getLogger().handlers
    before, level = handlers[:], logging.getLogger().level
    handlers.clear()  # a process of its own has none
    try:
        with pytest.raises(typer.Exit):
            go(act())
    finally:
        handlers[:] = before
        logging.getLogger().setLevel(level)
    assert (
        capsys.readouterr().err
        == "psyche-admin: endpoint \N{REPLACEMENT CHARACTER}[31mis behind\npsyche-admin: no URL\n"
    )
