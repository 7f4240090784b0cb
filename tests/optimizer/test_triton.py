"""The kernels in Triton under its interpreter, in a process of its own: it is chosen before triton is imported."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from optimizer.compiled import choose_engine
from optimizer.geometry import Geometry
from optimizer.layout import Layout

CASES = Path(__file__).with_name("triton_cases.py")
VERSION = tuple(map(int, version("triton").split(".")[:2])) if find_spec("triton") else (0, 0)
installed = pytest.mark.skipif(VERSION == (0, 0), reason="Triton is not installed; it exists for Linux only")
interpreter = pytest.mark.skipif(VERSION < (3, 7), reason="needs Triton 3.7: interpreters before it fail on NumPy 2.4")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=CASES.parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@interpreter
def test_interpreted_kernels_make_the_bits_of_the_definition() -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "--no-header")
    done = python("-m", "pytest", *options, str(CASES), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


@installed
def test_products_and_sums_are_rounded_one_by_one(tmp_path: Path) -> None:
    """In the code for an H100, which is compiled without one: no fused multiply-add, no inexact division."""
    done = python(str(CASES.with_name("triton_ptx.py")), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"encode_kernel": [], "add_kernel": [], "apply_kernel": []}


def test_triton_is_not_imported_unless_asked_for() -> None:
    """Where tensors are on the CPU it costs neither time nor memory."""
    code = "import sys, torch, optimizer.distro, optimizer.selfcheck\n"
    code += "from optimizer.compiled import Geometry, choose_engine\n"
    code += "layout = optimizer.Layout.build([('w', (3,))], 2)\n"
    code += "choose_engine(Geometry.build(layout, 1), torch.device('cpu'))\n"
    done = python("-c", code + "sys.exit('triton' in sys.modules)")
    assert done.returncode == 0, done.stderr or "triton was imported"


def test_on_a_cpu_it_cannot_be_forced() -> None:
    geometry = Geometry.build(Layout.build([("w", (3,))], 2), 1)
    with pytest.raises(ValueError, match="kernels in Triton cannot be used"):
        choose_engine(geometry, torch.device("cpu"), "triton")
