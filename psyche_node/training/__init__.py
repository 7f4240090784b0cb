"""Training: models, the loss, the session that turns positions into updates, the AdamW baseline.

The messages, terms and schedules need no torch: the supervisor process imports them. The other names are resolved on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from psyche_node.training.schedule import Schedule, lr_bits
from psyche_node.training.terms import TrainingTerms

if TYPE_CHECKING:
    from psyche_node.training.baseline import BaselineRun, run_adamw
    from psyche_node.training.errors import ModelError, SeparationError, TrainingError
    from psyche_node.training.hashing import model_root, weights_sha256
    from psyche_node.training.model import DEMO_MODEL, load_model, make_demo_model
    from psyche_node.training.session import Session, TrainResult

_HOMES = {
    "BaselineRun": "baseline",
    "DEMO_MODEL": "model",
    "ModelError": "errors",
    "SeparationError": "errors",
    "Session": "session",
    "TrainResult": "session",
    "TrainingError": "errors",
    "load_model": "model",
    "make_demo_model": "model",
    "model_root": "hashing",
    "run_adamw": "baseline",
    "weights_sha256": "hashing",
}

__all__ = [
    "DEMO_MODEL",
    "BaselineRun",
    "ModelError",
    "Schedule",
    "SeparationError",
    "Session",
    "TrainResult",
    "TrainingError",
    "TrainingTerms",
    "load_model",
    "lr_bits",
    "make_demo_model",
    "model_root",
    "run_adamw",
    "weights_sha256",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'psyche_node.training' has no attribute {name!r}")
    return getattr(import_module(f"psyche_node.training.{_HOMES[name]}"), name)
