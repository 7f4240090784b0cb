"""DisTrO: data-parallel training by updates of a few bits per thousand parameters, with identical replicas.

`optimizer.layout` and `optimizer.codec` need numpy alone: a process that only validates other members' updates imports
them without torch. The names below are therefore resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizer.codec import Update, decode, encode
    from optimizer.distro import DisTrO
    from optimizer.errors import MalformedUpdate
    from optimizer.layout import Layout

__all__ = ["DisTrO", "Layout", "MalformedUpdate", "Update", "decode", "encode"]

_HOMES = {
    "DisTrO": "optimizer.distro",
    "Layout": "optimizer.layout",
    "MalformedUpdate": "optimizer.errors",
    "Update": "optimizer.codec",
    "decode": "optimizer.codec",
    "encode": "optimizer.codec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optimizer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
