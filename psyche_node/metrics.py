"""What a node tells a Prometheus server about its network: `metrics = "127.0.0.1:9464"` serves it at /metrics.

The supervisor serves it, so that it answers while the network process is being restarted. Numbers that the network
process counts are asked of it at each scrape; what the node sees itself is counted here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, TimeoutError

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psyche_node.evaluation import Results
from psyche_node.ipc import IpcError, Message
from psyche_node.network.messages import Fetched, FetchFailed, NetworkRestarted, Stats

log = logging.getLogger(__name__)
ASK_SECONDS = 5.0


class MetricsUnavailable(Exception):
    """The metrics cannot be served there; the message says why and what to do."""


class NodeMetrics(Collector):
    """Counts of one node; a Prometheus collector. Any thread.

    ``ask`` returns the network process's statistics, or raises IpcError or TimeoutError.
    """

    def __init__(self, ask: Callable[[], Stats]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._fetched = self._failed = self._restarts = 0
        self._results: Results | None = None

    def on_event(self, message: Message) -> None:
        """Count an event of the network process, if it is one that is counted."""
        with self._lock:
            self._fetched += isinstance(message, Fetched)
            self._failed += isinstance(message, FetchFailed)
            self._restarts += isinstance(message, NetworkRestarted)

    def on_results(self, results: Results) -> None:
        """Show these figures of tasks from now on."""
        with self._lock:
            self._results = results

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._ask()
        except (IpcError, TimeoutError, CancelledError) as error:
            log.warning("metrics without those of the network process: %s", str(error) or type(error).__name__)
            stats = None
        with self._lock:
            fetched, failed, restarts, results = self._fetched, self._failed, self._restarts, self._results
        yield GaugeMetricFamily("psyche_network_up", "1 while the network process answers.", stats is not None)
        yield CounterMetricFamily("psyche_network_restarts", "Restarts of the network process.", restarts)
        blobs = CounterMetricFamily(
            "psyche_blobs", "Wanted blobs that arrived, and reasons why one did not at first.", labels=("result",)
        )
        blobs.add_metric(("fetched",), fetched)
        blobs.add_metric(("failed",), failed)
        yield blobs
        if stats is not None:
            yield from _network(stats)
        if results is not None:
            yield from _tasks(results)

    @contextlib.contextmanager
    def served(self, address: str) -> Iterator[int]:
        """Serve /metrics on ``address`` (IP:port); yields the port. Raises MetricsUnavailable."""
        host, port = split_address(address)
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise MetricsUnavailable(
                f"metrics cannot be served on {address}: {error.strerror}. Choose another address or port"
            ) from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _network(stats: Stats) -> Iterator[Metric]:
    traffic = CounterMetricFamily(
        "psyche_network_bytes", "Bytes of message bodies, without TLS and TCP.", labels=("direction", "kind")
    )
    bulk = CounterMetricFamily(
        "psyche_network_bulk_bytes", "Of the bytes of blobs, those over bulk connections.", labels=("direction",)
    )
    for direction, total, blob, over_bulk in (
        ("sent", stats.bytes_sent, stats.blob_bytes_sent, stats.bulk_bytes_sent),
        ("received", stats.bytes_received, stats.blob_bytes_received, stats.bulk_bytes_received),
    ):
        traffic.add_metric((direction, "blob"), blob)
        traffic.add_metric((direction, "other"), total - blob)
        bulk.add_metric((direction,), over_bulk)
    yield traffic
    yield bulk
    yield GaugeMetricFamily("psyche_network_peers", "Peers with a libp2p connection.", stats.peers)
    yield GaugeMetricFamily("psyche_network_members", "Members with a libp2p connection.", len(stats.connected))
    yield GaugeMetricFamily("psyche_network_private", "1 if nobody can open a connection here.", bool(stats.private))
    paths = sum(peer.punched for peer in stats.per_peer)
    yield GaugeMetricFamily("psyche_network_paths", "Private members with a path to them through both NATs.", paths)
    banned = sum(peer.banned for peer in stats.per_peer)
    yield GaugeMetricFamily("psyche_network_banned", "Peers banned as sources of blobs.", banned)
    refusals = CounterMetricFamily(
        "psyche_network_refusals", "What was refused, by what it was and why.", labels=("what", "why")
    )
    for refusal in stats.refusals:
        refusals.add_metric((refusal.what, refusal.why), refusal.count)
    yield refusals


def _tasks(results: Results) -> Iterator[Metric]:
    yield GaugeMetricFamily("psyche_task_round", "Rounds that the evaluated weights contain.", results.round or 0)
    labels = ("task", "thinking", "measure")
    figures = GaugeMetricFamily("psyche_task", "Figures of the newest evaluation of each task.", labels=labels)
    errors = GaugeMetricFamily("psyche_task_stderr", "Standard errors of these figures.", labels=labels)
    for task in results.tasks:
        switch = {True: "on", False: "off", None: ""}[task.thinking]
        for name, measure in task.measures.items():
            figures.add_metric((task.task, switch, name), measure.value)
            if measure.stderr is not None:
                errors.add_metric((task.task, switch, name), measure.stderr)
    yield figures
    yield errors


def split_address(address: str) -> tuple[str, int]:
    """Return (IP, port) of ``IP:port`` or ``[IPv6]:port``. Raises ValueError."""
    host, _, port = address.rpartition(":")
    try:
        ip = str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        ip = ""
    bracketed = host.startswith("[") and host.endswith("]")
    if not ip or (":" in ip) != bracketed or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not IP:port")
    return ip, int(port)
