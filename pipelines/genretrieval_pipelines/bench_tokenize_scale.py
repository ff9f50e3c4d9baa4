"""Ten million items from Parquet to stored semantic IDs: how long it takes, and in how much memory.

The work is done by a child process on a limited number of cores, so that what is measured is its memory and not that of
whoever asked for the figure.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from genretrieval.errors import GenRetrievalError
from genretrieval.figures import Figure
from genretrieval_tokenizers.collisions import CollisionConfig, row_keys
from genretrieval_tokenizers.rq_kmeans import RqKMeans, RqKMeansConfig
from genretrieval_tokenizers.stream import EmbeddingShards, encode_shards

CODEBOOK_SIZES = (256, 256, 256)
SHARD_ROWS = 500_000
_BLOCK_ROWS = 65_536
# As in text embeddings of a shop there are clusters in clusters, and few directions that carry much: the variance falls
# with the number of the dimension (MiniLM on Amazon Beauty: with its power -1.17).
_N_CLUSTERS = (1_000, 50_000)
_SHARES = (0.4, 0.3, 0.3)  # of the variance: between the clusters of each level, and within the last


@dataclass(frozen=True, slots=True)
class Job:
    """What the child process does.

    Attributes:
        shards: folder of embedding shards.
        output: folder that the published IDs go to.
        sample_items: items that the tokenizer is fitted on.
        threads: cores it may use.
    """

    shards: str
    output: str
    sample_items: int
    threads: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What the child process reports.

    Attributes:
        fit_seconds: drawing the sample and fitting.
        encode_seconds: reading, encoding, resolving collisions and storing.
        peak_bytes: most resident memory at any time, libraries and mapped files included.
        collision_rate: share of items whose codes another item has too.
    """

    fit_seconds: float
    encode_seconds: float
    peak_bytes: int
    collision_rate: float


class ScaleBenchError(GenRetrievalError):
    """The measured process failed; its own message stands above."""


def bench_tokenize_scale(
    n_items: int = 10_000_000, dim: int = 384, *, folder: Path, sample_items: int = 131_072, threads: int = 2
) -> dict[str, Figure]:
    """Fit RQ-KMeans 3 x 256 on a sample, encode all items, store their IDs; count minutes and memory.

    Args:
        n_items: items to encode.
        dim: dimensions of their embeddings.
        folder: where the made embeddings are kept for the next time (768 bytes an item at 384 dimensions), and the IDs
            are written.
        sample_items: items that the tokenizer is fitted on.
        threads: cores that the process is bound to.

    Returns:
        Figures by name. `minutes` is fitting, encoding and storing, without making the embeddings; `peak_gib` is the
        most resident memory of the whole process, its libraries and mapped files included.

    Raises:
        ScaleBenchError: the process that does the work failed.
    """
    shards = make_shards(folder, n_items, dim)
    output = folder / f"bench-ids-{n_items}x{dim}"
    if output.exists():
        shutil.rmtree(output)  # a finished encoding would be taken up, and nothing measured
    measured = _in_child(Job(str(shards), str(output), sample_items, threads))
    seconds = measured.fit_seconds + measured.encode_seconds
    return {
        "tokenize.scale.items": Figure(n_items, "items"),
        "tokenize.scale.minutes": Figure(seconds / 60, "min"),
        "tokenize.scale.fit_minutes": Figure(measured.fit_seconds / 60, "min"),
        "tokenize.scale.peak_gib": Figure(measured.peak_bytes / 2**30, "GiB"),
        "tokenize.scale.items_per_second": Figure(n_items / measured.encode_seconds, "items/s"),
        "tokenize.scale.collision_rate": Figure(measured.collision_rate, "share"),
    }


