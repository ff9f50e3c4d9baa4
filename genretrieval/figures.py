"""Measured figures: a dotted name, a value, a unit, a spread; printed and written alike by every verb.

Names are stable: documentation, CI and dashboards read them.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from genretrieval.errors import InvalidInputError

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_MEASURING_PACKAGES = (
    "genretrieval",
    "numpy",
    "torch",
    "transformers",
    "onnxruntime",
    "faiss-cpu",
    "faiss-gpu",
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement.

    Attributes:
        value: the number itself.
        unit: what it counts, e.g. "share", "ms", "requests/s"; never empty.
        spread: low and high end of the interval that the measurement names, None for a single reading.
    """

    value: float
    unit: str
    spread: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """``{"value": ..., "unit": ...}``, with ``"spread": [low, high]`` where there is one."""
        spread = {} if self.spread is None else {"spread": list(self.spread)}
        return {"value": self.value, "unit": self.unit, **spread}


def lines(figures: Mapping[str, Figure]) -> list[str]:
    """One line a figure, ``dotted.name: value unit``, in the given order, six significant digits.

    Raises:
        InvalidInputError: if a name is not dotted lower case.
    """
    _check_names(figures)
    return [f"{name}: {figure.value:.6g} {figure.unit}" for name, figure in figures.items()]


def print_lines(figures: Mapping[str, Figure], write: Callable[[str], object] = print) -> None:
    """Hand each of `lines` to `write`."""
    for line in lines(figures):
        write(line)


def document(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """What `write_json` writes: every figure under its name, beside "machine" and "versions".

    Raises:
        InvalidInputError: if a name is not dotted lower case; a dot keeps names apart from the other keys.
    """
    _check_names(figures)
    by_name = {name: figure.as_json() for name, figure in figures.items()}
    return {**by_name, "machine": machine(), "versions": versions()}


def check_writable(path: Path) -> None:
    """Refuse a path that `write_json` could not write to, before figures are measured; folders are made.

    Raises:
        InvalidInputError: the path is a folder, or none can be made or written to there.
    """
    if path.is_dir():
        raise InvalidInputError(f"{path} is a folder; give the name of a file for the figures")
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink(missing_ok=True)  # by another process of torchrun
    except OSError as error:
        raise InvalidInputError(f"no figures can be written to {path}: {error}; give another path") from error


def write_json(path: Path, figures: Mapping[str, Figure]) -> None:
    """Write `document` to `path`, complete or not at all; folders are made.

    Raises:
        InvalidInputError: if a name is not dotted lower case, or a value is not finite.
    """
    write_json_document(path, document(figures))


def write_json_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON to a neighbour of `path`, then rename it, so that no reader sees half a file.

    Raises:
        InvalidInputError: if a number is not finite: JSON has no word for it.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InvalidInputError(f"{path} was not written: a figure is infinite or not a number ({error})") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def machine() -> dict[str, Any]:
    """CPU model, the cores this process may use, and the platform."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "platform": platform.platform()}


def versions() -> dict[str, str]:
    """Python, and those of the packages that decide a figure which are installed here."""
    found = {"python": platform.python_version()}
    for package in _MEASURING_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    """The name that Linux gives; elsewhere what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if named:
            return named.group(1).strip()
    return platform.processor() or platform.machine()


def _check_names(figures: Mapping[str, Figure]) -> None:
    """Names are read by machines: refuse one that would be hard to match."""
    for name in figures:
        if not _NAME.fullmatch(name):
            raise InvalidInputError(f"figure name {name!r} is not dotted lower case such as 'quality.recall10'")
