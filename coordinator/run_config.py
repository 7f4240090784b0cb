"""The settings of a new run, as an owner writes them: a TOML file, overrides from the command line, or both."""

from __future__ import annotations

import re
import struct
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from solders.pubkey import Pubkey

from coordinator.state import Limits, Terms, float_bits
from coordinator.wording import Sources, has, problems

_MAX_FILE_BYTES: Final = 1 << 20
_SCHEDULES: Final = {"constant": 0, "linear": 1, "cosine": 2, "wsd": 3}
_U32: Final = 2**32 - 1

Slots = Annotated[int, Field(ge=1, le=_U32)]
Topk = Annotated[int, Field(ge=1, le=65536)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
Source = Annotated[str, Field(max_length=64)]


class ConfigError(Exception):
    """Settings that cannot be used; the message names each key and what it must be."""


_HASHES: Final = ("model_root", "layout_digest", "data_manifest")
_FLOATS: Final = ("decay", "peak_lr", "final_lr", "weight_decay", "clip_norm", "z_loss")
RECIPE: Final = "recipe"
"""Where settings are from that a file, --set and folders go over."""
_Model = TypeVar("_Model", bound=BaseModel)


class Settings(BaseModel):
    """A table of settings: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSettings(Settings):
    """Sizes, quorums and deadlines. Times are slots: 0.4 s on mainnet, 50 ms on the embedded ledger by default."""

    init_min_members: int = Field(ge=1, le=256)
    """Members that must have joined before the run starts."""
    min_members: int = Field(ge=1, le=256)
    """Members below which the run stops and waits for more."""
    max_members: int = Field(default=256, ge=1, le=256)
    """Members at once."""
    witnesses: int = Field(default=0, ge=0, le=32)
    """Witnesses elected per round; 0 elects everybody, up to 32."""
    overlap: int = Field(default=0, ge=0, le=1)
    """1: updates travel while the next round trains. 0: every round waits for its own updates."""
    max_missed: int = Field(default=2, ge=1, le=255)
    """Rounds in a row that a member may miss before it is dropped."""
    join_grace: int = Field(default=20, ge=0, le=_U32)
    """How long to wait for more members once there are enough."""
    warmup_time: Slots = 1200
    """How long members may take to load the model."""
    max_round_train_time: Slots = 6000
    """A round ends after this, whoever has committed."""
    round_witness_time: Slots = 600
    """A round's attestations are waited for no longer than this."""
    cooldown_time: Slots = 1200
    """A checkpoint is waited for no longer than this."""
    adaptive_grace: int = Field(default=20, ge=0, le=_U32)
    """Added to 1.5 times the median commit time; raise it when slow members keep missing rounds by little."""
    batch: int = Field(ge=1, le=2**24)
    """Positions (packed sequences) per round."""
    rounds_per_epoch: int = Field(ge=1, le=_U32)
    """Rounds between checkpoints."""
    total_rounds: int = Field(ge=1, lt=2**31)
    """Rounds of the whole run."""
    max_share: int = Field(default=0, ge=0, le=1_000_000)
    """Largest share of the batch that a member may ask for, in the shares' own unit; 0: the general 1,000,000."""

    @model_validator(mode="after")
    def _consistent(self) -> LimitSettings:
        if not self.min_members <= self.init_min_members <= self.max_members:
            raise ValueError("must hold: min_members <= init_min_members <= max_members")
        if self.witnesses > self.min_members:
            raise ValueError("witnesses must be at most min_members")
        if self.adaptive_grace > self.max_round_train_time:
            raise ValueError("adaptive_grace must be at most max_round_train_time")
        if self.batch < self.min_members:
            raise ValueError("batch must be at least min_members")
        return self

    def on_chain(self) -> Limits:
        """In the form that the program takes."""
        return Limits(**self.model_dump())


class TrainingSettings(Settings):
    """How a model is trained, whichever model and data it is: the part of a run's terms that a recipe has."""

    sequence_length: int = Field(ge=1, le=2**24)
    """Tokens per packed sequence."""
    topk: Topk = 512
    """Components sent per block of 4,096. Fewer make smaller updates and a higher loss."""
    lookahead: bool = True
    """Whether gradients are taken at the weights that the trend of the votes predicts."""
    clip_votes: bool = True
    """Whether a component counts by the sign of its votes."""
    window: int = Field(default=3, ge=0, le=8)
    """The trend of the votes forgets over 2^window rounds; 0: each round's votes alone decide its step."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_rounds: int = Field(default=0, ge=0, le=_U32)
    """Rounds over which the learning rate rises. Increase it if the loss jumps at the start."""
    decay_rounds: int = Field(default=0, ge=0, le=_U32)
    """Rounds over which wsd falls at the end."""
    peak_lr: float = Field(gt=0, le=1, allow_inf_nan=False)
    """Highest learning rate: the size of each weight's step."""
    final_lr: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Learning rate at the end."""
    decay: float = Field(default=0.9, ge=0, lt=1, allow_inf_nan=False)
    """Momentum kept per round."""
    weight_decay: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Weight decay per round, times the learning rate."""
    clip_norm: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)
    """A member's gradient is clipped to this norm; 0 does not clip."""
    z_loss: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Coefficient of log(Z)^2 in the loss, which keeps logits from drifting; 1e-4 is common, 0 leaves it out."""
    ramp_batch: int = Field(default=0, ge=0, le=2**24)
    """Sequences of the first round, where the batch is to grow over `ramp_rounds`."""
    ramp_rounds: int = Field(default=0, ge=0, le=_U32)
    """Rounds over which a round's sequences grow from `ramp_batch` to `limits.batch`; 0: all rounds have the batch."""

    @model_validator(mode="after")
    def _ramp_is_whole(self) -> Self:
        if bool(self.ramp_batch) != bool(self.ramp_rounds):
            raise ValueError("ramp_batch and ramp_rounds go together: set both, or neither")
        return self

    def sequences(self, rounds: int, batch: int) -> float:
        """How many sequences a run of so many rounds takes, ``batch`` in a full one, if none is void."""
        ramped = min(self.ramp_rounds, rounds)
        return batch * (rounds - ramped) + ramped * (self.ramp_batch + batch) / 2

    def check_schedule(self, total: int) -> None:
        """Raises ValueError where warm-up, decay or ramp do not fit into so many rounds."""
        if bool(self.decay_rounds) != (self.schedule == "wsd"):
            raise ValueError("decay_rounds is for the schedule wsd, and wsd needs it")
        if self.warmup_rounds + self.decay_rounds > total:
            raise ValueError(f"warmup_rounds and decay_rounds together must be at most the {total} rounds of the run")
        if self.ramp_rounds > total:
            raise ValueError(f"ramp_rounds must be at most the {total} rounds of the run")


