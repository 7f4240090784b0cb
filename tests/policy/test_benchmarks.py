"""Benchmarks are run now and then; what they import is checked with every change."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


NAMES = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("name", [".".join(path.parts) for path in NAMES])
def test_it_can_be_imported(name: str) -> None:
    importlib.import_module(name)
