"""How should the exported graph run a mixture of experts? Every answer beside a dense layer of equal active width.

    OMP_NUM_THREADS=1 python benchmarks/moe_decode.py --rounds 100

One layer, 8 experts of width 256 of which each token uses 2, against a dense layer of width 512, for as many tokens as
a decoder step has: 1 at the first level of a request, its beams at the others, times the batch.

- sorted: tokens sorted by expert, a product of each expert with its own. What `FusedMixtureOfExperts` does.
- gathered: the matrices of each token's experts gathered, one batched product.
- all_experts: every expert on every token, as two large products; gates of 0 where an expert was not chosen.
- looped: for each expert its tokens found, gathered, multiplied and put back.
- operator: the MoE operator of onnxruntime's own domain.

Then whole models of the shipped sizes, dense and with the first of these in the decoder's layers. Tokens are random, so
loads are about even, which is the hardest case for what depends on them. Contenders take turns in one process, on one
thread; answers are compared before anything is timed.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import linear

from genretrieval.export.onnx import OPSET, GraphBackend, example_inputs, export_graph, named_graph
from genretrieval.figures import Figure, machine, print_lines, versions, write_json
from genretrieval.model import Generator, GeneratorConfig
from genretrieval.model.moe import FusedMixtureOfExperts, MixtureOfExperts, route
from genretrieval.model.search import add_linear, norm
from genretrieval_pipelines.bench_decode import (
    SIZES_4X256,
    Contender,
    generator_inputs,
    open_session,
    random_generator,
    random_index,
    runner,
    take_turns,
)

D, D_FF, N_EXPERTS, TOP_K = 128, 512, 8, 2
D_EXPERT = D_FF // TOP_K
TOKENS = (1, 10, 50, 400)
CELLS = ((1, 10), (1, 50), (8, 50), (32, 50))
CATALOGUE_ITEMS = 100_000


class Dense(nn.Module):
    """The layer that a mixture stands in for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(D_FF, D) * D**-0.5)
        self.outer = nn.Parameter(torch.randn(D_FF, D) * D_FF**-0.5)

    def forward(self, x_ND: Tensor) -> Tensor:
        hidden_NF: Tensor = linear(norm(x_ND), self.inner).relu()
        return add_linear(x_ND, hidden_NF, self.outer)


class Sorted(nn.Module):
    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = FusedMixtureOfExperts(mixture, torch.ones(D))

    def forward(self, x_ND: Tensor) -> Tensor:
        mixed_ND: Tensor = self.mixture(norm(x_ND))
        return x_ND + mixed_ND


class Gathered(nn.Module):
    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture
        self.inner_XDF = nn.Parameter(mixture.inner.mT.contiguous())
        self.outer_XFD = nn.Parameter(mixture.outer.mT.contiguous())

    def forward(self, x_ND: Tensor) -> Tensor:
        normed = norm(x_ND)
        routing = route(self.mixture.router(normed), self.mixture.router_bias, TOP_K)
        hidden_NJ1F = (normed[:, None, None] @ self.inner_XDF[routing.chosen_NJ]).relu()
        y_NJD = (hidden_NJ1F @ self.outer_XFD[routing.chosen_NJ])[:, :, 0]
        return x_ND + (y_NJD * routing.gate_NJ[..., None]).sum(1)


def gates_of_all(mixture: MixtureOfExperts, normed_ND: Tensor) -> Tensor:
    """Gates ``[N, X]``, 0 for experts that were not chosen."""
    routing = route(mixture.router(normed_ND), mixture.router_bias, TOP_K)
    return normed_ND.new_zeros(normed_ND.shape[0], N_EXPERTS).scatter(1, routing.chosen_NJ, routing.gate_NJ)


class AllExperts(nn.Module):
    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture
        self.inner = nn.Parameter(mixture.inner.flatten(0, 1))
        self.outer = nn.Parameter(mixture.outer.mT.flatten(0, 1).contiguous())

    def forward(self, x_ND: Tensor) -> Tensor:
        normed = norm(x_ND)
        hidden_NXF: Tensor = linear(normed, self.inner).relu().view(-1, N_EXPERTS, D_EXPERT)
        gated = hidden_NXF * gates_of_all(self.mixture, normed)[..., None]
        return add_linear(x_ND, gated.flatten(1), self.outer)


class Looped(nn.Module):
    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture
        self.inner = nn.ParameterList(weight.clone() for weight in mixture.inner)
        self.outer = nn.ParameterList(weight.clone() for weight in mixture.outer)

    def forward(self, x_ND: Tensor) -> Tensor:
        normed = norm(x_ND)
        columns = gates_of_all(self.mixture, normed).unbind(1)
        for gate_N, inner, outer in zip(columns, self.inner, self.outer, strict=True):
            rows = gate_N.nonzero()[:, 0]
            own = normed.index_select(0, rows) * gate_N.index_select(0, rows)[:, None]
            x_ND = x_ND.index_add(0, rows, linear(linear(own, inner).relu(), outer))
        return x_ND


