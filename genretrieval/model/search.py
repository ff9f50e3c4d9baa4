"""Beam search over the catalogue as one function of tensors, the same for torch and for the exported graph.

The `n_levels` decoder steps are unrolled. Beams are query positions, not batch rows, so the context's keys and values
are computed once for all layers and never copied per beam. A beam's own path is at most `n_levels` codes long: its
keys and values follow the beam from step to step. A step looks only at the children of each beam's node in the
catalogue index, so an ID that does not exist cannot be written; and where scores are normalised over the codes that
exist, the decoder runs for those beams alone that have more than one leaf ahead. Why so:
docs/decisions/0002-decoding.md.

Norm gains are folded into the matrices behind them and the projections of a layer are fused, which is why this module
holds its own copy of the weights: build it from a trained `Generator`, it is not trained itself.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from genretrieval.model.generator import Context, Generator, Request
from genretrieval.model.layers import HIDDEN, Decoder, DecoderLayer, Encoder, EncoderLayer, RelativeBias
from genretrieval.model.moe import FusedMixtureOfExperts, MixtureOfExperts

Normalise = Literal["children", "vocabulary"]

# Below every score that a real beam can reach; the host drops what ends under half of it.
CLOSED = -2e9


class IndexTensors(NamedTuple):
    """A catalogue index and its mask rows, level after level; see `genretrieval.catalogue.graph_inputs`.

    Attributes:
        tokens: `genretrieval.catalogue.token_type` ``[n_nodes_l]``.
        child_starts: int32 ``[n_nodes_(l-1) + 1]``.
        slots: int64 ``[max_children_l]``.
        allowed: bool ``[n_mask_rows, n_nodes_l]``.
        mask_row_B: int64 ``[B]``, the mask row of each request.
        closed: int64 ``[B, E_l]`` twice, parents and which of their children each request must not enter; see
            `genretrieval.catalogue.closed_inputs`. None where no request has any.
    """

    tokens: list[Tensor]
    child_starts: list[Tensor]
    slots: list[Tensor]
    allowed: list[Tensor]
    mask_row_B: Tensor
    closed: list[tuple[Tensor, Tensor]] | None = None


class Retrieved(NamedTuple):
    """The best leaves of each request, best first.

    Attributes:
        leaves_BK: int64, leaf ids; meaningless where the score is `CLOSED` or below.
        scores_BK: float32, summed log-probability of the codes.
        level_scores_BKL: float32, its parts.
        user_BE: float32, what the dense head compares item vectors with; None for a model without one.
    """

    leaves_BK: Tensor
    scores_BK: Tensor
    level_scores_BKL: Tensor
    user_BE: Tensor | None = None


def attend(q_BQD: Tensor, k_BSD: Tensor, v_BSD: Tensor, bias_BHQS: Tensor, n_heads: int) -> Tensor:
    """Unscaled multi-head attention; in an export the native ONNX operator.

    That operator repeats a bias over rows and heads, but not over queries.
    """
    if torch.onnx.is_in_onnx_export():
        out = torch.onnx.ops.attention(
            q_BQD, k_BSD, v_BSD, attn_mask=bias_BHQS, scale=1.0, q_num_heads=n_heads, kv_num_heads=n_heads
        )
        return out[0] if isinstance(out, tuple) else out
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q_BQD, k_BSD, v_BSD))
    return ((q @ k.transpose(-1, -2) + bias_BHQS).softmax(-1) @ v).transpose(1, 2).flatten(2)


def attend_path(q_BQHE: Tensor, keys: list[Tensor], values: list[Tensor], bias_PH: Tensor) -> Tensor:
    """Unscaled multi-head attention of each beam to the P codes on its own path: ``[B * Q, D]``.

    A path is so short that one product a beam and head would cost more to start than to compute, hence elementwise; and
    code by code, so that what is at hand stays in the caches.

    Args:
        q_BQHE: queries.
        keys: of each code on the path, ``[B, Q, H, E]``, or ``[B, 1, H, E]`` where all beams of a row share it.
        values: as `keys`.
        bias_PH: of each code and head.
    """
    scores_BQHP = torch.cat([(q_BQHE * key).sum(-1, keepdim=True) for key in keys], -1) + bias_PH.T
    weights = scores_BQHP.softmax(-1).split(1, -1)
    out_BQHE = weights[0] * values[0]
    for weight_BQH1, value in zip(weights[1:], values[1:], strict=True):
        out_BQHE = out_BQHE + weight_BQH1 * value
    return out_BQHE.flatten(2).flatten(0, 1)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without its gain."""
    # The ones are spelled out because an export without them builds a tensor of x's full shape at every call.
    return nn.functional.rms_norm(x, x.shape[-1:], torch.ones(x.shape[-1], device=x.device), eps=1e-6)


