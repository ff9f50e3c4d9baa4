from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genretrieval.catalogue import build_index
from genretrieval.errors import DataError
from genretrieval.figures import lines
from genretrieval.histories import Histories, LeaveOneOut
from genretrieval.model import GeneratorConfig
from genretrieval.model.generator import Decoded
from genretrieval.semantic_ids import SemanticIds
from genretrieval.training.data import collate
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.trainer import TrainingConfig
from genretrieval_pipelines import bench_train as bench
from genretrieval_pipelines.recipe import GeneratorSection
from genretrieval_pipelines.shop import open_shop
from genretrieval_pipelines.synth import ShopConfig, synthesize

TINY = replace(
    bench.QUICK,
    generator=GeneratorSection(
        d_model=16, n_heads=2, d_ff=32, n_encoder_layers=1, n_decoder_layers=1, max_history=5, dropout=0.1
    ),
    training=TrainingConfig(epochs=1, targets_per_batch=24, validation_users=20),
    shop=ShopConfig(n_items=60, n_users=20, median_history=8.0, mean_history=12.0),
    codebook_sizes=(8, 8),
    examples=120,
    rounds=2,
    turn_seconds=0.05,
    threads=(1,),
)


@pytest.fixture
def material(make_histories: Callable[..., Histories], make_ids: Callable[..., SemanticIds]) -> bench.Material:
    """Histories of up to 12 items before a model that reads 5: some need several windows."""
    return bench.Material.choose(bench.codes_alone(make_histories()), make_ids(30), replace(TINY, examples=1000))


def our_side(material: bench.Material, folder: Path) -> bench.OurSide:
    return bench.OurSide("ours", material, TINY.training, bench.PlainObjective(material), folder)


def by_hand() -> bench.Material:
    """One user who takes items 0, 1, 2, 0, 1; the last two are held out."""
    histories = Histories(
        user_ids=["u"],
        offsets=np.array([0, 5]),
        items=np.array([0, 1, 2, 0, 1], np.int32),
        events=np.zeros(5, np.int16),
        times=np.arange(5),
        query_rows=np.zeros(5, np.int32),
        event_names=("click",),
        queries=["red"],
        order_rule="as given",
    )
    ids = SemanticIds(np.array([[0, 1], [2, 0], [1, 3]], np.int32), (3, 4))
    config = replace(TINY, generator=TINY.generator.model_copy(update={"max_history": 2}))
    return bench.Material.choose(bench.codes_alone(histories), ids, config)


# --- the whole ---


@pytest.mark.slow
def test_figures_of_a_quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HISTORY_LENGTHS", (2, 5))
    monkeypatch.setattr(bench, "TUNED_ROWS", (16,))
    before = torch.get_num_threads()
    figures = bench.bench_train(config=TINY)
    assert torch.get_num_threads() == before
    sides = ("ours", "ours_plain", "hf", "hf_tuned")
    losses = ("ours", "hf", "hf_tuned")
    spread = {
        *("train.speedup_vs_hf", "train.speedup_vs_hf_tuned", "train.history_cost.5_over_2"),
        *(
            "train.validation_loss_ratio",
            "train.validation_loss_ratio_vs_hf",
            "train.validation_loss_ratio_vs_hf_tuned",
        ),
        *(f"train.examples_per_second.{side}" for side in sides),
        *(f"train.validation_loss.{side}" for side in losses),
        "machine.gemm_gflops.t1",
    }
    single = {
        *("train.examples", "train.validation_users", "train.history_items.mean", "train.eager_attention.hf_tuned"),
        *("train.parameters.ours", "train.parameters.hf", "train.gflops.ours", "train.gemm_share"),
        *(f"train.threads.{side}" for side in sides),
        *(f"train.examples_per_step.{side}" for side in sides),
    }
    assert set(figures) == spread | single
    assert len(lines(figures)) == len(figures)
    assert all(math.isfinite(figure.value) for figure in figures.values())
    for name in spread:
        found = figures[name].spread
        assert found is not None
        assert 0 < found[0] <= figures[name].value <= found[1]
    assert figures["train.examples_per_step.hf"].value == 8 < figures["train.examples_per_step.hf_tuned"].value
    assert 60 < figures["train.examples"].value <= 120
    # Anything that has learnt the least is below what knows nothing.
    assert figures["train.validation_loss.hf"].value < math.log(16)


