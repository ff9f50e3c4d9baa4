"""A bundle of any size that knows nothing: random semantic IDs, random weights, real reserved slots.

What a server costs depends on sizes, not on what was learnt, so benches of serving need no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import set_seed

from genretrieval import __version__
from genretrieval.bundle import CATALOGUE, GRAPH, KEYWORDS, QUERY_TOKENIZER, Manifest, write_bundle
from genretrieval.export import MINIMUM_ONNXRUNTIME, OPSET, export_graph
from genretrieval.export.onnx import example_inputs, named_graph
from genretrieval.features import N_GAPS, RequestFeatures
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.model import Generator, GeneratorConfig

Shape = Literal["keyword", "4x256", "rq_opq"]
_GROUPS = (AttributeType.ENTITY, AttributeType.BRAND, AttributeType.MODIFIER)
_WORDS = 500  # of a group, and brands
# Codebook sizes, and the exponent of Zipf's law that codes of a level are drawn by. Items of a real shop clump: of a
# million these make 44 and 370 thousand prefixes of two and three codes at 4x256, where even draws make 65 and 970.
_SHAPES: dict[Shape, tuple[tuple[int, float], ...]] = {
    "keyword": ((_WORDS, 0.5),) * len(_GROUPS),
    "4x256": ((256, 0.7), (256, 1.4), (256, 1.0), (256, 0.3)),
    "rq_opq": ((4096, 0.7), (1024, 1.2), (512, 0.9), (256, 0.5), (256, 0.5)),
}
SHAPES = tuple(_SHAPES)
EVENTS = ("click", "cart", "purchase")
N_PAST_TOKENS = 8


@dataclass(frozen=True)
class RandomBundle:
    """A bundle in memory (a `genretrieval.servable.Servable`), which knows nothing.

    Attributes:
        manifest: what it is.
        table: its catalogue.
        config: of its generator.
        query_tokenizer: its words, as JSON.
        keywords: slots of words, for the shape that has them.
    """

    manifest: Manifest
    table: pl.DataFrame
    config: GeneratorConfig
    query_tokenizer: str
    keywords: KeywordCodebook | None

    def features(self) -> RequestFeatures:
        """How requests are turned into model inputs."""
        return RequestFeatures(
            events=self.manifest.events,
            query_tokenizer=self.query_tokenizer,
            max_query_tokens=self.manifest.max_query_tokens,
            keywords=self.keywords,
        )

    def catalogue(self) -> pl.DataFrame:
        """Items in row order."""
        return self.table

    def item_vectors(self) -> NDArray[np.float32] | None:
        """None: there is no dense head."""
        return None

    def export(self, path: Path, seed: int = 0) -> None:
        """Write the graph of a generator with random weights."""
        set_seed(seed)
        graph = named_graph(Generator(self.config).eval())
        with torch.inference_mode():
            export_graph(graph, example_inputs(graph, 1), path)


def random_bundle(
    n_items: int,
    shape: Shape = "keyword",
    *,
    reserved_slots: int = 100,
    d_model: int = 64,
    beam_width: int = 10,
    max_history: int = 20,
    max_past: int = 0,
    seed: int = 0,
) -> RandomBundle:
    """Make a bundle.

    Args:
        n_items: items of its catalogue.
        shape: ``keyword`` has three keyword groups and a level that tells items of equal keywords apart; ``4x256`` and
            ``rq_opq`` have codes that mean nothing, and items that share a leaf.
        reserved_slots: of each keyword group.
        d_model: width of the model; the one that is trained by default has 128.
        beam_width: of requests that name none; the one that is trained by default has 50.
        max_history: newest interactions that are read.
        max_past: events before those that are read compressed.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    codes = np.stack([_zipf(rng, n_items, size, exponent) for size, exponent in _SHAPES[shape]], 1)
    sizes = tuple(size for size, _ in _SHAPES[shape])
    if shape == "keyword":
        keywords = _codebook(reserved_slots)
        codes = np.concatenate([codes + 1, _numbered(codes)[:, None]], 1)
        sizes = (*keywords.sizes, int(codes[:, -1].max()) + 2)
        words = [keyword.text for keyword in keywords.dictionary.keywords]
        entities, brands, modifiers = (pl.Series(words[g * _WORDS : (g + 1) * _WORDS]) for g in range(3))
        brand = brands.gather(codes[:, 1] - 1)
        named = {"title": entities.gather(codes[:, 0] - 1) + " " + modifiers.gather(codes[:, 2] - 1), "brand": brand}
    else:
        keywords = None
        words = [f"brand{number}" for number in range(1, _WORDS + 1)]
        named = {"brand": pl.Series(words).gather(_zipf(rng, n_items, _WORDS, 0.5))}
    table = pl.DataFrame(
        {
            "item_id": pl.select(pl.format("item-{}", pl.int_range(n_items))).to_series(),
            **named,
            "price": rng.uniform(1, 100, n_items),
            "in_stock": rng.random(n_items) < 0.9,
            "semantic_id": pl.Series(codes.astype(np.int32)).arr.to_list(),
            "popularity": rng.integers(0, 1000, n_items),
        }
    )
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: n for n, word in enumerate(words, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GeneratorConfig(
        codebook_sizes=sizes,
        d_model=d_model,
        n_heads=4,
        d_ff=4 * d_model,
        query_vocab_size=len(vocabulary),
        n_query_codes=sum(keywords.sizes) if keywords else 0,
        n_events=1 + len(EVENTS),
        n_gaps=N_GAPS,
        n_past_tokens=N_PAST_TOKENS if max_past else 0,
        max_past=max_past,
        max_history=max_history,
    )
    manifest = Manifest(
        genretrieval_version=__version__,
        n_items=n_items,
        codebook_sizes=sizes,
        reserved_slots=(*keywords.reserved, 0) if keywords else (),
        opset=OPSET,
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        graph_inputs=named_graph(Generator(config)).names,
        events=EVENTS,
        max_history=config.max_history,
        max_past=config.max_past,
        max_query_tokens=config.max_query_tokens,
        reads_queries=True,
        beam_width=beam_width,
        exclude_seen=False,
    )
    return RandomBundle(manifest, table, config, tokenizer.to_str(), keywords)


def write_random_bundle(
    path: Path,
    n_items: int,
    shape: Shape = "keyword",
    *,
    reserved_slots: int = 100,
    d_model: int = 64,
    beam_width: int = 10,
    seed: int = 0,
) -> None:
    """Write a `random_bundle` to a folder; another `seed` gives other weights and the same items."""
    made = random_bundle(n_items, shape, reserved_slots=reserved_slots, d_model=d_model, beam_width=beam_width)
    with write_bundle(path, made.manifest) as folder:
        made.export(folder / GRAPH, seed)
        made.table.write_parquet(folder / CATALOGUE)
        if made.keywords:
            made.keywords.save(folder / KEYWORDS)
        (folder / QUERY_TOKENIZER).write_text(made.query_tokenizer, "utf-8")


def _zipf(rng: np.random.Generator, n: int, size: int, exponent: float) -> NDArray[np.int64]:
    """Draws of ``range(size)``, int64 ``[n]``; the first ones are the most frequent."""
    weight = np.arange(1, size + 1) ** -exponent
    drawn: NDArray[np.int64] = rng.choice(size, n, p=weight / weight.sum())
    return drawn


def _numbered(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The how manieth each row is among those equal to it, int64 ``[n]``."""
    order = np.lexsort(codes.T[::-1])
    new = np.append(True, (codes[order[1:]] != codes[order[:-1]]).any(1))
    first = np.maximum.accumulate(np.where(new, np.arange(len(codes)), 0))
    number = np.empty(len(codes), np.int64)
    number[order] = np.arange(len(codes)) - first
    return number


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
