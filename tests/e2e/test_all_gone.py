"""All daemons are killed at once: what is in a folder, or a published checkpoint, is enough to go on from."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import admin, create_run, kill, node
from e2e_harness import until

from psyche_node.folders import terms_of_model
from psyche_node.node.journal import JournalReader
from psyche_node.sim.settings import Prepared, SimSettings

pytestmark = pytest.mark.e2e
# Slots of 100 ms. No deadline decides anything here, but for the cooldown that nobody votes in.
LIMITS = {"rounds_per_epoch": 3, "total_rounds": 1000, "cooldown_time": 30, "join_grace": 1}


class Sites:
    """Two daemons of one run, each with a folder and the model that it starts from."""

    def __init__(self, run: str, rpc: str, owner: Path, data: Path) -> None:
        self.run, self.rpc, self.owner, self.data = run, rpc, owner, data
        self.running: list[subprocess.Popen[str]] = []
        self.weights: list[dict[int, str]] = []

    def start(self, *sites: tuple[Path, Path]) -> None:
        """Start a daemon for each folder and model; the second is told where the first is."""
        first, second = sites
        self._journals = [JournalReader(folder / "journal.jsonl") for folder, _ in sites]
        for reader in self._journals:
            reader.read()  # what an earlier life has written
        self.weights = [{}, {}]
        address = self._start(*first)
        self._start(*second, "--bootstrap", address)

    def _start(self, folder: Path, model: Path, *more: str) -> str:
        self.running.append(node(self.run, self.rpc, folder, model, self.data, "--check-every", "1", *more))
        at: list[str] = []

        def listens() -> bool:
            assert self.running[-1].poll() is None, self.running[-1].communicate()[1]
            at.extend(line["multiaddrs"][0] for line in self.read(len(self.running) - 1) if line["kind"] == "started")
            return bool(at)

        until(listens, f"the start of the node in {folder}")
        return at[0]

    def read(self, number: int) -> list[dict[str, Any]]:
        lines = self._journals[number].read()
        self.weights[number] |= {line["round"]: line["weights_sha256"] for line in lines if line["kind"] == "applied"}
        return lines

    def train(self, rounds: int) -> None:
        """Wait until both have applied so many rounds; they must have the same weights after each."""

        def trained() -> bool:
            for number, process in enumerate(self.running):
                assert process.poll() is None, process.communicate()[1]
                self.read(number)
            return min(len(found) for found in self.weights) >= rounds

        until(trained, f"{rounds} rounds of both")
        both = self.weights[0].keys() & self.weights[1].keys()
        assert len(both) >= rounds
        assert {n: self.weights[0][n] for n in both} == {n: self.weights[1][n] for n in both}

    def cut_power(self) -> None:
        for process in self.running:
            kill(process)
        self.running.clear()

    def steer(self, *what: str) -> None:
        admin("run", *what, "--payer", str(self.owner), "--rpc", self.rpc)

    def go_on_from(self, model: Path) -> None:
        """What the operator's guide tells the owner to do."""
        root = terms_of_model(model, SimSettings(out=model).recipe.topk, False)["model_root"]
        self.steer("pause", self.run)
        for member in admin("run", "show", self.run, "--rpc", self.rpc)["members"]:
            if member["status"] == "ACTIVE":
                self.steer("kick", self.run, str(member["slot"]), "--yes")

        def paused() -> bool:
            if admin("run", "show", self.run, "--rpc", self.rpc)["state"] == "PAUSED":
                return True
            with contextlib.suppress(subprocess.CalledProcessError):  # not due yet
                self.steer("tick", self.run)
            return False

        until(paused, "the pause")
        self.steer("set", self.run, f"terms.model_root={root}", "--yes")
        self.steer("resume", self.run)


@pytest.fixture
def sites(prepared: Prepared, rpc: str, tmp_path: Path) -> Iterator[Sites]:
    it = Sites(create_run(prepared, tmp_path, rpc, **LIMITS), rpc, tmp_path / "owner.json", prepared.data)
    yield it
    it.cut_power()


def test_a_run_goes_on_after_all_daemons_were_killed_at_once(sites: Sites, prepared: Prepared, tmp_path: Path) -> None:
    a, b, published = tmp_path / "a", tmp_path / "b", tmp_path / "published"
    sites.start((a, prepared.model), (b, prepared.model))
    sites.train(5)
    sites.cut_power()

    # The first site has its folder. The second has lost all, wallet and keys too, and gets the published checkpoint.
    shutil.copytree(a / "checkpoint", published)
    shutil.rmtree(b)
    sites.go_on_from(published)
    sites.start((a, a / "checkpoint"), (tmp_path / "c", published))
    sites.train(4)
