"""The protocol's budgets in compute units, which are deterministic."""

from __future__ import annotations

import pytest
from program_costs import BUDGET, SMALL_BUDGET, measure, over_budget


@pytest.mark.parametrize("members", [4, 256])
def test_within_budget(members: int) -> None:
    costs = measure(members)
    assert {"commit", "attest", "join", "revoke", "archive", "set_model"} <= set(costs)
    assert over_budget(costs) == {}, f"budget {BUDGET}, commit and attest {SMALL_BUDGET}: {costs}"