class TermSettings(TrainingSettings):
    """What is trained, and how: every member must have the same. Roots and digests are 32 bytes in hex."""

    model_root: Hash
    """Root of the start model's weights."""
    layout_digest: Hash
    """Digest of the update's layout, which follows from the model's shapes and topk."""
    data_manifest: Hash
    """SHA-256 of the prepared data's manifest."""
    samples: int = Field(ge=1, le=2**63)
    """Packed sequences in the data."""
    update_bytes: int = Field(ge=1, le=2**40)
    """Exact size of an update."""
    model_source: Source = ""
    """Where members find the model, for people: a path, a URL or a hub name."""
    data_source: Source = ""
    """Where members find the data."""

    def on_chain(self) -> Terms:
        """In the form that the program takes."""
        terms = self.model_dump()
        for name in _HASHES:
            terms[name] = bytes.fromhex(terms[name])
        for name in _FLOATS:
            terms[f"{name}_bits"] = float_bits(terms.pop(name))
        terms["schedule"] = _SCHEDULES[terms["schedule"]]
        return Terms(**terms)

    @classmethod
    def of_chain(cls, terms: Terms) -> TermSettings:
        """The settings that make these terms; fp32 values come back as they were rounded. Raises ConfigError for terms
        that other software has set and that these settings would refuse."""
        return validated(cls, term_values(terms), "terms")


def term_values(terms: Terms) -> dict[str, Any]:
    """The terms of a run as its settings name them. fp32 values are the shortest decimals that mean the same."""
    values = asdict(terms)
    for name in _HASHES:
        values[name] = values[name].hex()
    for name in _FLOATS:
        values[name] = _shortest(values.pop(f"{name}_bits"))
    values["schedule"] = next(name for name, number in _SCHEDULES.items() if number == terms.schedule)
    return values


