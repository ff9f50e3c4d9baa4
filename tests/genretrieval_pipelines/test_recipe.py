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
        ({"generator__max_history": 0}, r"generator\.max_history: .*greater than or equal to 1, not 0"),
        ({"generator__max_history": -1}, r"generator\.max_history: .*greater than or equal to 1, not -1"),
        ({"generator__d_model": 0}, r"generator\.d_model: .*greater than or equal to 1, not 0"),
        ({"generator__d_model": 17}, r"generator: d_model 17 is no multiple of n_heads 4"),
        ({"generator__n_heads": 0}, r"generator\.n_heads: .*not 0"),
        ({"generator__n_query_layers": -1}, r"generator\.n_query_layers: .*not -1"),
        ({"generator__n_encoder_layers": 0}, r"generator\.n_encoder_layers: .*not 0"),
        ({"generator__n_decoder_layers": 0}, r"generator\.n_decoder_layers: .*not 0"),
        ({"generator__n_profile_buckets": 0}, r"generator\.n_profile_buckets: .*not 0"),
        ({"generator__dropout": 1.5}, r"generator\.dropout: .*less than 1, not 1\.5"),
        (
            {"generator__n_experts": 1},
            r"generator: experts_per_token 2 must divide d_ff 512 and be at most n_experts 1",
        ),
        ({"generator__n_experts": 6, "generator__experts_per_token": 3}, "experts_per_token 3 must divide d_ff 512"),
        ({"training__learning_rate": float("nan")}, r"training\.learning_rate is nan; it must be a finite number"),
        ({"tokenizer__capacity_slack": float("inf"), "tokenizer__last_level": "balanced"}, r"capacity_slack is inf"),
        ({"training__seed": -1}, r"training\.seed is -1; it must be in \[0, 2000000000\]"),
        ({"training__seed": 2**40}, r"training\.seed is 1099511627776"),
        ({"tokenizer__seed": -1}, r"tokenizer\.seed is -1"),
        ({"ablation": {"seeds": [0, -1], "rows": {}}}, r"ablation\.seeds\.1: .*not -1"),
        (
            {"ablation": {"seeds": [0, 1], "rows": {"x": {"generator": {"d_ff": 0}}}}},
            r"rows\.x .*generator\.d_ff: .*not 0",
        ),
        ({"evaluation__beam_width": 0}, r"evaluation\.beam_width: .*greater than or equal to 10, not 0"),
        ({"evaluation__beam_width": 5}, r"evaluation\.beam_width: .*greater than or equal to 10, not 5"),
        ({"evaluation__beam_width": 100_000}, r"evaluation\.beam_width: .*less than or equal to 500, not 100000"),
        ({"evaluation__sasrec": {"max_epochs": 0}}, r"evaluation\.sasrec: sasrec\.max_epochs is 0"),
        ({"evaluation__sasrec": {"dim": 8, "n_heads": 3}}, r"sasrec\.dim 8 is no multiple of sasrec\.n_heads 3"),
        ({"collisions__headroom": 3_000_000_000}, r"collisions\.headroom is 3000000000.*at most 65536"),
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


@pytest.mark.parametrize(
    ("content", "key", "line"),
    [
        ("training: {epochs: 1}\nembedding: []\ntraining: {epochs: 7}\n", "training", 3),
        ("embedding: [{name: hashing, name: minilm}]\n", "name", 1),
        ("training:\n  epochs: 2\n\n  'epochs': 9\n", "epochs", 4),
    ],
)
@pytest.mark.parametrize("kind", [Recipe, ComparisonRecipe])
def test_a_key_that_stands_twice_is_no_choice(
    tmp_path: Path, content: str, key: str, line: int, kind: type[BaseModel]
) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(RecipeError, match=rf"(?s)found the key '{key}' twice.*line {line}, "):
        read_recipe(path, kind)


def test_keys_that_a_merge_brings_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    merged = "  - &text {name: hashing, dim: 16}\n  - &wide {<<: *text, dim: 32}\n  - {<<: *wide, weight: 2}\n"
    path.write_text("embedding:\n" + merged, "utf-8")
    assert [part.dim for part in load_recipe(path).embedding] == [16, 32, 32]


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("embedding:\n- name: hashing  # café\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml is not UTF-8, first in line 2"):
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
            ({"seeds": [0, 2**40]}, r"seeds\.1: .*not 1099511627776"),
            ({"training": {"learning_rate": float("nan")}}, r"training\.learning_rate is nan"),
            ({"evaluation": {"beam_width": 1000}}, r"evaluation\.beam_width: .*not 1000"),
            ({"sasrec": {"max_epochs": 0}}, r"sasrec: sasrec\.max_epochs is 0"),
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
