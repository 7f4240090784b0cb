"""Benchmarks are run now and then; what they import is checked with every change."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_it_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
