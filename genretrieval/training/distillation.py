"""Self-distillation and regularisation losses over the codes of one level, as pure functions.

The same generator sees a request with and without what it is to learn to do without (keywords, a better attempt, ...);
what it says with it teaches what it says without it.

Logits are float32 (or float64) ``[N, V]``: N targets, V codes of a level. A code that does not exist under a target's
true prefix has a logit of -inf, in every argument at once; every target has one code or more that exists. Such codes
add exactly 0 to a loss and get a gradient of exactly 0, and a target whose prefix leaves one code costs nothing. Losses
are scalars, means over the N >= 1 targets, so that levels can be averaged as `NextItemObjective` does; what is said of
their range holds up to rounding.

Settings out of range raise `RecipeError`; tensors that do not belong together are faults of ours and fail an `assert`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genretrieval.errors import RecipeError


def temperature_kl(teacher_logits_NV: Tensor, student_logits_NV: Tensor, temperature: float) -> Tensor:
    """Distillation at a temperature: ``tau^2 * mean_n KL(softmax(T_n / tau) || softmax(S_n / tau))``.

    OneSearch-V2 (arXiv 2603.24422), which uses tau 1, as Hinton et al. 2015. The factor tau^2 keeps the size of the
    gradient when tau changes.

    Args:
        teacher_logits_NV: float ``[N, V]``; no gradient flows into them.
        student_logits_NV: float ``[N, V]``.
        temperature: tau, above 0. Above 1 the teacher's unlikely codes count for more.

    Returns:
        Float scalar, 0 or more.

    Raises:
        RecipeError: the temperature is not a finite number above 0.
    """
    check_positive("temperature", temperature)
    exists_NV = _support(teacher_logits_NV, student_logits_NV)
    log_p_NV, p_NV = _distribution(teacher_logits_NV.detach() / temperature, exists_NV)
    log_q_NV, _ = _distribution(student_logits_NV / temperature, exists_NV)
    return temperature**2 * (p_NV * (log_p_NV - log_q_NV)).sum(1).mean()


def clipped_forward_kl(teacher_logits_NV: Tensor, student_logits_NV: Tensor, clip: float) -> Tensor:
    """Forward KL, each code's share of it cut off: ``mean_n sum_v min(p_T log(p_T / p_S), clip)``.

    Search-E1 (arXiv 2605.22511). The clip is per entry of the vocabulary: one code of which the student knows nothing
    adds no more than `clip`, and gets no gradient of its own while it does. Entries below 0 are not clipped, so that a
    clipped loss may be negative; it equals the KL divergence where no entry reaches the clip. The paper does not give
    its value.

    Args:
        teacher_logits_NV: float ``[N, V]``; no gradient flows into them.
        student_logits_NV: float ``[N, V]``.
        clip: most that one code may add, in nats, above 0.

    Returns:
        Float scalar.

    Raises:
        RecipeError: the clip is not a finite number above 0.
    """
    check_positive("clip", clip)
    exists_NV = _support(teacher_logits_NV, student_logits_NV)
    log_p_NV, p_NV = _distribution(teacher_logits_NV.detach(), exists_NV)
    log_q_NV, _ = _distribution(student_logits_NV, exists_NV)
    return (p_NV * (log_p_NV - log_q_NV)).clamp(max=clip).sum(1).mean()


def jensen_shannon(teacher_logits_NV: Tensor, student_logits_NV: Tensor, top_k: int | None = None) -> Tensor:
    """Jensen-Shannon divergence ``mean_n 1/2 KL(p || m) + 1/2 KL(q || m)``, ``m = (p + q) / 2``.

    SD-Search (arXiv 2605.18299). It is symmetric in value and at most log 2, so that no confident target dominates;
    gradients flow into the student alone.

    Args:
        teacher_logits_NV: float ``[N, V]``; no gradient flows into them.
        student_logits_NV: float ``[N, V]``.
        top_k: compare over the teacher's `top_k` most likely codes only (of equal ones the lower code), both
            distributions renormalised over them; at least 2, as over one code all agree. None compares over all.

    Returns:
        Float scalar in ``[0, log 2]``.

    Raises:
        RecipeError: `top_k` is below 2.
    """
    if top_k is not None and top_k < 2:
        raise RecipeError(f"top_k is {top_k}; give 2 or more codes to compare, or leave it out to compare all")
    exists_NV = _support(teacher_logits_NV, student_logits_NV)
    teacher_logits_NV = teacher_logits_NV.detach()
    if top_k is not None:
        kept_NK = teacher_logits_NV.sort(stable=True, dim=1, descending=True).indices[:, :top_k]
        teacher_logits_NV, student_logits_NV, exists_NV = (
            x_NV.gather(1, kept_NK) for x_NV in (teacher_logits_NV, student_logits_NV, exists_NV)
        )
    log_p_NV, p_NV = _distribution(teacher_logits_NV, exists_NV)
    log_q_NV, q_NV = _distribution(student_logits_NV, exists_NV)
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    return (p_NV * (log_p_NV - log_m_NV) + q_NV * (log_q_NV - log_m_NV)).sum(1).mean() / 2


def symmetric_kl(first_logits_NV: Tensor, second_logits_NV: Tensor) -> Tensor:
    """R-Drop's consistency of two passes under different dropout: ``mean_n 1/2 [KL(p1 || p2) + KL(p2 || p1)]``.

    Liang et al. 2021 (arXiv 2106.14448); OneSearch-V2 weighs it 0.5.

    Args:
        first_logits_NV: float ``[N, V]``.
        second_logits_NV: float ``[N, V]``. Gradients flow into both.

    Returns:
        Float scalar, 0 or more.
    """
    exists_NV = _support(first_logits_NV, second_logits_NV)
    log_p_NV, p_NV = _distribution(first_logits_NV, exists_NV)
    log_q_NV, q_NV = _distribution(second_logits_NV, exists_NV)
    # The two divergences added: sum_v (p1 - p2) (log p1 - log p2), no term of which is negative.
    return ((p_NV - q_NV) * (log_p_NV - log_q_NV)).sum(1).mean() / 2


def fgm_perturbation(gradient: Tensor, epsilon: float) -> Tensor:
    """Fast gradient method: ``delta = epsilon * g / ||g||_2``, the step on embeddings that raises the loss fastest.

    Miyato et al. 2017 (arXiv 1605.07725); OneSearch-V2 uses epsilon 0.6. Added to the embedding table for a second
    pass, whose loss is ``L_adv``, and taken off again.

    Args:
        gradient: of the loss by the embeddings: float, any shape, finite. The norm is taken over all of it, after
            division by its largest entry, which no small or large gradient under- or overflows.
        epsilon: length of the step, above 0, in the embeddings' units.

    Returns:
        Float of the gradient's shape, without gradient; zeros for a gradient of zeros.

    Raises:
        RecipeError: epsilon is not a finite number above 0.
    """
    check_positive("epsilon", epsilon)
    gradient = gradient.detach()
    largest = gradient.abs().max()
    scaled = gradient / largest.where(largest > 0, 1)
    # One entry is 1 in size unless all are 0: the norm is 1 or more, or it is 0.
    return epsilon * scaled / scaled.norm().clamp(min=1)


def focal_cross_entropy(logits_NV: Tensor, codes_N: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss ``mean_n -alpha (1 - p)^gamma log p``, p the probability of the true code.

    Lin et al. 2017 (arXiv 1708.02002); OneSearch-V2 uses alpha 2, gamma 3. ``gamma = 0, alpha = 1`` is cross-entropy.

    Args:
        logits_NV: float ``[N, V]``.
        codes_N: true codes, int64 ``[N]``. The loss is infinite if one does not exist.
        alpha: weight of the whole loss, above 0: it makes up for what the focal factor takes away.
        gamma: 0 or more; the higher, the less targets count that the model already gets right.

    Returns:
        Float scalar, 0 or more.

    Raises:
        RecipeError: alpha is not above 0, gamma is below 0, or one of them is not finite.
    """
    check_positive("alpha", alpha)
    check_weight("gamma", gamma)
    log_p_N = _log_probability(logits_NV, codes_N)
    # Kept off 0, where a power below 1 has an infinite slope: a lone code is certain.
    missing_N = -torch.expm1(log_p_N).clamp(max=-torch.finfo(log_p_N.dtype).tiny)
    return -alpha * (missing_N**gamma * log_p_N).mean()