def test_what_is_not_read_in_full_is_the_past(make_ids: Callable[..., SemanticIds]) -> None:
    ids = make_ids(30)
    sizes = {"codebook_sizes": ids.codebook_sizes, "d_model": 16, "n_heads": 2, "d_ff": 32, "n_events": 2}
    config = GeneratorConfig(**sizes, max_history=4, n_past_tokens=2, max_past=10)
    near, far = (bench.made_batch(ids, config, length, n_targets=10) for length in (4, 9))
    assert near["learn"].shape == far["learn"].shape == (2, 5)
    assert near["learn"].all()
    assert far["learn"].all()
    assert not near["past_mask"].any()
    assert far["past_rows"].shape == (2, 5)
    assert far["past_mask"].all()


def test_a_shop_is_tokenized_without_a_language_model(tmp_path: Path) -> None:
    synthesize(tmp_path / "shop", TINY.shop)
    shop = open_shop(tmp_path / "shop", tmp_path / "work")
    material = bench.Material.of(shop, TINY, tmp_path / "work")
    assert material.ids.codebook_sizes[:2] == (8, 8)
    assert material.ids.n_items == 60
    assert material.config.codebook_sizes == material.ids.codebook_sizes
    np.testing.assert_array_equal(material.histories.items, shop.histories.items)


def test_logs_that_nothing_can_be_learnt_from_are_refused(make_ids: Callable[..., SemanticIds]) -> None:
    with pytest.raises(DataError, match="more histories, or more examples"):
        bench.Material.choose(by_hand().histories, make_ids(3), replace(TINY, examples=1))


