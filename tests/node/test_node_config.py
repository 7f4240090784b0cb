from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from psyche_node.cli import app
from psyche_node.exits import Exit
from psyche_node.identity import load_or_create_node_key
from psyche_node.node.config import ConfigError, NodeConfig, load_config

GOOD = 'run = "{run}"\nrpc = ["http://127.0.0.1:8899"]\nfolder = "node"\nmodel = "model"\ndata = "data"\n'.format(
    run="1" * 32
)


@pytest.fixture(autouse=True)
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths that the settings of these tests name."""
    monkeypatch.chdir(tmp_path)
    for file in (Path("model/config.json"), Path("data/manifest.json"), Path("w.json"), Path("sums.json")):
        file.parent.mkdir(exist_ok=True)
        file.touch()


def load(tmp_path: Path, text: str, **overrides: object) -> NodeConfig:
    file = tmp_path / "node.toml"
    file.write_bytes(text.encode("latin-1"))
    return load_config(file, overrides)


def test_defaults_and_derived_paths(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.wallet_path == Path("node/wallet.json")
    assert config.node_key_path == Path("node/node.key")
    assert load(tmp_path, GOOD + 'wallet = "w.json"\n').wallet_path == Path("w.json")


def test_flags_win_and_absent_flags_do_not(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD + "threads = 2\n", threads=5, device=None, rpc=())
    assert config.threads == 5
    assert config.device == "auto"
    assert config.rpc == ("http://127.0.0.1:8899",)


def test_a_list_of_one_needs_no_brackets(tmp_path: Path) -> None:
    bootstrap = f"/ip4/203.0.113.7/tcp/4001/p2p/{load_or_create_node_key(tmp_path / 'node.key').node_id}"
    text = GOOD.replace('["http://127.0.0.1:8899"]', '"http://127.0.0.1:8899"')
    config = load(tmp_path, text + f'bootstrap = "{bootstrap}"\ntasks = "sums.json"\n')
    assert config.rpc == ("http://127.0.0.1:8899",)
    assert (config.bootstrap, config.tasks) == ((bootstrap,), (Path("sums.json"),))


def test_what_is_no_url_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rpc: 'localhost:8899' is not the URL of an RPC endpoint"):
        load(tmp_path, GOOD, rpc=("localhost:8899",))


def test_every_way_to_set_a_priority_fee_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="priority_fee: it is 'fast'; it must be a whole number or 'auto'"):
        load(tmp_path, GOOD, priority_fee="fast")


def test_every_path_that_is_not_there_is_named_at_once_and_with_the_other_problems(tmp_path: Path) -> None:
    """All that is known without the chain comes before anything is started."""
    (tmp_path / "empty").mkdir()
    paths = {"folder": "w.json", "model": "modle", "data": "empty", "wallet": "wallet.jsn", "tasks": ("task.toml",)}
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD, threads=-1, **paths)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["threads", *paths]
    assert "modle is not there; name a Hugging Face model folder" in lines[2]
    assert "empty has no manifest.json; name a folder that `psyche-node data prepare` has made" in lines[3]
    assert "psyche-admin keys new wallet.jsn" in lines[4]


def test_a_gpu_each_is_a_rank_each(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).training_ranks == 1
    assert load(tmp_path, GOOD + "gpus = 8\ntensor_parallel = 4\n").training_ranks == 8
    assert load(tmp_path, GOOD + "ranks = 2\n").training_ranks == 2
    # torchrun may have started more of them.
    assert load(tmp_path, GOOD + "tensor_parallel = 8\n").tensor_parallel == 8


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("gpus = 8\nranks = 2\n", "gpus is enough"),
        ('gpus = 8\ndevice = "cuda:1"\n', "leave device out"),
        ("gpus = 8\ntensor_parallel = 3\n", "cannot be divided by tensor_parallel, which is 3"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(tmp_path: Path, lines: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(tmp_path, GOOD + lines)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("thread = 2", "thread"),
        ("threads = -1", "threads"),
        ('threads = "many"', "threads"),
        ("p2p_port = 70000", "p2p_port"),
        ("update_timeout = 0", "update_timeout"),
        ('faults = ["tamper", "gossip"]', "faults"),
        ("bootstrap = 7", "bootstrap"),
        ('bootstrap = ["/ip4/203.0.113.7/tcp/4001"]', "bootstrap"),
        ('listen = "nowhere"', "listen"),
        ('device = "tpu"', "device"),
        ('announce_grpc = "example.org:4002"', "announce_grpc"),
        ('announce_grpc = "203.0.113.7:0"', "announce_grpc"),
        ('announce_p2p = "203.0.113.7"', "announce_p2p"),
        ('owner = "me"', "owner"),
        ('program = "1111"', "program"),
    ],
)
def test_error_names_file_and_key(tmp_path: Path, line: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"node\.toml(.|\n)*\n  {key}[.0-9]*: "):
        load(tmp_path, GOOD + line + "\n")


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"run": ""})
    for key in ("run", "rpc", "folder", "model", "data"):
        assert f"\n  {key}: " in str(caught.value)


def test_unknown_fault_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tamper, length, outsider"):
        load(tmp_path, GOOD + 'faults = ["gossip"]\n')


@pytest.mark.parametrize("text", ["run = ", "run = '\xff'"], ids=["syntax", "encoding"])
def test_file_that_is_not_toml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"node\.toml is not TOML"):
        load(tmp_path, text)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml.*Pass --config FILE"):
        load_config(tmp_path / "none.toml", {})


def test_command_ends_with_the_exit_code_of_settings_and_names_them() -> None:
    done = CliRunner().invoke(app, ["run", "--threads", "-1"])
    assert done.exit_code == Exit.CONFIG
    assert "threads: " in done.output
    assert "model: " in done.output
    last = json.loads(done.output.splitlines()[-1])
    assert last["msg"] == "exit code 10, CONFIG", "what to do has been said"
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("address", "good"), [("127.0.0.1:9464", True), ("[::1]:0", True), ("9464", False)])
def test_metrics_are_served_on_an_ip_address_and_a_port(tmp_path: Path, address: str, good: bool) -> None:
    text = GOOD + f'metrics = "{address}"\n'
    if good:
        assert load(tmp_path, text).metrics == address
    else:
        with pytest.raises(ConfigError, match=r"write IP:port, for example 127\.0\.0\.1:9464"):
            load(tmp_path, text)


def test_what_the_system_refuses_is_said_without_its_number(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    done = CliRunner().invoke(app, ["keys", "show", "--folder", str(tmp_path / "taken")])
    assert (done.exit_code, done.output.replace("\n", "")) == (Exit.FILES, f"{tmp_path / 'taken'}: File exists")


def test_a_node_key_is_rotated_by_a_command(tmp_path: Path) -> None:
    def rotate() -> tuple[int, str]:
        done = CliRunner().invoke(app, ["keys", "rotate", "--folder", str(tmp_path)])
        return done.exit_code, done.output

    code, said = rotate()
    first = load_or_create_node_key(tmp_path / "node.key")
    assert (code, "old node key" in said) == (0, False)
    assert first.node_id in said
    code, said = rotate()
    second = load_or_create_node_key(tmp_path / "node.key")
    assert code == 0
    assert first != second
    assert first.node_id in said
    assert second.node_id in said
    # The old key is not written over by a third one.
    code, said = rotate()
    assert (code, "is kept there" in said.replace("\n", " ")) == (Exit.NODE_KEY, True)
    assert load_or_create_node_key(tmp_path / "node.key") == second


def test_the_id_of_a_node_that_has_not_run_yet_is_shown(tmp_path: Path) -> None:
    """For the others' `bootstrap`: it is that of the key which the node will use, and the same each time."""
    folder = tmp_path / "new"
    said = [CliRunner().invoke(app, ["keys", "show", "--folder", str(folder)]) for _ in range(2)]
    assert [done.stdout for done in said] == [f"{load_or_create_node_key(folder / 'node.key').node_id}\n"] * 2
    first, second = (done.stderr for done in said)
    assert first.startswith(f"made a new node key in {folder / 'node.key'}"), "the folder may be a slip"
    assert second == ""
    (folder / "node.key").write_bytes(b"short")
    done = CliRunner().invoke(app, ["keys", "show", "--folder", str(folder)])
    assert (done.exit_code, "is not a node key" in done.output) == (Exit.NODE_KEY, True)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("p2p_port = 4001\ngrpc_port = 4001\n", "each needs a port of its own"),
        ('announce_p2p = "203.0.113.7:4001"\n', "go together"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, lines: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load(tmp_path, GOOD + lines)


def test_rotating_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["keys", "rotate", "--folder", str(tmp_path / "none")])
    assert done.exit_code == Exit.CONFIG
    assert "is no folder" in done.output
    assert not (tmp_path / "none").exists()


def test_of_a_bootstrap_address_in_another_form_the_right_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'127.0.0.1:4001' is not /ip4/IP/tcp/PORT/p2p/ID, .* when it starts$"):
        load(tmp_path, GOOD, bootstrap=("127.0.0.1:4001",))
    with pytest.raises(ConfigError, match=r"when it starts: .*names no usable port"):
        load(tmp_path, GOOD, bootstrap=("/ip4/203.0.113.7/tcp/0/p2p/x",))
