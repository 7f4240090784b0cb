"""How the tests are spread when several run at once (`make test`): file by file, so that fixtures are made once each.

Those that start a whole network run one after the other: two networks at once would starve each other.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

# How long an example takes says something about the machine only.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = "e2e" if item.path.parent.name == "e2e" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
