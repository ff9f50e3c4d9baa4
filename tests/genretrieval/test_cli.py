"""What every verb does alike: values of options, and errors that end it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from genretrieval import cli
from genretrieval.errors import InvalidInputError, RecipeError


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, FULL), 5, f"{FULL}; make room"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "work/x"), 5, "'work/x'; make room"),
        # As safetensors, NumPy and torch say it of a full tmpfs.
        (
            SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
            5,
            f"{FULL} (os error 28); make",
        ),
        (OSError("512000 requested and 54240 written"), 5, "the disk is full, or a quota: 512000"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 5, "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out/b"),
            2,
            "Permission denied: 'out/b'; give another path",
        ),
        (OSError(errno.EIO, "Input/output error"), 5, "Input/output error"),
        (RecipeError("no such key"), 2, "genretrieval: no such key"),
    ],
)
def test_what_the_machine_denies_ends_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, said: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("x"),
        ValueError("x"),
        OSError("no model of that name"),
        KeyError(28),
        ValueError("2 requested and 3 given"),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(error)):
        cli.main()


RUN = ("run", "no-such-recipe", "--data", "logs", "--output", "bundle")


@pytest.mark.parametrize("below", ["file/figures.json", "folder"])
def test_figures_that_could_not_be_written_are_refused_before_the_work(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    result = invoke(*RUN, "--json", tmp_path / below)
    assert isinstance(result.exception, InvalidInputError)
    assert str(tmp_path / below) in str(result.exception)
    assert not isinstance(result.exception, RecipeError)  # that would be the work


def test_figures_may_go_into_a_new_folder_and_over_old_ones(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")
    for path in (tmp_path / "new" / "figures.json", old):
        assert isinstance(invoke(*RUN, "--json", path).exception, RecipeError)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "old.json"]
    assert old.read_text() == "{}"


@pytest.mark.parametrize(
    "words",
    [
        (*RUN, "--threads", "0"),
        (*RUN, "--threads", "-1"),
        ("serve", "--threads", "0"),
        ("tokenize", "encode", "shards", "--output", "ids", "--seed", "-1"),
        ("export", "--bundle", "b", "--output", "o", "--precision", "int8", "--min-recall-ratio", "nan"),
        ("export", "--bundle", "b", "--output", "o", "--precision", "int8", "--min-recall-ratio", "-1"),
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_values_out_of_range_are_refused(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert words[-2] in result.output


def test_the_folder_of_changes_is_there_before_anything_is_appended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """IDs that are appended stay, and a second try would find nothing new."""
    changes = tmp_path / "of" / "changes"
    seen = []

    def append_items(*_: object) -> list[str]:
        seen.append(changes.is_dir())
        return []

    monkeypatch.setattr("genretrieval.bundle.load_bundle", lambda path: path)
    monkeypatch.setattr("genretrieval_pipelines.shop.open_shop", lambda *_: None)
    monkeypatch.setattr("genretrieval_pipelines.tokenize.append_items", append_items)
    monkeypatch.setattr("genretrieval_pipelines.tokenize.changes_of", lambda *_: None)
    append = ("tokenize", "append", tmp_path / "ids", "--data", tmp_path)
    result = invoke(*append, "--changes", changes, "--bundle", tmp_path)
    assert result.exit_code == 0, result.output
    assert seen == [True]
