"""What is tested on a CUDA device, on a pretended one: so a test that needs a GPU is run before there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pretended_library import LIBRARY, build

ROOT = Path(__file__).parents[1]
# Of the optimizer's tests those that are quick; kernels in Triton cannot be pretended.
CHOSEN = "not triton and not replicas_are_equal and not many_votes and not medium and not highest-1"

ROUNDING = ("known_answers", "draws_are_by_place_in_the_layout", "a_gpu_makes_the_same_weights")


def test_what_needs_a_gpu_runs_on_a_pretended_one(tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this build of PyTorch has CUDA, and takes no other's word for it")
    if (library := build(tmp_path)) is None:
        pytest.skip("there is no C++ compiler")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    plugins = ["-p", "tests.pretended_library", "-p", "tests.pretended_cuda"]
    rounding = [f"tests/optimizer/test_rounding.py::test_{name}" for name in ROUNDING]
    tests = ["tests/optimizer/test_cuda.py", "tests/training/test_on_cuda.py", *rounding]
    environment = {**os.environ, LIBRARY: str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *plugins, "-k", CHOSEN, *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\b\d\d passed\b", done.stdout), done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
