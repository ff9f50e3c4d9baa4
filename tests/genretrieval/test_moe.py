"""The mixture of experts against one written as a loop over tokens, its balance, and its exported graph."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from genretrieval.export.onnx import OPSET
from genretrieval.model.layers import FeedForward
from genretrieval.model.moe import FusedMixtureOfExperts, MixtureOfExperts, mix, route, update_balance

D, F, X, J = 16, 12, 5, 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def mixture(seed: int = 0, top_k: int = J, rate: float = 0.01, n_experts: int = X) -> MixtureOfExperts:
    """One whose bias has moved."""
    torch.manual_seed(seed)
    made = MixtureOfExperts(D, F, n_experts, top_k, rate)
    made.router_bias.uniform_(-0.2, 0.2)
    return made


def naive(made: MixtureOfExperts, x_ND: Tensor) -> Tensor:
    """One token and one expert at a time; sorting in Python is stable."""
    rows = []
    for x in x_ND:
        scores = torch.sigmoid(made.router.weight @ x)
        biased = (scores + made.router_bias).tolist()
        chosen = sorted(range(len(biased)), key=lambda e: -biased[e])[: made.top_k]
        total = sum(scores[e] for e in chosen)
        terms = [scores[e] / total * (made.outer[e] @ torch.relu(made.inner[e] @ x)) for e in chosen]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows)


# --- routing ---


def test_gates_by_hand() -> None:
    # Sigmoids of 0, ln 3, -ln 3 and ln 9 are 1/2, 3/4, 1/4 and 9/10.
    logits = torch.tensor([[1.0, 3.0, 1 / 3, 9.0]]).log()
    plain = route(logits, torch.zeros(4), 2)
    assert plain.chosen_NJ.tolist() == [[3, 1]]
    torch.testing.assert_close(plain.gate_NJ, torch.tensor([[0.9 / 1.65, 0.75 / 1.65]]))
    assert plain.load_X.tolist() == [0, 1, 0, 1]
    # The bias lifts expert 2 to 1.25, above all others, and weighs nothing: its gate comes from 1/4.
    lifted = route(logits, torch.tensor([0.0, 0.0, 1.0, 0.0]), 2)
    assert lifted.chosen_NJ.tolist() == [[2, 3]]
    torch.testing.assert_close(lifted.gate_NJ, torch.tensor([[0.25 / 1.15, 0.9 / 1.15]]))
    assert lifted.load_X.tolist() == [0, 0, 1, 1]


def test_ties_go_to_the_lower_expert() -> None:
    routing = route(torch.zeros(300, 40), torch.zeros(40), 3)
    assert (routing.chosen_NJ == torch.tensor([0, 1, 2])).all()
    torch.testing.assert_close(routing.gate_NJ, torch.full((300, 3), 1 / 3))
    # Experts 1 and 3 tie by their bias.
    routing = route(torch.zeros(2, 5), torch.tensor([0.0, 0.1, 0.0, 0.1, 0.0]), 3)
    assert routing.chosen_NJ.tolist() == [[1, 3, 0]] * 2


def test_scores_that_underflow_leave_no_nan() -> None:
    routing = route(torch.full((2, 3), -500.0), torch.zeros(3), 2)
    assert routing.gate_NJ.tolist() == [[0.0, 0.0]] * 2


# --- the layer ---


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(1, 20), n_experts=st.integers(2, 7), top_k=st.integers(2, 4))
def test_equals_a_loop_over_tokens(seed: int, n: int, n_experts: int, top_k: int) -> None:
    made = mixture(seed, top_k=min(top_k, n_experts), n_experts=n_experts).double()
    x = torch.randn(n, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, D, dtype=torch.float64)
    # Both route in float32; what follows is compared in float64.
    torch.testing.assert_close(made(x), naive(made, x), rtol=1e-6, atol=1e-7)
    wanted = (x, made.router.weight, made.inner, made.outer)
    ours = torch.autograd.grad((made(x) * weight).sum(), wanted)
    theirs = torch.autograd.grad((naive(made, x) * weight).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_backward_is_exact() -> None:
    made = mixture(3).double()
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    routing = route(x.detach() @ made.router.weight.T, made.router_bias, J)
    gates = routing.gate_NJ.detach().requires_grad_()

    def run(x: Tensor, gates: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return mix(x, routing._replace(gate_NJ=gates), inner.unbind(), outer.unbind())

    assert torch.autograd.gradcheck(run, (x, gates, made.inner, made.outer))


def test_any_leading_shape() -> None:
    made = mixture()
    x = torch.randn(2, 3, 4, D)
    torch.testing.assert_close(made(x), made(x.flatten(0, 2)).unflatten(0, (2, 3, 4)))
    torch.testing.assert_close(made(x[0, 0, 0]), made(x)[0, 0, 0])


def test_all_experts_chosen_is_a_dense_mixture() -> None:
    made = mixture(top_k=X)
    x = torch.randn(50, D)
    share = (x @ made.router.weight.T).sigmoid()
    share = share / share.sum(1, keepdim=True)
    hidden = torch.einsum("xfd,nd->nxf", made.inner, x).relu()
    dense = torch.einsum("nx,nxf,xdf->nd", share, hidden, made.outer)
    torch.testing.assert_close(made(x), dense)


def test_equal_experts_are_one_feed_forward() -> None:
    made = mixture()
    dense = FeedForward(D, F)
    with torch.no_grad():
        made.inner.copy_(dense.inner.weight.expand_as(made.inner))
        made.outer.copy_(dense.outer.weight.expand_as(made.outer))
    x = torch.randn(20, D)
    torch.testing.assert_close(made(x), dense(x))


def test_routing_does_not_depend_on_bf16() -> None:
    made = mixture(n_experts=40, rate=0.0)
    x = torch.randn(500, D)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = made(x)
    in_bf16 = made.update_balance()
    exact = made(x)
    assert torch.equal(in_bf16, made.update_balance())
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.02)


def test_only_chosen_experts_learn() -> None:
    made = mixture()
    made.router_bias.copy_(torch.tensor([9.0, 0.0, 9.0, 0.0, 0.0]))
    made(torch.randn(30, D)).square().sum().backward()
    for stack in (made.inner, made.outer):
        assert stack.grad is not None
        assert stack.grad.flatten(1).any(1).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(("top_k", "rate"), [(X + 1, 0.1), (1, 0.1), (0, 0.1), (2, -0.1)])
def test_what_cannot_be_routed_is_refused(top_k: int, rate: float) -> None:
    with pytest.raises(ValueError, match="give 2 or more" if rate > 0 else "below 0"):
        MixtureOfExperts(D, F, X, top_k, rate)


# --- balance ---


def test_the_bias_by_hand() -> None:
    made = MixtureOfExperts(D, F, 4, 2, 0.1)
    # Two forward passes, as of a gradient that is accumulated: mean load 4.
    made._load = torch.tensor([8, 4, 4, 0])
    assert made.update_balance().tolist() == [8, 4, 4, 0]
    torch.testing.assert_close(made.router_bias, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
    assert made.update_balance().tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(made.router_bias, torch.tensor([-0.1, 0.0, 0.0, 0.1]))


def test_loads_are_counted_in_training_until_read() -> None:
    layers = {"first": mixture(), "second": mixture(1)}
    x = torch.randn(7, D)
    for layer in layers.values():
        layer(x)
        layer(x)
        layer.eval()(x)
        layer.train()
    expected = {
        name: 2 * route(x @ layer.router.weight.T, layer.router_bias, J).load_X for name, layer in layers.items()
    }
    model = nn.ModuleDict(layers)
    loads = update_balance(model)
    assert list(loads) == ["first", "second"]
    for name, load_X in loads.items():
        assert load_X.sum() == 2 * 7 * J
        assert torch.equal(load_X, expected[name])
    assert not any(load_X.any() for load_X in update_balance(model).values())


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), n_experts=st.integers(4, 8))
def test_a_skewed_router_becomes_even(seed: int, n_experts: int) -> None:
    made = mixture(seed, n_experts=n_experts, rate=0.02)
    nn.init.zeros_(made.router_bias)
    with torch.no_grad():
        # The first component of every token is 1: logits of the experts differ by up to 3 whatever the token.
        made.router.weight[:, 0] = torch.linspace(-1.5, 1.5, n_experts)

    def excess() -> float:
        x = torch.randn(500, D)
        x[:, 0] = 1.0
        with torch.no_grad():
            made(x)
        load_X = made.update_balance()
        return float(load_X.max() / load_X.float().mean())

    before = excess()
    after = np.mean([excess() for _ in range(300)][-20:])
    assert before > 1.5
    assert after < 1.15
    assert abs(float(made.router_bias.mean())) < 1e-4


def test_rate_zero_moves_nothing() -> None:
    made = mixture(rate=0.0)
    before = made.router_bias.clone()
    made(torch.randn(9, D))
    made.update_balance()
    assert torch.equal(made.router_bias, before)


def test_the_state_holds_the_bias_and_no_counts() -> None:
    made = mixture()
    made(torch.randn(3, D))
    state = made.state_dict()
    assert list(state) == ["inner", "outer", "router_bias", "router.weight"]
    # As `from_pretrained` builds: without memory, then filled.
    with torch.device("meta"):
        other = MixtureOfExperts(D, F, X, J, 0.01)
    other.to_empty(device="cpu").load_state_dict(state)
    x = torch.randn(6, D)
    assert torch.equal(other(x), made(x))
    assert other.update_balance().sum() == 6 * J


PROCESSES = textwrap.dedent(
    """
    import os
    import sys
    from pathlib import Path

    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from genretrieval.model.moe import MixtureOfExperts, route, update_balance

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    made = MixtureOfExperts(8, 4, 5, 2, 0.1)
    model = DistributedDataParallel(made)
    torch.manual_seed(1 + rank)
    steps = []
    for _ in range(2):
        expected = torch.zeros(5, dtype=torch.long)
        # Accumulation that synchronises every time, where the wrapper sends buffers around before each pass.
        for _ in range(2):
            x = torch.randn(6 + rank, 8)
            expected += route(x @ made.router.weight.T, made.router_bias, 2).load_X
            model(x).sum().backward()
        distributed.all_reduce(expected)
        (load,) = update_balance(model).values()
        steps.append({"load": load, "expected": expected, "bias": made.router_bias.clone()})
    torch.save(steps, Path(sys.argv[1]) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    # Threads of gloo that are not joined when the interpreter takes itself apart abort the process now and then.
    os._exit(0)
    """
)


def test_processes_add_their_loads(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(PROCESSES, "utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for one, other in zip(first, second, strict=True):
        # 2 passes of 6 and 7 tokens by 2 experts each.
        assert one["load"].sum() == 2 * (6 + 7) * 2
        assert torch.equal(one["load"], one["expected"])
        assert torch.equal(one["load"], other["load"])
        assert torch.equal(one["bias"], other["bias"])
        assert one["bias"].any()


# --- inference ---


class Fused(nn.Module):
    """Norm and mixture as a layer of the search has them: the gain is in the matrices."""

    def __init__(self, made: MixtureOfExperts, gain_D: Tensor) -> None:
        super().__init__()
        self.mixture = FusedMixtureOfExperts(made, gain_D)

    def forward(self, x_ND: Tensor) -> Tensor:
        mixed_ND: Tensor = self.mixture(nn.functional.rms_norm(x_ND, x_ND.shape[-1:], torch.ones(D), 1e-6))
        return x_ND + mixed_ND


def gain() -> Tensor:
    return torch.linspace(0.5, 1.5, D)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_fused_equals_the_layer_behind_its_norm(n: int) -> None:
    made = mixture().eval()
    x = torch.randn(n, D)
    normed = nn.functional.rms_norm(x, (D,), gain(), 1e-6)
    torch.testing.assert_close(Fused(made, gain())(x), x + made(normed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtureOfExperts, Path]:
    """A mixture and the graph of its fused form, traced with tokens that all go to the same experts."""
    made = mixture(5).eval()
    path = tmp_path_factory.mktemp("moe") / "mixture.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Fused(made, gain()),
            (torch.ones(6, D),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: Dim.DYNAMIC},),
            verbose=False,
        )
    assert program is not None
    onnx.save(program.model_proto, path)
    return made, path


def runner(model: onnx.ModelProto, threads: int = 1) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def tokens_of_every_expert(made: MixtureOfExperts) -> Tensor:
    """Tokens of which some go to each expert."""
    x = torch.randn(60, D)
    normed = nn.functional.rms_norm(x, (D,), gain(), 1e-6)
    load_X = route(normed @ made.router.weight.T, made.router_bias, J).load_X
    assert load_X.min() > 0
    return x


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_the_graph_answers_as_torch(exported: tuple[MixtureOfExperts, Path], threads: int) -> None:
    made, path = exported
    run = runner(onnx.load(path), threads)
    fused = Fused(made, gain())
    # One token leaves most experts without any.
    for x in (*(torch.randn(n, D) for n in (1, 2, 7, 50, 400)), tokens_of_every_expert(made)):
        torch.testing.assert_close(run(x), fused(x), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_every_expert_is_in_the_graph_and_used(exported: tuple[MixtureOfExperts, Path]) -> None:
    made, path = exported
    model = onnx.load(path)
    x = tokens_of_every_expert(made)
    complete = runner(model)(x)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for stack in (made.inner * gain(), made.outer):
        for weight in stack.numpy():
            names = [n for n, tensor in weights.items() if np.array_equal(numpy_helper.to_array(tensor), weight)]
            assert len(names) == 1
            kept = weights[names[0]].raw_data
            weights[names[0]].raw_data = bytes(len(kept))
            assert (runner(model)(x) - complete).abs().max() > 1e-3
            weights[names[0]].raw_data = kept
    torch.testing.assert_close(runner(model)(x), complete)


@torch.inference_mode()
def test_the_graph_gives_ties_to_the_lower_expert(exported: tuple[MixtureOfExperts, Path]) -> None:
    made, path = exported
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.dims in ([X, D], [X]) and tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = bytes(len(tensor.raw_data))
    x = torch.randn(9, D)
    normed = nn.functional.rms_norm(x, (D,), gain(), 1e-6)
    lowest = sum(0.5 * (normed @ made.inner[e].T).relu() @ made.outer[e].T for e in range(J))
    torch.testing.assert_close(runner(model)(x), x + lowest, rtol=0, atol=1e-5)
