"""What an operator sets for one node: a TOML file, every key of which is also a flag of ``psyche-node run``."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from solders.pubkey import Pubkey

from coordinator.fees import DEFAULT_FEE_CAP
from coordinator.urls import check_url
from coordinator.wording import problems
from psyche_node.faults import Faults
from psyche_node.identity import IdentityError
from psyche_node.network.statements import Malformed, parse_bootstrap, split_address
from psyche_node.node.paths import missing
from psyche_node.training.options import Options, known_device


class ConfigError(Exception):
    """A setting is missing or wrong; the message names the file, the key and what to write instead."""


class NodeConfig(BaseModel):
    """One node. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(min_length=1)
    """The address of the run's account, or its name (`psyche-admin run create` prints both). Anybody can make a run of
    any name: for good, set the address, or `program` and `owner` with the name."""
    program: str | None = None
    """Address of the coordinator program, where `run` is a name."""
    owner: str | None = None
    """The owner's wallet, where `run` is a name. With `program`, nothing is searched for: no other run can be meant."""
    rpc: tuple[str, ...] = Field(min_length=1)
    """Solana RPC endpoints, the preferred one first; a single one may stand without brackets. The only setting that
    differs between a laptop and the world."""
    commitment: Literal["processed", "confirmed", "finalized"] = "confirmed"
    """Level at which state is read and transactions count as done. `finalized` adds some 13 s to every transition."""
    priority_fee: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Micro-lamports per compute unit, on top of 5,000 lamports per signature. `auto` follows what the cluster asks;
    set it when transactions expire."""
    priority_fee_cap: int = Field(default=DEFAULT_FEE_CAP, ge=0)
    """Micro-lamports per compute unit that `auto` never goes above. 1,000,000 is 0.00002 SOL for a commitment."""
    folder: Path
    """Everything this node keeps: keys, updates, logs, checkpoints."""
    model: Path
    """Hugging Face folder of the model that the run starts from; its model root must be the one on chain."""
    data: Path
    """Prepared data set; the SHA-256 of its manifest must be the one on chain."""
    wallet: Path | None = None
    """Solana keypair file that pays and signs; one that is named must exist. Default: `wallet.json` in the folder, made
    when missing."""
    bootstrap: tuple[str, ...] = ()
    """libp2p addresses of nodes that are already in the network. Empty: this node is the first."""
    listen: str = "127.0.0.1"
    """Address that the node listens on. Use 0.0.0.0 on a host that others reach from outside."""
    p2p_port: int = Field(default=0, ge=0, le=65535)
    """TCP port of libp2p. 0 picks a free one."""
    grpc_port: int = Field(default=0, ge=0, le=65535)
    """TCP port that updates are fetched from. 0 picks a free one."""
    bulk_port: int = Field(default=0, ge=0, le=65535)
    """TCP port for updates in bulk, by TLS alone, which costs less CPU time. 0 picks a free one. Members that cannot
    reach it fetch from the other port."""
    mdns: bool = False
    """Announce this node on the local network by mDNS and look for members there. For hosts on one LAN; a rented host
    would answer strangers on UDP port 5353."""
    reachable: Literal["auto", "yes", "no"] = "auto"
    """Whether others can open connections to both ports. `auto` asks some members to try. A node that says `no`
    fetches over its own connections, and pushes its updates to public nodes."""
    metrics: str | None = None
    """IP:port to serve Prometheus metrics on, `127.0.0.1:9464` for example. Keep it off the internet; unset, there are
    none."""
    announce_p2p: str = ""
    """`IP:PORT` at which others reach the libp2p port, if it is not where the node listens: a port that a router
    forwards."""
    announce_grpc: str = ""
    """The same for the port that updates are fetched from. A node whose ports are forwarded sets both."""
    announce_bulk: str = ""
    """The same for the bulk port, if it is forwarded, too."""
    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:1`."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of this host to train on, one process each: 8 on a host with 8. 0: the one of `device`. More hosts:
    torchrun."""
    ranks: int = Field(default=1, ge=1)
    """Training processes without GPUs, which divide the work as GPUs would: to try out what `gpus` does."""
    tensor_parallel: int = Field(default=1, ge=1)
    """So many of the processes divide each matrix; the groups of them divide the batch, and shard the weights (FSDP2).
    Raise it, to 8 at most, if weights and activations do not fit otherwise. Replicas are identical whatever this is."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of each training process. 0 lets PyTorch choose. Replicas are identical whatever this is."""
    micro_batch: int = Field(default=0, ge=0)
    """Sequences per forward pass. 0 chooses by device. Lower it if memory runs out; replicas stay identical."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What weights are kept in. `auto`: as the run says, which is part of its layout digest. `bf16` needs 4 bytes per
    weight less, and rounds each step by chances that all members share."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again going backward instead of keeping them: a third more time, much less memory. `auto`: if
    they do not fit."""
    attention: Literal["auto", "sdpa", "eager", "flex", "flash"] = "auto"
    """Implementation of attention. `auto` takes the fastest one that is installed and passes the separation test."""
    compile: bool = False
    """Compile the decoder's layers with torch.compile when the node starts: minutes, and faster steps on a GPU. What
    the node sends may then differ in bits from what it sends otherwise; replicas stay identical."""
    share: int = Field(default=0, ge=0, le=1_000_000)
    """Share of the batch, in proportion to the other members' shares. 0: the measured tokens per second."""
    evaluate_every: int = Field(default=0, ge=0)
    """Rounds between evaluations of the held-out loss on this node. 0: only at the end."""
    tasks: tuple[Path, ...] = ()
    """Task files that are evaluated with the held-out loss, but in time that the node spends waiting. Their results go
    into its journal and metrics, and their SHA-256 on chain. The weights are kept once more meanwhile."""
    check_every: int = Field(default=0, ge=0)
    """Rounds between SHA-256 digests of all weights in the journal. 0: only at the end."""
    update_timeout: float = Field(default=120.0, gt=0)
    """Seconds to look for an update that counts before giving up. Raise it on slow links."""
    faults: tuple[str, ...] = ()
    """Misbehave on purpose: see psyche_node.faults. For tests and `psyche-sim --adversary`."""

    @field_validator("rpc", "bootstrap", "tasks", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("rpc")
    @classmethod
    def _endpoints(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_url(url) for url in urls)

    @field_validator("program", "owner")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        try:
            return None if address is None else str(Pubkey.from_string(address))
        except ValueError:
            raise ValueError(f"{address!r} is no address (32 bytes in base58)") from None

    @field_validator("announce_p2p", "announce_grpc", "announce_bulk")
    @classmethod
    def _ip_and_port(cls, address: str) -> str:
        if not address:
            return address
        try:
            split_address(address)
        except Malformed:
            raise ValueError(f"{address!r} is not IP:PORT, such as 203.0.113.7:4002 or [2001:db8::7]:4002") from None
        return address

    @field_validator("bootstrap")
    @classmethod
    def _libp2p_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            try:
                parse_bootstrap(address)
            except (Malformed, IdentityError) as error:
                # Of an address in quite another form, the part that is missing would be said to be wrong.
                why = f": {error}" if "/p2p/" in address else ""
                raise ValueError(
                    f"{address!r} is not /ip4/IP/tcp/PORT/p2p/ID, as a node prints it when it starts{why}"
                ) from error
        return addresses

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        return known_device(device)

    @field_validator("listen")
    @classmethod
    def _ip(cls, address: str) -> str:
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            raise ValueError(f"{address!r} is not an IP address of this machine; 0.0.0.0 is all of them") from None

    @model_validator(mode="after")
    def _ports_fit(self) -> Self:
        ports: dict[int, str] = {}
        for name in ("p2p_port", "grpc_port", "bulk_port"):
            port = getattr(self, name)
            if port and ports.setdefault(port, name) != name:
                raise ValueError(f"{ports[port]} and {name} are both {port}; each needs a port of its own")
        if bool(self.announce_p2p) != bool(self.announce_grpc):
            raise ValueError("announce_p2p and announce_grpc go together: set both, or neither")
        if self.announce_bulk and not self.announce_grpc:
            raise ValueError("announce_bulk goes with announce_p2p and announce_grpc: set all three")
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        if self.gpus and self.ranks > 1:
            raise ValueError(
                f"gpus is {self.gpus} and ranks is {self.ranks}: gpus is enough, it starts a rank for each"
            )
        if self.gpus and self.device not in ("auto", "cuda"):
            raise ValueError(f"gpus is {self.gpus} and device is {self.device!r}: leave device out")
        if self.training_ranks > 1 and self.training_ranks % self.tensor_parallel:
            raise ValueError(
                f"{self.training_ranks} training processes cannot be divided by tensor_parallel, which is "
                f"{self.tensor_parallel}"
            )
        if self.tasks and self.training_ranks > 1:
            raise ValueError(
                f"tasks need the whole model in one process, and {self.training_ranks} divide it: leave tasks out, and "
                "use `psyche-node eval` on the checkpoints"
            )
        return self

    @field_validator("faults")
    @classmethod
    def _known_faults(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        Faults.parse(names)
        return names

    @field_validator("metrics")
    @classmethod
    def _usable_address(cls, address: str | None) -> str | None:
        if address is not None:
            # Imported late: who serves no metrics need not wait for their library.
            from psyche_node.metrics import split_address

            try:
                split_address(address)
            except ValueError as error:
                raise ValueError(f"{error}; write IP:port, for example 127.0.0.1:9464") from error
        return address

    @property
    def options(self) -> Options:
        """How the training process runs the model."""
        return Options(**{name: getattr(self, name) for name in Options.model_fields})

    @property
    def training_ranks(self) -> int:
        """Training processes that this node starts."""
        return self.gpus or self.ranks

    @property
    def names_one_run(self) -> bool:
        """Whether no other run can ever be meant: addresses are derived from program, owner and name."""
        try:
            Pubkey.from_string(self.run)
        except ValueError:
            return self.program is not None and self.owner is not None
        return True

    @property
    def wallet_path(self) -> Path:
        return self.wallet or self.folder / "wallet.json"

    @property
    def node_key_path(self) -> Path:
        return self.folder / "node.key"


def load_config(file: Path | None, overrides: dict[str, object]) -> NodeConfig:
    """Merge a TOML file with flags (flags win), and look whether the paths are there.

    Raises ConfigError with every problem, one a line.
    """
    values: dict[str, object] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}. Pass --config FILE, or flags alone") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from error
    values.update({key: value for key, value in overrides.items() if value is not None and value != ()})
    wrong = missing(values)
    try:
        config = NodeConfig.model_validate(values)
    except ValidationError as error:
        wrong = problems(error, NodeConfig) + wrong
    else:
        if not wrong:
            return config
    where = f"{file} and flags" if file else "flags"
    lines = [f"  {key + ': ' if key else ''}{words}" for key, words in wrong]
    raise ConfigError(f"the node's settings ({where}) are not valid:\n" + "\n".join(lines))
