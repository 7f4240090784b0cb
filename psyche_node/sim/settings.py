"""What a simulation is told: every field is a flag of `psyche-sim`, too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from coordinator.ledger.faults import parse_faults
from coordinator.recipes import load_recipe
from coordinator.run_config import TermSettings, TrainingSettings
from coordinator.state import Limits, Terms
from psyche_node.faults import Fault
from psyche_node.folder_files import hub_hint
from psyche_node.relay.spec import LinkSpec
from psyche_node.sim.recipe import DEMO, SimRecipe, recipe_for
from psyche_node.sim.samples import SampleCounts
from psyche_node.training.options import known_device


class Kill(BaseModel):
    """SIGKILL one node in one round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: int
    round: int

    @classmethod
    def parse(cls, text: str) -> Kill:
        """Read ``NODE@ROUND``. Raises ValueError."""
        node, separator, number = text.partition("@")
        if not separator or not node.isdecimal() or not number.isdecimal():
            raise ValueError(f"{text!r} is not NODE@ROUND, such as 2@30 (node 2 in round 30)")
        return cls(node=int(node), round=int(number))

    def __str__(self) -> str:
        return f"{self.node}@{self.round}"


class Ranks(BaseModel):
    """The training processes of a node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int = Field(ge=1, le=64)
    tensor_parallel: int = Field(default=1, ge=1)

    @classmethod
    def parse(cls, text: str) -> Ranks:
        """Read ``RANKS`` or ``RANKS/TENSOR_PARALLEL``. Raises ValueError."""
        ranks, separator, divide = text.partition("/")
        if not ranks.isdecimal() or (separator and not divide.isdecimal()):
            raise ValueError(f"{text!r} is not RANKS or RANKS/TENSOR_PARALLEL, such as 2 or 4/2")
        if not (int(ranks) and int(divide or 1)):
            raise ValueError(f"{text!r}: no rank at all trains nothing; 1 is the least of either")
        found = cls(ranks=int(ranks), tensor_parallel=int(divide or 1))
        if found.ranks % found.tensor_parallel:
            raise ValueError(f"{text!r}: {found.ranks} ranks cannot be divided by {found.tensor_parallel}")
        return found

    def __str__(self) -> str:
        return f"{self.ranks}/{self.tensor_parallel}" if self.tensor_parallel > 1 else str(self.ranks)


class Prepared(BaseModel):
    """Data, tokenizer and initial model, ready to be copied into the nodes' folders (psyche_node.sim.prepare)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """Hugging Face folder of the initial weights, with the tokenizer."""
    data: Path
    """Prepared data folder."""
    model_root: str
    layout_digest: str
    data_manifest: str
    samples: int
    """Packed training sequences."""
    sequence_length: int
    update_bytes: int
    parameters: int
    unigram_entropy: float
    counts: SampleCounts
    """What became of the samples."""
    question: str | None = None
    """The first prompt of the held-out data, shortened; None if it has no conversations."""
    notes: tuple[str, ...] = ()
    """Which files of the data were passed over, and what was fetched."""
    warnings: tuple[str, ...] = ()
    """What the user should know of model and data."""
    model_source: str
    data_source: str


