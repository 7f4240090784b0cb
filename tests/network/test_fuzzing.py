"""A short run of what `make nightly` does with a million inputs: hostile bytes for everything that reads the wire."""

from __future__ import annotations

from collections.abc import Iterator

import fuzzing
import fuzzing_targets
import pytest
from fuzzing_inputs import Input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def targets() -> Iterator[fuzzing_targets.Targets]:
    with fuzzing_targets.targets() as made:
        yield made


@pytest.mark.parametrize("name", fuzzing_targets.NAMES)
def test_hostile_bytes_are_refused_and_nothing_else_happens(targets: fuzzing_targets.Targets, name: str) -> None:
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        assert targets.all[name](Input(data)) in (True, False)

    check()


def test_random_inputs_get_behind_the_first_check_of_each_reader() -> None:
    """Some are accepted, or nothing behind the signatures would be reached, and most are not."""
    accepted = fuzzing.run(400 * len(fuzzing_targets.NAMES))
    for name in fuzzing_targets.NAMES:
        assert accepted[name] > 0.001, f"{name}: {accepted[name]:.1%} accepted"
        assert accepted[name] < 0.9 or name == "bitmaps", f"{name}: {accepted[name]:.1%} accepted"


def test_what_should_not_come_out_is_reported(
    targets: fuzzing_targets.Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(data: Input) -> bool:
        return len(bytearray(fuzzing.MEMORY + 1)) > 0

    def endless(data: Input) -> bool:
        while True:
            pass

    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)
    monkeypatch.setattr(targets, "all", {"greedy": greedy, "endless": endless})
    fuzzing.signal.signal(fuzzing.signal.SIGALRM, fuzzing._hangs)
    with pytest.raises(AssertionError, match="were allocated"):
        fuzzing.attempt(targets, "greedy", b"", watched=True)
    with pytest.raises(AssertionError, match="longer than"):
        fuzzing.attempt(targets, "endless", b"", watched=False)
