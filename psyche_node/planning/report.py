"""A plan as people read it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from psyche_node.planning.advice import Try, Value
from psyche_node.planning.plan import Plan, Terms
from psyche_node.units import bytes_text, counted, memory_text, seconds_text

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "momentum": "momentum",
    "trend": "trend of the votes",
    "aside": "weights put aside for lookahead",
    "activations": "activations",
    "head": "loss: a chunk of logits, gradients of the head",
    "gathered": "weights gathered or cast for computing",
    "workspace": "CUDA, NCCL, scratch",
}
_SOL = 1_000_000_000


def lines(plan: Plan, given: Mapping[str, Value], recipe: str) -> Iterator[str]:
    """The plan, a line at a time. ``given``: flags of the command, without their dashes. ``recipe``: what says what
    they do not."""
    work = plan.work
    yield f"{plan.model}: {plan.parameters:,} parameters, on {plan.gpus} x {plan.gpu}"
    yield f"  run: {_terms(plan.terms)}"
    flags = [f"--{flag}" for flag in ("members", "rounds", "batch", "seq", "topk") if flag in given]
    yield f"  these are of the recipe {recipe}" + (f", but for {', '.join(flags)}" if flags else "")
    yield (
        f"  FSDP over {work.data_parallel}, tensor parallel over {work.tensor_parallel}; {work.micro_batch} x "
        f"{work.sequence:,} tokens at a time, {work.micro_batches} times; activation checkpointing "
        f"{'on' if work.checkpointing else 'off'}"
    )
    yield "memory of a GPU at the peak of a step"
    for name, part in plan.memory.parts().items():
        if part:
            yield f"  {_PARTS[name]:48} {_memory(part):>9}"
    yield f"  {'all':48} {_memory(plan.memory.total):>9} of {_memory(plan.usable)}"
    if plan.fits:
        yield "  it fits"
        yield from _round(plan)
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for note in plan.notes:
        yield f"note: {note}"
    if not plan.fits:
        yield from _advice(plan, given)


def _terms(terms: Terms) -> str:
    sizes = f"{terms.rounds:,} rounds of {terms.batch:,} x {terms.sequence:,} tokens, topk {terms.topk}"
    return f"{counted(terms.members, 'member')}, {sizes}, {'with' if terms.overlap else 'without'} overlap"


def _memory(count: int) -> str:
    """Whether it fits may depend on a tenth of a GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else memory_text(count)


def command(plan: Plan, given: Mapping[str, Value]) -> str | None:
    """The command with the changes that make it fit; None if it does, or nothing makes it."""
    if not plan.tries:
        return None
    flags = {**given, **{step.flag: step.value for step in plan.tries}}
    return " ".join(("psyche-node plan", *(_flag(name, value) for name, value in flags.items())))


def _flag(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def _advice(plan: Plan, given: Mapping[str, Value]) -> Iterator[str]:
    """What to change; a round's time and the run's cost would be those of a run that cannot be."""
    if not plan.tries:
        yield f"  it does not fit, and nothing makes it fit, not even 4,096 x {plan.gpu}: take GPUs with more memory"
        return
    yield "  it does not fit. What helps, one on top of the other:"
    for step in plan.tries:
        yield f"    {_tried(step):46} {_memory(step.total):>9}{'  fits' if step.fits else ''}"
    if any(step.owners for step in plan.tries):
        yield "    all members have it in common: the owner sets it before the run. A member plans with --joining"
    yield f"  this fits: {command(plan, given)}"


def _tried(step: Try) -> str:
    return _flag(step.flag, step.value) + ("  (the run's owner)" if step.owners else "")


def _round(plan: Plan) -> Iterator[str]:
    sent = plan.exchange
    yield "round"
    yield f"  {'update':32} {bytes_text(sent.update_bytes)} ({sent.update_bytes:,} bytes)"
    yield f"  {'received, and sent, by a member':32} {bytes_text(sent.received)} in {seconds_text(sent.seconds)}"
    speed = f"{plan.member_tokens_per_second:,.0f} tokens/s a member"
    yield f"  {'training':32} {seconds_text(plan.compute_seconds)} at {speed}"
    yield f"  {'chain':32} {seconds_text(plan.chain_seconds)} until commitments and attestations are final"
    speed = f"{plan.tokens_per_second:,.0f} tokens/s of all members"
    yield f"  {'whole round':32} {seconds_text(plan.round_seconds)}, {speed}"
    yield f"  {'whole run':32} {seconds_text(plan.run_days * 86_400)}"
    fees = plan.fees
    yield "chain, all members together"
    yield f"  {'a round':32} {fees.transactions_per_round} transactions, {fees.per_round / _SOL:.6f} SOL"
    yield f"  {'an epoch':32} {fees.per_epoch / _SOL:.6f} SOL"
    yield f"  {'the run':32} {fees.whole_run / _SOL:.4f} SOL; the owner's deposit {fees.deposit / _SOL:.2f} SOL"