def add_linear(x_ND: Tensor, y_NE: Tensor, weight_ED: Tensor) -> Tensor:
    """`x` plus a linear map of `y`, one operator in the graph."""
    return torch.addmm(x_ND, y_NE, weight_ED)


def take(table_X: Tensor, index: Tensor) -> Tensor:
    """``table_X[index]``; written so, the export is GatherElements, five times faster than Gather on single numbers."""
    return table_X.gather(0, index.flatten()).view(index.shape)


def _rows(x_BQHE: Tensor, index_N: Tensor) -> Tensor:
    """Those of all B * Q rows, for as many beams again."""
    return x_BQHE.flatten(0, 1).index_select(0, index_N).unflatten(0, (x_BQHE.shape[0], -1))


def _frozen(weight: Tensor) -> nn.Parameter:
    """A copy of its own, in memory order."""
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))


class FusedLayer(nn.Module):
    """One layer's matrices with the gain of the norm before them folded in."""

    def __init__(self, layer: EncoderLayer | DecoderLayer) -> None:
        super().__init__()
        gain = layer.attention_norm.weight
        attention = layer.attention
        self.query = _frozen(attention.query.weight * gain)
        self.key = _frozen(attention.key.weight * gain)
        self.value = _frozen(attention.value.weight * gain)
        self.output = _frozen(attention.output.weight.T)
        self.mixture: FusedMixtureOfExperts | None = None
        if isinstance(layer.feed_forward, MixtureOfExperts):
            self.mixture = FusedMixtureOfExperts(layer.feed_forward, layer.feed_forward_norm.weight)
        else:
            self.inner = _frozen(layer.feed_forward.inner.weight * layer.feed_forward_norm.weight)
            self.outer = _frozen(layer.feed_forward.outer.weight.T)
        if isinstance(layer, DecoderLayer):
            self.cross_query = _frozen(layer.cross.query.weight * layer.cross_norm.weight)
            self.cross_output = _frozen(layer.cross.output.weight.T)

    def projections(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value. Three products, because to cut one apart again costs more than it saves."""
        normed = norm(x_ND)
        return linear(normed, self.query), linear(normed, self.key), linear(normed, self.value)

    def feed_forward(self, x_ND: Tensor) -> Tensor:
        """Add the feed-forward's output to `x`."""
        if self.mixture is not None:
            return x_ND + self.mixture(norm(x_ND))
        return add_linear(x_ND, linear(norm(x_ND), self.inner).relu(), self.outer)


def fused_layers(stack: FusedEncoder | BeamSearch) -> list[FusedLayer]:
    """The layers of `stack`; a module list by itself does not say what it holds."""
    return [layer for layer in stack.layers if isinstance(layer, FusedLayer)]


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
        n_positions = x_BSD.shape[1]
        positions = torch.arange(n_positions, device=x_BSD.device)
        bias = self.bias(positions, positions)
        if self.causal:
            # Padding stands on the right, so a real position never sees it.
            bias = torch.where(positions[None, :] > positions[:, None], HIDDEN, bias)
        else:
            bias = bias + torch.where(mask_BS, 0.0, HIDDEN)[:, None, None, :]
        x_ND = x_BSD.flatten(0, 1)
        for layer in fused_layers(self):
            q, k, v = (part.unflatten(0, (-1, n_positions)) for part in layer.projections(x_ND))
            mixed = attend(q, k, v, bias, self.n_heads)
            x_ND = layer.feed_forward(add_linear(x_ND, mixed.flatten(0, 1), layer.output))
        return self.norm(x_ND).unflatten(0, (-1, n_positions))


class Undecided(NamedTuple):
    """Beams with several leaves ahead.

    The others are decided: a code that is alone under its prefix has log-probability 0, and nothing has to be computed
    to write it.

    Attributes:
        beams_BQ: int64, their numbers. A row with fewer than another has others among them, decided or dead. Those may
            be given the path of any beam: over a single child the softmax is 1 in any case, and the dead stay dead.
        place_BK: int64, where each beam stands among them, Q for one that does not.
    """

    beams_BQ: Tensor
    place_BK: Tensor

    def of(self, x_BK: Tensor) -> Tensor:
        """What these have of `x`, ``[B, Q]``."""
        return x_BK.gather(1, self.beams_BQ)

    def place(self, beam_BQ: Tensor) -> Tensor:
        """Where some beams stand among these, ``[B, Q]``; anywhere for those that do not."""
        return self.place_BK.gather(1, beam_BQ).clamp(max=self.beams_BQ.shape[1] - 1)

    def spread(self, logp_BQC: Tensor, row_B1: Tensor) -> Tensor:
        """From these to all beams, ``[B, K, C]``; 0 for the others."""
        rows_NC = torch.cat([logp_BQC, torch.zeros_like(logp_BQC[:, :1])], 1).flatten(0, 1)
        row_N = (self.place_BK + row_B1 * (self.beams_BQ.shape[1] + 1)).flatten()
        return rows_NC.index_select(0, row_N).unflatten(0, self.place_BK.shape)


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
        dense: float ``[D + 1, D]``, `user` and `gate` of the dense head, where there is one.
    """

    def __init__(
        self,
        decoder: Decoder,
        codes: Tensor,
        head: Tensor,
        codebook_sizes: tuple[int, ...],
        level_offsets: tuple[int, ...],
        normalise: Normalise = "children",
        dense: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dense = _frozen(dense * decoder.norm.weight) if dense is not None else None
        self.normalise = normalise
        self.codebook_sizes = codebook_sizes
        self.level_offsets = level_offsets
        self.n_heads = decoder.layers[0].attention.n_heads
        self.bias: RelativeBias = decoder.bias
        self.layers = nn.ModuleList(FusedLayer(layer) for layer in decoder.layers)
        cross = [w for layer in decoder.layers for w in (layer.cross.key.weight, layer.cross.value.weight)]
        self.cross_kv = nn.ParameterList(_frozen(weight) for weight in cross)
        self.codes = _frozen(codes)
        folded = head * decoder.norm.weight
        if normalise == "vocabulary":
            self.heads = nn.ParameterList([_frozen(folded)])
        else:
            spans = zip(level_offsets, codebook_sizes, strict=True)
            self.heads = nn.ParameterList([_frozen(folded[first : first + size]) for first, size in spans])

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
        n_rows, n_memory = memory_BSD.shape[:2]
        n_beams = beams_K.shape[0]
        row_B1 = torch.arange(n_rows, device=memory_BSD.device)[:, None]
        memory_ND = memory_BSD.flatten(0, 1)
        memory = [linear(memory_ND, weight).unflatten(0, (n_rows, -1)) for weight in self.cross_kv]
        hidden_BQ1S = torch.where(mask_BS, 0.0, HIDDEN)[:, None, None, :]
        # Layer by layer the keys and values of the codes on each path: first the start, which all beams share.
        paths: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]

        x_ND = start_BD + self.codes[0]
        score_BK = x_ND.new_zeros(n_rows, 1)
        node_BK = torch.zeros_like(score_BK, dtype=torch.long)
        undecided: Undecided | None = None
        level_scores: list[Tensor] = []
        user_BF: Tensor | None = None
        for level in range(len(self.codebook_sizes)):
            n_queries = node_BK.shape[1] if undecided is None else undecided.beams_BQ.shape[1]
            cross_bias = hidden_BQ1S.expand(n_rows, 1, n_queries, n_memory)
            for i, layer in enumerate(fused_layers(self)):
                mixed_ND = self._attend_path(x_ND, layer, paths[i], n_rows)
                x_ND = add_linear(x_ND, mixed_ND, layer.output)
                q_BQD = linear(norm(x_ND), layer.cross_query).unflatten(0, (n_rows, n_queries))
                crossed = attend(q_BQD, memory[2 * i], memory[2 * i + 1], cross_bias, self.n_heads)
                x_ND = layer.feed_forward(add_linear(x_ND, crossed.flatten(0, 1), layer.cross_output))

            if self.dense is not None and not level:
                user_BF = linear(norm(x_ND), self.dense)
            state_BQD = norm(x_ND).unflatten(0, (n_rows, n_queries))
            child_BKC, exists_BKC = self._children(level, node_BK, index)
            if undecided is None:
                logp_BKC = self._logp(state_BQD, level, child_BKC, exists_BKC, index)
            else:
                asked = self._children(level, undecided.of(node_BK), index)
                logp_BKC = undecided.spread(self._logp(state_BQD, level, *asked, index), row_B1)
            open_BKC = self._open(level, child_BKC, exists_BKC, index)
            candidates = torch.where(open_BKC, score_BK[..., None] + logp_BKC, CLOSED).flatten(1)
            # Fillers let fewer candidates than beams through; they end under every real score.
            filler = candidates.new_full((n_rows, n_beams), CLOSED)
            filled = torch.cat([candidates, filler], 1)
            if index.closed is not None:
                live_BK = torch.where(score_BK > CLOSED / 2, node_BK, -2)
                filled = self._close(filled, live_BK, child_BKC.shape[-1], *index.closed[level])
            score_BK, chosen_BK = filled.topk(n_beams, -1)
            chosen_BK = chosen_BK.clamp(max=candidates.shape[1] - 1)
            parent_BK = torch.div(chosen_BK, logp_BKC.shape[-1], rounding_mode="floor")
            node_BK = child_BKC.flatten(1).gather(1, chosen_BK)
            level_scores = [s.gather(1, parent_BK) for s in level_scores]
            level_scores.append(logp_BKC.flatten(1).gather(1, chosen_BK))
            if level + 1 < len(self.codebook_sizes):
                node_BQ, parent_BQ, before = node_BK, parent_BK, undecided
                if self.normalise == "children":
                    undecided = self._undecided(level, node_BK, score_BK > CLOSED / 2, index)
                    node_BQ, parent_BQ = undecided.of(node_BK), undecided.of(parent_BK)
                if before is not None:
                    parent_BQ = before.place(parent_BQ)
                x_ND = nn.functional.embedding(self._tokens(level, node_BQ, index).flatten(), self.codes)
                parent_N = (parent_BQ + row_B1 * n_queries).flatten()
                paths = [[path[0], *((_rows(k, parent_N), _rows(v, parent_N)) for k, v in path[1:])] for path in paths]
        return Retrieved(node_BK, score_BK, torch.stack(level_scores, -1), user_BF)

    @staticmethod
    def _undecided(level: int, node_BK: Tensor, live_BK: Tensor, index: IndexTensors) -> Undecided:
        """Live beams at nodes of a level that several leaves are under."""
        first, last = node_BK, node_BK + 1
        for starts in index.child_starts[level + 1 :]:
            first, last = take(starts, first).long(), take(starts, last).long()
        several_BK = (last - first > 1) & live_BK
        n_queries = cast(int, several_BK.sum(1).amax(0).clamp(min=1).item())
        # What an export has to know of a size that it cannot see.
        torch._check(n_queries >= 1)
        torch._check(n_queries <= node_BK.shape[1])
        beams_BQ = several_BK.float().topk(n_queries).indices
        place_BK = torch.full_like(node_BK, n_queries)
        numbers_BQ = torch.arange(beams_BQ.shape[1], device=beams_BQ.device).expand(beams_BQ.shape)
        return Undecided(beams_BQ, place_BK.scatter(1, beams_BQ, numbers_BQ))

    def _attend_path(self, x_ND: Tensor, layer: FusedLayer, path: list[tuple[Tensor, Tensor]], n_rows: int) -> Tensor:
        """Self-attention of a layer to each beam's own path, which this level's keys and values join."""
        q, k, v = (
            part.unflatten(0, (n_rows, -1)).unflatten(-1, (self.n_heads, -1)) for part in layer.projections(x_ND)
        )
        path.append((k, v))
        if len(path) == 1:
            # The only code in sight gets all the weight.
            return v.flatten(2).flatten(0, 1)
        positions = torch.arange(len(path), device=x_ND.device)
        bias_PH = self.bias(positions[-1:], positions)[0, :, 0].T
        return attend_path(q, [key for key, _ in path], [value for _, value in path], bias_PH)

    @staticmethod
    def _close(filled_BX: Tensor, live_BQ: Tensor, n_slots: int, parent_BE: Tensor, child_BE: Tensor) -> Tensor:
        """Take what a request must not enter out of its candidates, which the fillers follow.

        Live beams stand at different nodes, so at most one matches: its number, from 1, is a sum, faster than a search
        for it. A row times a matrix, because a matrix times a column takes onnxruntime ten times as long.
        """
        n_beams = live_BQ.shape[1]
        number_Q = torch.arange(1, n_beams + 1, dtype=torch.float32, device=live_BQ.device)
        # Half a beam more, because a product need not be exact in every precision.
        beam_BE = (number_Q @ (live_BQ[..., None] == parent_BE[:, None]).float() + 0.5).long()
        # What no beam stands above closes a filler, which is closed anyway.
        place_BE = torch.where(beam_BE > 0, (beam_BE - 1) * n_slots + child_BE, n_beams * n_slots)
        return filled_BX.scatter(1, place_BE, CLOSED)

    def _tokens(self, level: int, node_BQ: Tensor, index: IndexTensors) -> Tensor:
        """Flat token of each node."""
        return take(index.tokens[level], node_BQ).long() + self.level_offsets[level]

    def _children(self, level: int, node_BK: Tensor, index: IndexTensors) -> tuple[Tensor, Tensor]:
        """Node ids of the children of each node, ``[B, K, C]``, and whether they exist."""
        starts = index.child_starts[level]
        end_BK1 = take(starts, node_BK + 1)[..., None].long()
        child_BKC = take(starts, node_BK)[..., None].long() + index.slots[level]
        # Slots past a node's last child look at that child again, and count for nothing.
        return torch.minimum(child_BKC, end_BK1 - 1), child_BKC < end_BK1

    def _open(self, level: int, child_BKC: Tensor, exists_BKC: Tensor, index: IndexTensors) -> Tensor:
        """Whether children exist and the mask of their request allows them."""
        allowed = index.allowed[level]
        row_start = index.mask_row_B * allowed.shape[1]
        return exists_BKC & take(allowed.flatten(), child_BKC + row_start[:, None, None])

    def _logp(
        self, state_BQD: Tensor, level: int, child_BQC: Tensor, exists_BQC: Tensor, index: IndexTensors
    ) -> Tensor:
        """Log-probability of each child, ``[B, Q, C]``."""
        token_BQC = take(index.tokens[level], child_BQC).long()
        if self.normalise == "vocabulary":
            logits = linear(state_BQD, self.heads[0]).log_softmax(-1)
            return logits.gather(-1, token_BQC + self.level_offsets[level])
        logits = linear(state_BQD, self.heads[level]).gather(-1, token_BQC)
        return torch.where(exists_BQC, logits, HIDDEN).log_softmax(-1)


class RetrievalGraph(nn.Module):
    """A trained `Generator` and its beam search: request tensors in, leaves of the catalogue out."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        config = generator.config
        self.context = copy.copy(generator.context)
        self.context._modules = dict(generator.context._modules)
        self.context.encoder = FusedEncoder(cast(Encoder, generator.context.encoder))
        if generator.context.query_encoder is not None:
            self.context.query_encoder = FusedEncoder(cast(Encoder, generator.context.query_encoder))
        self.dense = generator.dense
        self.search = BeamSearch(
            generator.decoder,
            generator.context.codes.weight,
            generator.head.weight,
            config.codebook_sizes,
            config.level_offsets,
            dense=torch.cat([generator.dense.user.weight, generator.dense.gate.weight]) if generator.dense else None,
        )

    def forward(self, request: Request, beams: Tensor, index: IndexTensors) -> Retrieved:
        """Retrieve for a batch of requests; the rest as in `BeamSearch.forward`."""
        context: Context = self.context(request)
        found: Retrieved = self.search(context.memory_BSD, context.mask_BS, context.start_BD, beams, index)
        if self.dense is None or found.user_BE is None:
            return found
        return found._replace(user_BE=self.dense.joined(found.user_BE, context.seen_BE))
