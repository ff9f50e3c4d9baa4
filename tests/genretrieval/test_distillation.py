from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from genretrieval.errors import RecipeError
from genretrieval.training.distillation import (
    clipped_forward_kl,
    fgm_perturbation,
    focal_cross_entropy,
    jensen_shannon,
    smoothed_cross_entropy,
    symmetric_kl,
    temperature_kl,
)

NEVER = -math.inf
LN_3_2, LN_1_2 = math.log(3 / 2), math.log(1 / 2)
# KL of (3/4, 1/4) from (1/2, 1/2).
KL = 3 / 4 * LN_3_2 + 1 / 4 * LN_1_2

PairLoss = Callable[[Tensor, Tensor], Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {
    "temperature": partial(temperature_kl, temperature=2.0),
    "clipped": partial(clipped_forward_kl, clip=0.1),
    "jensen_shannon": jensen_shannon,
    "jensen_shannon_top": partial(jensen_shannon, top_k=2),
    "symmetric": symmetric_kl,
}
CODE_LOSSES: dict[str, PairLoss] = {
    "focal": partial(focal_cross_entropy, alpha=2.0, gamma=3.0),
    "focal_root": partial(focal_cross_entropy, alpha=2.0, gamma=0.5),
    "smoothed": partial(smoothed_cross_entropy, smoothing=0.2),
}


def logs(*weights: float) -> list[float]:
    """Logits whose softmax is proportional to the weights; 0 stands for a code that does not exist."""
    return [math.log(weight) if weight else NEVER for weight in weights]


def leaf(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


def slopes(loss: Tensor, *of: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, of, allow_unused=True))


# Two targets, the second of which the passes agree on.
def pair() -> tuple[Tensor, Tensor]:
    return leaf(logs(3, 0, 1), logs(5, 2, 0)), leaf(logs(1, 0, 1), logs(10, 4, 0))


def test_temperature_kl_by_hand() -> None:
    teacher, student = pair()
    loss = temperature_kl(teacher, student, 1.0)
    assert loss.item() == pytest.approx(KL / 2)
    by_teacher, by_student = slopes(loss, teacher, student)
    assert by_teacher is None
    assert by_student is not None
    # (q - p) over two targets.
    assert by_student.flatten().tolist() == pytest.approx([-1 / 8, 0, 1 / 8, 0, 0, 0], abs=1e-7)


def test_temperature_divides_logits_and_multiplies_by_its_square() -> None:
    teacher, student = (2 * logits.detach() for logits in pair())
    assert temperature_kl(teacher, student, 2.0).item() == pytest.approx(4 * KL / 2)


def test_clipped_forward_kl_by_hand() -> None:
    teacher, student = pair()
    # The entries of the first target are 0.304099 and -0.173287.
    assert clipped_forward_kl(teacher, student, 1.0).item() == pytest.approx(KL / 2)
    loss = clipped_forward_kl(teacher, student, 0.1)
    assert loss.item() == pytest.approx((0.1 - 0.173287) / 2, abs=1e-6)
    by_teacher, by_student = slopes(loss, teacher, student)
    assert by_teacher is None
    assert by_student is not None
    # Only -p_T log p_S of the last code is left, p_T = 1/4: its slope is (1/4)(q - [is it]).
    assert by_student.flatten().tolist() == pytest.approx([1 / 16, 0, -1 / 16, 0, 0, 0], abs=1e-7)


def test_jensen_shannon_by_hand() -> None:
    # (3/4, 1/4) and (1/4, 3/4): the middle is even, and each differs from it by KL.
    teacher, student = leaf(logs(3, 0, 1)), leaf(logs(1, 0, 3))
    loss = jensen_shannon(teacher, student)
    assert loss.item() == pytest.approx(KL)
    by_teacher, by_student = slopes(loss, teacher, student)
    assert by_teacher is None
    assert by_student is not None
    # The slope by log q is q/2 log(q/m): 1/8 ln(1/2) and 3/8 ln(3/2); by logits, less q times their sum.
    first, last = LN_1_2 / 8, 3 * LN_3_2 / 8
    expected = [first - (first + last) / 4, 0, last - 3 * (first + last) / 4]
    assert by_student[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_jensen_shannon_over_the_teachers_best() -> None:
    teacher, student = leaf(logs(2, 6, 0, 1)), leaf(logs(3, 1, 0, 100))
    loss = jensen_shannon(teacher, student, top_k=2)
    assert loss.item() == pytest.approx(KL)
    _, by_student = slopes(loss, teacher, student)
    assert by_student is not None
    assert by_student[0, 2:].tolist() == [0, 0]
    # Of equal codes the lower; more than exist is all.
    even = torch.zeros(1, 3)
    assert jensen_shannon(even, torch.tensor([logs(5, 5, 9)]), top_k=2).item() == 0
    everything = jensen_shannon(teacher, student)
    assert jensen_shannon(teacher, student, top_k=3).item() == pytest.approx(everything.item())
    assert jensen_shannon(teacher, student, top_k=99).item() == pytest.approx(everything.item())


def test_symmetric_kl_by_hand() -> None:
    first, second = pair()
    loss = symmetric_kl(first, second)
    # KL is 0.130812 one way and 1/2 ln(2/3) + 1/2 ln 2 = 0.143841 the other.
    assert loss.item() == pytest.approx((KL + math.log(4 / 3) / 2) / 2 / 2)
    by_first, by_second = slopes(loss, first, second)
    assert by_first is not None
    assert by_second is not None
    # By the second: ((q - p) + q (log(q/p) - mean)) / 2 over two targets.
    low, high = math.log(2 / 3), math.log(2)
    mean = (low + high) / 2
    expected = [(-1 / 4 + (low - mean) / 2) / 4, 0, (1 / 4 + (high - mean) / 2) / 4]
    assert by_second[0].tolist() == pytest.approx(expected, abs=1e-7)
    assert by_first[0, 0].item() > 0


def test_fgm_perturbation_by_hand() -> None:
    delta = fgm_perturbation(torch.tensor([[3.0, 0.0], [0.0, -4.0]]), 0.5)
    assert delta.flatten().tolist() == pytest.approx([0.3, 0, 0, -0.4])


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25])
def test_fgm_perturbation_of_any_size_has_length_epsilon(size: float) -> None:
    delta = fgm_perturbation(torch.tensor([3 * size, 4 * size]), 0.6)
    assert delta.tolist() == pytest.approx([0.36, 0.48])


