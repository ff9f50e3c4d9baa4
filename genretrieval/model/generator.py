"""The generator: history, query and profile in, the codes of the next item out, one level after another.

The context has one position an item: the sum of its codes' embeddings, its own vector, its event and the time since
the item before it. A causal encoder reads the history, so that one pass trains the prediction of every item of it; a
bidirectional encoder reads the query; a Query-Former compresses the past before the history to a few tokens; a decoder
of a few steps attends to all of them. Why one position an item and one causal pass:
docs/decisions/0001-context-layout.md.

Shape suffixes are explained in `genretrieval.model.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput

from genretrieval.model.configuration import GeneratorConfig
from genretrieval.model.dense import DenseHead, ItemVectors
from genretrieval.model.layers import Decoder, Encoder, Experts, Queries, RelativeBias
from genretrieval.model.profile import Profile
from genretrieval.model.query_former import QueryFormer

# The tensors of a batch of requests that a generator reads. Padding stands on the right; a model reads what its
# configuration has a place for:
#
#   history_codes    int64 [B, S, L]  semantic IDs in time order, padded with any code
#   history_events   int64 [B, S]
#   history_gaps     int64 [B, S]
#   history_mask     bool  [B, S]     True where an interaction is real
#   history_vectors  float [B, S, E]  item vectors, E = 2 D                                 n_items
#   past_codes       int64 [B, N, L]  events before the history, exposures among them       n_past_tokens
#   past_events      int64 [B, N]     as in the history; `n_events` is exposure
#   past_mask        bool  [B, N]
#   past_vectors     float [B, N, E]                                                        n_past_tokens and n_items
#   profile          int64 [B, n]     hashed profile features                               n_profile_buckets
#   query_tokens     int64 [B, Q]     codes are numbered behind the tokens                  query_vocab_size
#   query_mask       bool  [B, Q]
#   scenario         int64 [B]                                                              n_scenarios
#
# A batch of training has the codes and vectors of a past once for every distinct item, [U, L] and [U, E], and where
# each event's stand there:
#
#   past_rows        int64 [B, N]
Request = Mapping[str, Tensor]


def request_tensors(config: GeneratorConfig) -> tuple[str, ...]:
    """Names of the tensors that a generator of this configuration reads, in order."""
    read: dict[str, object] = {
        "history_codes": True,
        "history_events": True,
        "history_gaps": True,
        "history_mask": True,
        "history_vectors": config.n_items,
        "past_codes": config.n_past_tokens,
        "past_events": config.n_past_tokens,
        "past_mask": config.n_past_tokens,
        "past_vectors": config.n_past_tokens and config.n_items,
        "profile": config.n_profile_buckets,
        "query_tokens": config.query_vocab_size,
        "query_mask": config.query_vocab_size,
        "scenario": config.n_scenarios,
    }
    return tuple(name for name, needed in read.items() if needed)


@dataclass(frozen=True, slots=True)
class Context:
    """An encoded request: what the decoder attends to and where it starts from.

    Attributes:
        memory_BSD: encoded history positions, then encoded query tokens.
        mask_BS: bool, which of them are real.
        start_BD: state that the first decoder step starts from.
        seen_BE: what the dense head reads of the history, see `DenseHead.seen`; without one the encoder's state.
    """

    memory_BSD: Tensor
    mask_BS: Tensor
    start_BD: Tensor
    seen_BE: Tensor


class Decoded(NamedTuple):
    """Teacher-forced targets of a batch; see `Generator.decode_targets`.

    Attributes:
        states_BTLD: the decoder's state before each code of each target.
        seen_BTE: what the dense head reads of the interactions before each target, as in `Context`.
    """

    states_BTLD: Tensor
    seen_BTE: Tensor


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
        self.profile: nn.Module | None = Profile(c.n_profile_buckets, c.d_model) if c.n_profile_buckets else None
        self.encoder: nn.Module = Encoder(c.n_encoder_layers, *sizes, causal=True)
        self.query_tokens = nn.Embedding(c.query_vocab_size, c.d_model) if c.query_vocab_size else None
        self.n_query_codes = c.n_query_codes
        self.query_encoder: nn.Module | None = None
        if c.query_vocab_size:
            self.query_encoder = Encoder(c.n_query_layers, *sizes, causal=False)
        self.scenarios = nn.Embedding(c.n_scenarios, c.d_model) if c.n_scenarios else None
        self.query_former = QueryFormer(c) if c.n_past_tokens else None
        self.start = nn.Linear(c.d_model, c.d_model, bias=False)
        self.register_buffer("level_offsets", torch.tensor(c.level_offsets), persistent=False)

    def embed(self, codes_XL: Tensor) -> Tensor:
        """Embeddings of codes, level by level: ``[..., L]`` (a prefix of the levels will do) to ``[..., L, D]``."""
        return cast(Tensor, self.codes(codes_XL + self.level_offsets[: codes_XL.shape[-1]]))

    def history(self, request: Request) -> Tensor:
        """Encode histories.

        Returns:
            Float ``[B, 1 + S, D]``: state 0 has seen the profile alone, state i the first i interactions.
        """
        x_BSD = self._items(request, "history") + self.events(request["history_events"])
        x_BSD = x_BSD + self.gaps(request["history_gaps"])
        first_BD = self.begin.expand(x_BSD.shape[0], -1)
        if self.profile is not None:
            first_BD = first_BD + self.profile(request["profile"])
        x_BSD = torch.cat([first_BD[:, None], x_BSD], 1)
        mask_BS = request["history_mask"]
        mask_BS = torch.cat([mask_BS.new_ones(mask_BS.shape[0], 1), mask_BS], 1)
        return cast(Tensor, self.encoder(x_BSD, mask_BS))

    def past(self, request: Request) -> tuple[Tensor, Tensor] | None:
        """Compress what came before the histories; None for a model that reads the history alone.

        Returns:
            Tokens float ``[B, R, D]``, and bool ``[B, R]``, which of them mean something.
        """
        if self.query_former is None:
            return None
        found: tuple[Tensor, Tensor] = self.query_former(
            self._items(request, "past"), request["past_events"], request["past_mask"]
        )
        return found

    def _items(self, request: Request, part: str) -> Tensor:
        """Items of the history or of the past, as one embedding each: codes and, where there is one, item vector."""
        x = self.embed(request[f"{part}_codes"]).sum(-2)
        vectors, rows = request.get(f"{part}_vectors"), request.get(f"{part}_rows")
        if vectors is not None:
            x = x + vectors[..., : x.shape[-1]]
        return x if rows is None else nn.functional.embedding(rows, x)

    @staticmethod
    def seen(memory_BSD: Tensor, request: Request) -> Tensor:
        """What the dense head reads of every prefix of the history; see `Context.seen_BE`."""
        vectors = request.get("history_vectors")
        return memory_BSD if vectors is None else DenseHead.seen(memory_BSD, vectors)

    def starts(self, states_XD: Tensor, scenario_X: Tensor | None) -> Tensor:
        """What the first decoder step starts from, added to the embedding of the start token: ``[..., D]``."""
        start = cast(Tensor, self.start(states_XD))
        return start if self.scenarios is None else start + self.scenarios(scenario_X)

    def query(self, query_tokens: Tensor, query_mask: Tensor) -> Tensor:
        """Encode queries: int64 ``[N, Q]`` and bool ``[N, Q]`` to float ``[N, Q, D]``.

        A keyword slot in a query has the embedding of that code, which is what makes the way from a slot that is read
        to the same slot being written easy to learn, also for slots that no item has.
        """
        assert self.query_tokens is not None
        assert self.query_encoder is not None
        table = self.query_tokens.weight
        if self.n_query_codes:
            # Flat token 0 is no code; the keyword levels are the first ones.
            table = torch.cat([table, self.codes.weight[1 : 1 + self.n_query_codes]])
        return cast(Tensor, self.query_encoder(nn.functional.embedding(query_tokens, table), query_mask))

    def forward(self, request: Request) -> Context:
        """Encode requests for the one item that comes next."""
        memory_BSD, mask_BS = self.history(request), request["history_mask"]
        last = mask_BS.sum(1)[:, None, None].expand(-1, 1, memory_BSD.shape[-1])
        start_BD = self.starts(memory_BSD.gather(1, last)[:, 0], request.get("scenario"))
        seen_BSE = self.seen(memory_BSD, request)
        seen_BE = seen_BSE.gather(1, last[..., :1].expand(-1, 1, seen_BSE.shape[-1]))[:, 0]
        parts, masks = [memory_BSD], [mask_BS.new_ones(mask_BS.shape[0], 1), mask_BS]
        past = self.past(request)
        if past is not None:
            parts.append(past[0])
            masks.append(past[1])
        if self.query_encoder is not None:
            parts.append(self.query(request["query_tokens"], request["query_mask"]))
            masks.append(request["query_mask"])
        return Context(torch.cat(parts, 1), torch.cat(masks, 1), start_BD, seen_BE)


@dataclass
class EncodedRequest(ModelOutput):
    """A `Context` in the form that Hugging Face ``generate`` repeats for every beam; it wants defaults."""

    last_hidden_state: Tensor | None = None
    mask: Tensor | None = None
    start: Tensor | None = None
    seen: Tensor | None = None

    def context(self) -> Context:
        """As it was before."""
        assert self.last_hidden_state is not None
        assert self.mask is not None
        assert self.start is not None
        assert self.seen is not None
        return Context(self.last_hidden_state, self.mask, self.start, self.seen)


class RequestEncoder(nn.Module):
    """A `ContextEncoder` in the form that Hugging Face ``generate`` calls."""

    def __init__(self, context: ContextEncoder) -> None:
        super().__init__()
        self.context = context

    def forward(self, **kwargs: Any) -> EncodedRequest:
        """Encode requests, whose tensors are given by name, among other things that ``generate`` passes on."""
        found: Context = self.context({name: given for name, given in kwargs.items() if isinstance(given, Tensor)})
        return EncodedRequest(found.memory_BSD, found.mask_BS, found.start_BD, found.seen_BE)


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
        experts = Experts(c.n_experts, c.experts_per_token) if c.n_experts else None
        sizes = (c.d_model, c.n_heads, c.d_ff, c.dropout, c.n_position_buckets, c.max_distance)
        self.decoder = Decoder(c.n_decoder_layers, *sizes, experts)
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
        elif isinstance(module, QueryFormer):
            nn.init.normal_(module.queries_RD, std=0.5)
            for name, table in module.tables().items():
                getattr(module, name).copy_(table)
        elif isinstance(module, ItemVectors):
            # Content has length 1: its projection is as wide as the embeddings it is added to.
            nn.init.normal_(module.projection.weight, std=0.5)
            nn.init.zeros_(module.own_ID)
        elif isinstance(module, DenseHead):
            module.content_IC.zero_()
            # One of two factors has to start off zero, or neither would ever move.
            nn.init.normal_(module.leaving_ID, std=0.02)
            nn.init.zeros_(module.taking_ID)
            nn.init.zeros_(module.gate.weight)
        elif isinstance(module, ContextEncoder):
            module.level_offsets.copy_(torch.tensor(self.config.level_offsets))
            nn.init.normal_(module.begin, std=0.5)
            nn.init.normal_(module.start.weight, std=self.config.d_model**-0.5)

    def decode_targets(self, batch: Request) -> Decoded:
        """Teacher-force every target of every history in one pass.

        Args:
            batch: a request of the first T - 1 interactions of every history, and ``target_codes`` int64
                ``[B, T, L]``; target t follows the first t of them. ``query_tokens`` and ``query_mask`` belong to the
                targets at ``query_rows``, int64 ``[N]``, flat (``b * T + t``); ``target_scenarios`` is int64
                ``[B, T]``. What a target is told besides (see `genretrieval.training.self_distillation`), no request
                has it: ``hint_states`` float ``[N, H, D]``, to be attended to as the states of a query are, and
                ``hint_mask`` bool ``[N, H]``, of the targets at ``hint_rows``.

        Returns:
            States of the decoder and of the encoder; see `level_logits` and `DenseHead.user_vectors`.
        """
        context, target_codes = self.context, batch["target_codes"]
        n_rows, n_targets = target_codes.shape[:2]
        memory = context.history(batch)
        seen_BTE = context.seen(memory, batch)
        start = context.starts(memory, batch.get("target_scenarios")) + context.codes.weight[0]
        x_BTLD = torch.cat([start[:, :, None], context.embed(target_codes[..., :-1])], 2)
        seen = torch.ones(n_targets, n_targets, dtype=torch.bool, device=start.device).tril().expand(n_rows, -1, -1)
        past = context.past(batch)
        if past is not None:
            memory = torch.cat([memory, past[0]], 1)
            seen = torch.cat([seen, past[1][:, None].expand(-1, n_targets, -1)], 2)
        queries = None
        if context.query_encoder is not None and len(batch["query_rows"]):
            encoded = context.query(batch["query_tokens"], batch["query_mask"])
            queries = Queries(batch["query_rows"], encoded, batch["query_mask"])
        if "hint_states" in batch:
            hints = Queries(batch["hint_rows"], batch["hint_states"], batch["hint_mask"])
            queries = hints if queries is None else queries.joined(hints, (n_rows, n_targets))
        return Decoded(self.decoder(x_BTLD, memory, seen, queries, batch.get("learn")), seen_BTE)

    def level_logits(self, states_XD: Tensor, level: int) -> Tensor:
        """Scores of the codes of `level`: ``[..., D]`` to ``[..., V]``."""
        first = self.config.level_offsets[level]
        weight = self.head.weight[first : first + self.config.codebook_sizes[level]]
        return nn.functional.linear(states_XD, weight)

    def forward(
        self,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: EncodedRequest | None = None,
        objective: Callable[[Generator, dict[str, Tensor]], Tensor] | None = None,
        batch: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | Tensor:
        """Next-code logits over the flat vocabulary, in the form that Hugging Face ``generate`` drives.

        The tensors of a `Request` are given by name.

        Tokens of another level than the one to be written are -inf. Given an `objective` and a training `batch`, it
        is their loss instead: data-parallel wrappers only see what runs inside ``forward``.
        """
        if objective is not None:
            assert batch is not None
            return objective(self, batch)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(**kwargs)
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

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """``generate`` would look for the tensors of a request in the signature of `forward`."""
        if unknown := set(model_kwargs) - set(request_tensors(self.config)) - {"encoder_outputs"}:
            raise ValueError(f"this generator reads {request_tensors(self.config)}, and not {sorted(unknown)}")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """No cache: a semantic ID is a handful of codes."""
        return {"decoder_input_ids": input_ids, "encoder_outputs": kwargs["encoder_outputs"]}