def smoothed_cross_entropy(logits_NV: Tensor, codes_N: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing over the codes that exist under each target's prefix.

    ``mean_n -(1 - s) log p[c_n] - s / |E_n| * sum_{v in E_n} log p[v]``, with E_n the codes that exist: Szegedy et al.
    2016 (arXiv 1512.00567) on a vocabulary that differs by target. Mass on other codes would make the loss infinite.

    Args:
        logits_NV: float ``[N, V]``.
        codes_N: true codes, int64 ``[N]``. The loss is infinite if one does not exist.
        smoothing: s, the share of the target's mass that is spread evenly over the codes that exist, the true one
            included; in ``[0, 1)``.

    Returns:
        Float scalar, 0 or more.

    Raises:
        RecipeError: smoothing is outside ``[0, 1)``.
    """
    if not 0 <= smoothing < 1:
        raise RecipeError(f"smoothing is {smoothing}; it is a share of the target's mass, in [0, 1)")
    exists_NV = logits_NV.isfinite()
    log_p_NV, _ = _distribution(logits_NV, exists_NV)
    even_N = log_p_NV.sum(1) / exists_NV.sum(1)
    return -((1 - smoothing) * _log_probability(logits_NV, codes_N) + smoothing * even_N).mean()


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number above 0, with a `RecipeError`."""
    if not 0 < value < math.inf:
        raise RecipeError(f"{name} is {value}; give a finite number above 0")


def check_weight(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number of 0 or more, with a `RecipeError`."""
    if not 0 <= value < math.inf:
        raise RecipeError(f"{name} is {value}; give a finite number of 0 or more")


def _support(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """Bool ``[N, V]``: the codes that exist, which must be the same for both."""
    assert first_NV.ndim == 2, f"logits have shape {tuple(first_NV.shape)}, not [N, V]"
    exists_NV = first_NV.isfinite()
    assert torch.equal(exists_NV, second_NV.isfinite()), "the two passes disagree on which codes exist"
    return exists_NV


def _distribution(logits_NV: Tensor, exists_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities ``[N, V]``; both are 0 for codes that do not exist.

    A logarithm of 0 in place of -inf makes every difference of two of them 0 instead of NaN.
    """
    log_p_NV = logits_NV.log_softmax(1)
    return log_p_NV.masked_fill(~exists_NV, 0), log_p_NV.exp()


def _log_probability(logits_NV: Tensor, codes_N: Tensor) -> Tensor:
    """Log-probability of each target's code, ``[N]``."""
    return logits_NV.log_softmax(1).gather(1, codes_N[:, None])[:, 0]
