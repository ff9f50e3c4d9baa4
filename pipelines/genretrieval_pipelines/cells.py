"""Cells of a comparison, each one contender with one seed, computed side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from genretrieval.errors import GenRetrievalError, UnavailableError
from genretrieval_tokenizers.quantise import one_thread

Cell = tuple[str, int]
"""A name and a seed."""


class CellResult(Protocol):
    """What a cell gives."""

    def __str__(self) -> str:
        """For those who wait."""
        ...


Result = TypeVar("Result", bound=CellResult)


def in_processes(
    work: Callable[[str, int], Result], cells: Sequence[Cell], jobs: int, what: str, console: Console
) -> dict[Cell, Result]:
    """`work` of every cell, `jobs` at a time; fresh processes, because torch and faiss do not survive a fork.

    When a cell fails, those that have begun are finished and kept, and no other one begins. When this process is
    killed, its processes end with it.

    Args:
        work: a function that can be pickled.
        cells: in the order in which they begin.
        jobs: cells at a time.
        what: they are, for messages.
        console: a line a cell.

    Raises:
        UnavailableError: a process died.
        GenRetrievalError: as `work`, with the name of the cell.
    """
    done: dict[Cell, Result] = {}
    waiting = iter(cells)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent) as pool:
        begun: dict[Future[Result], Cell] = {}
        try:
            while True:
                # No more than run: what a pool has queued it begins, whatever happens beside.
                while len(begun) < jobs and (cell := next(waiting, None)) is not None:
                    begun[pool.submit(work, *cell)] = cell
                if not begun:
                    return done
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    name, seed = cell = begun.pop(future)
                    done[cell] = _result(future, f"{what} of {name}, seed {seed}")
                    line = f"{what} {len(done)} of {len(cells)}: {name}, seed {seed}: {done[cell]}"
                    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
        except BaseException as error:
            said = " ".join([str(error), *getattr(error, "__notes__", ())])
            console.print(
                f"{said}\nno further cell is begun", style="red", highlight=False, markup=False, soft_wrap=True
            )
            raise


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Within it torch, BLAS and OpenMP have one thread, and transformers draws no progress bar.

    So what a cell finds does not depend on how many are computed beside it.
    """
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        with one_thread():
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()


def _end_with_parent() -> None:
    """End this process when the one that began it is gone, which a pool's processes would not notice."""
    parent = multiprocessing.parent_process()
    if parent is None:  # not in a process of its own
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(future: Future[Result], cell: str) -> Result:
    """What a cell gave; its error says which cell it was."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UnavailableError(
            f"{cell}, or one beside it: its process died, most often because memory ran out; give fewer jobs. "
            "Finished cells are kept"
        ) from error
    except GenRetrievalError as error:
        raise type(error)(f"{cell}: {error}") from error
    except Exception as error:
        error.add_note(f"in the {cell}")
        raise
