"""Constrained beam search in one graph against Hugging Face ``generate`` on the same weights.

Row A is a T5 of 4+4 layers and width 128 over 4 levels of 256 codes, which both sides run; their answers are compared
in the same run, and no speed is reported where they differ. Row B is the model that we ship, over several shapes of
index. Contenders take turns within one process, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from genretrieval.bundle import GRAPH, load_bundle
from genretrieval.catalogue import (
    NOTHING_CLOSED,
    CatalogueIndex,
    build_index,
    closed_inputs,
    graph_inputs,
    mask_inputs,
)
from genretrieval.errors import GenRetrievalError
from genretrieval.export.onnx import NamedGraph, example_inputs, export_graph, named_graph
from genretrieval.export.t5 import REQUEST_INPUTS, T5RetrievalGraph, t5_graph, t5_level_offsets
from genretrieval.figures import Figure
from genretrieval.model import BeamSearch, Generator, GeneratorConfig
from genretrieval.model.search import IndexTensors
from genretrieval.semantic_ids import SemanticIds
from genretrieval.servable import Catalogue

Inputs = dict[str, NDArray[Any]]

SIZES_4X256 = (256, 256, 256, 256)
SIZES_SIX_LEVELS = (2048, 2048, 2048, 1024, 1024, 1024)
SIZES_FIVE_LEVELS = (4096, 1024, 512, 256, 256)
CONTEXT_TOKENS = 80
HISTORY_ITEMS = 20
QUERY_TOKENS = 4
ZIPF_EXPONENT = 1.0
# Answers may differ in beams whose scores are this near to the last beam's: float32 sums in another order.
SCORE_GAP = 1e-5
GEMM_SHAPES = ((2048, 1024, 1024), (512, 512, 512), (80, 128, 1024), (50, 128, 512), (50, 512, 128))
ANSWER_SCORE_TOLERANCE = 2e-4


class DifferentAnswersError(GenRetrievalError):
    """The two sides of a comparison found different items, so their speeds are not comparable."""


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
        name: key of its times.
        call: does the work once.
    """

    name: str
    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a beam search found: of each row, summed log-probability by semantic ID."""

    rows: tuple[dict[tuple[int, ...], float], ...]


def bench_decode(sizes: tuple[int, ...], rounds: int, bundle: Path | None, quick: bool) -> dict[str, Figure]:
    """Measure; a table goes to stderr when it is a terminal.

    Args:
        sizes: catalogue sizes, in items.
        rounds: how often each contender is timed at batch 1; larger batches get fewer.
        bundle: a bundle to be row B; without one row B is the shipped sizes with random weights.
        quick: row A at batch 1 only.

    Returns:
        Figures by name. A latency is a median with its 10th and 90th percentile; a ratio is one of medians.

    Raises:
        DifferentAnswersError: ours and Hugging Face's answers differ.
    """
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), sizes, rounds, console)
        bench.row_a(batches=(1,) if quick else (1, 8, 32), with_free=not quick)
        if not quick:
            bench.row_b(bundle)
    if console.is_terminal:
        console.print(_table(bench.figures))
    return bench.figures


class _Bench:
    """One run: where graphs are kept, and the figures so far."""

    def __init__(self, folder: Path, sizes: tuple[int, ...], rounds: int, console: Console) -> None:
        self.folder = folder
        self.sizes = sizes
        self.rounds = rounds
        self.console = console
        self.figures: dict[str, Figure] = {}

    def row_a(self, batches: tuple[int, ...], *, with_free: bool) -> None:
        """The T5: ours, Hugging Face with and without the constraint."""
        model = random_t5(SIZES_4X256)
        graph = self._export("t5", t5_graph(model, SIZES_4X256))
        free = self._export("free", free_t5_graph(model, SIZES_4X256)) if with_free else None
        sessions = {threads: open_session(graph, threads) for threads in (1, 2)}
        # One switch for both sides: see `open_session`.
        torch.set_flush_denormal(True)
        indexes = {n: random_index(n, SIZES_4X256) for n in self.sizes}
        peers = {n: HuggingFace(model, index) for n, index in indexes.items()}
        largest = max(self.sizes)
        for batch in batches:
            tokens = np.random.default_rng(batch).integers(2, model.config.vocab_size, (batch, CONTEXT_TOKENS))
            peer_threads = self._fastest_threads(peers[min(self.sizes)], tokens)
            for beams in (10, 50):
                contenders = []
                for n, index in indexes.items():
                    inputs = {"context_tokens": tokens, "beams": np.arange(beams), **open_catalogue(index, batch)}
                    ours, theirs = our_answer(runner(sessions[1], inputs)(), index), peers[n].answer(tokens, beams)
                    require_equal_answers(ours, theirs, f"batch {batch}, {beams} beams, {n} items")
                    contenders += [
                        Contender(f"ours.n{n}.t{threads}", runner(session, inputs))
                        for threads, session in sessions.items()
                    ]
                    contenders.append(Contender(f"constrained.n{n}", peers[n].caller(tokens, beams, peer_threads)))
                peer = peers[min(self.sizes)]
                contenders.append(Contender("free", peer.caller(tokens, beams, peer_threads, constrained=False)))
                cell = f"b{batch}.k{beams}"
                if batch == 1:
                    if free:
                        inputs = {"context_tokens": tokens, "beams": np.arange(beams)}
                        inputs |= open_catalogue(indexes[largest], batch)
                        contenders.append(Contender("unconstrained", runner(open_session(free, 1), inputs)))
                    contenders += gemm_contenders()
                times = take_turns(contenders, self._rounds(batch, beams))
                self._row_a_figures(times, cell, batch, beams, model.config.vocab_size)

    def _row_a_figures(self, times: Mapping[str, Figure], cell: str, batch: int, beams: int, vocab_size: int) -> None:
        """Name what one cell of row A measured."""
        smallest, largest = min(self.sizes), max(self.sizes)
        ours = {n: min(times[f"ours.n{n}.t1"].value, times[f"ours.n{n}.t2"].value) for n in self.sizes}
        for n in self.sizes:
            for threads in (1, 2):
                self.figures[f"decode.latency_ms.rowa.{cell}.n{n}.t{threads}"] = times[f"ours.n{n}.t{threads}"]
            peer = times[f"constrained.n{n}"]
            self.figures[f"decode.latency_ms.hf_constrained.{cell}.n{n}"] = peer
            self.figures[f"decode.speedup_vs_hf_constrained.{cell}.n{n}"] = _ratio(peer.value, ours[n])
        self.figures[f"decode.latency_ms.hf_free.{cell}"] = times["free"]
        self.figures[f"decode.speedup_vs_hf_free.{cell}.n{smallest}"] = _ratio(times["free"].value, ours[smallest])
        if smallest != largest:
            self.figures[f"decode.latency_ratio.n{largest}_over_n{smallest}.{cell}"] = _ratio(
                times[f"ours.n{largest}.t1"].value, times[f"ours.n{smallest}.t1"].value
            )
        if "unconstrained" in times:
            self.figures[f"decode.latency_ms.unconstrained.{cell}.t1"] = times["unconstrained"]
            self.figures[f"decode.latency_ratio.constrained_over_unconstrained.{cell}"] = _ratio(
                times[f"ours.n{largest}.t1"].value, times["unconstrained"].value
            )
        if batch == 1:
            rate = gemm_rate(times)
            flops = t5_search_flops(CONTEXT_TOKENS, beams, vocab_size)
            seconds = times[f"ours.n{smallest}.t1"].value / 1e3
            self.figures[f"machine.gemm_gflops.t1.during_{cell.replace('.', '_')}"] = Figure(rate, "GFLOP/s")
            self.figures["machine.gemm_gflops.t1"] = Figure(rate, "GFLOP/s")
            self.figures[f"decode.gemm_share.{cell}"] = Figure(flops / seconds / rate / 1e9, "share")

    def row_b(self, bundle: Path | None) -> None:
        """The shipped model over several shapes of index, and over a bundle's own."""
        largest = max(self.sizes)
        cases: dict[str, tuple[ort.InferenceSession, CatalogueIndex]] = {}
        shapes = (("4x256", SIZES_4X256), ("sixlevel", SIZES_SIX_LEVELS), ("fivelevel", SIZES_FIVE_LEVELS))
        for name, codebook_sizes in shapes:
            path = self._export(name, named_graph(random_generator(codebook_sizes)))
            session = open_session(path, 1)
            cases[name] = session, random_index(largest, codebook_sizes)
            cases[f"{name}_skewed"] = session, random_index(largest, codebook_sizes, skewed=True)
            if name == "4x256":
                for n in self.sizes:
                    cases[f"rowb.n{n}"] = session, random_index(n, codebook_sizes)
        if bundle is not None:
            opened = load_bundle(bundle)
            index = Catalogue.open(opened).index
            cases[f"bundle.n{index.n_items}"] = open_session(opened.path / GRAPH, 1), index
        for batch in (1, 8, 32):
            for beams in (10, 50):
                contenders = [
                    Contender(name, runner(session, generator_inputs(index, batch, beams)))
                    for name, (session, index) in cases.items()
                    if batch == 1 or "." in name
                ]
                times = take_turns(contenders, self._rounds(batch, beams))
                self._row_b_figures(times, f"b{batch}.k{beams}")

    def _row_b_figures(self, times: Mapping[str, Figure], cell: str) -> None:
        """Name what one cell of row B measured; names without a dot are shapes of index."""
        for name, figure in times.items():
            row, _, size = name.partition(".")
            if size:
                self.figures[f"decode.latency_ms.{row}.{cell}.{size}.t1"] = figure
            else:
                self.figures[f"decode.latency_ms.rowb_{name}.{cell}.n{max(self.sizes)}.t1"] = figure
                if name != "4x256":
                    baseline = times["4x256"].value
                    self.figures[f"decode.latency_ratio.{name}_over_4x256.{cell}"] = _ratio(figure.value, baseline)

    def _rounds(self, batch: int, beams: int) -> int:
        """Large batches take seconds a call with Hugging Face."""
        if batch == 1:
            return self.rounds
        return max(2, self.rounds // (4 if batch * beams < 1000 else 7))

    def _export(self, name: str, graph: NamedGraph) -> Path:
        path = self.folder / f"{name}.onnx"
        with self.console.status(f"exporting {name}"):
            export_graph(graph, example_inputs(graph, n_profile_features=2), path)
        return path

    def _fastest_threads(self, peer: HuggingFace, tokens: NDArray[np.int64]) -> int:
        """Threads at which Hugging Face is fastest at this batch."""
        contenders = [Contender(str(threads), peer.caller(tokens, 10, threads)) for threads in (1, 2)]
        times = take_turns(contenders, 3 if len(tokens) == 1 else 1)
        best = min(times, key=lambda name: times[name].value)
        self.console.print(f"Hugging Face runs batch {len(tokens)} with {best} thread(s), its faster setting")
        self.figures[f"decode.hf_threads.b{len(tokens)}"] = Figure(float(best), "threads")
        return int(best)


def take_turns(
    contenders: Sequence[Contender], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Figure]:
    """Time every contender once a round, in turn; each timed call follows an untimed one.

    The untimed call brings a contender's own weights back into the caches that the one before it took; it is left out
    after calls so long that they fill the caches themselves.

    Returns:
        By name: median ms by the clock, with the 10th and 90th percentile.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.call()
    for _ in range(rounds):
        for contender in contenders:
            taken = seconds[contender.name]
            if not taken or taken[-1] < 0.1:
                contender.call()
            started = clock()
            contender.call()
            taken.append(clock() - started)
    return {name: _spread(np.asarray(taken) * 1e3) for name, taken in seconds.items()}


def _spread(ms: NDArray[np.float64]) -> Figure:
    low, middle, high = np.quantile(ms, [0.1, 0.5, 0.9])
    return Figure(float(middle), "ms", (float(low), float(high)))


def _ratio(over: float, under: float) -> Figure:
    return Figure(over / under, "ratio")


# --- the models ---


def random_t5(codebook_sizes: tuple[int, ...], n_layers: int = 4, d_model: int = 128) -> T5ForConditionalGeneration:
    """A T5 with twice its initial weights, so that scores lie far enough apart to have one right order."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=t5_level_offsets(codebook_sizes)[-1] + codebook_sizes[-1],
        d_model=d_model,
        d_kv=d_model // 4,
        d_ff=4 * d_model,
        num_layers=n_layers,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    # Every semantic ID has all its codes: nothing ends early.
    model.generation_config.eos_token_id = None
    return model


def random_generator(codebook_sizes: tuple[int, ...]) -> Generator:
    """The shipped model's sizes (configs/next_item.yaml), untrained."""
    torch.manual_seed(0)
    config = GeneratorConfig(
        codebook_sizes=codebook_sizes, query_vocab_size=4096, n_events=4, n_gaps=16, n_profile_buckets=4096
    )
    generator: Generator = Generator(config).eval()
    return generator


class FreeBeamSearch(BeamSearch):
    """The same search without an index: every code may follow every prefix. What the constraint costs is the rest."""

    def _tokens(self, level: int, node_BQ: Tensor, index: IndexTensors) -> Tensor:
        return node_BQ + self.level_offsets[level]

    def _children(self, level: int, node_BK: Tensor, index: IndexTensors) -> tuple[Tensor, Tensor]:
        codes_C = torch.arange(self.codebook_sizes[level], device=node_BK.device)
        return codes_C.expand(*node_BK.shape, -1), torch.ones(1, 1, 1, dtype=torch.bool, device=node_BK.device)

    def _open(self, level: int, child_BKC: Tensor, exists_BKC: Tensor, index: IndexTensors) -> Tensor:
        return exists_BKC

    def _logp(
        self, state_BQD: Tensor, level: int, child_BQC: Tensor, exists_BQC: Tensor, index: IndexTensors
    ) -> Tensor:
        first, size = self.level_offsets[level], self.codebook_sizes[level]
        return torch.nn.functional.linear(state_BQD, self.heads[0]).log_softmax(-1)[..., first : first + size]


def free_t5_graph(model: T5ForConditionalGeneration, codebook_sizes: tuple[int, ...]) -> NamedGraph:
    """`t5_graph` with `FreeBeamSearch`; its leaves are codes of the last level, its index inputs are not read."""
    graph = T5RetrievalGraph(model, codebook_sizes, FreeBeamSearch).eval()
    return NamedGraph(graph, REQUEST_INPUTS, codebook_sizes)


# --- catalogues and requests ---


def random_index(n_items: int, codebook_sizes: tuple[int, ...], *, skewed: bool = False) -> CatalogueIndex:
    """Index of items with random codes: uniform, or by Zipf's law at every level."""
    rng = np.random.default_rng(0)
    columns = []
    for size in codebook_sizes:
        weight = np.arange(1, size + 1) ** -(ZIPF_EXPONENT if skewed else 0.0)
        columns.append(rng.choice(size, n_items, p=weight / weight.sum()))
    return build_index(SemanticIds(np.stack(columns, 1).astype(np.int32), codebook_sizes))


def open_catalogue(index: CatalogueIndex, batch: int) -> Inputs:
    """The index with everything allowed, as inputs of a graph."""
    everything = index.allowed_nodes(np.ones(index.n_leaves, bool))
    nothing = (NOTHING_CLOSED,) * index.n_levels
    return {
        "mask_row": np.zeros(batch, np.int64),
        **graph_inputs(index),
        **mask_inputs([everything]),
        **closed_inputs([nothing] * batch),
    }


def generator_inputs(index: CatalogueIndex, batch: int, beams: int) -> Inputs:
    """Requests to the shipped model: 20 items of the catalogue and a query of 4 tokens."""
    rng = np.random.default_rng(batch)
    leaves = rng.integers(0, index.n_leaves, batch * HISTORY_ITEMS)
    return {
        "history_codes": index.leaf_codes(leaves).astype(np.int64).reshape(batch, HISTORY_ITEMS, -1),
        "history_events": np.ones((batch, HISTORY_ITEMS), np.int64),
        "history_gaps": np.ones((batch, HISTORY_ITEMS), np.int64),
        "history_mask": np.ones((batch, HISTORY_ITEMS), bool),
        "query_tokens": np.ones((batch, QUERY_TOKENS), np.int64),
        "query_mask": np.ones((batch, QUERY_TOKENS), bool),
        "profile": np.zeros((batch, 2), np.int64),
        "beams": np.arange(beams),
        **open_catalogue(index, batch),
    }


# --- ours ---


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """A session that treats denormals as zero: a masked key's weight is one, and they cost Intel CPUs dearly."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # Idle threads must not spin into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(session: ort.InferenceSession, inputs: Inputs) -> Callable[[], list[NDArray[Any]]]:
    """A call of `session` with those of `inputs` that its graph has."""
    given = {node.name: inputs[node.name] for node in session.get_inputs()}
    return lambda: session.run(None, given)


def our_answer(found: Sequence[NDArray[Any]], index: CatalogueIndex) -> Answer:
    """What our graph found, from its outputs: leaves, scores and more."""
    rows = zip(found[0], found[1], strict=True)
    return Answer(tuple(_by_id(index.leaf_codes(leaves), scores) for leaves, scores in rows))


def _by_id(codes: Iterable[Iterable[int]], scores: Iterable[float]) -> dict[tuple[int, ...], float]:
    return {tuple(int(c) for c in code): float(score) for code, score in zip(codes, scores, strict=True)}


# --- Hugging Face ---


class HuggingFace:
    """``generate`` with the catalogue as a dict from prefix to allowed tokens."""

    def __init__(self, model: T5ForConditionalGeneration, index: CatalogueIndex) -> None:
        """Build the dict, before anything is timed."""
        self.model = model
        self.n_levels = index.n_levels
        self.level_offsets = t5_level_offsets(index.codebook_sizes)
        self.allowed = prefix_table(index, self.level_offsets)

    def caller(
        self, tokens: NDArray[np.int64], beams: int, threads: int, *, constrained: bool = True
    ) -> Callable[[], Any]:
        """A call that finds `beams` semantic IDs for each row of `tokens`."""

        def call() -> Any:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            return self.generate(tokens, beams, constrained=constrained)

        return call

    def answer(self, tokens: NDArray[np.int64], beams: int) -> Answer:
        """What constrained ``generate`` finds."""
        found = self.generate(tokens, beams, return_dict_in_generate=True, output_scores=True)
        codes = found.sequences[:, 1:].reshape(len(tokens), beams, -1) - torch.tensor(self.level_offsets)
        scores = found.sequences_scores.reshape(len(tokens), beams)
        pairs = zip(codes.tolist(), scores.tolist(), strict=True)
        return Answer(tuple(_by_id(row_codes, row_scores) for row_codes, row_scores in pairs))

    @torch.inference_mode()
    def generate(
        self,
        tokens: NDArray[np.int64],
        beams: int,
        *,
        n_best: int | None = None,
        constrained: bool = True,
        **options: Any,
    ) -> Any:
        """What ``generate`` returns: the `n_best` of `beams` semantic IDs, all by default, for each row of `tokens`."""
        context = torch.from_numpy(tokens)
        return self.model.generate(
            context,
            attention_mask=torch.ones_like(context),
            num_beams=beams,
            num_return_sequences=n_best or beams,
            max_new_tokens=self.n_levels,
            do_sample=False,
            # Scores are sums, as ours are.
            length_penalty=0.0,
            early_stopping=True,
            prefix_allowed_tokens_fn=self._allowed_tokens if constrained else None,
            **options,
        )

    def _allowed_tokens(self, _: int, sequence: Tensor) -> list[int]:
        return self.allowed[tuple(sequence[1:].tolist())]


def prefix_table(index: CatalogueIndex, level_offsets: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each prefix."""
    table: dict[tuple[int, ...], list[int]] = {}
    prefixes: list[tuple[int, ...]] = [()]
    for tokens, starts, offset in zip(index.tokens, index.child_starts, level_offsets, strict=True):
        flat, bounds = (tokens.astype(np.int64) + offset).tolist(), starts.tolist()
        children = [flat[bounds[i] : bounds[i + 1]] for i in range(len(prefixes))]
        table.update(zip(prefixes, children, strict=True))
        prefixes = [
            (*prefix, token) for prefix, following in zip(prefixes, children, strict=True) for token in following
        ]
    return table


def require_equal_answers(ours: Answer, theirs: Answer, where: str) -> None:
    """Compare semantic IDs as sets and their scores, row by row.

    Raises:
        DifferentAnswersError: if an ID that one side lacks is not within `SCORE_GAP` of the other's last beam, or the
            scores of an ID differ.
    """
    for row, (a, b) in enumerate(zip(ours.rows, theirs.rows, strict=True)):
        strays = [code for code in a if code not in b and a[code] > min(b.values()) + SCORE_GAP]
        strays += [code for code in b if code not in a and b[code] > min(a.values()) + SCORE_GAP]
        gap = max((abs(a[code] - b[code]) for code in a.keys() & b.keys()), default=0.0)
        if strays or gap > ANSWER_SCORE_TOLERANCE:
            raise DifferentAnswersError(
                f"ours and Hugging Face differ at {where}, row {row}: {len(strays)} IDs on one side only, scores up to "
                f"{gap:.2g} apart. No speed is reported for unequal answers; this is a bug of the search"
            )


# --- the machine ---


def gemm_contenders() -> list[Contender]:
    """Plain float32 MatMul in onnxruntime on one thread, one for each of `GEMM_SHAPES`."""
    rng = np.random.default_rng(0)
    contenders = []
    for m, k, n in GEMM_SHAPES:
        weight = numpy_helper.from_array(rng.standard_normal((k, n), np.float32), "w")
        value = [helper.make_tensor_value_info(x, TensorProto.FLOAT, s) for x, s in (("x", (m, k)), ("y", (m, n)))]
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])], "gemm", value[:1], value[1:], [weight]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        contenders.append(
            Contender(f"gemm.{m}x{k}x{n}", runner(session, {"x": rng.standard_normal((m, k), np.float32)}))
        )
    return contenders


