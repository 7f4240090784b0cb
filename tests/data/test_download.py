"""Downloads: addressed by content, resumed, limited, and clear about what went wrong."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from web import Web, served

from psyche_node.data import DataError
from psyche_node.data import download as module
from psyche_node.data.download import download, fetch
from psyche_node.data.locate import find_files

BYTES = b"".join(b'{"prompt": "%d", "completion": "a"}\n' % n for n in range(20_000))
DIGEST = hashlib.sha256(BYTES).hexdigest()
LIMIT = 1 << 30


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.0)
    with served({"/set/chat.jsonl": BYTES}) as web:
        yield web


def test_a_file_comes_once_and_only_a_change_comes_again(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set/chat.jsonl"
    path = download(url, tmp_path, LIMIT)
    assert path.name == f"{DIGEST}.jsonl"
    assert path.read_bytes() == BYTES
    assert download(url, tmp_path, LIMIT) == path
    assert [status for *_, status in web.asked] == ["200", "304"]
    web.files["/set/chat.jsonl"] = BYTES + b"{}\n"
    assert download(url, tmp_path, LIMIT).read_bytes() == BYTES + b"{}\n"
    assert path.read_bytes() == BYTES, "who uses the old one still has it"


def test_it_goes_on_where_it_broke_off(web: Web, tmp_path: Path) -> None:
    web.break_after, web.breaks = 300_000, 2
    path = download(f"{web.url}/set/chat.jsonl", tmp_path, LIMIT)
    assert path.read_bytes() == BYTES
    assert [wanted for _, wanted, _ in web.asked] == ["", "bytes=300000-", "bytes=600000-"]


def test_it_goes_on_after_the_process_was_gone(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set/chat.jsonl"
    web.break_after, web.breaks = 100_000, 5
    with pytest.raises(DataError, match="after 5 attempts; 500000 bytes are kept"):
        download(url, tmp_path, LIMIT)
    assert download(url, tmp_path, LIMIT).read_bytes() == BYTES
    assert web.asked[-1][1:] == ("bytes=500000-", "206")


def test_a_file_that_changed_meanwhile_is_not_mixed(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set/chat.jsonl"
    web.break_after, web.breaks = 100_000, 5
    with pytest.raises(DataError, match="are kept"):
        download(url, tmp_path, LIMIT)
    web.files["/set/chat.jsonl"] = other = BYTES.replace(b"a", b"b")
    assert download(url, tmp_path, LIMIT).read_bytes() == other


def test_the_hash_of_what_was_fetched_is_said(web: Web, tmp_path: Path) -> None:
    heard: list[str] = []
    url = f"{web.url}/set/chat.jsonl"
    assert find_files(url, tmp_path, note=heard.append) == [tmp_path / f"{DIGEST}.jsonl"]
    assert heard == [f"{url} has SHA-256 {DIGEST}"]


def test_without_a_network_the_copy_serves(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set/chat.jsonl"
    path = download(url, tmp_path, LIMIT)
    web.status = 503
    assert download(url, tmp_path, LIMIT) == path
    asked = len(web.asked)
    assert download(f"{url}#sha256={DIGEST}", tmp_path, LIMIT) == path
    assert len(web.asked) == asked, "what is pinned and here needs no network"
    with pytest.raises(DataError, match=r"cannot be had \(the server answers 503\), after 5 attempts"):
        download(f"{web.url}/set/other.jsonl", tmp_path, LIMIT)


def test_what_is_refused(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/set/chat.jsonl"
    with pytest.raises(DataError, match="has more than 1000 bytes"):
        download(url, tmp_path, 1000)
    with pytest.raises(DataError, match=f"has SHA-256 {DIGEST}, not {'0' * 64} as pinned"):
        download(f"{url}#sha256={'0' * 64}", tmp_path, LIMIT)
    with pytest.raises(DataError, match="64 hexadecimal digits"):
        download(f"{url}#sha256=12", tmp_path, LIMIT)
    with pytest.raises(DataError, match="the server answers 404"):
        download(f"{web.url}/set/none.jsonl", tmp_path, LIMIT)
    with pytest.raises(DataError, match="no known kind of file"):
        download(f"{web.url}/set/chat", tmp_path, LIMIT)
    assert fetch(url, LIMIT) == BYTES
    with pytest.raises(DataError, match="has more than 10 bytes"):
        fetch(url, 10)
    with pytest.raises(DataError, match="answers 404"):
        fetch(f"{web.url}/none", 10)


def test_a_data_set_of_the_hub_is_prepared_at_one_commit(web: Web, tokenizer: Path, tmp_path: Path) -> None:
    commit = "c0ffee" * 6 + "beef"
    names = ["README.md", "data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"]
    about = {"id": "owner/set", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
    web.files["/api/datasets/owner/set/revision/main"] = web.files["/api/datasets/owner/set"] = json.dumps(
        about
    ).encode()
    for name in names:
        web.files[f"/datasets/owner/set/resolve/{commit}/{name}"] = BYTES[:4000].rpartition(b"\n")[0] + b"\n"
    command = [sys.executable, "-m", "psyche_node.cli", "data", "prepare", "hf://datasets/owner/set@main"]
    options = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), "--sequence-length", "64", "--json"]
    environment = {**os.environ, "HF_ENDPOINT": web.url, "HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"is commit {commit}" in done.stderr
    assert "passes over data/test-0.jsonl" in done.stderr
    assert len(json.loads(done.stdout)["sources"]) == 2
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [*command, *options, "--replace"], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 40
    assert "cannot be looked up" in done.stderr
    assert "offline, name a folder with its files" in done.stderr


def test_a_hub_that_cannot_be_reached_is_told_as_a_url_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    code = "import sys; from pathlib import Path; from psyche_node.data.locate import find_files as f; "
    code += (
        "from psyche_node.data.errors import DataError\ntry: f('hf://datasets/owner/set', Path(sys.argv[1]))\n"
        "except DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": nobody, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=500, env=environment
    )
    assert "hf://datasets/owner/set cannot be looked up" in done.stdout, done.stderr