@pytest.mark.parametrize("setting", [{"rounds": 0}, {"examples": 0}, {"turn_seconds": 0.0}, {"threads": (0,)}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        replace(TINY, **setting)


# --- the examples ---


def test_both_sides_see_the_same_examples(material: bench.Material, tmp_path: Path) -> None:
    histories, offsets = material.histories, bench.t5_level_offsets(material.ids.codebook_sizes)
    ours: list[tuple[int, ...]] = []
    side = our_side(material, tmp_path)
    for rows in side.batches:
        batch = collate([side.dataset[row] for row in rows])
        for row, t in batch["learn"].nonzero().tolist():
            window = rows[row]
            position = int(material.windows.starts[window]) + t
            ours.append((int(material.windows.users[window]), position, *batch["target_codes"][row, t].tolist()))
    for config in (bench.PeerConfig(rows=1), bench.PeerConfig(rows=1, bf16=True, by_length=True)):
        peer = bench.PeerSide("hf", material, config, side.arguments(), tmp_path)
        theirs = [
            (
                int(material.examples.users[row]),
                int(material.examples.positions[row]),
                *(peer.dataset[row]["labels"] - offsets).tolist(),
            )
            for row in np.concatenate(peer.batches)
        ]
        assert sorted(theirs) == sorted(ours)
    trained = np.flatnonzero(LeaveOneOut(histories).trained())
    assert sorted(example[1] for example in ours) == trained.tolist()
    assert sum(map(side.n_examples, side.batches)) == len(material.examples)
    assert (material.windows.learn_from > material.windows.starts).any()


def test_examples_are_limited_by_whole_users(
    make_histories: Callable[..., Histories], make_ids: Callable[..., SemanticIds]
) -> None:
    histories = make_histories()
    some = bench.Material.choose(bench.codes_alone(histories), make_ids(30), replace(TINY, examples=100))
    assert 80 < len(some.examples) <= 100
    ends = LeaveOneOut(histories).train_ends()
    for user in np.unique(some.examples.users):
        positions = some.examples.positions[some.examples.users == user]
        np.testing.assert_array_equal(positions, np.arange(histories.offsets[user], ends[user]))


def test_the_peer_reads_flattened_codes() -> None:
    # Level 0 begins at token 2, level 1 at 2 + 3.
    tokens = {0: [2, 6], 1: [4, 5], 2: [3, 8]}
    material = by_hand()
    dataset = material.peer_dataset(material.examples)
    read = [(entry["input_ids"].tolist(), entry["labels"].tolist()) for entry in map(dataset.__getitem__, range(3))]
    assert read == [([1], tokens[0]), (tokens[0], tokens[1]), (tokens[0] + tokens[1], tokens[2])]
    assert dataset.lengths() == [1, 2, 4]
    # The newest two items before the target, and none after.
    validation = material.peer_dataset(material.validation)[0]
    assert validation["input_ids"].tolist() == tokens[1] + tokens[2]
    assert validation["labels"].tolist() == tokens[0]


def test_both_sides_validate_on_the_same_items() -> None:
    material = by_hand()
    batch = collate([material.dataset(material.validation.windows())[0]])
    assert batch["target_items"].tolist() == [[1, 2, 0]]
    assert batch["learn"].tolist() == [[False, False, True]]
    assert batch["history_codes"].tolist() == [[[2, 0], [1, 3]]]


def test_neither_side_knows_more_than_codes() -> None:
    material = by_hand()
    entry = material.dataset(material.windows)[0]
    assert not entry["events"].any()
    assert not entry["gaps"].any()
    assert not len(entry["query_targets"])
    assert not len(entry["profile"])
    assert material.config.n_events == material.config.n_gaps == 1
    assert material.config.query_vocab_size == material.config.n_profile_buckets == 0


def test_tokens_are_padded_on_the_right() -> None:
    material = by_hand()
    dataset = material.peer_dataset(material.examples)
    batch = bench.collate_tokens([dataset[0], dataset[2]])
    assert batch["input_ids"].tolist() == [[1, 0, 0, 0], [2, 6, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[2, 6], [3, 8]]


# --- the sides ---


def test_the_peer_shares_our_optimizer_and_keeps_its_defaults(material: bench.Material, tmp_path: Path) -> None:
    ours = our_side(material, tmp_path).arguments()
    default = bench.PeerSide("hf", material, bench.PeerConfig(), ours, tmp_path).arguments()
    tuned = bench.PeerSide("tuned", material, bench.PeerConfig(21, bf16=True, by_length=True), ours, tmp_path)
    for arguments in (default, tuned.arguments()):
        for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "optim"):
            assert getattr(arguments, name) == getattr(ours, name)
        assert arguments.max_grad_norm == ours.max_grad_norm
        assert arguments.num_train_epochs == ours.num_train_epochs
    assert (default.per_device_train_batch_size, default.bf16, default.train_sampling_strategy) == (8, False, "random")
    assert tuned.arguments().train_sampling_strategy == "group_by_length"
    assert tuned.arguments().bf16
    assert [str(s) for s in tuned.settings([1])] == ["1 thread(s)", "1 thread(s), eager attention"]


def test_a_turn_passes_over_the_batches_that_it_is_given(material: bench.Material, tmp_path: Path) -> None:
    side = our_side(material, tmp_path)
    given = side.batches[::2]
    read = list(side.trainer(given, bench.Setting(1)).get_train_dataloader())
    assert [int(batch["learn"].sum()) for batch in read] == [side.n_examples(rows) for rows in given]
    peer = bench.PeerSide("hf", material, bench.PeerConfig(), side.arguments(), tmp_path)
    given = peer.batches[1::3]
    read = list(peer.trainer(given, bench.Setting(1)).get_train_dataloader())
    for batch, rows in zip(read, given, strict=True):
        expected = bench.collate_tokens([peer.dataset[row] for row in rows])
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor)


def test_length_groups_are_those_of_the_trainer(material: bench.Material, tmp_path: Path) -> None:
    arguments = our_side(material, tmp_path).arguments()
    peer = bench.PeerSide("hf", material, bench.PeerConfig(4, bf16=True, by_length=True), arguments, tmp_path)
    lengths = np.asarray(peer.dataset.lengths())
    assert np.mean([np.ptp(lengths[rows]) for rows in peer.batches]) < 2
    trainer = peer._trainer(peer.dataset, peer.arguments(), bench.Setting(1))
    assert isinstance(trainer._get_train_sampler(), bench.LengthGroupedSampler)


def test_both_models_have_the_same_sizes(material: bench.Material) -> None:
    ours, theirs = bench.new_generator(material.config), bench.new_t5(material.config)
    assert theirs.config.vocab_size == ours.config.vocab_size + 1  # T5 has an end of sequence
    assert theirs.config.num_layers == len(ours.context.encoder.layers)
    assert theirs.config.num_decoder_layers == len(ours.decoder.layers)
    in_layers = sum(p.numel() for p in ours.decoder.layers.parameters())
    assert sum(p.numel() for block in theirs.decoder.block for p in block.parameters()) == in_layers + 32 * 2


# --- losses ---

LOGITS = ([0.0, 1.0, -1.0], [2.0, 0.0, 0.0, -2.0])


def cross_entropy(codes: tuple[int, int]) -> float:
    each = [math.log(sum(map(math.exp, scores))) - scores[code] for scores, code in zip(LOGITS, codes, strict=True)]
    return sum(each) / 2


def test_equal_logits_give_equal_losses_on_both_sides() -> None:
    material = by_hand()
    flat = torch.full((2, 9), 50.0)  # what stands at special tokens and other levels counts for nothing
    for level, (start, scores) in enumerate(zip((2, 5), LOGITS, strict=True)):
        flat[level, start : start + len(scores)] = torch.tensor(scores)

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anything = nn.Parameter(torch.zeros(1))

        def level_logits(self, states: Tensor, level: int) -> Tensor:
            return torch.tensor(LOGITS[level]).expand(len(states), -1)

        def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=flat.expand(len(input_ids), -1, -1))

    class Decodes:
        def decode(self, model: nn.Module, batch: dict[str, Tensor]) -> Decoded:
            shape = batch["target_codes"].shape
            return Decoded(torch.zeros(*shape, 1), torch.zeros(*shape[:2], 1))

    examples = material.examples
    model: Any = Ours()
    objective: Any = Decodes()
    ours = bench.our_losses(model, objective, material.dataset(examples.windows()))
    theirs = bench.peer_losses(model, (3, 4), material.peer_dataset(examples))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours, [cross_entropy(codes) for codes in ((0, 1), (2, 0), (1, 3))], rtol=1e-6)


