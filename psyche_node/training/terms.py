"""The terms of training that every member must share, and how to read fp32 bit patterns."""

from __future__ import annotations

import struct

from pydantic import BaseModel, ConfigDict, Field

from psyche_node.training.schedule import Schedule

_BITS = Field(ge=0, lt=0x7F800000)
"""An fp32 bit pattern of a finite number that is not negative."""


def fp32(bits: int) -> float:
    """Return the number that an fp32 bit pattern means."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


class TrainingTerms(BaseModel):
    """How a run trains, as its account on chain says. Numbers that affect the weights are fp32 bit patterns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_round: int = Field(default=0, ge=0)
    """Round of the run with which the schedule begins."""
    total_rounds: int = Field(ge=1)
    """Rounds of the schedule; after the last one the learning rate stays where it is."""
    schedule: Schedule = Schedule.COSINE
    """How the learning rate changes after its warm-up."""
    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds in which the learning rate rises from 0 to its peak. Increase it if the loss jumps at the start."""
    decay_rounds: int = Field(default=0, ge=0)
    """Rounds of the decay at the end, of the warm-up-stable-decay schedule only."""
    peak_lr_bits: int = _BITS
    """Learning rate after the warm-up: the size of each weight's step, as an fp32 bit pattern."""
    final_lr_bits: int = _BITS
    """Learning rate of the last round, as an fp32 bit pattern."""
    weight_decay_bits: int = Field(default=0, ge=0, lt=0x7F800000)
    """Decoupled weight decay, as an fp32 bit pattern."""
    clip_norm_bits: int = Field(default=0, ge=0, lt=0x7F800000)
    """Norm to which a member's gradient is clipped, as an fp32 bit pattern. 0: it is not clipped."""
    z_loss_bits: int = Field(default=0, ge=0, lt=0x7F800000)
    """Coefficient of the z-loss, log(Z)^2 of each trained place's logits, as an fp32 bit pattern. 0: there is none."""
    decay_bits: int = Field(default=0x3F666666, ge=0, lt=0x3F800000)
    """Decay of the momentum per round, as an fp32 bit pattern. The default is 0.9."""
    topk: int = Field(default=512, ge=1)
    """Coefficients sent of each block of 4,096."""
    lookahead: bool = True
    """Whether gradients are taken at the weights that the trend of the votes predicts. Needed with overlap."""
    clip_votes: bool = True
    """Whether a coefficient moves one way, however many members voted for it."""
    window: int = Field(default=3, ge=0, le=8)
    """The trend of the votes forgets over 2^window rounds; 0: each round's votes alone decide its step."""
    data_seed: str = Field(default="", pattern=r"^([0-9a-f]{2})*$", max_length=128)
    """Key of the data's order, in hexadecimal. Empty: the digest of the data's manifest."""
