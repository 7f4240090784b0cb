"""The gRPC server: one guard in front of every method of the service."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]

from psyche_node.network.certificates import Leaf, null_ca_pem
from psyche_node.network.guard import MAX_STREAMS, Guard
from psyche_node.network.nat.dialback import MAX_DIALS
from psyche_node.network.push import MAX_PUSHES
from psyche_node.network.service import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, NodeService
from psyche_node.network.statements import join_address

# One thread per open call: streams, and short calls next to them.
_WORKERS = MAX_STREAMS + MAX_PUSHES + MAX_DIALS + 12


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections may cost, whoever they are of.

    gRPC's own limits are a handshake of two minutes, any number of connections and of calls in each, and connections
    that are kept for ever.
    """

    connections: int = 512
    handshake_seconds: float = 10.0
    """For TLS, and once more for HTTP/2's first words."""
    idle_seconds: float = 120.0
    calls_per_connection: int = 16
    header_bytes: int = 8192

    def options(self) -> list[tuple[str, int]]:
        """Return them as gRPC's server options."""
        return [
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.server_handshake_timeout_ms", round(self.handshake_seconds * 1000)),
            ("grpc.http2.settings_timeout", round(self.handshake_seconds * 1000)),
            ("grpc.max_connection_idle_ms", round(self.idle_seconds * 1000)),
            ("grpc.max_concurrent_streams", self.calls_per_connection),
            ("grpc.max_metadata_size", self.header_bytes),
            ("grpc.absolute_max_metadata_size", self.header_bytes),
            # A peer that has gone away without a word is noticed; one that pings all the time is closed.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 3),
        ]


DEFAULT_LIMITS = Limits()


class ServerUnavailable(Exception):
    """The server cannot listen; the message says where and what to do."""


class Server:
    """The gRPC server. ``leaf`` is asked at every handshake, so a renewed certificate needs no restart."""

    def __init__(
        self,
        host: str,
        port: int,
        leaf: Callable[[], Leaf],
        guard: Guard,
        service: NodeService,
        limits: Limits = DEFAULT_LIMITS,
        more: Sequence[Any] = (),
        unix_path: str | None = None,
    ) -> None:
        """``more``: gRPC handlers of further methods. At ``unix_path`` the server listens, too, with the same TLS."""
        self._leaf = leaf
        self._server = grpc.server(
            ThreadPoolExecutor(_WORKERS, thread_name_prefix="grpc"),
            interceptors=[guard],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                *limits.options(),
            ],
            maximum_concurrent_rpcs=4 * _WORKERS,
        )
        self._server.add_generic_rpc_handlers((service.handlers(), *more))
        address = join_address(host, port)
        try:
            self.port = int(self._server.add_secure_port(address, self._credentials()))
            if unix_path is not None:
                self._server.add_secure_port(f"unix:{unix_path}", self._credentials())
                os.chmod(unix_path, 0o600)
        except RuntimeError as error:
            raise ServerUnavailable(f"grpc_port: {address} cannot be listened on: {error}. Is it taken?") from error
        if not self.port:
            raise ServerUnavailable(f"grpc_port: {address} cannot be listened on. Is it taken?")
        self._server.start()

    def stop(self) -> None:
        """End open calls at once and wait for their threads, a second at most."""
        self._server.stop(grace=None).wait(1.0)

    def _credentials(self) -> Any:
        shown = self._leaf()

        def configuration(leaf: Leaf) -> Any:
            return grpc.ssl_server_certificate_configuration([(leaf.key, leaf.certificate)], null_ca_pem())

        def renewed() -> Any:
            nonlocal shown
            leaf = self._leaf()
            if leaf is shown:
                return None
            shown = leaf
            return configuration(leaf)

        return grpc.dynamic_ssl_server_credentials(configuration(shown), renewed, require_client_authentication=True)
