"""URLs of RPC endpoints: which are such, how they are shown, and where their WebSocket is."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from coordinator.jsonrpc import ChainError


class BadUrl(ChainError, ValueError):
    """A setting that is not the URL of an RPC endpoint."""


def shown_url(url: str) -> str:
    """A URL for logs and messages: providers put keys into paths and queries, so only scheme and host remain."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def check_url(url: str) -> str:
    """Raises BadUrl unless it is http(s)://host..."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise BadUrl(f"{url!r} is not the URL of an RPC endpoint; it must look like http://127.0.0.1:8899")
    return url


def websocket_url(url: str) -> str:
    """Where Solana's WebSocket is for an RPC URL: the next port, or the same address where no port is given."""
    parts = urlsplit(check_url(url))
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    if parts.username:
        host = parts.netloc.rpartition("@")[0] + "@" + host
    if parts.port is not None:
        host += f":{parts.port + 1}"
    scheme = "wss" if parts.scheme == "https" else "ws"
    return urlunsplit((scheme, host, parts.path, parts.query, ""))
