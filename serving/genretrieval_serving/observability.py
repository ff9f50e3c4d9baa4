"""What an operator sees: Prometheus metrics, JSON logs, request ids."""

from __future__ import annotations

import logging
import re
import sys
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from genretrieval.request import RetrieveResponse

# Finer below 5 ms than the usual buckets: a small model answers in a few.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.request_duration = Histogram(
            "genretrieval_request_duration_seconds",
            "Time from a request's arrival to its answer.",
            ("transport", "method", "code"),
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_duration = Histogram(
            "genretrieval_queue_duration_seconds",
            "Time a request waited for its batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self.inference_duration = Histogram(
            "genretrieval_inference_duration_seconds",
            "Time the graph ran for the batch that a request was in.",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "genretrieval_batch_size", "Requests in a batch.", buckets=COUNTS, registry=registry
        )
        self.in_flight = Gauge(
            "genretrieval_in_flight_requests", "Requests accepted and not yet answered.", registry=registry
        )
        self.queue_depth = Gauge("genretrieval_queue_depth", "Requests waiting for a batch.", registry=registry)
        self.rejected = Counter(
            "genretrieval_rejected",
            "Requests given up without an answer from the model.",
            ("reason",),
            registry=registry,
        )
        self.results_returned = Histogram(
            "genretrieval_results_returned", "Items in a response.", buckets=COUNTS, registry=registry
        )
        self.empty_results = Counter("genretrieval_empty_results", "Responses without an item.", registry=registry)
        self.model_info = Gauge(
            "genretrieval_model_info",
            "1 for the bundle being served.",
            ("version", "uuid"),
            registry=registry,
        )

        self.admin_revision = Gauge(
            "genretrieval_admin_revision", "Revision of the admin state in force.", registry=registry
        )
        self.admin_revision_lag = Gauge(
            "genretrieval_admin_revision_lag_seconds", "Time since the admin state was last read.", registry=registry
        )
        self.admin_skipped = Gauge(
            "genretrieval_admin_skipped_resources",
            "Bindings, rules and synonyms that cannot be applied; the log names them.",
            registry=registry,
        )
        self.keyword_slots = Gauge(
            "genretrieval_keyword_slots", "Reserved slots: free, bound, quarantined.", ("state",), registry=registry
        )

    def answered(self, response: RetrieveResponse) -> None:
        """Count one response."""
        self.queue_duration.observe(response.timings.queue_ms / 1e3)
        self.inference_duration.observe(response.timings.inference_ms / 1e3)
        self.results_returned.observe(len(response.items))
        if not response.items:
            self.empty_results.inc()

    def watch_queue(self, depth: Callable[[], float]) -> None:
        """Read the queue's depth when metrics are scraped."""
        self.queue_depth.set_function(depth)

    def watch_admin_lag(self, lag: Callable[[], float]) -> None:
        """Read when the admin state was last read when metrics are scraped."""
        self.admin_revision_lag.set_function(lag)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def request_id(given: str | None) -> str:
    """The caller's request id where it is printable ASCII of at most 128 characters, else a new one."""
    return given if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send every log of the process to `stream`, by default standard output, one JSON object a line."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # What libraries say of every request or migration would bury ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
