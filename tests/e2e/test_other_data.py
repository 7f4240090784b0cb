"""Two real nodes and a run whose data is published: the one with other data does not join, and says what differs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from daemons import admin, create_run, node, write_chat
from e2e_harness import until

from psyche_node.data import Manifest, prepare
from psyche_node.exits import Exit
from psyche_node.sim.settings import Prepared

pytestmark = pytest.mark.e2e


@pytest.fixture
def published(prepared: Prepared) -> Iterator[str]:
    """The URL of the owner's prepared folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(prepared.data))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_node_with_other_data_does_not_join(prepared: Prepared, published: str, rpc: str, tmp_path: Path) -> None:
    run = create_run(prepared, tmp_path, rpc, source=published)
    write_chat(tmp_path / "other.jsonl", "three")
    theirs, other = Manifest.read(prepared.data), tmp_path / "other"
    mine = prepare(tmp_path / "other.jsonl", prepared.model, other, theirs.sequence_length)

    right = node(run, rpc, tmp_path / "right", prepared.model, prepared.data)
    try:
        wrong = node(run, rpc, tmp_path / "wrong", prepared.model, other)
        _, said = wrong.communicate(timeout=240)
        assert wrong.returncode == Exit.DATA_MISMATCH, said
        assert f"The first file that differs is {other / mine.train[0].file}" in said
        assert f"the run's is {theirs.train[0].file}" in said
        assert f"source file 1 of 1 has SHA-256 {mine.sources[0].sha256}" in said
        until(lambda: len(admin("run", "show", run, "--rpc", rpc)["members"]) == 1, "the node with the run's data", 240)
    finally:
        right.terminate()
        right.communicate(timeout=240)
