"""The retrieval graph of a Hugging Face T5: its own weights under our beam search.

A peer that writes semantic IDs with T5 (TIGER, Rajput et al. 2023, is one) can be served by the same one-graph search,
and the search can be compared with Hugging Face ``generate`` on the same weights, code for code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from genretrieval.errors import InvalidInputError
from genretrieval.export.onnx import NamedGraph
from genretrieval.model.generator import Request
from genretrieval.model.layers import Attention, Decoder, Encoder, FeedForward
from genretrieval.model.search import BeamSearch, FusedEncoder, IndexTensors, Retrieved

# Tokens 0 (padding, which also starts the decoder) and 1 (end of sequence, never written) come before the codes.
N_SPECIAL_TOKENS = 2
REQUEST_INPUTS = ("context_tokens",)


def t5_level_offsets(codebook_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """First token of each level: the codes follow the special tokens, level by level."""
    return tuple(N_SPECIAL_TOKENS + sum(codebook_sizes[:level]) for level in range(len(codebook_sizes)))


class T5RetrievalGraph(nn.Module):
    """A T5 and our beam search over its vocabulary: context tokens in, leaves of the catalogue out.

    Args:
        model: the T5.
        codebook_sizes: codes of each level; code c of level l is token ``t5_level_offsets(codebook_sizes)[l] + c``.
        search: the beam search to build on the decoder.

    Raises:
        InvalidInputError: if the T5 is of a form that `genretrieval.model.layers` does not have.
    """

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        codebook_sizes: tuple[int, ...],
        search: type[BeamSearch] = BeamSearch,
    ) -> None:
        super().__init__()
        _check(model, codebook_sizes)
        config = model.config
        self.pad_token_id = config.pad_token_id
        self.embedding = nn.Embedding.from_pretrained(model.shared.weight.detach().clone())
        self.encoder = FusedEncoder(_encoder(model))
        scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self.search = search(
            _decoder(model),
            model.shared.weight,
            model.lm_head.weight * scale,
            codebook_sizes,
            t5_level_offsets(codebook_sizes),
            normalise="vocabulary",
        )

    def forward(self, request: Request, beams: Tensor, index: IndexTensors) -> Retrieved:
        """Retrieve.

        Args:
            request: ``context_tokens``, int64 ``[B, S]``, padded on the right.
            beams: as in `BeamSearch.forward`.
            index: as in `BeamSearch.forward`.
        """
        context_tokens = request["context_tokens"]
        mask_BS = context_tokens != self.pad_token_id
        x_BSD = self.embedding(context_tokens)
        return self.search(self.encoder(x_BSD, mask_BS), mask_BS, torch.zeros_like(x_BSD[:, 0]), beams, index)


def t5_graph(model: T5ForConditionalGeneration, codebook_sizes: tuple[int, ...]) -> NamedGraph:
    """The retrieval graph of a T5, ready for `export_graph`; its only request tensor is ``context_tokens``.

    Scores are log-probabilities over the whole vocabulary, as Hugging Face ``generate`` sums them: special tokens and
    codes that the catalogue lacks keep their share.

    Raises:
        InvalidInputError: as `T5RetrievalGraph`.
    """
    graph = T5RetrievalGraph(model, codebook_sizes).eval()
    return NamedGraph(graph, REQUEST_INPUTS, codebook_sizes)


def _check(model: T5ForConditionalGeneration, codebook_sizes: tuple[int, ...]) -> None:
    """Refuse a T5 whose weights would be copied into a layer of another form."""
    config = model.config
    needed = {
        "feed_forward_proj": (config.feed_forward_proj, "relu"),
        "num_heads * d_kv": (config.num_heads * config.d_kv, config.d_model),
        "layer_norm_epsilon": (config.layer_norm_epsilon, 1e-6),
        "decoder_start_token_id": (config.decoder_start_token_id, 0),
        "pad_token_id": (config.pad_token_id, 0),
    }
    for name, (found, expected) in needed.items():
        if found != expected:
            raise InvalidInputError(f"a T5 with {name} {found} cannot become a retrieval graph; it must be {expected}")
    n_tokens = N_SPECIAL_TOKENS + sum(codebook_sizes)
    if config.vocab_size < n_tokens:
        raise InvalidInputError(
            f"the T5 has {config.vocab_size} tokens, but codebooks of {codebook_sizes} need {n_tokens}: "
            f"{N_SPECIAL_TOKENS} special tokens, then the codes level by level"
        )


def _encoder(model: T5ForConditionalGeneration) -> Encoder:
    """The T5's encoder in our form."""
    c = model.config
    sizes = (c.d_model, c.num_heads, c.d_ff, 0.0, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    encoder = Encoder(c.num_layers, *sizes, causal=False)
    stack = model.encoder
    ours: Any
    for ours, theirs in zip(encoder.layers, stack.block, strict=True):
        attention, feed_forward = theirs.layer
        _copy(ours.attention_norm.weight, attention.layer_norm.weight)
        _copy_attention(ours.attention, attention.SelfAttention)
        _copy(ours.feed_forward_norm.weight, feed_forward.layer_norm.weight)
        _copy_feed_forward(ours.feed_forward, feed_forward.DenseReluDense)
    _copy(encoder.bias.embedding.weight, stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    _copy(encoder.norm.weight, stack.final_layer_norm.weight)
    return encoder


def _decoder(model: T5ForConditionalGeneration) -> Decoder:
    """The T5's decoder in our form."""
    c = model.config
    sizes = (c.d_model, c.num_heads, c.d_ff, 0.0, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    decoder = Decoder(c.num_decoder_layers, *sizes)
    stack = model.decoder
    ours: Any
    for ours, theirs in zip(decoder.layers, stack.block, strict=True):
        attention, cross, feed_forward = theirs.layer
        _copy(ours.attention_norm.weight, attention.layer_norm.weight)
        _copy_attention(ours.attention, attention.SelfAttention)
        _copy(ours.cross_norm.weight, cross.layer_norm.weight)
        _copy_attention(ours.cross, cross.EncDecAttention)
        _copy(ours.feed_forward_norm.weight, feed_forward.layer_norm.weight)
        _copy_feed_forward(ours.feed_forward, feed_forward.DenseReluDense)
    _copy(decoder.bias.embedding.weight, stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    _copy(decoder.norm.weight, stack.final_layer_norm.weight)
    return decoder


def _copy_attention(ours: Attention, theirs: Any) -> None:
    for to, source in ((ours.query, "q"), (ours.key, "k"), (ours.value, "v"), (ours.output, "o")):
        _copy(to.weight, getattr(theirs, source).weight)


def _copy_feed_forward(ours: FeedForward, theirs: Any) -> None:
    _copy(ours.inner.weight, theirs.wi.weight)
    _copy(ours.outer.weight, theirs.wo.weight)


@torch.no_grad()
def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)
