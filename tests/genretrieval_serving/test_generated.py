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
        "retrieval_pb2.py",
        "retrieval_pb2.pyi",
        "retrieval_pb2_grpc.py",
    ]
    for path in written:
        assert path.read_text() == (ROOT / "serving" / path.relative_to(tmp_path)).read_text(), AGAIN


def test_openapi_is_fresh(generate, tmp_path) -> None:
    generate.generate_openapi(tmp_path / "openapi.json")
    assert (tmp_path / "openapi.json").read_text() == (ROOT / "docs" / "openapi.json").read_text(), AGAIN


def test_openapi_describes_the_operations_and_their_errors() -> None:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert set(document["paths"]) == {"/v1/retrieve", "/v1/retrieve:batch", "/v1/info"}
    responses = document["paths"]["/v1/retrieve"]["post"]["responses"]
    assert set(responses) == {"200", "400", "429", "500", "503", "504"}
    assert list(responses["429"]["content"]) == ["application/problem+json"]
