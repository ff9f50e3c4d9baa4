"""A bundle of any size that knows nothing: random semantic IDs, random weights, real reserved slots.

What a server costs depends on sizes, not on what was learnt, so benches of serving need no training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import set_seed

from genretrieval import __version__
from genretrieval.bundle import CATALOGUE, GRAPH, KEYWORDS, QUERY_TOKENIZER, Manifest, write_bundle
from genretrieval.export import MINIMUM_ONNXRUNTIME, OPSET, export_graph
from genretrieval.export.onnx import example_inputs, named_graph
from genretrieval.features import N_GAPS
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.model import Generator, GeneratorConfig

_GROUPS = (AttributeType.ENTITY, AttributeType.BRAND, AttributeType.MODIFIER)
_WORDS = 500  # of a group


def write_random_bundle(path: Path, n_items: int, *, reserved_slots: int = 100, seed: int = 0) -> None:
    """Write a bundle with three keyword groups and a level that tells items of equal keywords apart.

    Args:
        path: the bundle.
        n_items: items of its catalogue.
        reserved_slots: of each group.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    codebook = _codebook(reserved_slots)
    codes = rng.integers(1, _WORDS + 1, (n_items, len(_GROUPS)))
    order = np.lexsort(codes.T[::-1])
    new = np.ones(n_items, bool)
    new[1:] = (codes[order[1:]] != codes[order[:-1]]).any(1)
    first = np.maximum.accumulate(np.where(new, np.arange(n_items), 0))
    number = np.empty(n_items, np.int64)
    number[order] = np.arange(n_items) - first
    codes = np.concatenate([codes, number[:, None]], 1).astype(np.int32)
    sizes = (*codebook.sizes, int(number.max()) + 2)
    table = pl.DataFrame(
        {
            "item_id": [f"item-{row}" for row in range(n_items)],
            "title": [f"{codebook.words(0, a)} {codebook.words(2, c)}" for a, c in codes[:, [0, 2]].tolist()],
            "brand": [codebook.words(1, b) for b in codes[:, 1].tolist()],
            "price": rng.uniform(1, 100, n_items).round(2),
            "semantic_id": pl.Series(codes.tolist(), dtype=pl.List(pl.Int32)),
            "popularity": rng.integers(0, 1000, n_items),
        }
    )
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {k.text: n for n, k in enumerate(codebook.dictionary.keywords, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    set_seed(seed)
    config = GeneratorConfig(
        codebook_sizes=sizes,
        d_model=64,
        n_heads=4,
        d_ff=256,
        query_vocab_size=len(vocabulary),
        n_query_codes=sum(codebook.sizes),
        n_events=2,
        n_gaps=N_GAPS,
        max_history=20,
    )
    graph = named_graph(Generator(config).eval())
    manifest = Manifest(
        genretrieval_version=__version__,
        n_items=n_items,
        codebook_sizes=sizes,
        reserved_slots=(*codebook.reserved, 0),
        opset=OPSET,
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        graph_inputs=graph.names,
        events=("click",),
        max_history=config.max_history,
        max_query_tokens=config.max_query_tokens,
        reads_queries=True,
        beam_width=10,
        exclude_seen=False,
    )
    with write_bundle(path, manifest) as folder, torch.inference_mode():
        export_graph(graph, example_inputs(graph, 1), folder / GRAPH)
        table.write_parquet(folder / CATALOGUE)
        codebook.save(folder / KEYWORDS)
        (folder / QUERY_TOKENIZER).write_text(tokenizer.to_str(), "utf-8")


def _codebook(reserved_slots: int) -> KeywordCodebook:
    """As many made words a group as solo slots."""
    keywords = [
        Keyword(f"{type_.value.lower()}{number}", type_) for type_ in _GROUPS for number in range(1, _WORDS + 1)
    ]
    return KeywordCodebook(
        KeywordDictionary(tuple(keywords)),
        tuple((type_,) for type_ in _GROUPS),
        np.tile(np.arange(1, _WORDS + 1, dtype=np.int32), len(_GROUPS)),
        (1 + _WORDS + reserved_slots,) * len(_GROUPS),
        (reserved_slots,) * len(_GROUPS),
    )