class SimSettings(BaseModel):
    """One simulation. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int = Field(default=4, ge=1, le=64)
    """Honest nodes."""
    rounds: int = Field(default=load_recipe(DEMO).limits.total_rounds, ge=2)
    """Rounds of the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the held-out split and the order of the data."""
    out: Path
    """Folder for the report, the model, the nodes' folders and logs; new or empty."""
    data: str | None = None
    """What to train on, as `psyche-node data prepare` takes it: a file, a folder, a URL. Default: the documentation of
    Python's standard library."""
    template: str | None = None
    """Chat template of the data, and of the model that is trained: a shipped one (`hermes-llama3`, `chatml`) or a file.
    Default: the tokenizer's own."""
    skip_bad: str = "0"
    """Pass over so many bad samples at most, counted and listed, or over `all` of them; then stop."""
    model: str | None = None
    """Hugging Face folder, or JSON file with a model config. Default: a small Seed-OSS."""
    adversaries: tuple[Fault, ...] = ()
    """Dishonest nodes, beside the honest ones."""
    kills: tuple[Kill, ...] = ()
    """Nodes to kill with SIGKILL."""
    chain_faults: tuple[str, ...] = ()
    """What goes wrong at the ledger's RPC endpoints, such as `lose=0.1, latency_ms=50`: one text for each endpoint that
    the nodes use, the preferred one first; an empty one is an endpoint without faults. What can go wrong:
    coordinator/ledger/faults.py."""
    link: str | None = None
    """What the line of each node is like, such as `100mbit/80ms/0.5%` (rate, round trip, loss). Default: this machine's
    loopback. Everything that nodes say to each other goes through it, both ways; the ledger is not behind it."""
    private: int = Field(default=0, ge=0)
    """So many of the honest nodes, the last ones, cannot be reached by others, as it is behind a NAT: they fetch over
    connections of their own and push their updates to nodes that can be reached."""
    baseline: bool = False
    """Train the same model on the same tokens with AdamW in one process afterwards, and compare."""
    check_every: int = Field(default=10, ge=0)
    """Rounds between comparisons of all replicas' SHA-256; 0: only at the end."""
    evaluate_every: int = Field(default=10, ge=0)
    """Rounds between evaluations of the held-out loss; 0: only at the end."""
    tasks: tuple[Path, ...] = ()
    """Task files that the first node evaluates as often, in time that it spends waiting."""
    slot_ms: int = Field(default=50, ge=10, le=10_000)
    """Length of the ledger's slot in milliseconds."""
    port: int = Field(default=0, ge=0, le=65_534)
    """Port of the ledger's JSON-RPC (WebSocket: one above). 0 picks one."""
    rpc: str | None = None
    """Solana RPC endpoint to run on instead of a ledger of its own. Set `slot_ms` to that chain's slots (400)."""
    wallet: Path | None = None
    """Keypair file of the run's owner, who pays for everything. Needed with `rpc`; it should hold 2 SOL and more."""
    hold: bool = False
    """Keep the ledger up after the run, until Ctrl-C, for `psyche-admin run show`."""
    device: str = "auto"
    """Device of the nodes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What all nodes keep their weights in; it is part of the run's layout digest."""
    ranks: tuple[Ranks, ...] = (Ranks(ranks=1),)
    """Training processes of the nodes, in turn: with `1`, `2` and `2/2` node 0 has one, node 1 two that shard the
    weights (FSDP2), node 2 two that divide each matrix, node 3 one again."""
    same_hosts: bool = False
    """Start all nodes alike. By default node 2 uses another thread count and node 3 another micro-batch."""
    recipe: SimRecipe = Field(default_factory=lambda known: recipe_for(DEMO, known["rounds"]))
    """How the model is trained."""

    @model_validator(mode="after")
    def _data_exists(self) -> Self:
        if self.data is not None and "://" not in self.data and not Path(self.data).exists():
            raise ValueError(f"--data {self.data}: no such file or folder; name one with samples")
        return self

    @model_validator(mode="after")
    def _model_exists(self) -> Self:
        if self.model is not None and not Path(self.model).exists():
            raise ValueError(
                f"--model {self.model}: no such file or folder; name a Hugging Face folder, or a JSON file with a "
                f"model config{hub_hint(self.model)}"
            )
        return self

    @model_validator(mode="after")
    def _template_exists(self) -> Self:
        from psyche_node.data.rendering import SHIPPED  # late: `psyche-sim --help` does not wait for the data package

        if self.template is not None and self.template not in SHIPPED and not Path(self.template).is_file():
            raise ValueError(f"--template {self.template}: no such file; name one, or one of {', '.join(SHIPPED)}")
        return self

    @field_validator("skip_bad")
    @classmethod
    def _known_limit(cls, text: str) -> str:
        from psyche_node.data.skipping import read_limit

        read_limit(text)
        return text

    @model_validator(mode="after")
    def _tasks_exist(self) -> Self:
        for task in self.tasks:
            if not task.is_file():
                raise ValueError(f"--tasks {task}: no such file; name a task file")
        return self

    @model_validator(mode="after")
    def _somebody_is_reachable(self) -> Self:
        if self.private >= self.nodes:
            raise ValueError(f"--private {self.private}: one of the {self.nodes} nodes at least must be reachable")
        return self

    @model_validator(mode="after")
    def _wallet_with_rpc(self) -> Self:
        if self.rpc is not None and self.wallet is None:
            raise ValueError("on a chain of your own choice (--rpc) the owner's funded wallet is needed: --wallet FILE")
        if self.rpc is not None and self.wallet is not None and not self.wallet.is_file():
            raise ValueError(
                f"--wallet {self.wallet}: no such file; name the owner's funded wallet, or make one with: "
                f"psyche-admin keys new {self.wallet}"
            )
        return self

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        return known_device(device)

    @field_validator("link")
    @classmethod
    def _known_link(cls, text: str | None) -> str | None:
        if text is not None:
            LinkSpec.parse(text)
        return text

    @field_validator("chain_faults")
    @classmethod
    def _known_chain_faults(cls, faults: tuple[str, ...]) -> tuple[str, ...]:
        for text in faults:
            parse_faults(text)
        return faults

    @model_validator(mode="after")
    def _faults_of_its_own_ledger(self) -> Self:
        if self.rpc is not None and self.chain_faults:
            raise ValueError("--chain-fault needs the simulation's own ledger; leave --rpc away")
        return self

    @model_validator(mode="after")
    def _kills_exist(self) -> Self:
        for kill in self.kills:
            if kill.node >= self.nodes or kill.round >= self.rounds:
                raise ValueError(
                    f"cannot kill node {kill.node} in round {kill.round}: there are {self.nodes} nodes "
                    f"(from 0) and {self.rounds} rounds"
                )
        return self

    @model_validator(mode="after")
    def _ranks_have_nodes(self) -> Self:
        if len(self.ranks) > self.nodes:
            raise ValueError(
                f"--ranks is given {len(self.ranks)} times, and there are {self.nodes} nodes: give it once for each "
                "node at most"
            )
        return self

    def terms(self, prepared: Prepared) -> Terms:
        """The run's terms of training on chain."""
        training = self.recipe.model_dump(include=set(TrainingSettings.model_fields))
        made = prepared.model_dump(include=set(TermSettings.model_fields) - set(TrainingSettings.model_fields))
        return TermSettings.model_validate({**training, **made}).on_chain()

    def passes(self, prepared: Prepared) -> float:
        """How often the run goes over its data, if no round is void."""
        return self.recipe.sequences(self.rounds, self.recipe.batch) / prepared.samples

    def threads_of(self, index: int) -> int:
        """CPU threads of node ``index``: the cores are shared; node 2 differs to show that replicas do not."""
        fair = max(1, (os.cpu_count() or 1) // self.nodes)
        return fair + 1 if index == 2 and not self.same_hosts else fair

    def written(self) -> dict[str, Any]:
        """The settings that are objects, as the command line has them."""
        return {"kills": [str(kill) for kill in self.kills], "ranks": [str(ranks) for ranks in self.ranks]}

    def ranks_of(self, index: int) -> Ranks:
        """Training processes of node ``index``."""
        return self.ranks[index % len(self.ranks)]

    def micro_batch_of(self, index: int) -> int:
        """Sequences per forward pass of node ``index``; 0 is the node's own choice."""
        return 4 if index == 3 and not self.same_hosts else 0

    def _slots(self, seconds: int) -> int:
        return -(-1000 * seconds // self.slot_ms)

    def limits(self) -> Limits:
        """The run's limits on chain, in slots. Generous maxima: the adaptive deadline is what ends a round."""
        members = self.nodes + sum(fault is not Fault.OUTSIDER for fault in self.adversaries)
        return Limits(
            init_min_members=members,
            min_members=max(1, members // 2),
            max_members=256,
            witnesses=0,
            overlap=self.recipe.overlap,
            max_missed=2,
            join_grace=1,
            warmup_time=self._slots(120),
            max_round_train_time=self._slots(120),
            round_witness_time=self._slots(10),
            cooldown_time=self._slots(30),
            adaptive_grace=self._slots(5),
            batch=self.recipe.batch,
            rounds_per_epoch=self.rounds,
            total_rounds=self.rounds,
        )
