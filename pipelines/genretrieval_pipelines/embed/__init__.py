"""Embeddings of items and queries: what tokenizers quantise and what the dense-retrieval baseline searches."""

from __future__ import annotations

from genretrieval_pipelines.embed.collaborative import collaborative_embeddings
from genretrieval_pipelines.embed.keywords import mine_keywords
from genretrieval_pipelines.embed.parts import EmbeddingPart, embed_items, embed_new_items, embed_queries
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
    "embed_new_items",
    "embed_queries",
    "item_texts",
    "mine_keywords",
    "text_embedder",
]
