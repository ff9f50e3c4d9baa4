from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from genretrieval.errors import RecipeError
from genretrieval_pipelines.recipe import ComparisonRecipe, Recipe, content_hash, load_recipe, read_recipe

FOLDER = Path(__file__).parents[2] / "configs"
COMPARISON = FOLDER / "tokenizers.yaml"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path != COMPARISON)
REFERENCE = next(path for path in CONFIGS if path.name == "next_item.yaml")


def keys(value: Any, prefix: str = "") -> set[str]:
    """Dotted names of everything in plain data; the entries of a list share one name."""
    if isinstance(value, dict):
        return {name for key, inner in value.items() for name in {f"{prefix}{key}", *keys(inner, f"{prefix}{key}.")}}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {name for inner in value for name in keys(inner, prefix)}
    return set()


def text(**changes: Any) -> str:
    content = yaml.safe_load(REFERENCE.read_text("utf-8"))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = content
        for name in sections:
            section = section[name]
        section[key] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, BaseModel)
    assert Recipe.model_validate(recipe.dump()) == recipe


@pytest.mark.parametrize("path", [*CONFIGS, COMPARISON], ids=lambda path: path.stem)
def test_every_line_of_a_shipped_recipe_is_commented(path: Path) -> None:
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    bare = [line for line in lines if "#" not in line and not line.rstrip().endswith(":")]
    assert not bare


