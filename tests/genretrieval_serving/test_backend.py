"""The ONNX Runtime backend, and the CPUs it may use."""

from __future__ import annotations

import os

import numpy as np
import onnx.parser
import pytest

from genretrieval.errors import BundleError, InvalidInputError
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval_serving.backend import OnnxBackend, usable_cpus


@pytest.fixture
def cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_usable_cpus_are_the_quotas_whole_ones(tmp_path, cpus, files, expected) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == expected


def test_the_graph_runs_with_one_thread_and_answers_by_hand(bundle) -> None:
    backend = OnnxBackend(bundle.path / "retriever.onnx", threads=1)
    options = backend.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    # The graph orders leaves by their number; a history of item 9 (codes 2, 1, 0) takes 0.03 from each score.
    request = RetrieveRequest(top_k=3, history=[{"item_id": "item-9"}])
    (response,) = Retriever(bundle, backend).retrieve([request])
    assert [item.item_id for item in response.items] == ["item-1", "item-0", "item-6"]
    scores = [item.score for item in response.items]
    np.testing.assert_allclose(scores, [-0.03, -0.03, -1.03], rtol=1e-6)


def test_what_is_no_retrieval_graph_is_refused(tmp_path) -> None:
    path = tmp_path / "retriever.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime"):
        OnnxBackend(path, threads=1)
    other = '<ir_version: 9, opset_import: ["" : 18]> other (float[1] x) => (float[1] leaves) {leaves = Neg(x)}'
    onnx.save(onnx.parser.parse_model(other), path)
    with pytest.raises(BundleError, match="lacks the outputs level_scores, scores"):
        OnnxBackend(path, threads=1)


def test_a_device_that_is_not_there_is_refused(bundle, monkeypatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InvalidInputError, match="serve-gpu"):
        OnnxBackend(bundle.path / "retriever.onnx", device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_device_that_does_not_start_is_refused(bundle, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.backend.ort.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(InvalidInputError, match="cannot start CUDAExecutionProvider"):
        OnnxBackend(bundle.path / "retriever.onnx", device="cuda")
