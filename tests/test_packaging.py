"""What is installed is what the design says: the wheel's content, the import rules, the names."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import genretrieval

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = {
    Path(folder).name: ROOT / folder for folder in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="building the wheel needs the build back end: make env")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", *build], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_packages_and_nothing_else(wheel) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert set(PACKAGES) == {
        "genretrieval",
        "genretrieval_tokenizers",
        "genretrieval_serving",
        "genretrieval_pipelines",
    }
    assert top - set(PACKAGES) == {f"genretrieval-{genretrieval.__version__}.dist-info"}
    for package in PACKAGES:
        assert f"{package}/__init__.py" in wheel.namelist()
        assert f"{package}/py.typed" in wheel.namelist()
    assert not [name for name in wheel.namelist() if re.search(r"test|conftest|\.pyc$", name)]


def test_the_wheel_holds_every_module(wheel) -> None:
    for package, folder in PACKAGES.items():
        in_wheel = {name for name in wheel.namelist() if name.startswith(f"{package}/") and name.endswith(".py")}
        assert in_wheel == {f"{package}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*.py")}


def test_the_wheel_holds_the_recipes_and_the_license(wheel) -> None:
    in_wheel = {name for name in wheel.namelist() if name.startswith("genretrieval/configs/")}
    assert in_wheel == {f"genretrieval/configs/{file.name}" for file in (ROOT / "configs").iterdir()}
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in wheel.read(licence)


def test_the_wheel_brings_the_command(wheel) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(entry_points).decode().split("\n")[:2] == [
        "[console_scripts]",
        "genretrieval = genretrieval.cli:main",
    ]


def test_the_version_is_said_alike_everywhere() -> None:
    assert genretrieval.__version__ == PYPROJECT["project"]["version"]
    assert f"## {genretrieval.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    "module",
    ["genretrieval.model", "genretrieval.export", "genretrieval_pipelines.embed", "genretrieval_pipelines.synth"],
)
def test_what_a_package_exports_exists(module) -> None:
    exported = importlib.import_module(module)
    assert all(hasattr(exported, name) for name in exported.__all__)


def test_the_checkout_does_not_shadow_hugging_face_tokenizers() -> None:
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
    assert not (ROOT / "tests" / "tokenizers").exists()
    code = (
        "import tokenizers; from transformers import PreTrainedModel; tokenizers.Tokenizer; print(tokenizers.__file__)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in found.stdout


def test_no_test_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(PACKAGES)


def test_constraints_pin_versions_and_no_build_of_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin)] == []
    assert "torch==2.13.0" in pins


CORE, TOKENIZERS, PIPELINES, SERVER, TORCH, CLI = (
    "The core imports nothing of ours",
    "Tokenizers import the core alone",
    "Pipelines import the core and tokenizers",
    "The server imports the core alone, and never what trains",
    "Torch stays under genretrieval.model, .training and .export",
    "Nothing imports the command line",
)


@pytest.fixture(scope="module")
def copied_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for package, source in PACKAGES.items():
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def broken_contracts(folder: Path) -> set[str]:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    checked = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    broken = set(re.findall(r"^(.+) BROKEN", checked.stdout, re.MULTILINE))
    assert "KEPT" in checked.stdout, checked.stdout + checked.stderr
    assert bool(broken) == bool(checked.returncode)
    return broken


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("genretrieval/metrics.py", "import genretrieval_pipelines.cases", CORE),
        ("genretrieval/model/layers.py", "import genretrieval_tokenizers", CORE),
        ("genretrieval/request.py", "import genretrieval_serving.messages", CORE),
        ("genretrieval/training/data.py", "import genretrieval.cli", CLI),
        ("genretrieval_pipelines/cases.py", "import genretrieval.cli", CLI),
        ("genretrieval_tokenizers/rq_kmeans.py", "import genretrieval_pipelines.cases", TOKENIZERS),
        ("genretrieval_tokenizers/rq_kmeans.py", "import genretrieval_serving.messages", TOKENIZERS),
        ("genretrieval_pipelines/cases.py", "import genretrieval_serving.client", PIPELINES),
        ("genretrieval_serving/rest.py", "import genretrieval_tokenizers", SERVER),
        ("genretrieval_serving/rest.py", "import genretrieval_pipelines", SERVER),
        ("genretrieval_serving/rest.py", "def lazily() -> None:\n    import torch", SERVER),
        ("genretrieval_serving/rest.py", "import faiss", SERVER),
        # By way of a module of the core that the server may import.
        ("genretrieval/features.py", "import transformers", SERVER),
        ("genretrieval/features.py", "import genretrieval.model", TORCH),
        ("genretrieval/schemas.py", "import torch", TORCH),
    ],
)
def test_a_planted_import_breaks_its_contract(copied_packages, module, line, broken) -> None:
    file = copied_packages / module
    before = file.read_text("utf-8")
    file.write_text(f"{before}\n{line}\n", "utf-8")
    try:
        assert broken in broken_contracts(copied_packages)
    finally:
        file.write_text(before, "utf-8")


def test_every_contract_holds(copied_packages) -> None:
    assert broken_contracts(copied_packages) == set()


def test_the_torch_contract_names_every_module_it_is_about() -> None:
    contracts = {contract["name"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    core = {
        f"genretrieval.{path.stem}" for path in (ROOT / "genretrieval").glob("[!_]*") if path.name not in {"py.typed"}
    }
    exempt = {"genretrieval.cli", "genretrieval.model", "genretrieval.training", "genretrieval.export"}
    assert set(contracts[TORCH]["source_modules"]) == core - exempt