def make_shards(folder: Path, n_items: int, dim: int, shard_rows: int = SHARD_ROWS) -> Path:
    """Clustered unit vectors as float16 in Parquet, in a folder named after their number; what is there is kept.

    A shard depends on its number, `dim` and nothing else, and appears whole by a rename.
    """
    shards = folder / f"embeddings-{n_items}x{dim}"
    shards.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, n_items, shard_rows)):
        path = shards / f"part-{number:05d}.parquet"
        if not path.exists():
            partial = path.with_suffix(".partial")
            _write_shard(partial, number, first, min(shard_rows, n_items - first), dim)
            partial.replace(path)
    return shards


def _write_shard(path: Path, number: int, first: int, n_rows: int, dim: int) -> None:
    schema = pa.schema({"item_id": pa.string(), "embedding": pa.list_(pa.float16())})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for x_ND in _vectors(number, n_rows, dim):
            offsets = pa.array(np.arange(0, x_ND.size + 1, dim, dtype=np.int32))
            ids = pa.array([f"item-{row:09d}" for row in range(first, first + len(x_ND))])
            lists = pa.ListArray.from_arrays(offsets, pa.array(x_ND.ravel()))
            writer.write_table(pa.table({"item_id": ids, "embedding": lists}, schema))
            first += len(x_ND)


def _vectors(number: int, n_rows: int, dim: int) -> Iterator[NDArray[np.float16]]:
    """Blocks of the unit vectors of shard `number`, float16 ``[at most 65,536, dim]``."""
    scale_D = (np.arange(dim, dtype=np.float32) + 1) ** -0.5
    rng = np.random.default_rng(0)
    levels = [rng.standard_normal((n, dim), np.float32) for n in _N_CLUSTERS]  # the same for all shards
    rng = np.random.default_rng([1, number])
    for first in range(0, n_rows, _BLOCK_ROWS):
        n = min(_BLOCK_ROWS, n_rows - first)
        inner_N = rng.integers(_N_CLUSTERS[1], size=n)
        x_ND = _SHARES[2] ** 0.5 * rng.standard_normal((n, dim), np.float32)
        x_ND += _SHARES[1] ** 0.5 * levels[1][inner_N]
        x_ND += _SHARES[0] ** 0.5 * levels[0][inner_N % _N_CLUSTERS[0]]
        x_ND *= scale_D
        x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
        yield x_ND.astype(np.float16)


# --- the measured process ---


def _in_child(job: Job) -> Measured:
    """Run this module as a process of its own; progress goes to stderr, the result comes back on stdout."""
    # BLAS libraries read their thread counts when they are loaded, so they must be set before.
    threads = {f"{library}_NUM_THREADS": str(job.threads) for library in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(  # noqa: S603  our own module
        [sys.executable, "-m", __name__, json.dumps(asdict(job))],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ScaleBenchError(f"encoding {job.shards} ended with exit code {done.returncode}; its message stands above")
    return Measured(**json.loads(done.stdout))


def _run(job: Job) -> Measured:
    """What is measured."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    pa.set_cpu_count(job.threads)
    started = time.perf_counter()
    shards = EmbeddingShards(Path(job.shards))
    config = RqKMeansConfig(codebook_sizes=CODEBOOK_SIZES)
    tokenizer = RqKMeans.fit(shards.sample(job.sample_items, config.seed), config)
    fitted = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("encoding", total=shards.n_items)
        published = encode_shards(
            shards,
            tokenizer,
            CollisionConfig(),
            Path(job.output),
            progress=lambda rows: bar.update(task, completed=rows),
        )
    ended = time.perf_counter()
    peak = _peak_bytes()
    _, sizes = np.unique(row_keys(published.ids.codes[:, : len(CODEBOOK_SIZES)]), return_counts=True)
    return Measured(fitted - started, ended - fitted, peak, float(sizes[sizes > 1].sum() / shards.n_items))


def _peak_bytes() -> int:
    """Most resident memory of this process so far.

    Linux's VmHWM where there is one: `ru_maxrss` outlives exec and would start from the memory of the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(json.dumps(asdict(_run(Job(**json.loads(sys.argv[1]))))))
