"""The ONNX Runtime backend, and the CPUs it may use."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray

from genretrieval.errors import BundleError, InvalidInputError
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval_serving.backend import OnnxBackend, SentInputs, usable_cpus


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


def graph(path: Path, body: str, version: int = 18) -> Path:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {version}]> made {body}'), path)
    return path


def test_what_is_no_retrieval_graph_is_refused(tmp_path) -> None:
    path = tmp_path / "retriever.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="is no ONNX file"):
        OnnxBackend(path, threads=1)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime"):
        OnnxBackend(path, threads=1)
    graph(path, "(float[1] x) => (float[1] leaves) {leaves = Neg(x)}")
    with pytest.raises(BundleError, match="lacks the outputs level_scores, scores"):
        OnnxBackend(path, threads=1)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_weights_that_a_cpu_cannot_use_are_refused_before_onnxruntime_reads_them(tmp_path, kind, monkeypatch) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("was read"))
    path = graph(tmp_path / "half.onnx", f"(float[1] x) => (float[1] y) <{kind}[2] w = {{1, 2}}> {{y = Neg(x)}}")
    with pytest.raises(BundleError, match=f"(?s)weights in {kind}, .* --device cuda"):
        OnnxBackend(path)


def test_a_bundle_for_a_newer_onnxruntime_is_refused(bundle, tmp_path) -> None:
    newer = replace(bundle, manifest=bundle.manifest.model_copy(update={"minimum_onnxruntime": "99.1"}))
    with pytest.raises(BundleError, match=r"needs onnxruntime 99\.1 or newer"):
        OnnxBackend.of(newer)
    path = graph(tmp_path / "retriever.onnx", "(float[1] x) => (float[1] leaves) {leaves = Neg(x)}", version=99)
    with pytest.raises(BundleError, match=r"(?s)Opset 99.*minimum_onnxruntime"):
        OnnxBackend(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"graph_inputs": ("history_codes", "history_mask", "beams", "mask_row", "past_codes")},
            "allowed_2, past_codes",
        ),
        ({"codebook_sizes": (8, 8)}, "IDs of 3 codes and the manifest has 2"),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_refused(bundle, changes, message) -> None:
    other = replace(bundle, manifest=bundle.manifest.model_copy(update=changes))
    with pytest.raises(BundleError, match=message):
        OnnxBackend.of(other, threads=1)


def test_what_was_sent_to_a_device_is_not_sent_again_and_answers_alike(bundle) -> None:
    fed = OnnxBackend.of(bundle, threads=1)
    sent = SentInputs(fed.session, fed.outputs, "cpu")
    rng = np.random.default_rng(0)

    def inputs(allowed: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        return {
            "history_codes": rng.integers(0, 8, (2, 3, 3)),
            "history_mask": np.ones((2, 3), bool),
            "beams": np.arange(5),
            "mask_row": np.asarray([0, 1]),
            "allowed_2": allowed,
        }

    allowed = rng.random((2, 20)) < 0.5
    there = []
    for row in (allowed, allowed, allowed[:]):
        given = inputs(row)
        for expected, found in zip(fed.session.run(fed.outputs, given), sent.run(given), strict=True):
            np.testing.assert_array_equal(found, expected)
        there.append(sent.there["allowed_2"])
        allowed[0, 0] ^= True
    # The second time it was the very array; the third a view of it, which says that it was written into.
    assert there[0] is there[1]
    assert there[2] is not there[1]


def test_a_device_that_is_not_there_is_refused(bundle, monkeypatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InvalidInputError, match="serve-gpu"):
        OnnxBackend(bundle.path / "retriever.onnx", device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_device_that_does_not_start_is_refused(bundle, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.backend.ort.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(InvalidInputError, match="cannot start CUDAExecutionProvider"):
        OnnxBackend(bundle.path / "retriever.onnx", device="cuda")