def gemm_rate(times: Mapping[str, Figure]) -> float:
    """GFLOP/s of the best shape, from median times."""
    return max(2 * m * k * n / times[f"gemm.{m}x{k}x{n}"].value / 1e6 for m, k, n in GEMM_SHAPES)


def t5_search_flops(
    n_context: int, n_beams: int, vocab_size: int, n_levels: int = 4, n_layers: int = 4, d: int = 128, d_ff: int = 512
) -> float:
    """Floating-point operations of one request of row A: two for every multiply-add of a matrix product.

    Norms, softmax, the index and the top-k count as nothing, so that their time shows.
    """
    s = n_context
    feed_forward = 2 * 2 * d * d_ff
    encoder = n_layers * s * (2 * 4 * d * d + feed_forward + 4 * s * d)
    cross_keys_values = 2 * s * d * 2 * n_layers * d
    flops = float(encoder + cross_keys_values)
    for level in range(n_levels):
        n_queries = n_beams if level else 1
        own_path = 4 * (level + 1) * d if level else 0
        layer = 2 * 6 * d * d + feed_forward + 4 * s * d + own_path
        flops += n_queries * (n_layers * layer + 2 * d * vocab_size)
    return flops


def _table(figures: Mapping[str, Figure]) -> Table:
    table = Table("figure", "value", "unit", "p10", "p90", title="genretrieval bench decode")
    for name, figure in figures.items():
        low, high = (f"{end:.4g}" for end in figure.spread) if figure.spread else ("", "")
        table.add_row(name, f"{figure.value:.4g}", figure.unit, low, high)
    return table
