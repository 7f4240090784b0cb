"""A ledger that is killed loses nothing that it acknowledged. `make nightly` kills one 50 times."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from kill_ledger import torture


@pytest.mark.e2e
def test_a_killed_ledger_is_what_a_twin_is_that_was_not_killed(tmp_path: Path) -> None:
    report = asyncio.run(torture(tmp_path / "ledger", kills=6, seed=1))
    assert report.failures == []
    assert report.kills_while_starting == 1
    assert report.acknowledged > 100
    assert report.replays_refused > 50
