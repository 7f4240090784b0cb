"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from psyche_node.planning.plan import Plan

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


def lines(plan: Plan) -> Iterator[str]:
    """The plan, a line at a time."""
    work = plan.work
    yield f"{plan.model}: {plan.parameters:,} parameters, on {plan.gpus} x {plan.gpu}"
    yield (
        f"  FSDP over {work.data_parallel}, tensor parallel over {work.tensor_parallel}; {work.micro_batch} x "
        f"{work.sequence:,} tokens at a time, {work.micro_batches} times; activation checkpointing "
        f"{'on' if work.checkpointing else 'off'}"
    )
    yield "memory of a GPU at the peak of a step, GiB"
    for name, part in plan.memory.parts().items():
        if part:
            yield f"  {_PARTS[name]:48} {part / 2**30:8.1f}"
    yield f"  {'all':48} {plan.memory.total / 2**30:8.1f} of {plan.usable / 2**30:.1f}"
    if plan.fits:
        yield "  it fits"
        yield from _round(plan)
    else:
        yield from _advice(plan)
    for note in plan.notes:
        yield f"note: {note}"


def _advice(plan: Plan) -> Iterator[str]:
    """What to change; a round's time and the run's cost would be those of a run that cannot be."""
    yield "  it does not fit. What helps, one on top of the other:" if plan.tries else "  it does not fit"
    for step in plan.tries:
        size = f"{step.total / 2**30:8.1f}{'  fits' if step.fits else ''}" if step.total else ""
        yield f"    {step.change:46} {size}"
    if not any(step.fits or not step.total for step in plan.tries):
        yield "    and more GPUs, or such with more memory: the rest is not enough"


def _round(plan: Plan) -> Iterator[str]:
    sent = plan.exchange
    yield "round"
    yield f"  {'update':32} {sent.update_bytes:,} bytes"
    yield f"  {'received, and sent, by a member':32} {sent.received / 1e9:.2f} GB in {sent.seconds:.1f} s"
    yield f"  {'training':32} {plan.compute_seconds:.1f} s at {plan.member_tokens_per_second:,.0f} tokens/s a member"
    yield f"  {'whole round':32} {plan.round_seconds:.1f} s, {plan.tokens_per_second:,.0f} tokens/s of all members"
    yield f"  {'whole run':32} {plan.run_days:.1f} days"
    fees = plan.fees
    yield "chain, all members together"
    yield f"  {'a round':32} {fees.transactions_per_round} transactions, {fees.per_round / _SOL:.6f} SOL"
    yield f"  {'an epoch':32} {fees.per_epoch / _SOL:.6f} SOL"
    yield f"  {'the run':32} {fees.whole_run / _SOL:.4f} SOL; the owner's deposit {fees.deposit / _SOL:.2f} SOL"
