"""Runs a bundle's graph with ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)

from genretrieval.errors import BundleError, InvalidInputError
from genretrieval.retrieval import Leaves

OUTPUTS = [name for name in Leaves._fields if name not in Leaves._field_defaults]
Device = Literal["cpu", "cuda"]


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs this process may use by its affinity and its container's quota.

    ONNX Runtime by itself knows nothing of the quota and would start a thread for every core of the machine.

    Args:
        cgroup: where control groups are mounted; version 2 and version 1 are read.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (limit := cgroup / "cpu.max").is_file():
        quota, period = limit.read_text("ascii").split()
    elif (limit := cgroup / "cpu" / "cpu.cfs_quota_us").is_file():
        quota, period = limit.read_text("ascii"), limit.with_name("cpu.cfs_period_us").read_text("ascii")
    else:
        return cpus
    # No quota is "max" in version 2 and -1 in version 1.
    if quota.strip() == "max" or int(quota) < 0:
        return cpus
    return max(1, min(cpus, int(quota) // int(period)))


class OnnxBackend:
    """The bundle's graph in one ONNX Runtime session; `run` may be called from several threads."""

    def __init__(self, path: Path, threads: int | None = None, device: Device = "cpu") -> None:
        """Load the graph.

        Args:
            path: ``retriever.onnx``.
            threads: threads of one run; by default the CPUs this process may use.
            device: ``cuda`` needs the extra ``serve-gpu``.

        Raises:
            BundleError: the graph cannot be loaded, or is no retrieval graph.
            InvalidInputError: ``cuda`` was asked for and is not there.
        """
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in ort.get_available_providers():
            raise InvalidInputError(
                f"this onnxruntime has no {provider}; install the extra `serve-gpu` in place of `serve`, or use the CPU"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cpus()
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # Idle threads that spin would take the CPU from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Masked softmax weights end as denormals, which slow some CPUs threefold: docs/decisions/0002-decoding.md.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=[provider])
        except (Fail, InvalidGraph, InvalidProtobuf, NotImplemented, RuntimeException) as error:
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}. "
                "If the manifest's `minimum_onnxruntime` is newer, upgrade; else export the bundle again"
            ) from error
        # Where CUDA does not start, onnxruntime would go on with the CPU and say so in a warning only.
        if self.session.get_providers()[0] != provider:
            raise InvalidInputError(f"onnxruntime cannot start {provider}; check the driver, or use the CPU")
        given = {output.name for output in self.session.get_outputs()}
        self.outputs = [name for name in Leaves._fields if name in given]
        if missing := set(OUTPUTS) - given:
            raise BundleError(f"{path} is no retrieval graph: it lacks the outputs {', '.join(sorted(missing))}")

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        """Run one batch."""
        leaves, *scores = self.session.run(self.outputs, inputs)
        return Leaves(leaves, *(np.asarray(part, np.float32) for part in scores))
