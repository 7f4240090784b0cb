"""What became of the samples that a simulation was given: how many were taken, how many dropped, and why."""

from __future__ import annotations

from psyche_node.sim.record import Count, Record


class SampleCounts(Record):
    """What became of every sample, as `psyche-node data prepare` counts them; the first five parts sum to samples."""

    samples: Count
    """Records of the data."""
    train: Count
    """Samples packed for training."""
    heldout: Count
    """Samples packed for evaluation, never trained on."""
    too_long: Count
    """Samples dropped because they have more tokens than `sequence_length`."""
    untrained: Count
    """Samples dropped because none of their tokens would be trained."""
    bad: Count
    """Records passed over because they are no samples, or none that the chat template takes (`--skip-bad`)."""
    cut: Count
    """Of the packed samples, those that lost their end to fit into one sequence (a prepared folder)."""
    closed: Count
    """Of the packed samples, those whose reasoning was ended at a budget (a prepared folder)."""
    sequence_length: Count
    """Tokens of a packed sequence."""
    skipped: tuple[str, ...] = ()
    """Of the bad records, by reason: how many, what is wrong, where. Empty where the data came prepared."""

    @property
    def dropped(self) -> int:
        return self.too_long + self.untrained + self.bad

    @property
    def alarming(self) -> bool:
        """Whether one in twenty was dropped, or any record was bad."""
        return bool(self.bad) or 20 * self.dropped >= max(self.samples, 1)

    def taken_text(self) -> str:
        """How many samples were taken, and for what."""
        taken = f"{self.train + self.heldout:,} of {self.samples:,} samples taken"
        changed = [f"{count:,} {word}" for count, word in ((self.cut, "cut to fit"), (self.closed, "ended")) if count]
        parts = [f"{self.train:,} for training", f"{self.heldout:,} held out"]
        return f"{taken}: {', '.join(parts)}{''.join(f'; {one}' for one in changed)}"

    def dropped_text(self) -> str:
        """How many samples were dropped, and why; empty if none was."""
        reasons = (
            (self.too_long, f"of more than {self.sequence_length:,} tokens (--sequence-length)"),
            (self.untrained, "without a token that is trained"),
            (self.bad, "bad"),
        )
        why = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
        return f"{self.dropped:,} dropped: {why}" if why else ""


def passes_text(passes: float | None) -> str:
    """How often a run goes over its data; empty if hardly more than once."""
    return f"{passes:,.0f} passes over the data" if passes is not None and passes >= 1.5 else ""
