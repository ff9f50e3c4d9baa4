from __future__ import annotations

import inspect

import pytest

from genretrieval import errors
from genretrieval.errors import GenRetrievalError

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GenRetrievalError)]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_the_drawing_names_every_kind_with_its_codes(kind: type[GenRetrievalError]) -> None:
    assert errors.__doc__ is not None
    line = next(line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in f"{line} ")
    if "HTTP" in line:
        assert f"HTTP {kind.http_status}" in line
        assert f"exit {kind.exit_code}" in line
        assert kind.grpc_code in line
    else:
        parent = kind.__mro__[1]
        assert issubclass(parent, GenRetrievalError)
        assert (kind.exit_code, kind.http_status, kind.grpc_code) == (
            parent.exit_code,
            parent.http_status,
            parent.grpc_code,
        )


def test_reason_is_the_name_of_the_kind() -> None:
    assert errors.InvalidInputError("x").reason == "INVALID_INPUT"
    assert errors.BundleIncompleteError("x").reason == "BUNDLE_INCOMPLETE"
    assert errors.DataError("x").reason == "DATA"


def test_kinds_are_what_python_expects() -> None:
    assert issubclass(errors.DataError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)


def test_grpc_codes_exist() -> None:
    grpc = pytest.importorskip("grpc")
    assert all(hasattr(grpc.StatusCode, kind.grpc_code) for kind in TREE)
