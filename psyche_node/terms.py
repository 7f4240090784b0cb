"""From the run's terms on chain to what the training process is told."""

from __future__ import annotations

from coordinator.state import Run
from psyche_node.training.schedule import Schedule
from psyche_node.training.terms import TrainingTerms


def training_terms(run: Run) -> TrainingTerms:
    terms = run.terms
    return TrainingTerms(
        first_round=run.model_round,
        total_rounds=run.schedule_rounds,
        schedule=Schedule(terms.schedule),
        warmup_rounds=terms.warmup_rounds,
        decay_rounds=terms.decay_rounds,
        peak_lr_bits=terms.peak_lr_bits,
        final_lr_bits=terms.final_lr_bits,
        weight_decay_bits=terms.weight_decay_bits,
        clip_norm_bits=terms.clip_norm_bits,
        z_loss_bits=terms.z_loss_bits,
        decay_bits=terms.decay_bits,
        topk=terms.topk,
        lookahead=terms.lookahead,
        clip_votes=terms.clip_votes,
        window=terms.window,
    )
