"""Program and model agree on everything, under schedules that nobody would choose; and a wrong rule is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from schedules import SEED, STEPS, Failure, Player

from coordinator.toolchain.build import PROGRAM_FOLDER, build

SCHEDULES = 300

# A rule of the program, and something close to it.
MUTANTS = {
    "a quorum of one less": ("sbf.h", "return (2 * n + 2) / 3;", "return (2 * n + 1) / 3;"),
    "drops one round late": (
        "settle.c",
        "if (*count >= c->run->limits.max_missed &&",
        "if (*count > c->run->limits.max_missed &&",
    ),
    "forgives a false fingerprint": ("settle.c", "count_up(&member->missed);", ";"),
    "drops who is out of sync a time too early": (
        "settle.c",
        "int again = member->missed >= run->limits.max_missed;",
        "int again = member->missed + 1u >= run->limits.max_missed;",
    ),
    "forgets a position": (
        "requeue.c",
        "push_range(r, r->range->start + (from - r->base), end - from);",
        "push_range(r, r->range->start + (from - r->base), end - from - (end - from > 5));",
    ),
    "counts the ejected": ("members.c", "round->eligible.word[w] &= ~out;", ";"),
    "forgives the silent": ("settle.c", "if (silent) blame(", "if (silent && slot > 250) blame("),
    "grows too fast": ("assign.c", "smaller(asked, 2 * had)", "smaller(asked, 3 * had)"),
    "waits a slot too long": (
        "schedule.c",
        "(3 * (u64)round->median_elapsed + 1) / 2 + l->adaptive_grace",
        "(3 * (u64)round->median_elapsed + 1) / 2 + l->adaptive_grace + 1",
    ),
    "pays twice": ("rewards.c", "*claimed += paid;", "*claimed += paid / 2;"),
}


def test_program_and_model_agree() -> None:
    player = Player()
    _play_all(player)
    print(f"seeds from {SEED}: {player.happened}; {player.ended}")
    assert player.actions == SCHEDULES * STEPS
    worth = player.happened
    assert worth["rounds"] > 4 * SCHEDULES, worth
    assert min(worth["of several ranges"], worth["with four or more included"], worth["void rounds"]) > 20, worth
    succeeded = {name.removesuffix(": ok") for name in player.ended if name.endswith(": ok")}
    assert len(succeeded) == 28, succeeded


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_found(name: str, tmp_path: Path) -> None:
    """The same schedules on a program with one rule changed. What is found is cut down to a few actions."""
    file, rule, changed = MUTANTS[name]
    sources = tmp_path / "program"
    shutil.copytree(PROGRAM_FOLDER, sources)
    text = (sources / file).read_text(encoding="utf-8")
    assert text.count(rule) == 1, f"{file} has changed: choose another rule"
    (sources / file).write_text(text.replace(rule, changed), encoding="utf-8")
    player = Player(build("v3", sources), seconds_to_cut=0)
    with pytest.raises(Failure, match="replay") as found:
        _play_all(player)
    print(f"{name}: found by schedule {player.played}: {str(found.value).splitlines()[0]}")


def _play_all(player: Player) -> None:
    for seed in range(SEED, SEED + SCHEDULES):
        player.schedule(seed)


def test_a_failure_is_cut_down(tmp_path: Path) -> None:
    sources = tmp_path / "program"
    shutil.copytree(PROGRAM_FOLDER, sources)
    path = sources / "members.c"
    path.write_text(path.read_text(encoding="utf-8").replace("member->next_share = a->share;", ";"), encoding="utf-8")
    with pytest.raises(Failure, match=r"cut down to [1-4]:.*next_share"):
        Player(build("v3", sources)).schedule(SEED)
