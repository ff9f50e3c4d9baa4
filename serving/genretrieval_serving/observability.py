"""What an operator sees: Prometheus metrics, JSON logs, request ids."""

from __future__ import annotations

import logging
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TextIO

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from genretrieval.request import RetrieveResponse
    from genretrieval_serving.deployment import Arm

# Finer below 5 ms than the usual buckets: a small model answers in a few.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Metrics:
    """The metrics of one server, in a registry of its own, and what the process itself uses."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def histogram(name: str, help_: str, *labels: str, buckets: Sequence[float] = SECONDS) -> Histogram:
            return Histogram(f"genretrieval_{name}", help_, labels, buckets=buckets, registry=registry)

        def gauge(name: str, help_: str, *labels: str) -> Gauge:
            return Gauge(f"genretrieval_{name}", help_, labels, registry=registry)

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"genretrieval_{name}", help_, labels, registry=registry)

        self.request_duration = histogram(
            "request_duration_seconds", "Time from a request's arrival to its answer.", "transport", "method", "code"
        )
        self.queue_duration = histogram("queue_duration_seconds", "Time a request waited for its batch.")
        self.inference_duration = histogram(
            "inference_duration_seconds", "Time the graph ran for the batch that a request was in.", "arm"
        )
        self.batch_rows = histogram("batch_rows", "Rows in a batch; a request is one or several.", buckets=COUNTS)
        self.in_flight = gauge("in_flight_requests", "Requests accepted and not yet answered.")
        self.in_flight_rows = gauge("in_flight_rows", "Rows accepted and not yet answered.")
        self.queue_depth = gauge("queue_depth", "Requests waiting for a batch.")
        self.failed = counter("failed", "Requests that the bundle of an arm failed on.", "arm")
        self.rejected = counter("rejected", "Requests given up without an answer from the model.", "reason")
        self.results_returned = histogram("results_returned", "Items in a response.", "arm", buckets=COUNTS)
        self.empty_results = counter("empty_results", "Responses without an item.", "arm")

        self.bundle_load_failures = counter("bundle_load_failures", "Bundles that could not take over.")
        self.catalogue_changes_refused = counter(
            "catalogue_changes_refused", "Changes of the catalogue that could not be made; the log names them."
        )

        self.certificate_expiry = gauge(
            "tls_certificate_expiry_timestamp_seconds", "When the certificate that is served ends; 0 without TLS."
        )

        self.history_lookups = counter("history_lookups", "Histories asked of the provider.", "outcome")
        self.served_log_records = counter("served_log_records", "Answers for the served log.", "outcome")
        self.events = counter("events", "Events sent back by callers.", "outcome")

        self.admin_revision = gauge("admin_revision", "Revision of the admin state in force.")
        self.admin_revision_lag = gauge("admin_revision_lag_seconds", "Time since the admin state was last read.")
        self.admin_skipped = gauge(
            "admin_skipped_resources", "Bindings, rules and synonyms that cannot be applied; the log names them."
        )
        self.keyword_slots = gauge("keyword_slots", "Reserved slots: free, bound, quarantined.", "state")

    def answered(self, response: RetrieveResponse, arm: str) -> None:
        """Count one response."""
        self.queue_duration.observe(response.timings.queue_ms / 1e3)
        self.inference_duration.labels(arm).observe(response.timings.inference_ms / 1e3)
        self.results_returned.labels(arm).observe(len(response.items))
        if not response.items:
            self.empty_results.labels(arm).inc()

    def watch_queue(self, depth: Callable[[], float], rows: Callable[[], float]) -> None:
        """Read what waits, and the rows of that and of what runs, when metrics are scraped."""
        self.queue_depth.set_function(depth)
        self.in_flight_rows.set_function(rows)

    def watch_admin_lag(self, lag: Callable[[], float]) -> None:
        """Read when the admin state was last read when metrics are scraped."""
        self.admin_revision_lag.set_function(lag)

    def watch_arms(self, arms: Callable[[], Mapping[str, Arm]]) -> None:
        """Look what is served, by name, when metrics are scraped."""
        self.registry.register(_Arms(arms))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Arms(Collector):
    """Metrics of what is served; of a bundle that is served no more there are none."""

    def __init__(self, arms: Callable[[], Mapping[str, Arm]]) -> None:
        self._arms = arms

    def collect(self) -> Iterable[Metric]:
        labels = ("arm", "version", "uuid")
        info = GaugeMetricFamily("genretrieval_bundle_info", "1 for a bundle being served.", labels=labels)
        revision = GaugeMetricFamily(
            "genretrieval_catalogue_revision", "Revision of the catalogue being served.", labels=labels[:1]
        )
        items = GaugeMetricFamily("genretrieval_catalogue_items", "Items that can be retrieved.", labels=labels[:1])
        for name, arm in self._arms().items():
            catalogue = arm.retriever.catalogue
            info.add_metric((name, arm.manifest.version, arm.manifest.uuid), 1)
            revision.add_metric((name,), catalogue.revision)
            items.add_metric((name,), len(catalogue.item_ids) - len(catalogue.gone))
        return info, revision, items


def request_id(given: str | None) -> str:
    """The caller's request id where it is printable ASCII of at most 128 characters, else a new one."""
    return given if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class _Lines:
    """Writes lines to a stream, for a logger of some name."""

    def __init__(self, out: _Out, name: str = "") -> None:
        self._out, self.name = out, name

    def msg(self, line: str) -> None:
        self._out.write(line)

    debug = info = warning = error = critical = msg


class _Out:
    """A stream of lines. Where it is closed or full they are lost, and no request with them; that is said once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._lost = stream, threading.RLock(), False

    def write(self, line: str) -> None:
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError) as error:
                if not self._lost:
                    self._lost = True
                    with suppress(OSError, ValueError):
                        print(f"genretrieval: lines of the log are lost: {error}", file=sys.stderr)


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send every log of the process to `stream`, by default standard output, one JSON object a line."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    stream = stream or sys.stdout
    foreign = logging.StreamHandler(stream)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[foreign], level=level.upper(), force=True)
    # What libraries say of every request or migration would bury ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Ours go without the standard library, which takes longer over a line than all else that follows an answer.
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=partial(_Lines, _Out(stream)),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
