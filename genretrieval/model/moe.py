"""A sparse mixture of experts in place of a feed-forward layer, balanced without an auxiliary loss.

A router scores the experts for every token by a sigmoid; the `top_k` best of score + bias work on it, weighted by their
scores alone (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). The bias learns from loads, not from gradients (Wang et al.
2024, arXiv 2408.15664), so that balance costs the main loss nothing. OneMall's decoder (arXiv 2601.21770) is one use.

Tensor names as in `genretrieval.model.layers`, where E is the width of an attention head, and: N tokens, X experts,
J experts chosen for a token, M = N * J rows, one for each token and expert chosen for it. F is the width of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import linear

from genretrieval.errors import InvalidInputError

# Keeps gates finite where every chosen score underflows; below what any other float32 sum of scores would notice.
_TINY = 1e-20


class Routing(NamedTuple):
    """Who works on what.

    Attributes:
        chosen_NJ: int64, the experts of each token, highest score + bias first.
        gate_NJ: float32, their weights; of each token they sum to 1.
        load_X: int64, tokens of each expert; they sum to N * J.
    """

    chosen_NJ: Tensor
    gate_NJ: Tensor
    load_X: Tensor


def route(logits_NX: Tensor, bias_X: Tensor, top_k: int) -> Routing:
    """Choose by ``sigmoid(logits) + bias``, weigh by ``sigmoid(logits)``, made to sum to 1 over the chosen.

    Args:
        logits_NX: float32, output of the router.
        bias_X: float32.
        top_k: experts of a token.
    """
    scores_NX = logits_NX.sigmoid()
    chosen_NJ = _best(scores_NX + bias_X, top_k)
    picked_NJ = scores_NX.gather(-1, chosen_NJ)
    gate_NJ = picked_NJ / (picked_NJ.sum(-1, keepdim=True) + _TINY)
    experts = torch.arange(len(bias_X), device=bias_X.device)
    return Routing(chosen_NJ, gate_NJ, (chosen_NJ.flatten() == experts[:, None]).sum(1))


def _best(scores_NX: Tensor, n: int) -> Tensor:
    """Indices of the `n` highest scores of each row, best first; of equal ones the lower index first."""
    if torch.onnx.is_in_onnx_export():
        # ONNX says how TopK breaks ties, torch does not; and a stable sort has no translation.
        return scores_NX.topk(n, -1).indices
    return scores_NX.sort(dim=-1, descending=True, stable=True).indices[:, :n]


def mix(x_ND: Tensor, routing: Routing, inner: Iterable[Tensor], outer: Iterable[Tensor]) -> Tensor:
    """Sum over each token's experts of gate times feed-forward, one product an expert and matrix.

    Args:
        x_ND: tokens.
        routing: of the same tokens.
        inner: X matrices ``[F, D]``.
        outer: X matrices ``[D, F]``.

    Returns:
        Float ``[N, D]``.
    """
    n_chosen = routing.chosen_NJ.shape[1]
    order_M = routing.chosen_NJ.flatten().argsort()
    # A gate is never negative, so gate * relu(y) = relu(gate * y): it rides on the copy that each expert needs anyway.
    copies_MD = (x_ND[:, None] * routing.gate_NJ[..., None]).flatten(0, 1)
    parts = _split(copies_MD.index_select(0, order_M), routing.load_X)
    sorted_MD = torch.cat([linear(linear(x, w).relu(), v) for x, w, v in zip(parts, inner, outer, strict=True)])
    # Gathered back, then added: adding by scattering leaves the order of the terms, and so their rounding, to threads.
    mixed_ND, *others = sorted_MD.index_select(0, order_M.argsort()).unflatten(0, (-1, n_chosen)).unbind(1)
    for other_ND in others:
        mixed_ND = mixed_ND + other_ND
    return mixed_ND


def _split(rows_MD: Tensor, load_X: Tensor) -> Sequence[Tensor]:
    """Rows, sorted by expert, of each expert."""
    sizes = load_X.tolist()
    if not torch.onnx.is_in_onnx_export():
        return rows_MD.split(sizes)
    # One operator that reads the loads as they are; torch's split is translated to several for each expert.
    shapes = [(size, rows_MD.shape[1]) for size in sizes]
    dtypes = [rows_MD.dtype] * len(sizes)
    return torch.onnx.ops.symbolic_multi_out(
        "Split", (rows_MD, load_X), {"axis": 0}, dtypes=dtypes, shapes=shapes, version=18
    )


class MixtureOfExperts(nn.Module):
    """Experts in the form of `genretrieval.model.layers.FeedForward`, of which each token uses `top_k`.

    While training, `forward` counts the tokens of each expert. Call `update_balance` after every optimizer step, on
    every process; it reads the counts, of however many forward passes, and moves the router's bias.

    Args:
        d_model: width of a token.
        d_ff: width of one expert; ``top_k * d_ff`` of a dense layer would cost as much.
        n_experts: experts to choose from.
        top_k: experts of a token. A single one would always weigh 1, which teaches a router nothing, hence at least 2.
        balance_rate: what the bias of an expert without tokens gains in a step; scores lie in (0, 1).

    Raises:
        InvalidInputError: `top_k` or `balance_rate` is out of range.
    """

    router_bias: Tensor

    def __init__(self, d_model: int, d_ff: int, n_experts: int, top_k: int, balance_rate: float) -> None:
        super().__init__()
        if not 2 <= top_k <= n_experts:
            raise InvalidInputError(f"top_k is {top_k} of {n_experts} experts; give 2 or more, and at most all of them")
        if balance_rate < 0:
            raise InvalidInputError(f"balance_rate is {balance_rate}; below 0 it would feed the fullest expert")
        self.top_k = top_k
        self.balance_rate = balance_rate
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.inner = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.outer = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.register_buffer("router_bias", torch.zeros(n_experts))
        # No buffer: DistributedDataParallel would overwrite every process's counts with those of the first.
        self._load: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix as `torch.nn.Linear` does; the router starts without a bias."""
        self.router.reset_parameters()
        for stack in (self.inner, self.outer):
            bound = stack.shape[-1] ** -0.5
            nn.init.uniform_(stack, -bound, bound)
        nn.init.zeros_(self.router_bias)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """``[..., D]`` to ``[..., D]``.

        Args:
            x: tokens.
            counted: bool ``[...]``, tokens that count as load while training; all by default. Padding should not: how
                much there is of it depends on how requests are batched.
        """
        x_ND = x.reshape(-1, x.shape[-1])
        # Which experts a token gets must not depend on the rounding of bf16.
        with torch.autocast(x.device.type, enabled=False):
            logits_NX = linear(x_ND.float(), self.router.weight.float())
            routing = route(logits_NX, self.router_bias, self.top_k)
        if self.training:
            load_X = routing.load_X
            if counted is not None:
                load_X = torch.bincount(routing.chosen_NJ[counted.reshape(-1)].flatten(), minlength=len(load_X))
            self._load = load_X if self._load is None else self._load + load_X
        # Taken apart by one operator: slices would each put a gradient as large as the stack together.
        return mix(x_ND, routing, self.inner.unbind(), self.outer.unbind()).view(x.shape)

    @torch.no_grad()
    def update_balance(self) -> Tensor:
        """Move the bias against the load since the last call: ``bias -= rate * (load / mean load - 1)``.

        Of the two rules of arXiv 2408.15664 the proportional one: it comes to rest when loads are even, where a step
        of ``rate * sign(mean load - load)`` keeps jumping, and it leaves the mean of the biases alone.

        With `torch.distributed` initialised, loads are summed over all processes here, and nowhere else; all of them
        must call, and all get the same bias.

        Returns:
            int64 ``[X]``, the load of each expert since the last call; without any token no bias moves.
        """
        load_X, self._load = self._load, None
        if load_X is None:
            load_X = torch.zeros_like(self.router_bias, dtype=torch.long)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(load_X)
        if load_X.any():
            self.router_bias -= self.balance_rate * (load_X / load_X.float().mean() - 1)
        return load_X


