"""Runs a bundle's graph with ONNX Runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)

from genretrieval.bundle import GRAPH, Bundle, Manifest
from genretrieval.errors import BundleError, InvalidInputError
from genretrieval.retrieval import Leaves
from genretrieval_serving import tracing
from genretrieval_serving._proto.genretrieval.onnx_weights_pb2 import Model, Tensor

OUTPUTS = [name for name in Leaves._fields if name not in Leaves._field_defaults]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Types of weights that a CPU has no arithmetic for.
NOT_ON_CPU = {Tensor.FLOAT16: "float16", Tensor.BFLOAT16: "bfloat16"}
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
            BundleError: the graph cannot be loaded, is no retrieval graph, or has weights that a CPU cannot use.
            InvalidInputError: ``cuda`` was asked for and is not there.
        """
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise InvalidInputError(
                f"this onnxruntime has no {provider}; install the extra `serve-gpu` in place of `serve`, or use the CPU"
            )
        if device == "cpu":
            _refuse_half_precision(path)
        self.path = path
        try:
            self.session = ort.InferenceSession(str(path), _options(threads), providers=[provider])
        except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented, RuntimeException) as error:
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
        # A CPU reads arrays where they lie.
        self._sent = None if device == "cpu" else SentInputs(self.session, self.outputs, device)

    @classmethod
    def of(cls, bundle: Bundle, threads: int | None = None, device: Device = "cpu") -> OnnxBackend:
        """Load a bundle's graph and see that it is the one of its manifest.

        Raises:
            BundleError: the bundle needs a newer onnxruntime, or its graph is another than the manifest says; and as
                the constructor.
            InvalidInputError: as the constructor.
        """
        needed = bundle.manifest.minimum_onnxruntime
        if _release(needed) > _release(ort.__version__):
            raise BundleError(
                f"{bundle.path} needs onnxruntime {needed} or newer and this is {ort.__version__}; upgrade it on the "
                "server before the bundle"
            )
        if device != "cpu" and bundle.manifest.precision == "int8":
            raise BundleError(
                f"{bundle.path} is in int8, which is for CPUs: on {device} it would be slower than in fp32. Serve the "
                f"bundle that it was made from, {bundle.manifest.parent_uuid}"
            )
        backend = cls(bundle.path / GRAPH, threads, device)
        backend._check(bundle.manifest)
        return backend

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        """Run one batch."""
        with tracing.inside("inference"):
            leaves, *scores = self.session.run(self.outputs, inputs) if self._sent is None else self._sent.run(inputs)
        return Leaves(leaves, *(np.asarray(part, np.float32) for part in scores))

    def _check(self, manifest: Manifest) -> None:
        """Compare what the graph takes and gives with the manifest.

        Raises:
            BundleError: they differ.
        """
        takes, said = {node.name for node in self.session.get_inputs()}, set(manifest.graph_inputs)
        if takes != said:
            raise BundleError(
                f"{self.path} and the manifest differ in the graph's inputs: {', '.join(sorted(takes ^ said))}. It is "
                "the graph of another bundle; copy the folder again or export anew"
            )
        (levels,) = (node.shape[-1] for node in self.session.get_outputs() if node.name == "level_scores")
        if levels != len(manifest.codebook_sizes):
            raise BundleError(
                f"{self.path} writes IDs of {levels} codes and the manifest has {len(manifest.codebook_sizes)} "
                "codebooks. It is the graph of another bundle; copy the folder again or export anew"
            )


class SentInputs:
    """Runs a graph on a device that has memory of its own; what it was given before is not sent there again.

    The catalogue index and the mask rows are a thousand times a request. They are known again because they are the very
    arrays of an earlier run: whoever writes into an array hands it on as a new view (see `genretrieval.masks`).
    """

    def __init__(self, session: ort.InferenceSession, outputs: Sequence[str], device: str) -> None:
        """Keep nothing yet; `device` is onnxruntime's name of where inputs go."""
        self._session = session
        self._outputs = outputs
        self._device = device
        # The array is kept with what was sent, so that no other one can take its identity.
        self.there: dict[str, tuple[NDArray[Any], ort.OrtValue]] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one batch; outputs come back as arrays."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._value(name, array))
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        found: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return found

    def _value(self, name: str, array: NDArray[Any]) -> ort.OrtValue:
        """The input on the device."""
        known = self.there.get(name)
        if known is None or known[0] is not array:
            known = array, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
            self.there[name] = known
        return known[1]


def _options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Idle threads that spin would take the CPU from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Masked softmax weights end as denormals, which slow some CPUs threefold: docs/decisions/0002-decoding.md.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _refuse_half_precision(path: Path) -> None:
    """Before onnxruntime reads it, which for float16 is slow at best and may end the process.

    Raises:
        BundleError: the graph has weights of 16 bits.
    """
    try:
        weights = Model.FromString(path.read_bytes()).graph.initializer
    except DecodeError as error:
        raise BundleError(f"{path} is no ONNX file ({error}); export the bundle again") from error
    if half := sorted({NOT_ON_CPU[weight.data_type] for weight in weights if weight.data_type in NOT_ON_CPU}):
        raise BundleError(
            f"{path} has weights in {' and '.join(half)}, for which CPUs have no arithmetic: onnxruntime refuses the "
            "graph, is half as fast, or crashes. Serve it with --device cuda, or export it in fp32 or int8"
        )


def _release(version: str) -> tuple[int, ...]:
    """What of a version decides which is newer: ``1.23`` is (1, 23)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
