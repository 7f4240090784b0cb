"""What the round loop asks for, message by message: each rule that members share has a test that fails without it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from loop_stage import ME, scene
from node_stage import run_async, settle
from node_values import RUN, included, pulse_of, round_of

from coordinator.client import ProgramError
from coordinator.errors import ErrorCode
from coordinator.state import InclusionSet, Phase
from psyche_node.faults import Fault, Faults
from psyche_node.node.roundloop import Cadence, Desynced
from psyche_node.training.messages import Apply, Evaluated, Save, Train


def test_cadence() -> None:
    never, seldom = Cadence(evaluate=0, check=0), Cadence(evaluate=3, check=2)
    assert [(never.evaluates(n), never.checks(n)) for n in range(2)] == [(False, False)] * 2
    assert [n for n in range(7) if seldom.evaluates(n)] == [0, 3, 6]
    assert [n for n in range(7) if seldom.checks(n)] == [0, 2, 4, 6]


def test_exactly_the_included_updates_are_applied_in_the_order_of_members(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.see(Phase.ROUND_WITNESS, 1, ["apply 0-"], sets=[included(0, {2, 0})])
            applied = [message for message in it.asked if isinstance(message, Apply)]
            assert [message.paths for message in applied] == [["0-0", "0-2"]]
            assert it.exchange.timeouts == {5.0}

    run_async(test())


def test_nothing_is_applied_in_a_void_round_whoever_was_attested_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            void = InclusionSet(round=0, members=frozenset({0, ME}), void=True)
            await it.see(Phase.ROUND_TRAIN, 1, ["apply 0b", "train 1"], sets=[void])
            assert [message.paths for message in it.asked if isinstance(message, Apply)] == [[]]

    run_async(test())


def test_a_run_that_has_a_new_model_is_applied_from_there_on(tmp_path: Path) -> None:
    async def test() -> None:
        sets = [included(n) for n in range(3)]
        begins = pulse_of(Phase.WARMUP, 2, sets=sets[:2], model_round=2)
        async with scene(tmp_path, begins=begins, loaded=begins.run) as it:
            await it.see(Phase.ROUND_TRAIN, 2, ["train 2"], sets=sets[:2], model_round=2)
            await it.see(Phase.ROUND_TRAIN, 3, ["apply 2i", "train 3"], sets=sets, model_round=2)

    run_async(test())


def test_a_node_that_starts_in_a_later_epochs_warm_up_leaves_ready_to_membership(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, begins=pulse_of(Phase.WARMUP, epoch=3)) as it:
            await it.see(Phase.WARMUP, 0, [], epoch=3, slot=5)

    run_async(test())


def test_updates_that_count_and_are_no_longer_kept_end_the_node(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.table = ()
            it.chain.push(pulse_of(Phase.ROUND_WITNESS, 5, sets=[included(0)]))
            with pytest.raises(Desynced, match="round 0 is no longer kept on chain"):
                await it.task
            assert it.asked == []

    run_async(test())


def test_commitments_are_read_once_they_are_all_there(tmp_path: Path) -> None:
    """What this node knows of a round from when it began is not enough to apply it."""

    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            it.exchange.known.clear()
            await it.see(Phase.ROUND_TRAIN, 1, ["apply 0i", "train 1"], sets=[included(0)])
            assert it.exchange.followed(0) == frozenset(range(4))

    run_async(test())


@pytest.mark.parametrize(("tokens", "journaled"), [(5, 1.5), (0, None)])
def test_a_loss_over_no_token_is_none(tmp_path: Path, tokens: int, journaled: float | None) -> None:
    async def test() -> None:
        async with scene(tmp_path, cadence=Cadence(evaluate=1, check=0)) as it:
            it.evaluated = Evaluated(loss=1.5, tokens=tokens, seconds=0.1)
            it.exchange.known |= {(0, 8), (0, 1)}
            await it.see(Phase.ROUND_WITNESS, 1, ["apply 0-", "evaluate"], sets=[included(0, {8, 1})])
            losses: list[float | None] = []

            def journal_has_it() -> bool:
                losses.extend(line["heldout_loss"] for line in it.journal.read() if line["kind"] == "evaluated")
                return bool(losses)

            await settle(journal_has_it)
            assert losses == [journaled]

    run_async(test())


def test_digests_evaluations_and_what_is_forgotten_follow_the_round(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, cadence=Cadence(evaluate=4, check=2)) as it:
            digests, sets = [], []
            for number in range(6):
                sets.append(included(number, {8, 1}))
                it.exchange.known |= {(number, 8), (number, 1)}
                did = [f"apply {number}-", *["evaluate"] * (number % 4 == 0)]
                await it.see(Phase.ROUND_WITNESS, number + 1, did, sets=sets[-4:])
                digests += [message.digest for message in it.asked if isinstance(message, Apply)]
            await settle(lambda: len(it.exchange.forgotten) == 6)
            assert digests == [True, False] * 3
            assert it.begun == [1, 5], "rounds that are in the weights"
            assert it.exchange.forgotten == [0, 0, 0, 0, 0, 1]
            written = [line for line in it.journal.read() if line["kind"] == "applied"]
            assert [line["members"] for line in written] == [[1, 8]] * 6
            assert {line["fingerprint"] for line in written} == {f"{7:016x}"}

    run_async(test())


def test_a_round_that_is_over_is_not_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.table = ()
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 0))
            await settle(lambda: "round 0 was over" in caplog.text)
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"])

    run_async(test())


def test_an_update_is_committed_to_as_it_is_and_announced_after_that(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            announced: list[int] = []
            it.chain.on_sent = lambda what: announced.append(len(it.exchange.announced))
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            await settle(lambda: len(it.exchange.announced) == 1)
            [(name, number, digest, *rest)] = it.chain.sent
            assert (name, number, rest) == ("commit", 0, [6, 5, 7]), "length, tokens, fingerprint before"
            path = it.store.path(digest)
            assert path is not None
            assert path.read_bytes() == b"update"
            assert announced == [0]
            assert it.exchange.announced == [(0, ME, digest, 6)]
            [train] = [message for message in it.asked if isinstance(message, Train)]
            assert train.positions == [2, 3], "its own slice"
            assert (train.run, train.member) == (bytes(32).hex(), ME)

    run_async(test())


def test_a_faulty_node_commits_to_what_its_fault_says(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, faults=Faults(frozenset({Fault.LENGTH}))) as it:
            it.update = b"a longer update"
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"])
            await settle(lambda: len(it.exchange.announced) == 1)
            [(_, _, digest, length, *_)] = it.chain.sent
            path = it.store.path(digest)
            assert path is not None
            assert (path.read_bytes(), length) == (b"a longer", 15)

    run_async(test())


def test_the_share_follows_rounds_that_were_trained_and_hears_of_those_that_were_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            limits = dataclasses.replace(RUN.limits, max_share=2000)
            await it.see(Phase.ROUND_TRAIN, 0, ["train 0"], limits=limits)
            await settle(lambda: it.share.told == ["follow 5 2000"])
            it.chain.errors["commit"] = [ProgramError(int(ErrorCode.WRONG_PHASE), ())]
            await it.see(Phase.ROUND_TRAIN, 1, ["train 1"])
            await settle(lambda: it.share.told[1:] == ["missed"])
            it.failing.add(Train)
            await it.see(Phase.ROUND_TRAIN, 2, ["train 2"])
            await settle(lambda: it.share.told[1:] == ["missed"] * 2)
            it.chain.table = (round_of(3, closed=False, active=frozenset({0, 2, 3})),)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 3))
            await settle(lambda: it.share.told[1:] == ["missed"] * 3)

    run_async(test())


def test_standing_by_is_said_once_and_so_is_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            for number in range(2):
                it.chain.table = (round_of(number, closed=False, active=frozenset({0, 2, 3})),)
                it.chain.push(pulse_of(Phase.ROUND_TRAIN, number))
                await settle(lambda number=number: it.left_out == number + 1)  # type: ignore[misc]
            for number in (2, 3):
                await it.see(Phase.ROUND_TRAIN, number, [f"train {number}"])
            assert caplog.text.count("it only follows") == 1
            assert caplog.text.count("this member takes part again") == 1

    with caplog.at_level(logging.INFO):
        run_async(test())


def test_a_checkpoint_that_the_program_does_not_want_is_kept_all_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.errors["checkpoint"] = [ProgramError(int(ErrorCode.WRONG_PHASE), ())]
            await it.see(Phase.COOLDOWN, 1, ["apply 0-", "root", "save 1"], sets=[included(0)])
            assert [message.folder for message in it.asked if isinstance(message, Save)] == [
                str(tmp_path / "checkpoint")
            ]

    run_async(test())


def test_that_an_update_does_not_count_is_said_once_it_was_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            refused = ProgramError(int(ErrorCode.WRONG_PHASE), ())
            sets = [included(0, {0, 2}), included(1, ()), included(2, {0, 2}), included(3)]
            for number, error in enumerate((None, None, refused, None)):
                it.chain.errors["commit"] = [error] if error else []
                fate = [f"apply {number - 1}b"] if number else []
                await it.see(Phase.ROUND_TRAIN, number, [*fate, f"train {number}"], sets=sets[:number])
                await settle(lambda number=number: len(it.chain.sent) > number)  # type: ignore[misc]
            await it.see(Phase.ROUND_TRAIN, 4, ["apply 3i", "train 4"], sets=sets)

    run_async(test())
    said = [record.getMessage() for record in caplog.records if "does not count" in record.getMessage()]
    assert [text[:8] for text in said] == ["round 0:", "round 1:"]
    assert "too few witnesses" in said[0]
    assert "void round" in said[1]
