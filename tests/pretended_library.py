"""The part of the pretended CUDA device that PyTorch knows it by (`pretended_cuda`), compiled and loaded.

It has to be there before torch is imported, and needs a build of PyTorch without CUDA: so it is a plugin of pytest of
its own. The environment's PRETENDED_CUDA names the library that ``build`` made.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

LIBRARY = "PRETENDED_CUDA"


def torch_folder() -> Path:
    """Where PyTorch is, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def build(folder: Path) -> Path | None:
    """Compile the part that PyTorch knows the device by; None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    root, made = torch_folder(), folder / "pretended_cuda.so"
    source = Path(__file__).with_name("pretended_cuda.cpp")
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    subprocess.run([compiler, *options, str(source), "-o", str(made), "-lc10", "-ltorch_cpu"], check=True)
    return made


if LIBRARY in os.environ:
    # PyTorch asks once, when it is imported, who knows of CUDA.
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.environ[LIBRARY])