def test_fgm_perturbation_of_no_gradient() -> None:
    assert fgm_perturbation(torch.zeros(2, 3), 0.6).tolist() == [[0, 0, 0]] * 2


def test_focal_cross_entropy_by_hand() -> None:
    logits = leaf(logs(3, 0, 1), logs(3, 0, 1))
    loss = focal_cross_entropy(logits, torch.tensor([0, 2]), alpha=2.0, gamma=3.0)
    right, wrong = -2 / 64 * math.log(3 / 4), -2 * 27 / 64 * math.log(1 / 4)
    assert loss.item() == pytest.approx((right + wrong) / 2)


def test_smoothed_cross_entropy_by_hand() -> None:
    logits = leaf(logs(3, 0, 1), logs(3, 0, 1))
    loss = smoothed_cross_entropy(logits, torch.tensor([0, 2]), 0.2)
    # The true code has 0.8 and its share of 0.2, of which there are two.
    first = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4))
    second = -(0.1 * math.log(3 / 4) + 0.9 * math.log(1 / 4))
    assert loss.item() == pytest.approx((first + second) / 2)
    (by_logits,) = slopes(loss, logits)
    assert by_logits is not None
    assert by_logits[0].tolist() == pytest.approx([(3 / 4 - 0.9) / 2, 0, (1 / 4 - 0.1) / 2], abs=1e-7)


