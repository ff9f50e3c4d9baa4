"""Configuration of the generator."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class GeneratorConfig(PretrainedConfig):
    """Sizes of a `Generator`; saved as ``config.json`` beside its weights, as Hugging Face users expect.

    Args:
        codebook_sizes: codes of each level of a semantic ID.
        d_model: width of every hidden state.
        n_heads: attention heads; must divide `d_model`.
        d_ff: width of the feed-forward layers.
        n_encoder_layers: causal layers over the history.
        n_decoder_layers: layers that write the codes.
        n_experts: experts of a sparse mixture in place of each feed-forward layer of the decoder; 0 keeps them dense.
        experts_per_token: experts that work on a code, each ``d_ff // experts_per_token`` wide.
        n_query_layers: bidirectional layers over the query tokens.
        query_vocab_size: entries of the query tokenizer; 0 makes a model without queries.
        n_query_codes: codes that a query may hold beside its tokens, the keyword slots of the first levels; they are
            numbered behind the tokens.
        max_query_tokens: longer queries are cut.
        n_events: behaviours, entry 0 being one that training never saw.
        n_gaps: buckets of the time since the previous interaction, entry 0 being unknown.
        n_profile_buckets: rows of the hashed table of profile features; 0 makes a model without profiles.
        n_items: rows of the item table; 0 makes a model without item vectors and without the dense head.
        content_dim: width of the content vectors that item vectors are made from.
        n_scenarios: surfaces that requests come from, entry 0 being one that training never saw; 0 makes a model
            without scenarios.
        n_past_tokens: tokens that the past before the history is compressed to, for each behaviour; 0 makes a model
            that reads the history alone.
        max_past: events of that past that the model reads, exposures among them, the newest ones.
        max_history: interactions of a history that the model reads, the newest ones.
        n_position_buckets: buckets of the relative position bias (T5).
        max_distance: distance from which on all positions share a bucket.
        dropout: on embeddings, attention outputs and feed-forward outputs, in training.
    """

    model_type = "genretrieval"

    def __init__(
        self,
        codebook_sizes: tuple[int, ...] = (256, 256, 256, 16),
        d_model: int = 128,
        n_heads: int = 4,
        d_ff: int = 512,
        n_encoder_layers: int = 2,
        n_decoder_layers: int = 2,
        n_experts: int = 0,
        experts_per_token: int = 2,
        n_query_layers: int = 1,
        query_vocab_size: int = 0,
        n_query_codes: int = 0,
        max_query_tokens: int = 16,
        n_events: int = 1,
        n_gaps: int = 1,
        n_profile_buckets: int = 0,
        n_items: int = 0,
        content_dim: int = 0,
        n_scenarios: int = 0,
        n_past_tokens: int = 0,
        max_past: int = 0,
        max_history: int = 50,
        n_position_buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.2,
        **kwargs: Any,
    ) -> None:
        if d_model < 1 or n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model={d_model} must be a multiple of n_heads={n_heads}, and both at least 1")
        if max_history < 1:
            raise ValueError(f"max_history={max_history} must be at least 1")
        if n_items and not content_dim:
            raise ValueError(f"n_items={n_items} needs content_dim: new items are placed by their content")
        if bool(n_past_tokens) != bool(max_past):
            raise ValueError(f"n_past_tokens={n_past_tokens} and max_past={max_past}: give both or neither")
        if n_experts and (experts_per_token < 1 or d_ff % experts_per_token):
            raise ValueError(f"d_ff={d_ff} must be a multiple of experts_per_token={experts_per_token}")
        if n_query_codes and not query_vocab_size:
            raise ValueError(f"n_query_codes={n_query_codes} needs query_vocab_size: the model reads no queries")
        self.codebook_sizes = tuple(codebook_sizes)
        self.d_model = d_model
        self.n_heads = n_heads
        self.d_ff = d_ff
        self.n_encoder_layers = n_encoder_layers
        self.n_decoder_layers = n_decoder_layers
        self.n_experts = n_experts
        self.experts_per_token = experts_per_token
        self.n_query_layers = n_query_layers
        self.query_vocab_size = query_vocab_size
        self.n_query_codes = n_query_codes
        self.max_query_tokens = max_query_tokens
        self.n_events = n_events
        self.n_gaps = n_gaps
        self.n_profile_buckets = n_profile_buckets
        self.n_items = n_items
        self.content_dim = content_dim
        self.n_scenarios = n_scenarios
        self.n_past_tokens = n_past_tokens
        self.max_past = max_past
        self.max_history = max_history
        self.n_position_buckets = n_position_buckets
        self.max_distance = max_distance
        self.dropout = dropout
        kwargs.setdefault("is_encoder_decoder", True)
        kwargs.setdefault("pad_token_id", 0)
        kwargs.setdefault("decoder_start_token_id", 0)
        super().__init__(**kwargs)

    @property
    def n_behaviours(self) -> int:
        """Behaviours of the past: the events of a history, then exposure."""
        return self.n_events + 1

    @property
    def n_levels(self) -> int:
        """Codes of a semantic ID."""
        return len(self.codebook_sizes)

    @property
    def level_offsets(self) -> tuple[int, ...]:
        """First flat token of each level; flat token 0 is the decoder's start and padding."""
        offsets, total = [], 1
        for size in self.codebook_sizes:
            offsets.append(total)
            total += size
        return tuple(offsets)

    @property
    def vocab_size(self) -> int:
        """Flat tokens: the start token and every code of every level."""
        return 1 + sum(self.codebook_sizes)
