"""Changes to a run that has begun, from KEY=VALUE on the command line to what the program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from solders.pubkey import Pubkey

from coordinator.admin.output import address_of
from coordinator.run_config import ConfigError, LimitSettings, Settings, TermSettings, parse_overrides, validated
from coordinator.state import Limits, Phase, Run, Terms
from coordinator.wording import no_such_key

_ANYONE: Final = "anyone"
_LAMPORTS_MOST: Final = 10_000_000_000


class _Changeable(Settings):
    """What may follow `run set RUN`."""

    limits: LimitSettings
    terms: TermSettings
    join_authority: str
    reward_rate: int


@dataclass(frozen=True, slots=True)
class Change:
    """What is to change: None for what is not. With `limits` comes the join authority, changed or not."""

    keys: tuple[str, ...]
    limits: Limits | None
    join_authority: Pubkey | None
    terms: Terms | None
    reward_rate: int | None

    def to_json(self, run: Run) -> dict[str, Any]:
        """{key: [before, after]} of everything that differs."""
        found: dict[str, Any] = {}
        if self.limits is not None:
            found |= _differing(asdict(_limits_of(run)), asdict(self.limits))
            if self.join_authority != run.join_authority:
                found["join_authority"] = [_named(run.join_authority), _named(self.join_authority)]
        if self.terms is not None:
            before, after = TermSettings.of_chain(_terms_of(run)), TermSettings.of_chain(self.terms)
            found |= _differing(before.model_dump(), after.model_dump(), "terms.")
        if self.reward_rate is not None:
            found["reward_rate"] = [run.reward_rate, self.reward_rate]
        return found

    def text(self, run: Run) -> list[str]:
        """A line per change."""
        lines = [f"{key}: {before} -> {after}, {_when(key, run)}" for key, (before, after) in self.to_json(run).items()]
        if (back := self.checkpoint(run)) is not None:
            lines.append(f"the run goes on from its checkpoint of round {back}, now")
        return lines

    def checkpoint(self, run: Run) -> int | None:
        """The round of the checkpoint that the run goes on from, which no key of it need say; else None."""
        goes_on = self.terms is not None and self.terms.model_root == run.checkpoint_root
        return run.checkpoint_round if goes_on else None

    def caution(self, run: Run) -> str | None:
        """What cannot be undone: other data forgets which positions were trained, another model what was learned."""
        if self.terms is None:
            return None
        lost = []
        if self.terms.model_root != run.checkpoint_root:
            lost.append(f"The run goes on from another model than its checkpoint of round {run.checkpoint_round}.")
        elif run.final_rounds > run.checkpoint_round:
            lost.append(
                f"Its checkpoint lacks what it has learned since round {run.checkpoint_round} "
                f"({run.final_rounds - run.checkpoint_round} rounds), and that is lost."
            )
        data = ("data_manifest", "samples", "sequence_length")
        if any(getattr(self.terms, name) != getattr(run.terms, name) for name in data):
            lost.append(
                f"The data changes: positions begin at 0 again; where the present data stands ({run.cursor:,}) is lost."
            )
        return " ".join(lost) or None


def change_of(run: Run, texts: Sequence[str]) -> Change:
    """What KEY=VALUE arguments ask for, checked as a new run's settings are.

    Raises:
        ConfigError: for a key that is unknown, a value out of range, a learning-rate schedule that does not fit into
            the rounds that are left, or nothing to change.
    """
    table = parse_overrides(texts)
    limits: dict[str, Any] = _section(table, "limits") or {}
    terms = _section(table, "terms")
    authority, rate = table.pop("join_authority", None), table.pop("reward_rate", None)
    for key in table:
        why = "a run keeps the name it has" if key == "run_id" else no_such_key((key,), _Changeable)
        raise ConfigError(f"{key}: {why}")
    keys = tuple(text.partition("=")[0].strip() for text in texts)
    new_limits = validated(LimitSettings, {**asdict(_limits_of(run)), **limits}, "limits") if limits else None
    new_terms = None
    if terms is not None:
        before = TermSettings.of_chain(_terms_of(run)).model_dump()
        settings = validated(TermSettings, {**before, **terms}, "terms")
        _check_schedule(settings, run, _limits_of(run).total_rounds if new_limits is None else new_limits.total_rounds)
        new_terms = settings.on_chain()
    wanted = run.join_authority
    if authority is not None:
        wanted = None if authority == _ANYONE else address_of(str(authority), "join_authority")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or not 0 <= rate <= _LAMPORTS_MOST):
        raise ConfigError(f"reward_rate {rate!r} must be 0 to {_LAMPORTS_MOST} lamports per million tokens")
    # Limits and join authority are set together.
    changed = None if new_limits is None else new_limits.on_chain()
    if changed is None and authority is not None:
        changed = _limits_of(run)
    change = Change(keys, changed, wanted, new_terms, rate)
    # Naming the checkpoint's own root takes members back to it: what a run needs whose nodes are all gone.
    back = terms is not None and "model_root" in terms and run.round > run.model_round
    if not back and all(before == after for before, after in change.to_json(run).values()):
        raise ConfigError(f"nothing changes: the run has {', '.join(texts)} already")
    return change


def _check_schedule(terms: TermSettings, run: Run, total: int) -> None:
    """With new terms the schedule begins again, and spans the rounds that are left. Raises ConfigError."""
    left = max(total - run.round, 1)
    try:
        terms.check_schedule(left)
    except ValueError as error:
        raise ConfigError(
            f"the learning-rate schedule begins again with new terms, and {left} of {total} rounds are left: {error}"
        ) from None


def _section(table: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Takes a section out of a table. Raises ConfigError for a value that has its name."""
    section = table.pop(name, None)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"{name}={section!r} must name a setting in its section, as {name}.KEY=VALUE")
    return section


def _when(key: str, run: Run) -> str:
    if key == "reward_rate":
        return "for credit from now on"
    if key == "join_authority" or key.startswith("terms."):
        return "now"
    return "from the next round on" if run.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS) else "now"


def _limits_of(run: Run) -> Limits:
    """Those that will hold: a change that waits for the next round is not undone by another one."""
    return run.next_limits or run.limits


def _terms_of(run: Run) -> Terms:
    """The present terms, for the weights that the run has now: not for the model that it began with."""
    return replace(run.terms, model_root=run.checkpoint_root)


def _differing(before: dict[str, Any], after: dict[str, Any], head: str = "") -> dict[str, Any]:
    return {f"{head}{key}": [before[key], value] for key, value in after.items() if before[key] != value}


def _named(key: Pubkey | None) -> str:
    return _ANYONE if key is None else str(key)
