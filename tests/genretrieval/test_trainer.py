"""Training learns, repeats itself, survives a kill, and shares its work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from genretrieval.catalogue import build_index
from genretrieval.errors import RecipeError
from genretrieval.features import RequestFeatures
from genretrieval.histories import LeaveOneOut
from genretrieval.model import Generator
from genretrieval.model.moe import MixtureOfExperts
from genretrieval.training import trainer as trainer_module
from genretrieval.training.data import HistoryDataset, collate, cut_windows
from genretrieval.training.objectives import NextItemObjective
from genretrieval.training.trainer import GeneratorTrainer, TrainingConfig, last_complete_checkpoint, train

GOLDEN = Path(__file__).parent / "golden" / "next_item_loss.json"
CONFIG = TrainingConfig(epochs=4, learning_rate=1e-2, targets_per_batch=64, evaluate_every=2, warmup_share=0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"learning_rate": -1.0},
        {"accumulate": 0},
        {"evaluate_every": 0},
        {"weight_decay": -0.1},
        {"warmup_share": 1.0},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(RecipeError, match=rf"training\.{name} is {wrong[name]}"):
        TrainingConfig(**wrong)


class Setting:
    """A dataset with a rule in it, and fresh models for it."""

    def __init__(self, make_generator: Any, make_histories: Any, make_ids: Any) -> None:
        histories = make_histories()
        ids = make_ids(30)
        windows = cut_windows(histories.offsets, LeaveOneOut(histories).train_ends(), 8)
        profiles = torch.arange(2 * histories.n_users).reshape(-1, 2).numpy() % 7
        features = RequestFeatures(events=histories.event_names)
        self.make_generator = make_generator
        self.objective = NextItemObjective(build_index(ids))
        self.dataset = HistoryDataset(histories, windows, ids, features, profiles, max_past=6)

    def generator(self, **changes: Any) -> Generator:
        made: Generator = self.make_generator(n_gaps=12, query_vocab_size=0, **changes)
        return made

    def loss(self, generator: Generator) -> float:
        """Over everything, without dropout."""
        generator.eval()
        with torch.no_grad():
            batch = collate([self.dataset[row] for row in range(len(self.dataset))])
            return float(generator(objective=self.objective, batch=batch))


@pytest.fixture(scope="module")
def setting(make_generator: Any, make_histories: Any, make_ids: Any) -> Setting:
    return Setting(make_generator, make_histories, make_ids)


class Steps(TrainerCallback):
    """Writes down what happens at every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


def test_losses_of_ten_steps_are_the_known_ones(setting: Setting) -> None:
    """Any change of the model, the data, the objective or the seed shows here.

    Renew the file, after a change that is meant to move it, with ``RENEW_GOLDEN=1 pytest`` on this test.
    """
    generator = setting.generator(dropout=0.0).train()
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    losses = []
    for step in range(10):
        rows = range(step % 3, len(setting.dataset), 3)
        loss = generator(objective=setting.objective, batch=collate([setting.dataset[row] for row in rows]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if os.environ.get("RENEW_GOLDEN") == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"losses": [round(loss, 6) for loss in losses]}, indent=1) + "\n", "utf-8")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text("utf-8"))["losses"], rel=1e-4)


def test_experts_are_balanced_after_every_step_and_their_load_is_reported(setting: Setting, tmp_path: Path) -> None:
    generator = setting.generator()
    mixture = generator.decoder.layers[0].feed_forward
    assert isinstance(mixture, MixtureOfExperts)
    logged: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    config = TrainingConfig(epochs=2, targets_per_batch=64, evaluate_every=1)
    train(generator, setting.objective, setting.dataset, lambda _: 0.5, config, tmp_path, callbacks=(Log(),))
    # Every code that was written in training has passed the router, and no count is left over.
    assert mixture.router_bias.abs().max() > 0
    assert int(mixture.update_balance().sum()) == 0
    loads = [log[name] for log in logged for name in log if name.startswith("expert_load/")]
    assert len(loads) == 2 * len(generator.decoder.layers)
    assert all(1.0 <= load <= 4.0 for load in loads)


def test_it_learns_and_keeps_the_best_checkpoint(setting: Setting, tmp_path: Path) -> None:
    generator = setting.generator()
    before = setting.loss(generator)
    judged: list[dict[str, torch.Tensor]] = []

    def validate(model: Generator) -> float:
        assert not model.training
        judged.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return [0.25, 0.75, 0.5][len(judged) - 1]

    config = TrainingConfig(epochs=5, learning_rate=1e-2, targets_per_batch=64, evaluate_every=2)
    assert train(generator, setting.objective, setting.dataset, validate, config, tmp_path) == 0.75
    # Judged after epochs 2 and 4, and at the end.
    assert len(judged) == 3
    assert all(torch.equal(tensor, judged[1][name]) for name, tensor in generator.state_dict().items())
    assert setting.loss(generator) < 0.8 * before