def test_next_item_leaves_nothing_unsaid() -> None:
    said = keys(yaml.safe_load(REFERENCE.read_text("utf-8")))
    assert keys(load_recipe(REFERENCE).dump()) - said == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__epocs": 3}, r"training\.epocs: "),
        ({"generater": {}}, "generater: "),
        ({"training__epochs": "many"}, r"training\.epochs: "),
        ({"training__epochs": 0}, r"training\.epochs is 0"),
        ({"training__warmup_share": 50}, r"training\.warmup_share is 50"),
        ({"generator__d_model": 1.5}, r"generator\.d_model: "),
        ({"generator__max_past": 951}, r"max_history 50 and max_past 951 are more than the 1000 events"),
        ({"tokenizer__codebook_sizes": []}, r"tokenizer\.rq_kmeans.*codebook_sizes"),
        ({"tokenizer__method": "rq_means"}, r"tokenizer: .*'rq_kmeans'"),
        ({"tokenizer__latent_dim": 8}, r"tokenizer\.rq_kmeans\.latent_dim: "),
        ({"collisions__cap": 5}, r"collisions: .*cap limits the items of a shared SID"),
        ({"embedding": []}, "embedding: "),
        ({"embedding": [{"name": "word2vec", "weight": 1.0}]}, r"embedding\.0"),
        ({"evaluation__sasrec": {"depth": 2}}, r"evaluation\.sasrec\.depth: "),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text(**changes), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text(training__epochs="x", generator__d_ff="y"), "utf-8")
    with pytest.raises(RecipeError, match=r"generator\.d_ff.*training\.epochs"):
        load_recipe(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_what_is_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("training: [1, 2\n", "utf-8")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


@pytest.mark.parametrize("content", ["", "- 1\n", "nothing\n"])
def test_what_is_yaml_but_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(path)


def test_content_hash_changes_with_every_part() -> None:
    assert content_hash("a", 1) == content_hash("a", 1)
    assert len({content_hash(*parts) for parts in [("a", 1), ("a", 2), ("a1",), ("a",), (1, "a")]}) == 5
    assert content_hash(load_recipe(REFERENCE)) == content_hash(load_recipe(REFERENCE))


def test_content_hash_reads_arrays_as_they_are() -> None:
    array = np.arange(3, dtype=np.int32)
    assert content_hash(array.data) == content_hash(array.tobytes())
    parts = [(b"a", b"b"), (b"ab",), (b"a\0b",), ("a", "b"), ("b'a'",), (b"a",), (), (np.empty(0).data,)]
    assert len({content_hash(*several) for several in parts}) == len(parts)


def test_content_hash_copies_no_array() -> None:
    array = np.zeros(2**22, np.uint8)
    tracemalloc.start()
    content_hash(array.data)
    assert tracemalloc.get_traced_memory()[1] < array.nbytes // 100
    tracemalloc.stop()


class TestComparison:
    def test_holds_every_method_and_the_default_of_next_item(self) -> None:
        comparison = read_recipe(COMPARISON, ComparisonRecipe)
        methods = {compared.tokenizer.method for compared in comparison.tokenizers.values()}
        assert methods == {"rq_kmeans", "rq_opq", "rq_vae", "rk_fsq"}
        default = load_recipe(REFERENCE)
        same = [c for c in comparison.tokenizers.values() if c.collisions == default.collisions]
        assert any(c.tokenizer == default.tokenizer for c in same)
        assert comparison.embedding == default.embedding

    def test_a_cell_takes_its_seed_everywhere(self) -> None:
        cell = read_recipe(COMPARISON, ComparisonRecipe).cell("quasid", 3)
        assert (cell.tokenizer.seed, cell.training.seed) == (3, 3)

    def test_some_of_them_in_the_order_given_behind_their_references(self) -> None:
        comparison = read_recipe(COMPARISON, ComparisonRecipe)
        some = comparison.only(["rq_vae", "rq_opq"])
        assert list(some.tokenizers) == ["rq_kmeans", "rq_vae", "rq_opq"]
        assert some.reference == "rq_kmeans"
        assert list(comparison.only(["rq_vae", "rq_kmeans"]).tokenizers) == ["rq_vae", "rq_kmeans"]
        text = comparison.only(["quasid_text"])
        assert list(text.tokenizers) == ["rq_kmeans", "rq_kmeans_text", "quasid_text"]
        assert text.reference_of("quasid_text") == "rq_kmeans_text"
        assert list(comparison.only([]).tokenizers) == list(comparison.tokenizers)

    def test_rows_on_text_stand_beside_the_papers_over_the_reference_on_text(self) -> None:
        comparison = read_recipe(COMPARISON, ComparisonRecipe)
        for name in ("rq_opq", "rq_vae", "quasid", "adasid"):
            compared = comparison.tokenizers[f"{name}_text"]
            assert compared.reference == "rq_kmeans_text"
            assert compared.published == comparison.tokenizers[name].published
            assert compared.tokenizer == comparison.tokenizers[name].tokenizer
            assert compared.embedding == comparison.tokenizers["rq_kmeans_text"].embedding
            assert compared.published
            assert "on Beauty, over RQ-KMeans on text" in compared.published.source

    def test_the_generator_of_a_run_replaces_the_small_one(self) -> None:
        comparison, run = read_recipe(COMPARISON, ComparisonRecipe), load_recipe(REFERENCE)
        cell = comparison.with_generator(run).cell("rq_vae", 3)
        assert cell.generator == run.generator != comparison.generator
        assert (cell.training.epochs, cell.training.seed) == (run.training.epochs, 3)

    def test_an_unknown_name_is_told_with_those_that_exist(self) -> None:
        with pytest.raises(RecipeError, match="no tokenizer rq_van in the comparison; it has rq_kmeans"):
            read_recipe(COMPARISON, ComparisonRecipe).only(["rq_van"])

    def test_a_reference_that_is_not_compared(self, tmp_path: Path) -> None:
        content = yaml.safe_load(COMPARISON.read_text("utf-8")) | {"reference": "rq_means"}
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        with pytest.raises(RecipeError, match="'rq_means' is none of the tokenizers adasid"):
            read_recipe(path, ComparisonRecipe)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seeds": [0, 1, 1]}, "hold one twice"),
            ({"tokenizers": {"rq_kmeans": {"tokenizer": {"method": "rq_kmeans"}, "reference": "x"}}}, "reference 'x'"),
            ({"tokenizers": {"RQ-KMeans": {"tokenizer": {"method": "rq_kmeans"}}}}, r"tokenizers\.RQ-KMeans.*pattern"),
        ],
    )
    def test_what_would_only_show_after_hours_is_refused(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(COMPARISON.read_text("utf-8")) | change), "utf-8")
        with pytest.raises(RecipeError, match=message):
            read_recipe(path, ComparisonRecipe)
