"""How much faster the graph of a model is in int8 on this machine, by the width of the model.

Weights are random: how many bytes a product reads does not depend on them. What int8 loses in recall is another
question, which `genretrieval export` asks of a trained bundle.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from genretrieval.export.quantise import quantise
from genretrieval.figures import Figure
from genretrieval.request import HistoryEvent, RetrieveRequest
from genretrieval.retrieval import Backend, Retriever
from genretrieval_pipelines.bench_decode import Contender, take_turns
from genretrieval_pipelines.int8 import BATCHES, Recording
from genretrieval_pipelines.random_bundle import random_bundle

BEAMS = 50
_ITEMS = 2_000
_HISTORY = 20


def bench_int8(
    widths: Sequence[int], rounds: int, open_backend: Callable[[Path], Backend], console: Console
) -> dict[str, Figure]:
    """Measure.

    Args:
        widths: ``d_model`` of each model; all else is as it is trained by default.
        rounds: of each graph, in turn with the others.
        open_backend: opens a graph on one thread.
        console: progress.

    Returns:
        CPU milliseconds of a run of both graphs, and their ratio, by width and batch.
    """
    figures: dict[str, Figure] = {}
    for width in widths:
        with console.status(f"width {width}"), tempfile.TemporaryDirectory() as folder:
            figures |= _of_width(width, rounds, open_backend, Path(folder))
    return figures


def _of_width(width: int, rounds: int, open_backend: Callable[[Path], Backend], folder: Path) -> dict[str, Figure]:
    bundle = random_bundle(_ITEMS, "4x256", d_model=width, beam_width=BEAMS)
    graphs = {name: folder / f"{name}.onnx" for name in ("fp32", "int8")}
    bundle.export(graphs["fp32"])
    quantise(graphs["fp32"], graphs["int8"])
    backends = {name: open_backend(graph) for name, graph in graphs.items()}
    recording = Recording(backends["fp32"])
    retriever, requests = Retriever(bundle, recording), _requests(max(BATCHES))
    contenders = []
    for batch in BATCHES:
        retriever.retrieve(requests[:batch])
        runs = {name: partial(backend.run, recording.inputs) for name, backend in backends.items()}
        contenders += [Contender(f"{name}.b{batch}", run) for name, run in runs.items()]
    times = take_turns(contenders, rounds, time.process_time)
    figures = {}
    for batch in BATCHES:
        fp32, int8 = times[f"fp32.b{batch}"], times[f"int8.b{batch}"]
        figures[f"int8.ms.fp32.d{width}.b{batch}"] = fp32
        figures[f"int8.ms.int8.d{width}.b{batch}"] = int8
        figures[f"int8.speedup.d{width}.b{batch}"] = Figure(fp32.value / int8.value, "ratio")
    return figures


def _requests(n: int) -> list[RetrieveRequest]:
    rows = np.random.default_rng(0).integers(0, _ITEMS, (n, _HISTORY))
    return [
        RetrieveRequest(history=[HistoryEvent(item_id=f"item-{row}", event="click") for row in of_user])
        for of_user in rows.tolist()
    ]
