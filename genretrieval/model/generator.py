"""The generator: history, query and profile in, the codes of the next item out, one level after another.

The context has one position an item: the sum of its codes' embeddings, its own vector, its event and the time since
the item before it. A causal encoder reads the history, so that one pass trains the prediction of every item of it; a
bidirectional encoder reads the query; a decoder of a few steps attends to both. Why one position an item and one causal
pass: docs/decisions/0001-context-layout.md.

Shape suffixes are explained in `genretrieval.model.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput

from genretrieval.model.configuration import GeneratorConfig
from genretrieval.model.dense import DenseHead
from genretrieval.model.layers import Decoder, Encoder, Queries, RelativeBias


@dataclass(frozen=True, slots=True)
class Context:
    """An encoded request: what the decoder attends to and where it starts from.

    Attributes:
        memory_BSD: encoded history positions, then encoded query tokens.
        mask_BS: bool, which of them are real.
        start_BD: state that the first decoder step starts from.
    """

    memory_BSD: Tensor
    mask_BS: Tensor
    start_BD: Tensor


class ContextEncoder(nn.Module):
    """Turns a request into what the decoder attends to."""

    level_offsets: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        c = config
        sizes = (c.d_model, c.n_heads, c.d_ff, c.dropout, c.n_position_buckets, c.max_distance)
        self.codes = nn.Embedding(c.vocab_size, c.d_model)
        self.begin = nn.Parameter(torch.empty(c.d_model))
        self.events = nn.Embedding(c.n_events, c.d_model)
        self.gaps = nn.Embedding(c.n_gaps, c.d_model)
        self.profile = nn.Embedding(c.n_profile_buckets, c.d_model) if c.n_profile_buckets else None
        self.encoder: nn.Module = Encoder(c.n_encoder_layers, *sizes, causal=True)
        self.query_tokens = nn.Embedding(c.query_vocab_size, c.d_model) if c.query_vocab_size else None
        self.query_encoder: nn.Module | None = None
        if c.query_vocab_size:
            self.query_encoder = Encoder(c.n_query_layers, *sizes, causal=False)
        self.start = nn.Linear(c.d_model, c.d_model, bias=False)
        self.register_buffer("level_offsets", torch.tensor(c.level_offsets), persistent=False)

    def embed(self, codes_XL: Tensor) -> Tensor:
        """Embeddings of codes, level by level: ``[..., L]`` (a prefix of the levels will do) to ``[..., L, D]``."""
        return cast(Tensor, self.codes(codes_XL + self.level_offsets[: codes_XL.shape[-1]]))

    def history(
        self,
        history_codes: Tensor,
        history_events: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        profile: Tensor | None = None,
        history_vectors: Tensor | None = None,
    ) -> Tensor:
        """Encode histories.

        Args:
            history_codes: int64 ``[B, S, L]``, semantic IDs in time order, padded on the right with any code.
            history_events: int64 ``[B, S]``.
            history_gaps: int64 ``[B, S]``.
            history_mask: bool ``[B, S]``, True where an interaction is real.
            profile: int64 ``[B, n_features]``, hashed profile features.
            history_vectors: float ``[B, S, D]``, item vectors, for a model that has them.

        Returns:
            Float ``[B, 1 + S, D]``: state 0 has seen the profile alone, state i the first i interactions.
        """
        x_BSD = self.embed(history_codes).sum(-2) + self.events(history_events) + self.gaps(history_gaps)
        if history_vectors is not None:
            x_BSD = x_BSD + history_vectors
        first_BD = self.begin.expand(x_BSD.shape[0], -1)
        if self.profile is not None and profile is not None:
            first_BD = first_BD + self.profile(profile).sum(-2)
        x_BSD = torch.cat([first_BD[:, None], x_BSD], 1)
        mask_BS = torch.cat([history_mask.new_ones(history_mask.shape[0], 1), history_mask], 1)
        return cast(Tensor, self.encoder(x_BSD, mask_BS))

    def query(self, query_tokens: Tensor, query_mask: Tensor) -> Tensor:
        """Encode queries: int64 ``[N, Q]`` and bool ``[N, Q]`` to float ``[N, Q, D]``."""
        assert self.query_tokens is not None
        assert self.query_encoder is not None
        return cast(Tensor, self.query_encoder(self.query_tokens(query_tokens), query_mask))

    def forward(
        self,
        history_codes: Tensor,
        history_events: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        query_tokens: Tensor | None = None,
        query_mask: Tensor | None = None,
        profile: Tensor | None = None,
        history_vectors: Tensor | None = None,
    ) -> Context:
        """Encode requests for the one item that comes next; shapes as in `history` and `query`."""
        memory_BSD = self.history(history_codes, history_events, history_gaps, history_mask, profile, history_vectors)
        last = history_mask.sum(1)[:, None, None].expand(-1, 1, memory_BSD.shape[-1])
        start_BD = self.start(memory_BSD.gather(1, last)[:, 0])
        mask_BS = torch.cat([history_mask.new_ones(history_mask.shape[0], 1), history_mask], 1)
        if query_tokens is not None and query_mask is not None:
            memory_BSD = torch.cat([memory_BSD, self.query(query_tokens, query_mask)], 1)
            mask_BS = torch.cat([mask_BS, query_mask], 1)
        return Context(memory_BSD, mask_BS, start_BD)


@dataclass
class EncodedRequest(ModelOutput):
    """A `Context` in the form that Hugging Face ``generate`` repeats for every beam; it wants defaults."""

    last_hidden_state: Tensor | None = None
    mask: Tensor | None = None
    start: Tensor | None = None

    def context(self) -> Context:
        """As it was before."""
        assert self.last_hidden_state is not None
        assert self.mask is not None
        assert self.start is not None
        return Context(self.last_hidden_state, self.mask, self.start)


class RequestEncoder(nn.Module):
    """A `ContextEncoder` in the form that Hugging Face ``generate`` calls."""

    def __init__(self, context: ContextEncoder) -> None:
        super().__init__()
        self.context = context

    def forward(
        self,
        history_codes: Tensor,
        history_events: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        query_tokens: Tensor | None = None,
        query_mask: Tensor | None = None,
        profile: Tensor | None = None,
        history_vectors: Tensor | None = None,
        **_: Any,
    ) -> EncodedRequest:
        """Encode requests; shapes as in `ContextEncoder.forward`."""
        found: Context = self.context(
            history_codes,
            history_events,
            history_gaps,
            history_mask,
            query_tokens,
            query_mask,
            profile,
            history_vectors,
        )
        return EncodedRequest(found.memory_BSD, found.mask_BS, found.start_BD)


class Generator(PreTrainedModel, GenerationMixin):
    """An encoder-decoder Transformer over semantic IDs.

    A semantic ID is written as `n_levels` flat tokens: code c of level l is token ``config.level_offsets[l] + c``;
    token 0 starts a sequence. Beam search over the catalogue is `genretrieval.model.BeamSearch`; Hugging Face
    ``generate`` works too, several times slower, and is what tests compare it with.
    """

    config_class = GeneratorConfig
    base_model_prefix = "generator"
    main_input_name = "history_codes"

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        c = config
        self.context = ContextEncoder(c)
        self.decoder = Decoder(
            c.n_decoder_layers, c.d_model, c.n_heads, c.d_ff, c.dropout, c.n_position_buckets, c.max_distance
        )
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.dense = DenseHead(c) if c.n_items else None
        self.post_init()
        # What ``generate`` needs to write whole semantic IDs, scored by the probability of their codes.
        self.generation_config.update(use_cache=False, max_new_tokens=c.n_levels, renormalize_logits=True)

    def _init_weights(self, module: nn.Module) -> None:
        """Wide embeddings, as nothing scales them up later; matrices keep PyTorch's default, but for `start`.

        T5's initialisation of the matrices was measured and learns more slowly at this size. ``from_pretrained`` builds
        the model without memory behind it, so tables that no file holds are filled here too.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5 if module.embedding_dim == self.config.d_model else 0.1)
        elif isinstance(module, RelativeBias):
            module.lookup.copy_(module.buckets())
        elif isinstance(module, DenseHead):
            # Content has length 1: its projection is as wide as the embeddings it is added to.
            nn.init.normal_(module.projection.weight, std=0.5)
            nn.init.normal_(module.user.weight, std=0.1 * self.config.d_model**-0.5)
            nn.init.zeros_(module.own_ID)
            module.content_IC.zero_()
        elif isinstance(module, ContextEncoder):
            module.level_offsets.copy_(torch.tensor(self.config.level_offsets))
            nn.init.normal_(module.begin, std=0.5)
            nn.init.normal_(module.start.weight, std=self.config.d_model**-0.5)

    def decode_targets(
        self,
        target_codes: Tensor,
        history_states: Tensor,
        query_rows: Tensor | None = None,
        query_tokens: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Teacher-force every target of every history in one pass.

        Args:
            target_codes: int64 ``[B, T, L]``; target t follows the first t interactions.
            history_states: float ``[B, T, D]`` from `ContextEncoder.history` of the first T - 1 interactions.
            query_rows: int64 ``[N]``, which targets (flat, ``b * T + t``) were asked for with a query.
            query_tokens: int64 ``[N, Q]``, their queries.
            query_mask: bool ``[N, Q]``.

        Returns:
            Float ``[B, T, L, D]``, the decoder's state before each code; see `level_logits`.
        """
        n_rows, n_targets = target_codes.shape[:2]
        start = self.context.start(history_states) + self.context.codes.weight[0]
        written = self.context.embed(target_codes[..., :-1])
        x_BTLD = torch.cat([start[:, :, None], written], 2)
        seen = torch.ones(n_targets, n_targets, dtype=torch.bool, device=start.device).tril()
        queries = None
        if query_rows is not None and query_tokens is not None and query_mask is not None and len(query_rows):
            queries = Queries(query_rows, self.context.query(query_tokens, query_mask), query_mask)
        decoded = self.decoder(x_BTLD, history_states, seen.expand(n_rows, -1, -1), queries)
        return cast(Tensor, decoded)

    def level_logits(self, states_XD: Tensor, level: int) -> Tensor:
        """Scores of the codes of `level`: ``[..., D]`` to ``[..., V]``."""
        first = self.config.level_offsets[level]
        weight = self.head.weight[first : first + self.config.codebook_sizes[level]]
        return nn.functional.linear(states_XD, weight)

    def forward(
        self,
        history_codes: Tensor | None = None,
        history_events: Tensor | None = None,
        history_gaps: Tensor | None = None,
        history_mask: Tensor | None = None,
        query_tokens: Tensor | None = None,
        query_mask: Tensor | None = None,
        profile: Tensor | None = None,
        history_vectors: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: EncodedRequest | None = None,
        objective: Callable[[Generator, dict[str, Tensor]], Tensor] | None = None,
        batch: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput | Tensor:
        """Next-code logits over the flat vocabulary, in the form that Hugging Face ``generate`` drives.

        Tokens of another level than the one to be written are -inf. Given an `objective` and a training `batch`, it
        is their loss instead: data-parallel wrappers only see what runs inside ``forward``.
        """
        if objective is not None:
            assert batch is not None
            return objective(self, batch)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(
                history_codes,
                history_events,
                history_gaps,
                history_mask,
                query_tokens,
                query_mask,
                profile,
                history_vectors,
            )
        assert decoder_input_ids is not None
        context = encoder_outputs.context()
        x_BLD = self.context.codes(decoder_input_ids)
        x_BLD = torch.cat([x_BLD[:, :1] + context.start_BD[:, None], x_BLD[:, 1:]], 1)
        states = self.decoder(x_BLD[:, None], context.memory_BSD, context.mask_BS[:, None])[:, 0]
        logits = states.new_full((*states.shape[:2], self.config.vocab_size), float("-inf"))
        for level in range(min(states.shape[1], self.config.n_levels)):
            first = self.config.level_offsets[level]
            last = first + self.config.codebook_sizes[level]
            logits[:, level, first:last] = self.level_logits(states[:, level], level)
        return Seq2SeqLMOutput(logits=logits)

    def get_encoder(self, *_: Any, **__: Any) -> RequestEncoder:
        """The part that reads a request (Hugging Face asks an encoder-decoder for it)."""
        return RequestEncoder(self.context)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """No cache: a semantic ID is a handful of codes."""
        return {"decoder_input_ids": input_ids, "encoder_outputs": kwargs["encoder_outputs"]}
