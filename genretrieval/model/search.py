"""Beam search over the catalogue as one function of tensors, the same for torch and for the exported graph.

The `n_levels` decoder steps are unrolled. Beams are query positions, not batch rows, so the context's keys and values
are computed once for all layers and never copied per beam. Keys and values of earlier steps are kept for all beams
(1 + K + K + ...) and an ancestor mask lets each beam see its own path: nothing is reordered. A step looks only at the
children of each beam's node in the catalogue index, so an ID that does not exist cannot be written.

Norm gains are folded into the matrices behind them and the projections of a layer are fused, which is why this module
holds its own copy of the weights: build it from a trained `Generator`, it is not trained itself.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from genretrieval.model.generator import Context, Generator
from genretrieval.model.layers import Decoder, Encoder, RelativeBias

Normalise = Literal["children", "vocabulary"]

# Below every score that a real beam can reach; the host drops what ends under half of it.
CLOSED = -2e9
_HIDDEN = -1e30


class IndexTensors(NamedTuple):
    """A catalogue index and its mask rows, level after level; see `genretrieval.catalogue.graph_inputs`.

    Attributes:
        tokens: int64 ``[n_nodes_l]``.
        child_starts: int64 ``[n_nodes_(l-1) + 1]``.
        slots: int64 ``[max_children_l]``.
        allowed: bool ``[n_mask_rows, n_nodes_l]``.
        mask_row_B: int64 ``[B]``, the mask row of each request.
    """

    tokens: list[Tensor]
    child_starts: list[Tensor]
    slots: list[Tensor]
    allowed: list[Tensor]
    mask_row_B: Tensor


class Retrieved(NamedTuple):
    """The best leaves of each request, best first.

    Attributes:
        leaves_BK: int64, leaf ids; meaningless where the score is `CLOSED` or below.
        scores_BK: float32, summed log-probability of the codes.
        level_scores_BKL: float32, its parts.
    """

    leaves_BK: Tensor
    scores_BK: Tensor
    level_scores_BKL: Tensor


def attend(q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, bias_BHQS: Tensor, n_heads: int) -> Tensor:
    """Unscaled multi-head attention; in an export the native ONNX operator, which needs a bias of full shape."""
    if torch.onnx.is_in_onnx_export():
        out = torch.onnx.ops.attention(
            q_BQD, k_BSD, v_BSD, attn_mask=bias_BHQS, scale=1.0, q_num_heads=n_heads, kv_num_heads=n_heads
        )
        return out[0] if isinstance(out, tuple) else out
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q_BQD, k_BSD, v_BSD))
    return ((q @ k.transpose(-1, -2) + bias_BHQS).softmax(-1) @ v).transpose(1, 2).flatten(2)


class FusedLayer(nn.Module):
    """One layer's matrices with the gain of the norm before them folded in, query, key and value as one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        gain = layer.attention_norm.weight
        attention = layer.attention
        qkv = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        self.qkv = nn.Parameter((qkv * gain).detach().clone())
        self.output = nn.Parameter(attention.output.weight.detach().clone())
        inner = layer.feed_forward.inner.weight * layer.feed_forward_norm.weight
        self.inner = nn.Parameter(inner.detach().clone())
        self.outer = nn.Parameter(layer.feed_forward.outer.weight.detach().clone())
        if hasattr(layer, "cross"):
            self.cross_query = nn.Parameter(
                (layer.cross.query.weight * layer.cross_norm.weight).detach().clone()
            )
            self.cross_output = nn.Parameter(layer.cross.output.weight.detach().clone())

    def feed_forward(self, x: Tensor) -> Tensor:
        """Add the feed-forward's output to `x`."""
        return x + linear(linear(norm(x), self.inner).relu(), self.outer)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without its gain."""
    return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class FusedEncoder(nn.Module):
    """An `Encoder` for inference."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.causal = encoder.causal
        self.bias: RelativeBias = encoder.bias
        self.n_heads = encoder.layers[0].attention.n_heads
        self.layers = nn.ModuleList(FusedLayer(layer) for layer in encoder.layers)
        self.norm = encoder.norm

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """As `Encoder.forward`."""
        n_rows, n_positions, width = x_BSD.shape
        positions = torch.arange(n_positions, device=x_BSD.device)
        hidden = torch.where(mask_BS, 0.0, _HIDDEN)[:, None, None, :]
        bias = self.bias(positions, positions) + hidden
        if self.causal:
            bias = torch.where(positions[None, :] > positions[:, None], _HIDDEN, bias)
        bias = bias.expand(n_rows, self.n_heads, n_positions, n_positions)
        for layer in self.layers:
            q, k, v = linear(norm(x_BSD), layer.qkv).split(width, -1)
            x_BSD = x_BSD + linear(attend(q, k, v, bias, self.n_heads), layer.output)
            x_BSD = layer.feed_forward(x_BSD)
        return self.norm(x_BSD)