def test_the_plain_objective_trains_what_is_compared(material: bench.Material) -> None:
    model = bench.new_generator(material.config).eval()
    dataset = material.dataset(material.windows)
    batch = collate([dataset[row] for row in range(6)])
    plain = bench.PlainObjective(material)
    states = plain.decode(model, batch).states_BTLD[batch["learn"]]
    codes = batch["target_codes"][batch["learn"]]
    logits = [model.level_logits(states[:, level], level).log_softmax(-1) for level in range(3)]
    expected = -torch.stack([logits[level].gather(1, codes[:, level : level + 1]) for level in range(3)]).mean()
    torch.testing.assert_close(plain(model, batch), expected)
    # A softmax over fewer codes cannot give the right one less.
    assert plain(model, batch) > NextItemObjective(build_index(material.ids))(model, batch)


def test_losses_are_compared_with_the_better_peer() -> None:
    figures = bench.loss_figures({"ours": np.full(4, 3.0), "hf": np.full(4, 2.5), "hf_tuned": np.full(4, 4.0)})
    assert figures["train.validation_loss.ours"].value == 3
    assert figures["train.validation_loss_ratio"] == figures["train.validation_loss_ratio_vs_hf"]
    assert figures["train.validation_loss_ratio"].value == pytest.approx(1.2)
    assert figures["train.validation_loss_ratio_vs_hf_tuned"].value == pytest.approx(0.75)


def test_a_ratio_of_losses_is_paired_by_user() -> None:
    loss = np.array([1.0, 2.0, 4.0, 9.0])
    figures = bench.loss_figures({"ours": 1.5 * loss, "hf": loss})
    assert figures["train.validation_loss_ratio"].spread == pytest.approx((1.5, 1.5))
    spread = figures["train.validation_loss.hf"].spread
    assert spread is not None
    assert 1 <= spread[0] < 4 < spread[1] <= 9


def test_speedups_are_taken_within_a_round() -> None:
    # The machine was half as fast in the second round.
    speeds = {"ours": [80.0, 40.0], "hf": [8.0, 4.0], "hf_tuned": [20.0, 10.0]}
    figures = bench.speed_figures(speeds)
    assert figures["train.speedup_vs_hf"] == bench.Figure(10, "ratio", (10, 10))
    assert figures["train.speedup_vs_hf_tuned"] == bench.Figure(4, "ratio", (4, 4))
    assert figures["train.examples_per_second.hf"] == bench.Figure(6, "examples/s", (4.4, 7.6))


