"""What an owner is shown of a new run: everything that is set, times in seconds, and what is hardly meant."""

from __future__ import annotations

import asyncio
import dataclasses
import tomllib
from typing import Any

import pytest
from admin_harness import CONFIG

from coordinator.admin import created as module
from coordinator.admin.created import GROUPS, Created, slot_seconds
from coordinator.chain import ChainUnavailable, RpcError
from coordinator.run_config import LimitSettings, TermSettings, settings_table


def created(*sets: str, slot: float = 0.4) -> Created:
    return Created(settings_table(None, None, sets, tomllib.loads(CONFIG)).checked(), slot)


def test_every_setting_is_shown_once_and_times_in_seconds() -> None:
    shown = [name for names in GROUPS.values() for name in names]
    assert sorted(shown) == sorted([*LimitSettings.model_fields, *TermSettings.model_fields])
    text = "\n".join(created("warmup_time=1500", "cooldown_time=50", "max_round_train_time=200").lines())
    assert "times at slots of 400 ms" in text
    assert "warmup_time 1,500 (10 min)" in text
    assert "cooldown_time 50 (20 s)" in text
    assert "max_round_train_time 200 (80 s)" in text
    assert "peak_lr 0.001" in text
    assert "model_source hub:demo/model" in text


def test_passes_count_the_ramp() -> None:
    assert created("batch=10", "total_rounds=20").passes == pytest.approx(2.0)
    # Ten rounds that grow from 2 to 10, and ten of 10, over 100 samples.
    assert created("batch=10", "total_rounds=20", "ramp_batch=2", "ramp_rounds=10").passes == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("sets", "slot", "warned"),
    [
        ([], 0.4, []),
        (["batch=32", "total_rounds=340"], 0.4, ["goes 109 times over its data (100 sequences)"]),
        (["warmup_time=100"], 0.05, ["warmup_time is 5 s, which is hardly enough: warmup_time=1200 is a minute"]),
        (["max_round_train_time=4000000"], 0.4, ["max_round_train_time is 18.5 days"]),
        (["peak_lr=0.5"], 0.4, ["peak_lr is 0.5"]),
        (["total_rounds=2000", "rounds_per_epoch=2000", "samples=16000"], 0.4, ["no checkpoint before the end"]),
    ],
)
def test_what_is_hardly_meant_is_warned_of(sets: list[str], slot: float, warned: list[str]) -> None:
    said = list(created(*sets, slot=slot).cautions())
    assert len(said) == len(warned), said
    assert all(part in one for part, one in zip(warned, said, strict=True))


@dataclasses.dataclass
class Looked:
    """A chain whose slots are as long as a look at it is far from the one before."""

    samples: Any
    now: int = 100
    goes_on: bool = True

    @property
    def rpc(self) -> Looked:
        return self

    async def call(self, method: str, params: list[int]) -> Any:
        assert method == "getRecentPerformanceSamples"
        if isinstance(self.samples, Exception):
            raise self.samples
        return self.samples

    async def slot(self) -> int:
        self.now += self.goes_on
        await asyncio.sleep(0.001)
        return self.now


def test_slots_are_as_long_as_the_chain_says_or_as_they_are_seen_to_be() -> None:
    def measured(samples: Any) -> float:
        return asyncio.run(slot_seconds(Looked(samples)))  # type: ignore[arg-type]

    assert measured([{"numSlots": 140, "samplePeriodSecs": 60}, {"numSlots": 160, "samplePeriodSecs": 60}]) == 0.4
    for without in ([], [{}], None, RpcError("getRecentPerformanceSamples", -32601, "no such method")):
        assert measured(without) >= 0.001


def test_a_chain_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STILL_SECONDS", 0.0)
    with pytest.raises(ChainUnavailable, match="its slot has been 100"):
        asyncio.run(slot_seconds(Looked([], goes_on=False)))  # type: ignore[arg-type]
