"""Embeddings of items and queries: what tokenizers quantise and what the dense-retrieval baseline searches."""

from __future__ import annotations

from genretrieval_pipelines.embed.collaborative import collaborative_embeddings
from genretrieval_pipelines.embed.fitted import FittedEmbedding, embed_items
from genretrieval_pipelines.embed.keywords import mine_keywords
from genretrieval_pipelines.embed.parts import EmbeddingPart
from genretrieval_pipelines.embed.text import (
    HashingEmbedder,
    TextEmbedder,
    TransformerEmbedder,
    text_embedder,
)

__all__ = [
    "EmbeddingPart",
    "FittedEmbedding",
    "HashingEmbedder",
    "TextEmbedder",
    "TransformerEmbedder",
    "collaborative_embeddings",
    "embed_items",
    "mine_keywords",
    "text_embedder",
]
