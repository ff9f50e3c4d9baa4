from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from numpy.typing import NDArray
from scipy import stats

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds
from genretrieval_tokenizers.comparison import Comparison, DownstreamRow, Gain, paired_gain
from genretrieval_tokenizers.report import TokenizerReport, report

# (0, 0) three times, (0, 1) and (1, 1); the last level numbers the items of a tuple.
CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 2]], np.int32)
PLAIN = np.array([[0], [1], [2], [3], [3]], np.int32)
X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
ROWS = {
    "rq_kmeans": report(SemanticIds(CODES, (4, 2, 4)), X, X * 0.9, fit_seconds=1.25, notes=("level 0 is short",)),
    "plain": report(SemanticIds(PLAIN, (4,)), dedup_level=False),
}
REFERENCE = DownstreamRow({"recall10": (0.10, 0.10, 0.10), "ndcg10": (0.05, 0.06, 0.07)})
BETTER = DownstreamRow(
    {"recall10": (0.11, 0.12, 0.13), "ndcg10": (0.06, 0.0701, 0.0799)},
    published_gain={"ndcg10": 0.09},
    published_source="arXiv 2603.00632 table 2, over RQ-KMeans",
)


def comparison(**changes: object) -> Comparison:
    settings: dict[str, object] = {
        "rows": ROWS,
        "downstream": {"rq_kmeans": REFERENCE, "plain": BETTER},
        "reference": "rq_kmeans",
        "seeds": (1, 2, 3),
        "protocol": "Beauty, validation split",
    }
    return Comparison(**(settings | changes))  # type: ignore[arg-type]


# --- the gain


def test_paired_gain_by_hand() -> None:
    # Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01. t(0.975, 2) = 4.302653, so the interval of the difference
    # is 0.02 ± 4.302653 * 0.01 / 1.7320508 = 0.02 ± 0.0248414; the reference is 0.1 on average.
    gain = paired_gain((0.11, 0.12, 0.13), (0.10, 0.10, 0.10))
    assert gain == pytest.approx((0.2, 0.2 - 0.248414, 0.2 + 0.248414), abs=1e-5)
    assert not gain.excludes_zero


def test_what_a_seed_does_to_both_sides_cancels_out() -> None:
    # Each side varies by 50 %, the difference not at all.
    gain = paired_gain((0.22, 0.11, 0.33), (0.20, 0.09, 0.31))
    assert gain == pytest.approx((0.1, 0.1, 0.1))
    assert gain.excludes_zero
    assert paired_gain((0.09,) * 3, (0.1,) * 3).excludes_zero


def test_one_seed_gives_no_interval() -> None:
    assert paired_gain((0.2,), (0.1,)) == Gain(1.0, None, None)
    assert not paired_gain((0.2,), (0.1,)).excludes_zero


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=8))
def test_the_interval_is_that_of_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    values, reference = (tuple(side) for side in zip(*pairs, strict=True))
    if np.std(np.subtract(values, reference)) < 1e-6:
        return
    interval = stats.ttest_rel(values, reference).confidence_interval(0.95)
    gain = paired_gain(values, reference)
    assert (gain.low, gain.high) == pytest.approx(
        (interval.low / np.mean(reference), interval.high / np.mean(reference))
    )


def test_seeds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(DataError, match="2 and 3 seeds do not pair"):
        paired_gain((0.1, 0.2), (0.1, 0.2, 0.3))
    with pytest.raises(DataError, match="do not pair"):
        paired_gain((), ())
    with pytest.raises(DataError, match="reference is 0"):
        paired_gain((0.1,), (0.0,))


# --- the page