class Operator(nn.Module):
    """It routes by itself, by a softmax, so it is given the logarithms of the gates."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x_ND: Tensor) -> Tensor:
        normed = norm(x_ND)
        log_gates = gates_of_all(self.mixture, normed).log().clamp(min=-1e30)
        weights = (self.mixture.inner, None, self.mixture.outer)
        attributes: dict[str, Any] = {"k": TOP_K, "activation_type": "relu", "normalize_routing_weights": 1}
        return x_ND + torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            (normed, log_gates, *weights),
            attributes,
            dtype=x_ND.dtype,
            shape=x_ND.shape,
            version=1,
        )


WAYS: dict[str, Callable[[MixtureOfExperts], nn.Module]] = {
    "sorted": Sorted,
    "gathered": Gathered,
    "all_experts": AllExperts,
    "looped": Looped,
    "operator": Operator,
}


def export_layer(layer: nn.Module, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            layer.eval(),
            (torch.randn(6, D),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: Dim.DYNAMIC},),
            verbose=False,
        )
    assert program is not None
    onnx.save(program.model_proto, path)


def time_layers(folder: Path, rounds: int) -> dict[str, Figure]:
    """Microseconds a call of every way, and their ratios to the dense layer."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(D, D_EXPERT, N_EXPERTS, TOP_K, 0.0).requires_grad_(False)
    layers = {"dense": Dense(), **{name: way(mixture) for name, way in WAYS.items()}}
    sessions = {}
    for name, layer in layers.items():
        export_layer(layer, folder / f"{name}.onnx")
        sessions[name] = open_session(folder / f"{name}.onnx", 1)
    figures: dict[str, Figure] = {}
    for n in TOKENS:
        inputs = {"x": np.random.default_rng(n).standard_normal((n, D), np.float32)}
        calls = {name: runner(session, inputs) for name, session in sessions.items()}
        with torch.inference_mode():
            expected = layers["sorted"](torch.from_numpy(inputs["x"])).numpy()
        for name in WAYS:
            np.testing.assert_allclose(calls[name]()[0], expected, rtol=0, atol=1e-4, err_msg=name)
        times = take_turns([Contender(name, call) for name, call in calls.items()], rounds)
        for name, ms in times.items():
            assert ms.spread is not None
            low, high = ms.spread
            figures[f"moe.layer_us.{name}.n{n}"] = Figure(ms.value * 1e3, "us", (low * 1e3, high * 1e3))
            if name != "dense":
                ratio = ms.value / times["dense"].value
                figures[f"moe.layer_ratio.{name}_over_dense.n{n}"] = Figure(ratio, "ratio")
    return figures


def time_models(folder: Path, rounds: int) -> dict[str, Figure]:
    """Milliseconds a call of the whole retrieval graph, dense and with mixtures, and their ratio."""
    generator = random_generator(SIZES_4X256)
    config = {**generator.config.to_dict(), "n_experts": N_EXPERTS, "experts_per_token": TOP_K}
    assert (config["d_model"], config["d_ff"]) == (D, D_FF)
    with_experts = Generator(GeneratorConfig(**config))
    with_experts.load_state_dict(generator.state_dict(), strict=False)
    dense, mixed = named_graph(generator), named_graph(with_experts.eval())
    sessions = {}
    for name, graph in {"dense": dense, "mixture": mixed}.items():
        export_graph(graph, example_inputs(graph, n_profile_features=2), folder / f"{name}.onnx")
        sessions[name] = open_session(folder / f"{name}.onnx", 1)
    index = random_index(CATALOGUE_ITEMS, SIZES_4X256)
    figures: dict[str, Figure] = {}
    for batch, beams in CELLS:
        inputs = generator_inputs(index, batch, beams)
        calls = {name: runner(session, inputs) for name, session in sessions.items()}
        reference = GraphBackend(mixed).run(inputs)
        np.testing.assert_allclose(calls["mixture"]()[1], reference.scores, rtol=0, atol=1e-4)
        times = take_turns([Contender(name, call) for name, call in calls.items()], rounds)
        cell = f"b{batch}.k{beams}"
        figures |= {f"moe.model_ms.{name}.{cell}": figure for name, figure in times.items()}
        ratio = times["mixture"].value / times["dense"].value
        figures[f"moe.model_ratio.mixture_over_dense.{cell}"] = Figure(ratio, "ratio")
    return figures


def main(
    rounds: Annotated[int, typer.Option(help="How often each contender is timed; figures are medians.")] = 100,
    json: Annotated[Path | None, typer.Option(help="Also write the figures, with p10 and p90, to this file.")] = None,
) -> None:
    """Time the ways to run a mixture of experts in the exported graph."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = time_layers(Path(folder), rounds) | time_models(Path(folder), rounds)
    typer.echo(f"{machine()['cpu']}, onnxruntime {versions()['onnxruntime']}, 1 thread", err=True)
    print_lines(figures)
    if json is not None:
        write_json(json, figures)


if __name__ == "__main__":
    typer.run(main)
