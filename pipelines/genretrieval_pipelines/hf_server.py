"""The peer of `bench serve`: a FastAPI app around Hugging Face constrained ``generate``, and the same T5 as our bundle.

The app is what a competent engineer writes in an afternoon: the model, a dict from prefix to allowed tokens, one
endpoint. Each request is one call of ``generate``; nothing is batched. Start it with
``python -m genretrieval_pipelines.hf_server FOLDER --port PORT``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from genretrieval import __version__
from genretrieval.bundle import CATALOGUE, GRAPH, Manifest, load_bundle, write_bundle
from genretrieval.export import MINIMUM_ONNXRUNTIME, OPSET, export_graph
from genretrieval.export.onnx import NamedGraph, example_inputs
from genretrieval.export.t5 import T5RetrievalGraph, t5_level_offsets
from genretrieval.model.generator import Request
from genretrieval.model.search import IndexTensors, Retrieved
from genretrieval.servable import Catalogue
from genretrieval_pipelines.bench_decode import SIZES_4X256, HuggingFace, random_t5

BUNDLE = "bundle"
T5 = "t5"
BEAM_WIDTH = 50
MAX_HISTORY = 20
SIZES_SMALL = (16, 16, 16)


class HistoryT5(nn.Module):
    """A T5 under our beam search that reads the codes of a history, as our requests have them."""

    def __init__(self, model: T5ForConditionalGeneration, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.retrieval = T5RetrievalGraph(model, codebook_sizes)
        self.offsets = t5_level_offsets(codebook_sizes)

    def forward(self, request: Request, beams: Tensor, index: IndexTensors) -> Retrieved:
        """Retrieve for ``history_codes``, int64 ``[B, T, L]``, and ``history_mask``, bool ``[B, T]``."""
        codes_BTL, mask_BT = request["history_codes"], request["history_mask"]
        tokens_BTL = codes_BTL + torch.tensor(self.offsets, device=codes_BTL.device)
        padded_BTL = torch.where(mask_BT[..., None], tokens_BTL, self.retrieval.pad_token_id)
        found: Retrieved = self.retrieval({"context_tokens": padded_BTL.flatten(1)}, beams, index)
        return found


def write_pair(folder: Path, n_items: int, *, small: bool = False) -> None:
    """Write a T5 with random weights twice: for Hugging Face, and as a bundle over a catalogue of random IDs.

    Args:
        folder: gets ``t5`` and ``bundle``.
        n_items: items of the catalogue.
        small: 1+1 layers of width 32 over 3 levels of 16 codes, instead of row A of `bench decode`.
    """
    codebook_sizes = SIZES_SMALL if small else SIZES_4X256
    model = random_t5(codebook_sizes, 1, 32) if small else random_t5(codebook_sizes)
    model.save_pretrained(folder / T5)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, codebook_sizes, (n_items, len(codebook_sizes)))
    graph = NamedGraph(HistoryT5(model, codebook_sizes).eval(), ("history_codes", "history_mask"), codebook_sizes)
    manifest = Manifest(
        genretrieval_version=__version__,
        n_items=n_items,
        codebook_sizes=codebook_sizes,
        opset=OPSET,
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        graph_inputs=graph.names,
        max_history=MAX_HISTORY,
        max_query_tokens=1,
        reads_queries=False,
        beam_width=BEAM_WIDTH,
        exclude_seen=False,
    )
    with write_bundle(folder / BUNDLE, manifest) as bundle, torch.inference_mode():
        export_graph(graph, example_inputs(graph, 0), bundle / GRAPH)
        pl.DataFrame(
            {
                "item_id": [f"item-{row}" for row in range(n_items)],
                "semantic_id": pl.Series(codes.tolist(), dtype=pl.List(pl.Int32)),
                "popularity": rng.integers(0, 1000, n_items),
            }
        ).write_parquet(bundle / CATALOGUE)


class Event(BaseModel):
    """An item that the user took."""

    item_id: str


class Question(BaseModel):
    """What is asked: the next items after a history, oldest first."""

    history: list[Event]
    top_k: int = 10


class Item(BaseModel):
    """A retrieved item and its log-probability."""

    item_id: str
    score: float


class Answer(BaseModel):
    """Items, best first."""

    items: list[Item]


def create_app(folder: Path) -> FastAPI:
    """The app over what `write_pair` wrote."""
    # One thread, because the server has one core; the switch is on in our sessions as well.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    bundle = load_bundle(folder / BUNDLE)
    catalogue = Catalogue.open(bundle)
    model = T5ForConditionalGeneration.from_pretrained(folder / T5).eval()
    model.generation_config.eos_token_id = None
    search = HuggingFace(model, catalogue.index)
    tokens = (catalogue.ids.codes + np.asarray(search.level_offsets)).tolist()
    tokens_of = dict(zip(catalogue.item_ids, tokens, strict=True))
    items_of: dict[tuple[int, ...], list[str]] = {}
    for row in np.argsort(-catalogue.table["popularity"].to_numpy(), kind="stable").tolist():
        items_of.setdefault(tuple(tokens[row]), []).append(catalogue.item_ids[row])
    app = FastAPI()

    @app.post("/v1/retrieve")
    def retrieve(question: Question) -> Answer:
        known = [event.item_id for event in question.history if event.item_id in tokens_of]
        context = [token for item in known[-bundle.manifest.max_history :] for token in tokens_of[item]]
        found = search.generate(
            np.asarray([context]),
            bundle.manifest.beam_width,
            n_best=question.top_k,
            return_dict_in_generate=True,
            output_scores=True,
        )
        items = [
            Item(item_id=item, score=score)
            for sequence, score in zip(found.sequences[:, 1:].tolist(), found.sequences_scores.tolist(), strict=True)
            for item in items_of[tuple(sequence)]
        ]
        return Answer(items=items[: question.top_k])

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvicorn.run(create_app(given.folder), port=given.port, log_level="warning", access_log=False)