class Given:
    """Batches in place of `LengthBatchSampler`."""

    batch_size, drop_last = None, False

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def test_eight_batches_of_one_are_one_of_eight(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows differ in their number of targets, and in how much they are padded beside others."""
    monkeypatch.setattr(trainer_module, "fast_bfloat16", lambda: False)
    windows = setting.dataset.windows
    learnt = windows.ends - windows.learn_from
    order = np.random.default_rng(0).permutation(len(windows))
    steps = [order[at : at + 8].tolist() for at in range(0, len(order) - 7, 8)]
    assert len(steps) > 2
    assert all(len(set(learnt[rows])) > 2 for rows in steps)

    def trained(accumulate: int, batches: list[list[int]]) -> Generator:
        generator = setting.generator(dropout=0.0)
        config = TrainingConfig(epochs=1, learning_rate=1e-2, accumulate=accumulate)
        trainer = GeneratorTrainer(generator, setting.objective, setting.dataset, lambda _: 0.0, config, tmp_path)
        trainer.sampler = Given(batches)  # type: ignore[assignment]
        trainer.args.save_strategy = trainer.args.eval_strategy = "no"
        trainer.train()
        assert trainer.state.global_step == len(steps)
        return generator

    whole = trained(1, steps).state_dict()
    parts = trained(8, [[row] for rows in steps for row in rows]).state_dict()
    before = setting.generator().state_dict()
    assert any((tensor - before[name]).abs().max() > 1e-2 for name, tensor in whole.items())
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5, msg=name)
    balance = [name for name in whole if name.endswith("router_bias")]
    assert balance
    assert all(whole[name].any() for name in balance)


def test_a_finished_run_ends_as_it_did_before(setting: Setting, tmp_path: Path) -> None:
    def validate(model: Generator) -> float:
        return -float(model.head.weight.detach().abs().sum())

    first, second = setting.generator(), setting.generator(seed=1)
    best = train(first, setting.objective, setting.dataset, validate, CONFIG, tmp_path)
    assert train(second, setting.objective, setting.dataset, validate, CONFIG, tmp_path) == best
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_the_rate_rises_over_the_share_and_falls_as_a_cosine(setting: Setting, tmp_path: Path) -> None:
    steps = Steps()
    train(setting.generator(), setting.objective, setting.dataset, lambda _: 0.0, CONFIG, tmp_path, callbacks=(steps,))
    n = len(steps.rates)
    warmup = -(-n // 4)
    peak = steps.rates.index(max(steps.rates)) + 1
    assert peak == warmup
    assert steps.rates[peak - 1] == pytest.approx(CONFIG.learning_rate)
    assert steps.rates[0] == pytest.approx(CONFIG.learning_rate / warmup)
    assert steps.rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_loss_that_is_no_number_stops_the_training(setting: Setting, tmp_path: Path) -> None:
    def broken(model: Generator, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return setting.objective(model, batch) * float("nan")

    with pytest.raises(RecipeError, match=r"the loss is nan at step 1 of \d+.* lower learning_rate, which is 0.01"):
        train(setting.generator(), broken, setting.dataset, lambda _: 0.0, CONFIG, tmp_path)


def test_every_epoch_has_its_own_order(setting: Setting, tmp_path: Path) -> None:
    trainer = GeneratorTrainer(setting.generator(), setting.objective, setting.dataset, lambda _: 0.0, CONFIG, tmp_path)
    orders: list[list[list[int]]] = []
    original = type(trainer.sampler).__iter__

    def record(sampler: Any) -> Any:
        orders.append(list(original(sampler)))
        return iter(orders[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.sampler), "__iter__", record)
        trainer.train()
    assert len(orders) == CONFIG.epochs
    for epoch, order in enumerate(orders):
        trainer.sampler.set_epoch(epoch)
        assert order == list(trainer.sampler)
        assert order not in orders[:epoch]


@pytest.mark.parametrize("state", [None, "", '{"global_step": 9, "epo'])
def test_a_half_written_checkpoint_is_removed(tmp_path: Path, state: str | None) -> None:
    for name, content in {"checkpoint-2": '{"global_step": 2}', "checkpoint-10": '{"global_step": 10}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(content, "utf-8")
    broken = tmp_path / "checkpoint-12"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    if state is not None:
        (broken / "trainer_state.json").write_text(state, "utf-8")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not broken.exists()
    assert (tmp_path / "checkpoint-2").exists()


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None


# A run of its own process: trains, writes what it ended with, and at `die_at` steps stops to be killed.
RUN = textwrap.dedent(
    """
    import json, sys, time
    from pathlib import Path
    import numpy as np, torch
    from safetensors.torch import save_file
    from transformers import TrainerCallback, set_seed
    from genretrieval.catalogue import build_index
    from genretrieval.features import RequestFeatures
    from genretrieval.histories import Histories
    from genretrieval.model import Generator, GeneratorConfig
    from genretrieval.semantic_ids import SemanticIds
    from genretrieval.training import trainer
    from genretrieval.training.data import HistoryDataset, cut_windows
    from genretrieval.training.objectives import NextItemObjective
    from genretrieval.training.trainer import TrainingConfig, train

    folder, die_at = Path(sys.argv[1]), int(sys.argv[2])
    accumulate, dropout = int(sys.argv[3]), float(sys.argv[4])
    if not dropout:  # runs that are compared with others than themselves
        trainer.fast_bfloat16 = lambda: False
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    n_users, length = 40, 6
    n = n_users * length
    items = (rng.integers(0, 30, (n_users, 1)) + np.arange(length)) % 30
    histories = Histories(
        [str(u) for u in range(n_users)], np.arange(0, n + 1, length), items.ravel().astype(np.int32),
        np.zeros(n, np.int16), np.full(n, -1), np.full(n, -1, np.int32), ("click",), [], "made up",
    )
    ids = SemanticIds(rng.integers(0, 5, (30, 3)).astype(np.int32), (5, 5, 5))
    windows = cut_windows(histories.offsets, histories.offsets[1:] - rng.integers(0, 4, n_users), 8)
    dataset = HistoryDataset(histories, windows, ids, RequestFeatures(), np.zeros((n_users, 0), np.int64))
    set_seed(0)
    model = Generator(GeneratorConfig(
        codebook_sizes=(5, 5, 5), d_model=16, n_heads=2, d_ff=32, n_gaps=12, n_items=30, content_dim=4, n_experts=4,
        dropout=dropout,
    ))
    model.dense.set_content(torch.randn(30, 4))
    config = TrainingConfig(
        epochs=4, learning_rate=1e-2, targets_per_batch=32, accumulate=accumulate, evaluate_every=1
    )

    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == die_at:
                (folder / "reached").touch()
                time.sleep(60)

    def validate(model):
        return -float(model.head.weight.detach().abs().sum())

    seen = {"judged": 0}

    class See(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen["began_at"] = state.global_step

        def on_evaluate(self, args, state, control, **kwargs):
            seen["judged"] += 1

        def on_train_end(self, args, state, control, **kwargs):
            seen["ended_at"] = state.global_step

    best = train(model, NextItemObjective(build_index(ids)), dataset, validate, config, folder / "run",
                 callbacks=(Wait(), See()))
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
    else:
        rank = 0
    save_file(model.state_dict(), folder / f"weights-{rank}.safetensors")
    (folder / f"end-{rank}.json").write_text(json.dumps({"best": best, **seen}))
    """
)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run(
    folder: Path, die_at: int = -1, launcher: tuple[str, ...] = (), accumulate: int = 1, dropout: float = 0.2
) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "run.py"
    script.write_text(RUN, "utf-8")
    command = [sys.executable, *launcher, *map(str, (script, folder, die_at, accumulate, dropout))]
    if die_at < 0:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        return
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (folder / "reached").exists():
            assert process.poll() is None, "the run ended before it was to be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    # In the middle of the third epoch of four.
    ended_at = json.loads((whole / "end-0.json").read_text("utf-8"))["ended_at"]
    run(killed, die_at=ended_at * 5 // 8)
    assert not (killed / "end-0.json").exists()
    run(killed)
    ends = [json.loads((folder / "end-0.json").read_text("utf-8")) for folder in (whole, killed)]
    assert [end["began_at"] for end in ends] == [0, ended_at // 2]
    assert ends[0]["best"] == ends[1]["best"]
    weights = [load_file(folder / "weights-0.safetensors") for folder in (whole, killed)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_two_processes_end_as_one_that_accumulates_two_batches(tmp_path: Path) -> None:
    """Weights and routers' biases, after equal steps, in float32 on any machine."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(alone, accumulate=2, dropout=0.0)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run(together, launcher=launcher, dropout=0.0)
    single = json.loads((alone / "end-0.json").read_text("utf-8"))
    ends = [json.loads((together / f"end-{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0].pop("best") == pytest.approx(single.pop("best"), rel=1e-5)
    assert ends[0] == single
    assert single["judged"] == 4
    one, *two = (
        load_file(folder / f"weights-{rank}.safetensors") for folder, rank in ((alone, 0), (together, 0), (together, 1))
    )
    for name, tensor in one.items():
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], tensor, rtol=0, atol=1e-5)
