"""Files of fitted tokenizers: one safetensors file, the settings in its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genretrieval.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Tensors = dict[str, NDArray[Any]]

_HEADER = "genretrieval"


def write_tokenizer(path: Path, format_: str, config: DataclassInstance, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a fitted tokenizer; the file is whole or absent. Equal tensors and settings give equal bytes."""
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # One entry, because safetensors writes several in random order, and equal tokenizers are to have equal bytes.
    header = json.dumps({"format": format_, "config": asdict(config)}, sort_keys=True)
    partial.write_bytes(save(contiguous, {_HEADER: header}))
    os.replace(partial, path)


def read_tokenizer(path: Path, format_: str) -> tuple[dict[str, Any], Tensors]:
    """Settings and tensors of a file that `write_tokenizer` wrote.

    Raises:
        DataError: the file is missing, damaged, or of another method.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            if header.get("format") != format_:
                raise DataError(f"{path} is {header.get('format', 'no tokenizer')!r}, not {format_!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return header["config"], tensors


def read_format(path: Path) -> str:
    """Which method wrote `path`, e.g. ``genretrieval.rq_kmeans.2``.

    Raises:
        DataError: the file is missing, damaged, or no tokenizer.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if "format" not in header:
        raise DataError(f"{path} is no tokenizer; give the file `genretrieval tokenize fit` wrote")
    return str(header["format"])


def fingerprint(path: Path) -> str:
    """sha256 of a tokenizer's file: what published IDs were made with, and what alone may append to them."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"tokenizer {path} cannot be read ({error}); give the file `genretrieval tokenize fit` wrote")