def update_balance(model: nn.Module) -> dict[str, Tensor]:
    """`MixtureOfExperts.update_balance` of every mixture in `model`: loads by module name."""
    mixtures = ((name, module) for name, module in model.named_modules() if isinstance(module, MixtureOfExperts))
    return {name: mixture.update_balance() for name, mixture in mixtures}


class FusedMixtureOfExperts(nn.Module):
    """A `MixtureOfExperts` for inference and export, the gain of the norm before it folded into its matrices.

    Tokens are sorted by expert, so each expert multiplies only its own: one Split and two Gemm an expert in the graph,
    all experts in it whatever it was traced with. What else was tried, and times: benchmarks/moe_decode.py.

    Args:
        mixture: a trained mixture.
        gain_D: gain of the norm.
    """

    router_bias: Tensor

    def __init__(self, mixture: MixtureOfExperts, gain_D: Tensor) -> None:
        super().__init__()
        self.top_k = mixture.top_k
        self.router = _frozen(mixture.router.weight * gain_D)
        self.register_buffer("router_bias", mixture.router_bias.clone())
        # A matrix each, so that the graph multiplies by constants, which onnxruntime packs when a session is opened.
        self.inner = nn.ParameterList(_frozen(weight) for weight in mixture.inner * gain_D)
        self.outer = nn.ParameterList(_frozen(weight) for weight in mixture.outer)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalised tokens, without the gain, to the sum of their experts, ``[N, D]``."""
        routing = route(linear(x_ND, self.router), self.router_bias, self.top_k)
        return mix(x_ND, routing, self.inner, self.outer)


def _frozen(weight: Tensor) -> nn.Parameter:
    """A copy of its own."""
    return nn.Parameter(weight.detach().clone())