class BeamSearch(nn.Module):
    """The decoder, unrolled over the levels of a semantic ID under the constraint of the catalogue index.

    Args:
        decoder: a trained decoder.
        codes: float ``[vocab, D]``, embeddings of the flat tokens; row 0 starts a sequence.
        head: float ``[vocab, D]``, output weights.
        codebook_sizes: codes of each level.
        level_offsets: first flat token of each level.
        normalise: ``children`` takes the softmax over the codes that exist under a beam's prefix, as our training
            does; ``vocabulary`` over all flat tokens, as Hugging Face does.
    """

    def __init__(
        self,
        decoder: Decoder,
        codes: Tensor,
        head: Tensor,
        codebook_sizes: tuple[int, ...],
        level_offsets: tuple[int, ...],
        normalise: Normalise = "children",
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.codebook_sizes = codebook_sizes
        self.level_offsets = level_offsets
        self.n_heads = decoder.layers[0].attention.n_heads
        self.bias: RelativeBias = decoder.bias
        self.layers = nn.ModuleList(FusedLayer(layer) for layer in decoder.layers)
        cross = [w for layer in decoder.layers for w in (layer.cross.key.weight, layer.cross.value.weight)]
        self.cross_kv = nn.Parameter(torch.cat(cross).detach().clone())
        self.codes = nn.Parameter(codes.detach().clone())
        folded = (head * decoder.norm.weight).detach().clone()
        if normalise == "vocabulary":
            self.heads = nn.ParameterList([folded])
        else:
            spans = zip(level_offsets, codebook_sizes, strict=True)
            self.heads = nn.ParameterList([folded[first : first + size].clone() for first, size in spans])

    def forward(
        self, memory_BSD: Tensor, mask_BS: Tensor, start_BD: Tensor, beams_K: Tensor, index: IndexTensors
    ) -> Retrieved:
        """Search.

        Args:
            memory_BSD: encoded context.
            mask_BS: bool, which positions of it are real.
            start_BD: added to the embedding of the start token.
            beams_K: any int64 vector; its length is the beam width.
            index: the catalogue index and the mask of each request.
        """
        n_rows, n_memory, width = memory_BSD.shape
        n_beams = beams_K.shape[0]
        n_layers = len(self.layers)
        cross = linear(memory_BSD, self.cross_kv).split(width, -1)
        cross_bias = torch.where(mask_BS, 0.0, _HIDDEN)[:, None, None, :]
        keys: list[list[Tensor]] = [[] for _ in range(n_layers)]
        values: list[list[Tensor]] = [[] for _ in range(n_layers)]

        x = (start_BD + self.codes[0])[:, None]
        score_BQ = x.new_zeros(n_rows, 1)
        node_BQ = torch.zeros_like(score_BQ, dtype=torch.long)
        ancestors: list[Tensor] = []
        level_scores: list[Tensor] = []
        for level in range(len(self.codebook_sizes)):
            n_queries = x.shape[1]
            bias = self._self_bias(ancestors, level, n_rows, n_queries, beams_K)
            step_cross_bias = cross_bias.expand(n_rows, self.n_heads, n_queries, n_memory)
            for i, layer in enumerate(self.layers):
                q, k, v = linear(norm(x), layer.qkv).split(width, -1)
                keys[i].append(k)
                values[i].append(v)
                all_keys, all_values = (torch.cat(keys[i], 1), torch.cat(values[i], 1)) if level else (k, v)
                x = x + linear(attend(q, all_keys, all_values, bias, self.n_heads), layer.output)
                crossed = attend(
                    linear(norm(x), layer.cross_query),
                    cross[2 * i],
                    cross[2 * i + 1],
                    step_cross_bias,
                    self.n_heads,
                )
                x = layer.feed_forward(x + linear(crossed, layer.cross_output))

            child_BQC, logp_BQC, open_BQC = self._children(norm(x), level, node_BQ, index)
            candidates = torch.where(open_BQC, score_BQ[..., None] + logp_BQC, CLOSED).flatten(1)
            # Fillers let fewer candidates than beams through; they end under every real score.
            filler = candidates.new_full((n_rows, n_beams), CLOSED)
            score_BK, chosen_BK = torch.cat([candidates, filler], 1).topk(n_beams, -1)
            chosen_BK = chosen_BK.clamp(max=candidates.shape[1] - 1)
            parent_BK = torch.div(chosen_BK, logp_BQC.shape[-1], rounding_mode="floor")
            node_BQ = child_BQC.flatten(1).gather(1, chosen_BK)
            level_scores = [s.gather(1, parent_BK) for s in level_scores]
            level_scores.append(logp_BQC.flatten(1).gather(1, chosen_BK))
            score_BQ = score_BK
            if level + 1 < len(self.codebook_sizes):
                ancestors = [a.gather(1, parent_BK) for a in ancestors]
                if level:
                    ancestors.append(parent_BK)
                x = self.codes[index.tokens[level][node_BQ] + self.level_offsets[level]]
        return Retrieved(node_BQ, score_BQ, torch.stack(level_scores, -1))

    def _self_bias(
        self, ancestors: list[Tensor], level: int, n_rows: int, n_queries: int, beams_K: Tensor
    ) -> Tensor:
        """Relative position bias ``[B, H, Q, n_keys]``, -inf for keys of other beams' paths."""
        here = torch.full_like(beams_K[:1], level)
        near = [
            self.bias(here, torch.full_like(here, step))[..., 0, 0] for step in range(level + 1)
        ]  # [1, H] each
        first = near[0][:, :, None, None].expand(n_rows, self.n_heads, n_queries, 1)
        if not level:
            return first
        # Step s >= 1 holds one key a beam: a beam sees the key of its own ancestor there, and itself at this step.
        own_BQ = [*ancestors, beams_K.expand(n_rows, -1)]
        parts = [first]
        for step, ancestor_BQ in enumerate(own_BQ, start=1):
            mine = ancestor_BQ[:, None, :, None] == beams_K
            parts.append(torch.where(mine, near[step][:, :, None, None], _HIDDEN))
        return torch.cat(parts, -1)

    def _children(
        self, x_BQD: Tensor, level: int, node_BQ: Tensor, index: IndexTensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Children of each beam's node: their node ids, log-probabilities and whether they exist and are allowed."""
        starts = index.child_starts[level]
        child = starts[node_BQ][..., None] + index.slots[level]
        exists = child < starts[node_BQ + 1][..., None]
        child = torch.where(exists, child, 0)
        token = index.tokens[level][child]
        if self.normalise == "vocabulary":
            logits = linear(x_BQD, self.heads[0]).log_softmax(-1)
            logp = logits.gather(-1, token + self.level_offsets[level])
        else:
            logits = linear(x_BQD, self.heads[level]).gather(-1, token)
            logp = torch.where(exists, logits, _HIDDEN).log_softmax(-1)
        allowed = index.allowed[level][index.mask_row_B[:, None, None], child]
        return child, logp, exists & allowed


class RetrievalGraph(nn.Module):
    """A trained `Generator` and its beam search: request tensors in, leaves of the catalogue out."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        config = generator.config
        self.context = copy.copy(generator.context)
        self.context._modules = dict(generator.context._modules)
        self.context.encoder = FusedEncoder(generator.context.encoder)
        if generator.context.query_encoder is not None:
            self.context.query_encoder = FusedEncoder(generator.context.query_encoder)
        self.search = BeamSearch(
            generator.decoder,
            generator.context.codes.weight,
            generator.head.weight,
            config.codebook_sizes,
            config.level_offsets,
        )

    def forward(
        self,
        history_codes: Tensor,
        history_events: Tensor,
        history_gaps: Tensor,
        history_mask: Tensor,
        query_tokens: Tensor | None,
        query_mask: Tensor | None,
        profile: Tensor | None,
        beams: Tensor,
        index: IndexTensors,
    ) -> Retrieved:
        """Retrieve; shapes as in `ContextEncoder.forward` and `BeamSearch.forward`."""
        context: Context = self.context(
            history_codes, history_events, history_gaps, history_mask, query_tokens, query_mask, profile
        )
        return self.search(context.memory_BSD, context.mask_BS, context.start_BD, beams, index)
