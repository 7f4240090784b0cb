"""The round loop against a scripted chain: what is applied, in which order, and what becomes of the own updates."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from loop_stage import ALL, ME, ROOT, scene
from node_stage import run_async, settle, settle_down
from node_values import TERMS, commitment, included, pulse_of, round_of

from coordinator.client import ChainUnavailable, ProgramError, RpcError
from coordinator.errors import ErrorCode
from coordinator.failures import refused
from coordinator.state import Phase
from psyche_node.ipc import Message
from psyche_node.node.roundloop import Desynced, TermsChanged
from psyche_node.training.messages import Applied, Apply, Save, Train


def test_with_overlap_a_round_is_trained_before_the_last_one_is_applied(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            sets = [included(0), included(1), included(2)]
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            await it.see(Phase.ROUND_WITNESS, 0, [])
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"])
            await it.see(Phase.ROUND_WITNESS, 1, [])
            await it.see(Phase.ROUND_TRAIN, 2, ["apply 0i", "train 2"], sets=sets[:1])
            await it.see(Phase.COOLDOWN, 3, ["apply 1i", "apply 2i", "root", "save 3"], sets=sets)
            await settle(lambda: it.chain.sent[-1] == ("checkpoint", 3, bytes.fromhex(ROOT)))
            await it.see(Phase.FINISHED, 3, [], sets=sets)
            await it.task
            assert [entry[:2] for entry in it.chain.sent[:3]] == [("commit", 0), ("commit", 1), ("commit", 2)]
            assert it.exchange.published == [0, 1, 2]
            paths = [message.paths for message in it.asked if isinstance(message, Apply)]
            assert all(path == sorted(path) for path in paths)

    run_async(test())


def test_other_terms_end_the_node_once_everything_final_is_applied(tmp_path: Path) -> None:
    """Also when they come twice in one pause: the round in which they begin is the same then."""

    async def test() -> None:
        for change in (
            {"model_round": 1},
            {"terms": dataclasses.replace(TERMS, peak_lr_bits=7)},
            {"schedule_rounds": 5},
        ):
            async with scene(tmp_path / str(len(change)) / next(iter(change))) as it:
                await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
                it.chain.table = (round_of(0, ALL, closed=True),)
                it.chain.push(pulse_of(Phase.PAUSED, 1, sets=[included(0)], **change))
                with pytest.raises(TermsChanged, match="start this node again"):
                    await it.task
                assert it.did()[-1] == "apply 0i"

    run_async(test())


def test_own_updates_go_back_when_void_excluded_or_refused_and_only_those_sent(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.errors["commit"] = [
                ProgramError(ErrorCode.WRONG_PHASE, ()),  # round 0: too late
                ChainUnavailable("away"),  # round 1: nobody knows whether it landed, and when the chain is back
                ProgramError(ErrorCode.WRONG_ROUND, ()),  # it is too late, and the table has another one
            ]
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"])
            assert it.exchange.published == []
            it.failing.add(Train)
            sets = [included(0, {0, 2})]
            await it.see(Phase.ROUND_TRAIN, 2, ["apply 0b", "train 2"], sets=sets)
            it.failing.clear()
            sets += [included(1)]
            await it.see(Phase.ROUND_TRAIN, 3, ["apply 1i", "train 3"], sets=sets)
            sets += [included(2, {0, 2})]
            await it.see(Phase.ROUND_TRAIN, 4, ["apply 2-", "train 4"], sets=sets)
            sets += [included(3, ())]
            await it.see(Phase.ROUND_TRAIN, 5, ["apply 3b", "train 5"], sets=sets)
            void = next(m for m in it.asked if isinstance(m, Apply))
            assert void.paths == []
            kinds = [line["kind"] for line in it.journal.read()]
            assert kinds.count("late") == 2
            assert kinds.count("failed") == 1

    run_async(test())


@pytest.mark.parametrize(
    "error", [None, ErrorCode.ALREADY_COMMITTED, ErrorCode.WRONG_ROUND], ids=["lost", "landed", "landed and closed"]
)
def test_a_commitment_whose_answer_is_lost_is_served_once_it_is_on_chain(
    tmp_path: Path, error: ErrorCode | None
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.errors["commit"] = [ChainUnavailable("it may still have its effect")]
            if error is not None:
                it.chain.errors["commit"].append(ProgramError(error, ()))
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            await settle(lambda: bool(it.chain.sent))
            assert it.exchange.published == []
            (sent,) = it.chain.sent
            mine = dataclasses.replace(commitment(ME), digest=sent[2])
            it.chain.table = (round_of(0, [mine], closed=error is ErrorCode.WRONG_ROUND),)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 0))
            await settle(lambda: bool(it.exchange.published))
            assert it.exchange.published == [0]
            assert it.chain.sent == [sent] * 2 + [("set_share", 1000)] * (len(it.chain.sent) - 2)
            await settle(lambda: any(line["kind"] == "trained" for line in it.journal.read()))

    run_async(test())


def test_slow_node_skips_what_is_over_and_applies_everything_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:

            def meanwhile(message: Message) -> None:
                if isinstance(message, Apply) and message.round == 0:
                    # While round 0 is applied, the run goes on to round 5.
                    loop.call_soon_threadsafe(it.chain.push, later)
                    released = asyncio.run_coroutine_threadsafe(it.view.until(lambda p: p is later), loop)
                    released.result(5)

            loop = asyncio.get_running_loop()
            sets = [included(number) for number in range(4)]
            later = pulse_of(Phase.ROUND_TRAIN, 5, sets=sets)
            it.before = meanwhile
            # Rounds 0 and 1 are no longer kept in full, but what was committed in them is known here.
            it.exchange.known |= {(number, member) for number in (0, 1) for member in range(4)}
            it.chain.table = tuple(round_of(n, ALL if n < 5 else (), closed=n < 5) for n in range(2, 6))
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 2, sets=sets[:1]))
            expected = ["apply 0-", "apply 1-", "apply 2-", "apply 3-", "train 5"]
            await settle(lambda: len(it.asked) >= len(expected))
            await settle_down()
            assert it.did() == expected

    run_async(test())


def test_node_that_was_away_for_too_long_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            with pytest.raises(Desynced, match=r"round 0 is no longer kept.*round 12"):
                await it.see(Phase.ROUND_TRAIN, 12, ["-"], sets=[included(n) for n in range(3, 11)])
            assert it.did() == []

    run_async(test())


def test_several_epochs_checkpoint_each_and_a_second_warm_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            sets = [included(0)]
            await it.see(Phase.COOLDOWN, 1, ["apply 0i", "root", "save 1"], sets=sets)
            await it.see(Phase.COOLDOWN, 1, [], sets=sets, slot=5)
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"], sets=sets, epoch=1)
            sets += [included(1)]
            await it.see(Phase.COOLDOWN, 2, ["apply 1i", "root", "save 2"], sets=sets, epoch=1)
            await it.see(Phase.WAITING_FOR_MEMBERS, 2, [], sets=sets, epoch=2)
            await it.see(Phase.WARMUP, 2, ["root"], sets=sets, epoch=2)
            await settle(lambda: it.chain.sent[-1] == ("ready", bytes.fromhex(ROOT)))
            await it.see(Phase.WARMUP, 2, [], sets=sets, epoch=2, slot=5)
            await it.see(Phase.ROUND_TRAIN, 2, ["train 2"], sets=sets, epoch=2)
            saved = [line["round"] for line in it.journal.read() if line["kind"] == "checkpoint"]
            assert saved == [1, 2]

    run_async(test())


def test_first_warm_up_is_not_answered_twice(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.see(Phase.WARMUP, 0, [])
            assert it.chain.sent == []

    run_async(test())


@pytest.mark.parametrize(("code", "said"), [(ErrorCode.ALREADY_READY, 0), (ErrorCode.MEMBER_NOT_ACTIVE, 1)])
def test_only_a_ready_that_is_refused_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: ErrorCode, said: int
) -> None:
    """A member that has joined again has said it already."""

    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.errors["ready"] = [ProgramError(int(code), ())]
            await it.see(Phase.WARMUP, 0, ["root"], epoch=1)
            await settle(lambda: len(it.chain.sent) == 1)
            await settle_down()
            assert caplog.text.count("not ready for the next epoch") == said

    run_async(test())


def test_node_that_missed_the_last_cooldown_keeps_the_final_weights_all_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.see(Phase.FINISHED, 2, ["apply 0-", "apply 1-", "root", "save 2"], sets=[included(0), included(1)])
            await it.task
            assert it.chain.sent == []

    run_async(test())


def test_full_disk_at_a_checkpoint_costs_the_checkpoint_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.failing.add(Save)
            it.chain.errors["checkpoint"] = [ChainUnavailable("away")]
            await it.see(Phase.COOLDOWN, 1, ["apply 0-", "root", "save 1"], sets=[included(0)])
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"], sets=[included(0)])
            assert "checkpoint" not in [line["kind"] for line in it.journal.read()]

    run_async(test())


@pytest.mark.parametrize("error", [refused("no lamports"), RpcError("getLatestBlockhash", -32000, "busy")])
def test_wallet_or_endpoint_that_fails_costs_what_was_to_be_sent_only(tmp_path: Path, error: Exception) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.errors = {name: [error] for name in ("commit", "checkpoint", "ready")}
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            sets = [included(0, {0, 2})]
            await it.see(Phase.COOLDOWN, 1, ["apply 0b", "root", "save 1"], sets=sets)
            await it.see(Phase.WARMUP, 1, ["root"], sets=sets, epoch=1)
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"], sets=sets, epoch=1)
            await settle(lambda: bool(it.exchange.published))
            assert [what[0] for what in it.chain.sent[:4]] == ["commit", "checkpoint", "ready", "commit"]
            assert it.exchange.published == [1]
            assert [line["round"] for line in it.journal.read() if line["kind"] == "late"] == [0]

    run_async(test())


@pytest.mark.parametrize(("rate", "warned"), [(1.0, True), (0.05, True), (0.001, False)])
def test_lost_steps_are_warned_of_but_for_the_end_of_a_schedule(
    tmp_path: Path, rate: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.applied = Applied(fingerprint=7, updates_lost=0.25, rate=rate)
            it.chain.table = (round_of(0, ALL), round_of(1, closed=False))
            it.chain.push(pulse_of(Phase.ROUND_WITNESS, 1, sets=[included(0, {0})]))
            await settle(lambda: any(line["kind"] == "applied" for line in it.journal.read()))

    run_async(test())
    assert ("of 25% of the weights the step is lost" in caplog.text) is warned


def test_member_without_data_trains_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.table = (round_of(0, closed=False, slices=dict.fromkeys(range(4), (0, 0))),)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 0))
            await settle_down()
            assert it.did() == []
            assert it.chain.sent == []

    run_async(test())


def test_a_member_that_is_not_active_follows_and_then_takes_part_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            without = frozenset({0, 2, 3})
            it.chain.table = (round_of(0, ALL), round_of(1, closed=False, active=without))
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 1, sets=[included(0, {0})]))
            await settle(lambda: it.left_out == 1)
            assert it.did() == ["apply 0-"]
            it.chain.table = (round_of(1, ALL), round_of(2, closed=False))
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 2, sets=[included(0, {0}), included(1, without)]))
            await settle(lambda: it.did() == ["apply 0-", "apply 1-", "train 2"])
            assert it.left_out == 1

    run_async(test())