# --- operations and long histories ---


def test_operations_by_hand() -> None:
    config = GeneratorConfig(
        codebook_sizes=(3, 5), d_model=4, n_heads=2, d_ff=6, n_encoder_layers=1, n_decoder_layers=2
    )
    # 3 positions: four projections, two feed-forward products, scores and mixture over 3 keys.
    encoder = 3 * (2 * 4 * 4 * 4 + 2 * 2 * 4 * 6 + 2 * 2 * 4 * 3)
    # 2 targets of 2 codes: six projections, feed-forward, 2 keys of the ID itself, 3 of the context.
    code = 2 * 6 * 4 * 4 + 2 * 2 * 4 * 6 + 2 * 2 * 4 * 2 + 2 * 2 * 4 * 3
    decoder = 2 * (3 * 2 * 2 * 4 * 4 + 2 * 2 * code)
    rest = 2 * 2 * 4 * 4 + 2 * 2 * 4 * 8
    assert bench.training_flops(config, np.array([3]), np.array([2])) == 3 * (encoder + decoder + rest)


def test_operations_are_those_that_torch_counts(make_ids: Callable[..., SemanticIds]) -> None:
    ids = make_ids(30)
    config = GeneratorConfig(codebook_sizes=ids.codebook_sizes, d_model=16, n_heads=2, d_ff=32, max_history=7)
    model, objective = bench.new_generator(config), NextItemObjective(build_index(ids))
    batch = bench.made_batch(ids, config, length=7, n_targets=24)
    assert batch["learn"].shape == (3, 8)
    assert batch["learn"].all()
    with FlopCounterMode(display=False) as counter:
        objective(model, batch).backward()
    windows = np.full(3, 8)
    assert bench.training_flops(config, windows, windows) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_peak_of_a_device() -> None:
    assert bench.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert bench.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert bench.peak_flops("NVIDIA L40S") == 362e12
    assert bench.peak_flops("a toaster") is None


def test_history_cost_is_time_a_target(monkeypatch: pytest.MonkeyPatch, make_ids: Callable[..., SemanticIds]) -> None:
    ids = make_ids(30)
    config = GeneratorConfig(codebook_sizes=ids.codebook_sizes, d_model=16, n_heads=2, d_ff=32)
    model = bench.new_generator(config)
    calls: list[str] = []

    def take_turns(contenders: list[bench.Contender], rounds: int, clock: bench.Clock) -> dict[str, bench.Figure]:
        for contender in contenders:
            contender.call()
            calls.append(contender.name)
        # 10 ms for the 12 targets of 3 histories of 3 events, 24 ms for the 8 of one of 7.
        return {"3": bench.Figure(10, "ms", (8, 12)), "7": bench.Figure(24, "ms", (20, 28))}

    monkeypatch.setattr(bench, "take_turns", take_turns)
    before = model.head.weight.detach().clone()
    cost = bench.history_cost(
        lambda length: bench.made_batch(ids, config, length, n_targets=12),
        (3, 7),
        model,
        NextItemObjective(build_index(ids)),
    )
    assert calls == ["3", "7"]
    assert not torch.equal(model.head.weight, before)
    assert cost.value == pytest.approx((24 / 8) / (10 / 12))
    assert cost.spread == pytest.approx(((20 / 8) / (12 / 12), (28 / 8) / (8 / 12)))


def test_a_history_without_targets_has_no_cost(make_ids: Callable[..., SemanticIds]) -> None:
    ids = make_ids(30)
    config = GeneratorConfig(codebook_sizes=ids.codebook_sizes, d_model=16, n_heads=2, d_ff=32)
    model = bench.new_generator(config)

    def nothing(length: int) -> dict[str, Tensor]:
        batch = bench.made_batch(ids, config, length, 12)
        return {**batch, "learn": torch.zeros_like(batch["learn"])}

    with pytest.raises(DataError, match="no targets"):
        bench.history_cost(nothing, (2, 3), model, NextItemObjective(build_index(ids)))
