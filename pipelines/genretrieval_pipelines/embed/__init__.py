"""Item embeddings: what tokenizers quantise and what the dense-retrieval baseline searches."""

from __future__ import annotations

from genretrieval_pipelines.embed.collaborative import collaborative_embeddings
from genretrieval_pipelines.embed.parts import EmbeddingPart, embed_items
from genretrieval_pipelines.embed.text import (
    HashingEmbedder,
    TextEmbedder,
    TransformerEmbedder,
    item_texts,
    text_embedder,
)

__all__ = [
    "EmbeddingPart",
    "HashingEmbedder",
    "TextEmbedder",
    "TransformerEmbedder",
    "collaborative_embeddings",
    "embed_items",
    "item_texts",
    "text_embedder",
]