def _shortest(bits: int) -> float:
    exact: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    rounded = (float(f"{exact:.{digits}g}") for digits in range(1, 10))
    return next((value for value in rounded if float_bits(value) == bits), exact)


class RunSettings(Settings):
    """A whole run."""

    run_id: str = Field(min_length=1, max_length=32)
    """The run's name, 1 to 32 bytes, unique for its owner."""
    join_authority: str = ""
    """Address of the wallet that says who may join (`auth grant`); none: anyone may."""
    limits: LimitSettings
    terms: TermSettings

    @model_validator(mode="after")
    def _authority(self) -> RunSettings:
        if self.join_authority:
            try:
                Pubkey.from_string(self.join_authority)
            except ValueError:
                raise ValueError("join_authority must be an address (32 bytes in base58), or left out") from None
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> RunSettings:
        self.terms.check_schedule(self.limits.total_rounds)
        return self


@dataclass(frozen=True, slots=True)
class SettingsTable:
    """Settings of a run that nobody has looked at yet, and where they are from."""

    values: dict[str, Any]
    sources: Sources

    def terms(self) -> Mapping[str, Any]:
        """The section of the terms; empty if there is none, or if it is no section."""
        terms = self.values.get("terms")
        return terms if isinstance(terms, Mapping) else {}

    def with_terms(self, terms: Mapping[str, Any]) -> SettingsTable:
        """These settings with some of the terms set otherwise. Where there is something else than a section, it stays
        for `checked` to complain about."""
        if not isinstance(self.values.get("terms", {}), Mapping):
            return self
        return SettingsTable({**self.values, "terms": {**self.terms(), **terms}}, self.sources)

    def origin(self, *path: str) -> str:
        """Where the value of a key is from: --set, a file's name, or ``RECIPE``."""
        return next((name for name, table in self.sources if has(table, path)), "the settings")

    def checked(self) -> RunSettings:
        """Raises ConfigError, with one line per key that is missing, unknown or out of range."""
        return validated(RunSettings, self.values, "", self.sources)


def settings_table(
    run_id: str | None, file: Path | None, overrides: Sequence[str], recipe: Mapping[str, Any] | None = None
) -> SettingsTable:
    """A recipe, over that a TOML file, over that KEY=VALUE such as `limits.batch=64`; `checked` makes settings of it.

    Raises ConfigError for what is not TOML, or no KEY=VALUE.
    """
    written = {} if file is None else read_toml(file)
    table = _over(recipe or {}, written)
    if run_id is not None:
        table["run_id"] = run_id
    for override in overrides:
        _override(table, override)
    return SettingsTable(table, (("--set", parse_overrides(overrides)), (str(file), written), (RECIPE, recipe or {})))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE arguments as a table of tables. Raises ConfigError."""
    table: dict[str, Any] = {}
    for override in overrides:
        _override(table, override)
    return table


def validated(model: type[_Model], table: Mapping[str, Any], section: str, sources: Sources = ()) -> _Model:
    """The settings in a table. Raises ConfigError, with one line per key that is missing, unknown or out of range."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        found = problems(error, model, section, sources)
        lines = "\n".join(f"  {where or 'settings'}: {words}" for where, words in found)
        raise ConfigError(f"the run's settings cannot be used:\n{lines}") from None


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables, section by section; where both have a key, that of ``above``."""
    both = {key: dict(value) if isinstance(value, dict) else value for key, value in below.items()}
    for key, value in above.items():
        both[key] = _over(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def read_toml(file: Path) -> dict[str, Any]:
    """A small TOML file. Raises ConfigError."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise ConfigError(f"{file} is over {_MAX_FILE_BYTES} bytes; is it the right file?")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error


_SECTIONS: Final[dict[str, type[Settings]]] = {"limits": LimitSettings, "terms": TermSettings}


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *path, name = key.strip().split(".")
    if not path and name not in RunSettings.model_fields:
        # A limit's or a term's name says where it belongs.
        path = [section for section, model in _SECTIONS.items() if name in model.model_fields]
    if not equals or not name or not all(path):
        raise ConfigError(f"{override!r} must look like KEY=VALUE, such as batch=64 or terms.peak_lr=0.001")
    for part in path:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {part} is not a section")
        table = inner
    table[name] = _parsed(value.strip())


def _parsed(text: str) -> Any:
    """A value as TOML has it; strings need not be quoted on the command line."""
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return text  # a digest, also where its digits happen to be a number
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
