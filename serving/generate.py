"""Write what is generated and committed: the code beside the .proto files, and docs/openapi*.json.

Run from anywhere: ``python serving/generate.py``. Needs grpcio-tools (dependency group ``dev``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpc_tools import protoc

from genretrieval.errors import GenRetrievalError
from genretrieval_serving import rest
from genretrieval_serving.admin import api

SERVING = Path(__file__).resolve().parent
# Relative to the import root: generated code says `from genretrieval_serving._proto...`.
PROTO = "genretrieval_serving/_proto/genretrieval/v1/retrieval.proto"
FORMAT = "genretrieval_serving/_proto/genretrieval/onnx_weights.proto"
DOCS = SERVING.parent / "docs"


def generate_grpc(output: Path) -> None:
    """Generate messages, stubs and type stubs under `output`, which stands for ``serving/``."""
    for source, kinds in ((PROTO, ("python", "pyi", "grpc_python")), (FORMAT, ("python", "pyi"))):
        outputs = [f"--{kind}_out={output}" for kind in kinds]
        if protoc.main(["protoc", f"-I{SERVING}", *outputs, str(SERVING / source)]):
            raise GenRetrievalError(f"protoc could not compile {source}; it printed why")


def generate_openapi(folder: Path) -> None:
    """Write the OpenAPI descriptions of both REST interfaces to `folder`."""
    for name, document in {"openapi.json": rest.openapi(), "openapi-admin.json": api.openapi()}.items():
        (folder / name).write_text(_json(document), "utf-8")


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    generate_grpc(SERVING)
    generate_openapi(DOCS)
