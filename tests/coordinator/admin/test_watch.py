"""`psyche-admin run watch`: fits the terminal it is on, follows a run to its end, and leaves the terminal as it was."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from admin_harness import admin, admin_json
from ledger_process import Ledger
from rich.console import Console
from runs import close, joined, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.addresses import RunAddresses
from coordinator.admin.health import EndpointHealth
from coordinator.admin.view import screen
from coordinator.admin.watched import Watched
from coordinator.client import CoordinatorClient
from coordinator.run_report import RunReport
from coordinator.snapshot import Snapshot, take_snapshot
from coordinator.state import UNKNOWN_SLOT, InclusionSet, MemberStatus, Phase

GOOD = EndpointHealth("http://127.0.0.1:1", 0.012, 1000, "4.1.2", "g" * 44, None)
BAD = EndpointHealth("http://127.0.0.1:2", 0.0, 0, "", "", "connection refused")


@pytest.fixture(scope="module")
def now(ledger: Ledger, run: dict[str, Any]) -> Snapshot:
    """A run of two members that has come to round 2."""

    async def read() -> Snapshot:
        async with await CoordinatorClient.open([ledger.rpc], run["address"]) as client:
            return await take_snapshot(client)

    return asyncio.run(read())


def watched(now: Snapshot, **changes: Any) -> Watched:
    one = Watched(now, now.slot + 4.0, 0.05, True, (GOOD, BAD))
    one.follow(now)
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def drawn(one: Watched, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(screen(one, width, height))
    return capture.get().splitlines()


def crowd(now: Snapshot, count: int) -> Snapshot:
    """The same run with many more members."""
    members = tuple(replace(now.members[0], slot=slot, wallet=Keypair().pubkey()) for slot in range(count))
    header = replace(now.header, members=count, active=count)
    everybody = frozenset(range(count))
    inclusion = tuple(InclusionSet(round, everybody, void=round == 3) for round in range(8))
    return replace(now, members=members, header=header, run=replace(now.run, inclusion=inclusion))


def test_void_rounds_are_no_progress_and_nobody_is_active_after_the_end(now: Snapshot) -> None:
    def shown(snapshot: Snapshot) -> list[str]:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(RunReport(Pubkey.default(), RunAddresses(*[Pubkey.default()] * 3), snapshot).render())
        return [capture.get(), "\n".join(drawn(watched(snapshot), 109, 60)), watched(snapshot).line()]

    ended = replace(crowd(now, 2), run=replace(crowd(now, 2).run, phase=Phase.FINISHED))
    for text in shown(crowd(now, 2)):
        assert "2 active" in text
        assert "at the end" not in text
    for text in shown(ended):
        assert "2 active at the end" in text
    for text in shown(ended)[:2]:
        assert "1 of the last 8 void" in text
    for text in shown(now):
        assert "void" not in text


def test_a_members_share_comes_with_the_part_of_the_batch_that_it_is(now: Snapshot) -> None:
    first, second, third = crowd(now, 3).members
    gone = replace(third, share=900, status=MemberStatus.DROPPED)
    shares = replace(now, members=(replace(first, share=300), replace(second, share=100), gone))
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(RunReport(Pubkey.default(), RunAddresses(*[Pubkey.default()] * 3), shares).render())
    text = capture.get()
    assert re.search(r"300 .*\n.*75\.0%", text)
    assert re.search(r"100 .*\n.*25\.0%", text)
    assert re.search(r"900 .*\n(?!.*%)", text)


def test_it_fits_every_terminal(now: Snapshot) -> None:
    for snapshot in (now, crowd(now, 30), crowd(now, 256), replace(now, members=(), rounds=())):
        for width in (60, 80, 109, 120, 160):
            for height in (16, 24, 36, 60):
                lines = drawn(watched(snapshot), width, height)
                assert max(map(len, lines)) <= width, (width, height)
                assert len(lines) <= height, (width, height, len(lines))
                text = "\n".join(lines)
                assert now.run.run_id in text
                assert now.run.phase.name in text
                assert "included" in text or "no round is final" in text
    assert re.search(r"2\d\d more: run show --all", "\n".join(drawn(watched(crowd(now, 256)), 120, 60)))
    assert "void" in "\n".join(drawn(watched(crowd(now, 30)), 120, 60))


def test_it_says_what_a_person_wants_to_know(now: Snapshot) -> None:
    text = "\n".join(drawn(watched(now), 140, 50))
    for member in now.members:
        assert str(member.wallet) in text
        assert f"{member.credit:,}" in text
    assert "50.0%" in text, "progress and shares"
    assert "round       2 of 4" in text
    assert "✓ http://127.0.0.1:1" in text
    assert "✗ http://127.0.0.1:2" in text
    assert "SOL per round" in text
    assert now.run.checkpoint_root.hex()[:16] in text
    assert "no news from the chain for 12 s" in "\n".join(drawn(watched(now, silent=12.0), 140, 50))
    assert "polled" in "\n".join(drawn(watched(now, pushes=False), 140, 50))


def test_time_left_runs_down_between_two_looks(now: Snapshot) -> None:
    due = replace(now, header=replace(now.header, due_slot=now.slot + 100))
    assert watched(due, slot=now.slot).left == pytest.approx(5.0)
    assert watched(due, slot=now.slot + 60.0).left == pytest.approx(2.0)
    assert watched(due, slot=now.slot + 200.0).left == 0.0
    unknown = replace(now, header=replace(now.header, due_slot=UNKNOWN_SLOT))
    assert watched(unknown).left is None
    for phase in Phase:
        one = watched(replace(now, run=replace(now.run, phase=phase)))
        assert one.waits_for
        assert phase.name in one.line()
        assert phase.name in "\n".join(drawn(one, 100, 40))


def test_the_pace_follows_the_last_rounds(now: Snapshot) -> None:
    one = watched(now)
    for step in range(1, 40):
        run = replace(now.run, final_rounds=2 + step, tokens=now.run.tokens + 100 * step)
        one.follow(replace(now, slot=now.slot + 20 * step, run=run))
    assert one.round_seconds == pytest.approx(1.0)
    assert one.tokens_per_second == pytest.approx(100.0)
    assert len(one.paces) == 21


def test_rewards_and_silent_members_show(now: Snapshot) -> None:
    first = replace(now.members[0], status=MemberStatus.DROPPED, missed=2)
    changed = replace(
        now, members=(first, *now.members[1:]), run=replace(now.run, reward_rate=10**6, reward_earned=5 * 10**9)
    )
    text = "\n".join(drawn(watched(changed), 140, 50))
    assert "5 SOL owed" in text
    assert "DROPPED" in text
    costs = watched(changed).costs
    assert costs.rewards_funded == 0
    assert costs.deposit == sum(now.lamports)
    assert costs.fees_per_round == 5000 * (2 + 2 + 2)


def play(ledger: Ledger, address: str) -> threading.Thread:
    """Two members that take part until the run is finished, in a thread."""

    async def act() -> None:
        nodes = [await joined([ledger.rpc], Pubkey.from_string(address)) for _ in range(2)]
        await asyncio.gather(*(take_part(node) for node in nodes))
        await close(*nodes)

    thread = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(act(), 300)))
    thread.start()
    return thread


@pytest.fixture
def fresh(ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path) -> str:
    options = ("--payer", wallet, "--program", program[1], "--config", config, "--rpc", ledger.rpc)
    address: str = admin_json("run", "create", *options)["address"]
    return address


def test_without_a_terminal_it_prints_a_line_per_change(ledger: Ledger, fresh: str) -> None:
    thread = play(ledger, fresh)
    lines = admin("run", "watch", fresh, "--rpc", ledger.rpc).splitlines()
    thread.join()
    assert all(re.match(r"slot \d+ [A-Z_]+ round \d+/4 epoch \d+: ", line) for line in lines), lines
    assert "FINISHED round 4/4" in lines[-1]
    (line,) = admin("run", "watch", fresh, "--json", "--rpc", ledger.rpc).splitlines()
    last = json.loads(line)
    assert (last["state"], last["final_rounds"], last["seconds_left"]) == ("FINISHED", 4, None)


def test_on_a_terminal_it_is_a_screen_that_ctrl_c_leaves(ledger: Ledger, fresh: str) -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "coordinator.admin", "run", "watch", fresh, "--rpc", ledger.rpc]
    env = {**os.environ, "TERM": "xterm-256color"}
    for variable in ("COLUMNS", "LINES"):
        env.pop(variable, None)
    # A background job of a shell without job control ignores SIGINT, and so would what it starts.
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=env, start_new_session=True, preexec_fn=_hear_sigint
    )
    os.close(child)
    seen = read_until(parent, b"WAITING_FOR_MEMBERS")
    assert b"\x1b[?1049h" in seen, "the alternate screen: what was on the terminal comes back"
    process.send_signal(signal.SIGINT)
    rest = read_until(parent, None)
    assert process.wait(90) == 130
    assert b"\x1b[?1049l" in rest
    assert "WAITING_FOR_MEMBERS" in rest.partition(b"\x1b[?1049l")[2].decode(), "the last view stays"
    assert b"Traceback" not in seen + rest
    os.close(parent)


def _hear_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(terminal: int, wanted: bytes | None) -> bytes:
    """What the process writes, up to `wanted`, or to its end."""
    deadline = time.monotonic() + 60
    seen = b""
    while wanted is None or wanted not in seen:
        assert time.monotonic() < deadline, seen
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert wanted is None or wanted in seen, seen
    return seen
