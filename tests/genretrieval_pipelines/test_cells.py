from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from rich.console import Console

from genretrieval.errors import RecipeError, UnavailableError
from genretrieval_pipelines import cells
from genretrieval_pipelines.cells import in_processes

QUIET = Console(quiet=True)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of processes, which take seconds to start."""
    monkeypatch.setattr(cells, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))


@pytest.mark.usefixtures("in_threads")
def test_a_failing_cell_is_named_and_no_other_one_begins() -> None:
    failed, begun, log = threading.Event(), [], io.StringIO()

    def work(name: str, seed: int) -> str:
        begun.append(name)
        if name == "b":
            failed.set()
            raise RecipeError("contradiction")
        if name == "a":  # runs on beside the one that fails, and is finished
            assert failed.wait(30)
            time.sleep(0.1)
            begun.append("end of a")
        return ""

    with pytest.raises(RecipeError, match="generator of b, seed 0: contradiction"):
        in_processes(work, [(name, 0) for name in "abcdef"], 2, "generator", Console(file=log))
    assert sorted(begun) == ["a", "b", "end of a"]
    assert "generator of b, seed 0: contradiction" in log.getvalue()


@pytest.mark.usefixtures("in_threads")
def test_a_fault_of_ours_keeps_its_type_and_names_the_cell() -> None:
    def work(name: str, seed: int) -> str:
        raise KeyError("nothing")

    with pytest.raises(KeyError) as caught:
        in_processes(work, [("a", 3)], 1, "generator", QUIET)
    assert caught.value.__notes__ == ["in the generator of a, seed 3"]


@pytest.mark.usefixtures("in_threads")
def test_a_process_that_dies_is_told_with_what_to_do() -> None:
    def work(name: str, seed: int) -> str:
        raise BrokenProcessPool

    with pytest.raises(UnavailableError, match=r"a, seed 3, or one beside it: its process died.*fewer jobs"):
        in_processes(work, [("a", 3)], 1, "generator", QUIET)


def say_and_wait(name: str, seed: int) -> str:
    Path(name).write_text(str(os.getpid()), "utf-8")
    time.sleep(60)
    return ""


def alive(pid: int) -> bool:
    try:
        # A process that has ended and was not waited for is still listed, as a zombie.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("ascii")
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_no_process_outlives_one_that_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from rich.console import Console\n"
        "from genretrieval_pipelines.cells import in_processes\n"
        f"from {Path(__file__).stem} import say_and_wait\n"
        "if __name__ == '__main__':\n"
        f"    in_processes(say_and_wait, [({str(told)!r}, 0)], 1, 'cell', Console())\n"
    )
    (tmp_path / "program.py").write_text(program, "utf-8")
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (told.exists() and told.read_text("utf-8")):
            assert time.monotonic() < until, "the cell never began"
            time.sleep(0.05)
        child = int(told.read_text("utf-8"))
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        while alive(child):
            assert time.monotonic() < until + 10, "the cell goes on without its parent"
            time.sleep(0.05)
    finally:
        parent.kill()