class Drawn:
    """Random logits of 1 to 4 targets over 1 to 6 codes, of which each target lacks some; true codes that exist."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        n, v = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 7))
        missing = torch.rand(n, v, generator=generator) < 0.4
        self.codes = torch.randint(v, (n,), generator=generator)
        missing.scatter_(1, self.codes[:, None], False)
        self.missing = missing
        self.first, self.second = (
            (3 * torch.randn(n, v, generator=generator)).masked_fill(missing, NEVER).requires_grad_() for _ in range(2)
        )

    def distributions(self, row: int, tau: float = 1.0) -> list[tuple[float, float]]:
        """Probabilities of the codes that exist, by plain Python."""
        exists = [v for v in range(self.missing.shape[1]) if not self.missing[row, v]]
        columns = []
        for logits in (self.first, self.second):
            weights = [math.exp(logits[row, v].item() / tau) for v in exists]
            columns.append([weight / sum(weights) for weight in weights])
        return list(zip(*columns, strict=True))


seeds = st.integers(0, 2**31)


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_pair_losses_are_those_of_slow_sums(seed: int) -> None:
    drawn = Drawn(seed)
    totals = dict.fromkeys(PAIR_LOSSES, 0.0)
    n = len(drawn.codes)
    for row in range(n):
        pairs = drawn.distributions(row)
        totals["temperature"] += sum(4 * p * math.log(p / q) for p, q in drawn.distributions(row, 2.0))
        totals["clipped"] += sum(min(p * math.log(p / q), 0.1) for p, q in pairs)
        totals["symmetric"] += sum(p * math.log(p / q) + q * math.log(q / p) for p, q in pairs) / 2
        best = sorted(pairs, reverse=True)[:2]
        whole = [sum(column) for column in zip(*best, strict=True)]
        renormalised = [(p / whole[0], q / whole[1]) for p, q in best]
        for name, compared in (("jensen_shannon", pairs), ("jensen_shannon_top", renormalised)):
            for p, q in compared:
                m = (p + q) / 2
                totals[name] += (p * math.log(p / m) + q * math.log(q / m)) / 2
    for name, loss in PAIR_LOSSES.items():
        assert loss(drawn.first, drawn.second).item() == pytest.approx(totals[name] / n, rel=1e-4, abs=1e-5), name


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_codes_that_do_not_exist_get_a_gradient_of_zero(seed: int) -> None:
    drawn = Drawn(seed)
    losses = [loss(drawn.first, drawn.second) for loss in PAIR_LOSSES.values()]
    losses += [loss(drawn.second, drawn.codes) for loss in CODE_LOSSES.values()]
    for loss in losses:
        assert loss.isfinite()
        for slope in slopes(loss, drawn.first, drawn.second):
            if slope is not None:
                assert slope.isfinite().all()
                assert (slope[drawn.missing] == 0).all()


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_codes_that_do_not_exist_change_nothing(seed: int) -> None:
    """A further code that no target has may stand in the codebook."""
    drawn = Drawn(seed)
    first, second = (
        torch.cat([torch.full_like(x[:, :1], NEVER), x.detach()], dim=1) for x in (drawn.first, drawn.second)
    )
    for loss in PAIR_LOSSES.values():
        assert loss(first, second).item() == pytest.approx(loss(drawn.first, drawn.second).item(), rel=1e-5, abs=1e-6)
    for loss in CODE_LOSSES.values():
        expected = loss(drawn.first, drawn.codes).item()
        assert loss(first, drawn.codes + 1).item() == pytest.approx(expected, abs=1e-6)


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_what_reduces_to_cross_entropy(seed: int) -> None:
    drawn = Drawn(seed)
    expected = cross_entropy(drawn.first, drawn.codes).item()
    assert focal_cross_entropy(drawn.first, drawn.codes, 1.0, 0.0).item() == pytest.approx(expected, abs=1e-6)
    assert smoothed_cross_entropy(drawn.first, drawn.codes, 0.0).item() == pytest.approx(expected, abs=1e-6)
    # Without missing codes, torch's label smoothing is the same.
    full, code = drawn.first[0][~drawn.missing[0]], drawn.codes[0] - drawn.missing[0, : drawn.codes[0]].sum()
    expected = cross_entropy(full, code, label_smoothing=0.3).item()
    made = smoothed_cross_entropy(drawn.first[:1], drawn.codes[:1], 0.3).item()
    assert made == pytest.approx(expected, abs=1e-5)


@given(seeds)
@settings(deadline=None, max_examples=60)
def test_divergences_of_equal_logits_are_zero_and_others_are_not_below(seed: int) -> None:
    drawn = Drawn(seed)
    for name, loss in PAIR_LOSSES.items():
        assert loss(drawn.first, drawn.first.detach().clone()).item() == pytest.approx(0, abs=1e-6)
        if name != "clipped":
            assert loss(drawn.first, drawn.second).item() >= -1e-6
    assert jensen_shannon(drawn.first, drawn.second).item() <= math.log(2) + 1e-6


@pytest.mark.parametrize("name", [*PAIR_LOSSES, *CODE_LOSSES])
def test_a_prefix_with_one_code_costs_nothing(name: str) -> None:
    first, second = leaf([NEVER, 3.0, NEVER]), leaf([NEVER, -7.0, NEVER])
    loss = PAIR_LOSSES[name](first, second) if name in PAIR_LOSSES else CODE_LOSSES[name](second, torch.tensor([1]))
    (slope,) = slopes(loss, second)
    assert loss.item() == 0
    assert slope is not None
    assert slope.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_logits_far_apart_stay_finite(name: str) -> None:
    """Probabilities that underflow: 0 times a finite logarithm."""
    first, second = leaf([200.0, 0.0, NEVER]), leaf([0.0, 300.0, NEVER])
    loss = PAIR_LOSSES[name](first, second)
    (slope,) = slopes(loss, second)
    assert loss.isfinite()
    assert slope is not None
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_both_passes_must_know_the_same_codes(name: str) -> None:
    with pytest.raises(AssertionError, match="disagree on which codes exist"):
        PAIR_LOSSES[name](torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, NEVER]]))


BAD: dict[str, Callable[[], Tensor]] = {
    "temperature is 0": lambda: temperature_kl(*pair(), 0),
    "temperature is nan": lambda: temperature_kl(*pair(), math.nan),
    "clip is -1": lambda: clipped_forward_kl(*pair(), -1),
    "top_k is 1": lambda: jensen_shannon(*pair(), 1),
    "epsilon is inf": lambda: fgm_perturbation(torch.ones(2), math.inf),
    "alpha is 0": lambda: focal_cross_entropy(pair()[0], torch.tensor([0, 0]), 0, 1),
    "gamma is -1": lambda: focal_cross_entropy(pair()[0], torch.tensor([0, 0]), 1, -1),
    "smoothing is 1": lambda: smoothed_cross_entropy(pair()[0], torch.tensor([0, 0]), 1),
}


@pytest.mark.parametrize("message", BAD)
def test_settings_out_of_range(message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BAD[message]()
