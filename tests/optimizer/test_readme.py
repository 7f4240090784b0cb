"""The README's example runs and does what it says."""

import re
from pathlib import Path

import pytest

import optimizer


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(optimizer.__file__).parent / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})
    printed = re.fullmatch(r"(\d+) bytes per member and round, error ([\d.]+)\n", capsys.readouterr().out)
    assert printed is not None
    assert int(printed[1]) == 96 + 16 * 128
    assert float(printed[2]) < 0.3  # 0.8 at the start
