"""What the documentation tells people to type is there, and the tutorial is typed in."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from genretrieval.cli import app
from genretrieval.schemas import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMANDS = typer.main.get_command(app)
FENCE = re.compile(r"^(?P<run><!-- run -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def calls(page: Path, program: str) -> list[list[str]]:
    """The arguments of every call of `program` on a page: in shell blocks, in indented lines, in backticks."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    prose = FENCE.sub("", text)
    typed = [
        line for block in FENCE.finditer(text) if block["language"] == "bash" for line in block["code"].splitlines()
    ]
    typed += [line for line in prose.splitlines() if line.startswith("    ")]
    typed += re.findall(r"`([^`\n]+)`", prose)
    found = []
    for line in typed:
        for command in re.split(r" && | \| ", line):
            call = re.match(r"\s*(?:\w+=\S* )*(\S+)((?: [^#<>&]*)?)", command)
            if call and call[1] == program:
                found.append(shlex.split(call[2]))
    return found


def check_call(arguments: list[str]) -> None:
    """Every verb and option of a call of `genretrieval` exists; values may be placeholders."""
    command: Any = COMMANDS
    words = iter(arguments)
    for word in words:
        verbs = getattr(command, "commands", None)
        if word == "--help":
            return
        if verbs is not None:
            assert word in verbs, f"there is no verb {word!r}: genretrieval {' '.join(arguments)}"
            command = verbs[word]
        elif word.startswith("-"):
            name, equals, _ = word.partition("=")
            options = {text: option for option in command.params for text in [*option.opts, *option.secondary_opts]}
            assert name in options, f"{command.name} has no option {name}: genretrieval {' '.join(arguments)}"
            if not equals and not options[name].is_flag:
                next(words, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_genretrieval_command_exists(page) -> None:
    for arguments in calls(page, "genretrieval"):
        check_call(arguments)


def test_every_column_of_the_logs_is_explained() -> None:
    page = (ROOT / "docs" / "logs.md").read_text("utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == [table.name for table in TABLES]
    for table in TABLES:
        for column in table.columns:
            line = next(
                (line for line in sections[table.name].splitlines() if line.startswith(f"| `{column.name}`")), ""
            )
            assert line.endswith(f"| {column.meaning} |"), f"{table.name}.{column.name}"
            assert (", required" in line) == column.required


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_exists(page) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())
    for arguments in calls(page, "make"):
        assert {word for word in arguments if "=" not in word} <= targets, f"make {' '.join(arguments)}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "no verb 'fly'"),
        (["data", "paint"], "no verb 'paint'"),
        (["run", "tiny", "--dta", "shop"], "no option --dta"),
        (["serve", "--bundle", "b", "--port=3"], "no option --port"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(arguments, message) -> None:
    with pytest.raises(AssertionError, match=message):
        check_call(arguments)


def test_calls_are_found(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Type `make env`, or\n\n    A=b make check && make test  # both\n\n```bash\nmake demo \\\n  ONCE=1 > log\n```\n"
    )
    assert calls(page, "make") == [["demo", "ONCE=1"], ["check"], ["test"], ["env"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_lead_somewhere(page) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            text = (page.parent / target if target else page).read_text("utf-8")
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }


def free_ports() -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return [one.getsockname()[1], other.getsockname()[1]]


def script(page: Path) -> str:
    """The marked blocks of a page as one shell script; Python blocks are run by the interpreter."""
    parts = ["set -euo pipefail -o monitor", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for block in FENCE.finditer(page.read_text("utf-8")):
        if block["run"]:
            code = block["code"]
            parts.append(f"python - <<'PYTHON'\n{code}PYTHON" if block["language"] == "python" else code)
    return "\n".join(parts)


def test_the_tutorial_works_as_written(tmp_path) -> None:
    for tool in ("bash", "curl"):
        if not shutil.which(tool):
            pytest.skip(f"the tutorial uses {tool}, which is not installed")
    text = script(ROOT / "docs" / "tutorial.md")
    for written, free in zip(("8080", "8081"), free_ports(), strict=True):
        assert written in text
        text = text.replace(written, str(free))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^items: 300 rows$", done.stdout, re.MULTILINE)
    assert "agreement.disagreeing: 0 requests" in done.stdout
    assert {"bundle", "checked", "validation.json", "live.json"} <= {file.name for file in tmp_path.iterdir()}