def table_row(text: str, name: str, table: int = 0) -> list[str]:
    """Cells of the row of `name` in the given table of those that have one."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")]


def test_diagnostics_by_hand() -> None:
    text = comparison().to_markdown()
    header = table_row(text, "tokenizer")
    first = dict(zip(header, table_row(text, "rq_kmeans"), strict=True))
    assert first == {
        "tokenizer": "rq_kmeans",
        "levels": "4-2 +4",
        "codes used": "66.7%",  # 2 of 4 and 2 of 2
        "min perplexity": "1.6",
        "collisions before": "60.00%",
        "after": "0.00%",
        "largest group": "3",
        "ICR": "40.00%",
        "CUR_total": "0.3750",
        "SID entropy": "1.371 bits, 0.9503 nats",
        "error": "0.0100",
        "fit": "1.2 s",
    }
    second = dict(zip(header, table_row(text, "plain"), strict=True))
    assert second["levels"] == "4"
    assert second["error"] == second["fit"] == "-"
    assert "- rq_kmeans: level 0 is short" in text
    assert "unlike collisions" not in text  # nobody measured them
    assert "Downstream" not in Comparison(ROWS).to_markdown()


def test_unlike_collisions_are_a_column_where_measured() -> None:
    figures = report(SemanticIds(PLAIN, (4,)), X, dedup_level=False, similarity_threshold=0.99)
    text = Comparison({"plain": figures}).to_markdown()
    assert "100.0% (<0.99)" in text


def test_the_downstream_tables_state_protocol_seeds_reference_and_what_is_certain() -> None:
    text = comparison().to_markdown()
    assert "Protocol: Beauty, validation split. Seeds: 1, 2, 3." in text
    assert "| rq_kmeans (reference) | 0.1000 ± 0.0000 | 0.0600 ± 0.0100 |" in text
    assert table_row(text, "plain", 1) == ["plain", "0.1200 ± 0.0100", "0.0700 ± 0.0100"]
    over, recall, ndcg = table_row(text, "plain", 2)[1:]
    assert over == "rq_kmeans"
    assert recall == "+20.0 % [-4.8 %, +44.8 %]"
    assert ndcg.startswith("**+16.7 % [")
    assert ndcg.endswith("]**; published +9.0 %")
    assert "- published, plain: arXiv 2603.00632 table 2, over RQ-KMeans" in text


def test_a_metric_that_is_missing_or_zero_leaves_its_cell_empty() -> None:
    rows = dict.fromkeys(("rq_kmeans", "plain", "other"), ROWS["plain"])
    metrics = {"recall10": (0.1,) * 3, "recall5": (0.1,) * 3, "ndcg10": (0.1,) * 3}
    page = comparison(
        rows=rows,
        downstream={
            "rq_kmeans": DownstreamRow({"recall10": (0.0,) * 3, "recall5": (0.1,) * 3}),
            "plain": DownstreamRow(metrics, published_gain={"ndcg10": 0.1}, published_source="a paper"),
            "other": DownstreamRow({name: metrics[name] for name in ("recall10", "ndcg10")}),
        },
    ).to_markdown()
    # recall10 is 0 of the reference: nobody has a gain in it, so it is no column.
    assert table_row(page, "tokenizer", 2) == ["tokenizer", "over", "recall5", "ndcg10"]
    assert table_row(page, "plain", 2)[3] == "-; published +10.0 %"
    assert table_row(page, "other", 2) == ["other", "rq_kmeans", "-", "-"]


def test_each_row_is_compared_with_its_own_reference() -> None:
    rows = dict.fromkeys(("rq_kmeans", "kmeans_text", "quasid_text"), ROWS["plain"])
    page = comparison(
        rows=rows,
        downstream={
            "rq_kmeans": DownstreamRow({"recall10": (0.4,) * 3}),
            "kmeans_text": DownstreamRow({"recall10": (0.1,) * 3}),
            "quasid_text": DownstreamRow({"recall10": (0.2,) * 3}, reference="kmeans_text"),
        },
    )
    text = page.to_markdown()
    assert table_row(text, "quasid_text", 2) == ["quasid_text", "kmeans_text", "**+100.0 % [+100.0 %, +100.0 %]**"]
    assert table_row(text, "kmeans_text", 2)[1:] == ["rq_kmeans", "**-75.0 % [-75.0 %, -75.0 %]**"]
    assert page.document()["downstream"]["quasid_text"]["reference"] == "kmeans_text"
    assert page.document()["downstream"]["kmeans_text"]["reference"] == "rq_kmeans"


def test_the_page_says_what_an_interval_does_not_cover() -> None:
    text = comparison().to_markdown()
    assert "It covers seeds alone, for one fixed sample of users" in text
    assert "the best of these 2 was chosen on this very sample" in text
    assert "initial weights they share only where codebook sizes are equal" in text


def test_baselines_stand_below_the_tokenizers() -> None:
    page = comparison(baselines={"popularity": {"recall10": 0.012}})
    assert "| baseline: popularity | 0.0120 | - |" in page.to_markdown()
    assert page.document()["baselines"] == {"popularity": {"recall10": 0.012}}


def test_looks_at_test_are_told() -> None:
    assert "on test that were written to this folder so far: 3." in comparison(test_evaluations=3).to_markdown()
    assert "on test that" not in comparison().to_markdown()
    assert comparison(test_evaluations=3).document()["test_evaluations"] == 3


def test_a_tokenizer_that_cannot_be_fitted_is_a_row_that_says_why() -> None:
    page = comparison(impossible={"balanced": "5 items |\n 256 codes"}).to_markdown()
    assert "| balanced | not possible: 5 items \\| 256 codes | - |" in page
    [row] = [line for line in page.splitlines() if line.startswith("| balanced ")]
    assert row.replace("\\|", "").count("|") == len(table_row(page, "tokenizer")) + 1


def test_without_its_reference_a_row_has_no_gain() -> None:
    page = comparison(downstream={"plain": BETTER}, impossible={"rq_kmeans": "too few items"})
    assert page.gain("plain", "recall10") is None
    assert table_row(page.to_markdown(), "plain", 2) == ["plain", "rq_kmeans", "-; published +9.0 %"]


def test_figures_by_other_vectors_are_marked() -> None:
    text = comparison(own_vectors=("rq_kmeans",)).to_markdown()
    row = dict(zip(table_row(text, "tokenizer"), table_row(text, "rq_kmeans"), strict=True))
    assert row["error"] == "0.0100 \\*"
    assert "- \\*: measured on vectors of its own" in text
    assert "vectors of its own" not in comparison().to_markdown()


def test_json_carries_every_figure_and_the_gains() -> None:
    content = json.loads(comparison().to_json())
    assert content["diagnostics"]["rq_kmeans"]["icr"] == pytest.approx(0.4)
    assert (content["seeds"], content["reference"]) == ([1, 2, 3], "rq_kmeans")
    gain = content["downstream"]["plain"]["gain"]["ndcg10"]
    assert gain["excludes_zero"] is True
    assert gain["mean"] == pytest.approx(1 / 6)
    assert content["downstream"]["plain"]["published_gain"] == {"ndcg10": 0.09}
    assert content["downstream"]["rq_kmeans"]["gain"]["ndcg10"] is None


# --- files


def test_writing_leaves_the_page_and_its_plots(tmp_path: Path) -> None:
    comparison().write(tmp_path / "page", {"rq_kmeans": CODES, "plain": PLAIN}, X)
    names = ["code_usage.png", "collisions.png", "comparison.json", "comparison.md", "items_by_first_code.png"]
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == names
    text = (tmp_path / "page" / "comparison.md").read_text()
    for name in names:
        if name.endswith(".png"):
            assert f"]({name})" in text
            assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "page" / "comparison.json").read_text())["protocol"] == "Beauty, validation split"
    assert pyplot.get_fignums() == []


def test_plots_that_need_what_is_not_given_are_left_out(tmp_path: Path) -> None:
    comparison().write(tmp_path)
    assert [file.name for file in sorted(tmp_path.glob("*.png"))] == ["collisions.png"]


@pytest.mark.parametrize("n", [1, 2])
def test_items_that_are_all_alike_can_be_drawn(tmp_path: Path, n: int) -> None:
    codes = np.zeros((n, 2), np.int32)
    figures = report(SemanticIds(codes, (1, n)))
    Comparison({"a": figures}).write(tmp_path, {"a": codes}, np.zeros((n, 4), np.float32))
    assert (tmp_path / "items_by_first_code.png").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rows": {}}, "no tokenizer"),
        ({"rows": {**ROWS, "other": report(SemanticIds(PLAIN[:4], (4,)), dedup_level=False)}}, "numbers of items"),
        ({"downstream": {"rq_kmeans": REFERENCE, "new": BETTER}}, "'new'.*no report"),
        ({"reference": "other"}, "reference 'other'"),
        ({"downstream": {"rq_kmeans": DownstreamRow({}, reference="other")}}, "reference 'other'"),
        ({"protocol": ""}, "needs its protocol"),
        ({"seeds": (1, 2)}, "not one value for each"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        comparison(**changes)


@pytest.mark.parametrize(
    ("codes", "x", "match"),
    [
        ({"other": CODES}, X, "no report"),
        ({"plain": PLAIN[:3]}, X, "shape"),
        ({"plain": PLAIN}, X[:3], "3 embeddings for 5 items"),
    ],
)
def test_codes_of_other_items_are_refused(
    tmp_path: Path, codes: dict[str, Codes], x: NDArray[np.float32], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        comparison().write(tmp_path, codes, x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"metrics": {"a": (1.0,), "b": (1.0, 2.0)}}, "unequal numbers of seeds"),
        ({"metrics": {"a": (float("nan"),)}}, "not finite"),
        ({"metrics": {"a": (1.0,)}, "published_gain": {"a": 0.1}}, "need their source"),
    ],
)
def test_incomplete_downstream_rows_are_refused(row: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        DownstreamRow(**row)  # type: ignore[arg-type]


def test_a_report_without_levels_is_shown(tmp_path: Path) -> None:
    codes = np.array([[0], [1]], np.int32)
    rows: dict[str, TokenizerReport] = {"numbers": report(SemanticIds(codes, (2,)))}
    Comparison(rows).write(tmp_path, {"numbers": codes}, np.eye(2, dtype=np.float32))
    assert "| numbers | none +2 | - |" in (tmp_path / "comparison.md").read_text()
