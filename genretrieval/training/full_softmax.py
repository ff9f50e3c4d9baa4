"""Cross-entropy over the items of a whole catalogue."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

LOSS_ROWS = 256  # logits held at once: LOSS_ROWS x n_items floats stay near the cache


def full_softmax_loss(hidden_ND: Tensor, vectors_ID: Tensor, target_N: Tensor, bias_I: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of targets among all items, without ever holding ``[n, n_items]`` logits.

    Products are in bfloat16 under an autocast to it, in float32 otherwise; softmax and sums always are in float32.

    Args:
        hidden_ND: float ``[n, D]``; a logit is its product with an item's vector.
        vectors_ID: float ``[n_items, D]``.
        target_N: int64 ``[n]``, rows of `vectors_ID`.
        bias_I: float ``[n_items]``, added to logits; no gradient flows to it.

    Returns:
        Scalar, nats an item, differentiable in `hidden_ND` and `vectors_ID`.
    """
    bias = torch.zeros(len(vectors_ID), device=vectors_ID.device) if bias_I is None else bias_I
    autocast = torch.is_autocast_enabled(hidden_ND.device.type)
    dtype = torch.get_autocast_dtype(hidden_ND.device.type) if autocast else torch.float32
    return cast(Tensor, _FullSoftmaxLoss.apply(hidden_ND.float(), vectors_ID.float(), target_N, bias, dtype))


class _FullSoftmaxLoss(torch.autograd.Function):
    """Loss and gradients in one pass.

    The gradient of a row's logits is softmax minus one-hot, so each chunk of rows finishes its loss and its gradients
    while its logits are in cache; twice as fast on a CPU as a product followed by `cross_entropy`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, vectors_ID: Tensor, target_N: Tensor, bias_I: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Products in `dtype`, softmax and sums in float32."""
        n = len(hidden_ND)
        hidden, vectors = hidden_ND.to(dtype), vectors_ID.to(dtype)
        grad_hidden = torch.empty_like(hidden_ND, dtype=torch.float32)
        grad_vectors = torch.zeros_like(vectors_ID)
        loss = hidden_ND.new_zeros(())
        for first in range(0, n, LOSS_ROWS):
            rows = slice(first, first + LOSS_ROWS)
            log_p = torch.log_softmax((hidden[rows] @ vectors.T).float() + bias_I, dim=1)
            target = target_N[rows, None]
            loss -= log_p.gather(1, target).sum()
            grad = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)).to(dtype)
            grad_hidden[rows] = grad @ vectors
            grad_vectors += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden / n, grad_vectors / n)
        return loss / n

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scales what `forward` has computed."""
        grad_hidden, grad_vectors = ctx.saved_tensors
        return grad_hidden * grad_outputs[0], grad_vectors * grad_outputs[0], None, None, None
