"""What is generated and committed is what the generator writes today."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "run `python serving/generate.py` and commit what it writes"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "serving" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grpc_code_is_fresh(generate, tmp_path) -> None:
    generate.generate_grpc(tmp_path)
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path.name for path in written] == [
        "onnx_weights_pb2.py",
        "onnx_weights_pb2.pyi",
        "retrieval_pb2.py",
        "retrieval_pb2.pyi",
        "retrieval_pb2_grpc.py",
    ]
    for path in written:
        assert path.read_text() == (ROOT / "serving" / path.relative_to(tmp_path)).read_text(), AGAIN


@pytest.mark.parametrize("name", ["openapi.json", "openapi-admin.json"])
def test_openapi_is_fresh(generate, tmp_path, name) -> None:
    generate.generate_openapi(tmp_path)
    assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), AGAIN


def test_openapi_describes_the_operations_and_their_errors() -> None:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert set(document["paths"]) == {"/v1/retrieve", "/v1/retrieve:batch", "/v1/events", "/v1/info"}
    responses = document["paths"]["/v1/retrieve"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "409", "413", "429", "500", "503", "504"}
    assert list(responses["429"]["content"]) == ["application/problem+json"]


def test_every_operation_says_which_scope_it_needs_and_how_it_fails() -> None:
    document = json.loads((ROOT / "docs" / "openapi-admin.json").read_text())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            (needed,) = operation["security"]
            reads = method == "get" or path.endswith((":test", "snapshots", "retrieve"))
            assert needed == {"apiKey": ["admin.read" if reads else "admin.write"]}, path
            assert {"400", "401", "403", "500", "503"} <= set(operation["responses"]), path
