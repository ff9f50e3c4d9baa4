"""Proof that the extra `serve` alone serves a bundle: run by the interpreter of an environment that has nothing else.

usage: serve_only.py BUNDLE
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import genretrieval
from genretrieval.bundle import load_bundle
from genretrieval.request import HistoryEvent, RetrieveRequest
from genretrieval_serving.client import Client
from genretrieval_serving.live_server import running_server

TRAINING_PACKAGES = ("torch", "transformers", "faiss", "scipy", "onnx", "onnxscript")


def main(folder: Path) -> str:
    """Check the environment, serve, retrieve by both transports; returns one line of result."""
    installed = [package for package in TRAINING_PACKAGES if find_spec(package)]
    if installed:
        sys.exit(f"{', '.join(installed)} came with the extra `serve`; something it needs now depends on training")
    if Path(genretrieval.__file__).is_relative_to(Path(__file__).resolve().parent.parent / "genretrieval"):
        sys.exit("the checkout was imported, not the installed wheel")
    bundle = load_bundle(folder)
    items = bundle.catalogue()["item_id"].head(3).to_list()
    request = RetrieveRequest(
        query="shoe" if bundle.manifest.reads_queries else None,
        history=[HistoryEvent(item_id=item) for item in items],
        top_k=5,
    )
    with running_server(folder, [str(Path(sys.executable).parent / "genretrieval")]) as server:
        answers = {}
        for address in (server.http, server.grpc):
            with Client(address) as client:
                answers[address] = [item.item_id for item in client.retrieve(request).items]
    by_http, by_grpc = answers.values()
    if len(by_http) != request.top_k or by_http != by_grpc:
        sys.exit(f"REST answered {by_http}, gRPC answered {by_grpc}; expected {request.top_k} items, the same ones")
    return f"serve-only: {len(by_http)} items by REST and gRPC, without {', '.join(TRAINING_PACKAGES)}"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
