"""Whether a round's training and its updates are done within the times that the run gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, inf

from optimizer.layout import Layout
from psyche_node.planning.asked import Asked
from psyche_node.planning.exchange import Exchange, exchange, rate_for
from psyche_node.planning.shape import ModelShape

_MEGABIT = 1e6 / 8


def exchange_of(asked: Asked) -> Exchange:
    """The exchange of a round's updates over a member's line."""
    return exchange(asked.update_bytes, asked.members, asked.link.up_rate, asked.link.down_rate, asked.link.rtt)


def seconds_for_updates(asked: Asked, compute: float) -> float:
    """How long a round's updates may take. A witness attests to what it has after half of round_witness_time; with
    overlap, that begins after the training of the next round."""
    if not asked.witness_slots:
        return inf
    return (compute if asked.overlap else 0.0) + asked.witness_slots * asked.slot_seconds / 2


def warnings(shape: ModelShape, asked: Asked, compute: float) -> Iterator[str]:
    """What is too slow for the run's times: seconds needed, seconds there are, and what to change. ``compute``: seconds
    of a round's training."""
    limit = asked.train_slots * asked.slot_seconds
    if limit and compute > limit:
        yield (
            f"a round's training takes {compute:.1f} s, and the run ends it after {limit:.1f} s: more or faster GPUs, "
            f"or for the run's owner a smaller batch, or max_round_train_time = {ceil(compute / asked.slot_seconds)}"
        )
    needed, given = exchange_of(asked).seconds, seconds_for_updates(asked, compute)
    if needed > given:
        training = f"the next round's training, {compute:.1f} s, and " if asked.overlap else ""
        slots = ceil(2 * (needed - (compute if asked.overlap else 0.0)) / asked.slot_seconds)
        helps = [*_faster(asked, given), *_smaller(shape, asked, given), f"round_witness_time = {slots} (the owner's)"]
        yield (
            f"a round's updates take {needed:.1f} s on this line, and there are {given:.1f} s ({training}half of "
            f"round_witness_time): those that come later do not count. What helps: {', or '.join(helps)}"
        )


def _faster(asked: Asked, given: float) -> Iterator[str]:
    """A line that is fast enough, in both directions."""
    rate = rate_for(asked.update_bytes, asked.members, asked.link.rtt, given)
    if rate is not None:
        whole = ceil(rate / _MEGABIT)
        wide = whole * _MEGABIT
        link = replace(asked.link, up_rate=wide, down_rate=wide)
        if exchange_of(replace(asked, link=link)).seconds <= given:
            yield f"a line of {whole}mbit both ways (--link {whole}mbit/{asked.link.rtt * 1000:g}ms)"


def _smaller(shape: ModelShape, asked: Asked, given: float) -> Iterator[str]:
    """The most components per block whose updates are fast enough."""
    most, least = asked.topk, 0
    while most - least > 1:
        topk = (most + least) // 2
        size = Layout.build(shape.tensors, topk).update_bytes
        if exchange_of(replace(asked, update_bytes=size)).seconds <= given:
            least = topk
        else:
            most = topk
    if least:
        yield f"--topk {least} (the owner's)"
