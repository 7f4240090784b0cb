"""What the supervisor asks of the training process, and what it answers. Importable without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from psyche_node.ipc import Message
from psyche_node.training.options import DEFAULTS, Options, Precision
from psyche_node.training.terms import TrainingTerms

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes in hexadecimal."""


class Load(Message):
    """Open model and data, and check that documents of a pack do not see each other. The first request. -> Loaded"""

    model: str
    """Hugging Face folder of the initial weights, with its tokenizer."""
    data: str
    """Prepared data folder."""
    terms: TrainingTerms
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or, for a single rank, one GPU such as ``cuda:0``."""
    threads: int = 0
    """CPU threads. 0 lets PyTorch choose."""
    micro_batch: int = 0
    """Sequences per forward pass. 0: chosen here. Smaller needs less memory."""
    tensor_parallel: int = 1
    """How many of this node's ranks divide the matrices; the others divide the batch."""
    options: Options = DEFAULTS
    """How the model is run."""
    layout_digest: Hex32 | None = None
    """Of the run: it says what precision weights are kept in. None: as ``options`` say."""
    model_root: Hex32 | None = None
    """Of the run: with it, a model of other tensors is refused before it is loaded. None: it is only reported."""
    data_manifest: Hex32 | None = None
    """The data that the run trains on; another one is refused, naming what differs. None: it is only reported."""
    data_source: str = ""
    """Where the run says that its data is. From a URL the owner's manifest is fetched, to tell which file differs."""


class Loaded(Message):
    shapes: list[tuple[str, tuple[int, ...]]]
    """Names and shapes of the trained tensors, in the layout's order."""
    layout_digest: Hex32
    precision: Precision = "fp32"
    """What the weights are kept in."""
    model_root: Hex32
    data_manifest: Hex32
    samples: int
    """Packed training sequences in one pass."""
    sequence_length: int
    update_bytes: int
    parameters: int
    unigram_entropy: float
    """Entropy of one trained token drawn alone, in nats."""
    device: str
    """What it trains on, in words."""
    reasons: list[str]
    """One line for each choice that was made automatically, and why."""


class Train(Message):
    """Train the sequences at ``positions`` and write this member's update to ``out_path``. -> Trained"""

    round: int
    positions: list[int]
    run: Hex32
    member: int
    out_path: str


class Trained(Message):
    loss: float
    """Mean over the trained tokens, in nats; 0 where there were none."""
    tokens: int
    """Trained tokens: those that have a loss."""
    seconds: float
    fingerprint_before: int
    """Fingerprint of the weights that it trained on."""
    gradient_norm: float
    """Before clipping."""


class Apply(Message):
    """Apply the updates of a round. ``included``: whether my own one is among them; None if I sent none. -> Applied"""

    round: int
    paths: list[str]
    included: bool | None = None
    digest: bool = False
    """Whether to answer with the SHA-256 of the weights, which takes longer than the fingerprint."""


class Applied(Message):
    fingerprint: int
    weights_sha256: str | None = None
    seconds: float = 0.0
    updates_lost: float | None = None
    """Share of the weights whose step was lost to rounding, of a sample; None if there was no step. 0 is healthy."""
    rate: float = 1.0
    """The round's learning rate as a share of the peak: near the end of a schedule it may be too small for anything."""


class Evaluate(Message):
    """Measure the held-out loss of the current weights. -> Evaluated"""

    sequences: int | None = None
    """At most so many held-out sequences, spread evenly. None: the session's own bound."""


class Evaluated(Message):
    loss: float
    """Mean over the held-out tokens, in nats."""
    tokens: int
    seconds: float


class OpenTasks(Message):
    """Read the task files that ``WorkOnTasks`` evaluates, once, and say what is wrong with them. -> Ok"""

    files: list[str]


class HoldWeights(Message):
    """Keep a copy of the current weights, and begin to evaluate the tasks on it. -> Ok"""

    round: int
    """Rounds that these weights contain."""


class WorkOnTasks(Message):
    """Go on with the evaluation until the next request comes, or for ``seconds``. -> TasksWorked"""

    seconds: float


class TasksWorked(Message):
    results: str | None
    """The results as canonical JSON, once, when they are complete."""
    seconds: float


class Root(Message):
    """-> RootIs"""


class RootIs(Message):
    model_root: Hex32


class Weights(Message):
    """-> WeightsAre"""


class WeightsAre(Message):
    sha256: Hex32
    fingerprint: int


class Save(Message):
    """Write the current weights as a Hugging Face folder. -> Ok"""

    folder: str
    round: int | None = None
    """Rounds that the weights contain, for the folder's README."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """More lines for the README: run, program, owner..."""


class Shutdown(Message):
    """Answer, and end the process. -> Ok"""
