from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from genretrieval.errors import DataError, InvalidInputError
from genretrieval.figures import Figure, print_lines, write_json
from genretrieval_pipelines import quality_report
from genretrieval_pipelines.quality_report import QualityReport


def report(split: str = "validation") -> QualityReport:
    ours = {
        "recall10": Figure(0.0851, "share", (0.081, 0.089)),
        "ndcg10": Figure(0.04, "share", (0.038, 0.042)),
        "sid_recall10": Figure(0.1, "share", (0.09, 0.11)),
    }
    markov = {"recall10": Figure(0.0658, "share", (0.062, 0.069)), "ndcg10": Figure(0.0427, "share")}
    return {
        "protocol": {
            "dataset": "Small shop, 5-core",
            "split": "test" if split == "test" else "validation",
            "order_rule": "position, then file order",
            "exclude_seen": True,
            "n_cases": 22363,
            "n_items": 12101,
            "beam_width": 50,
            "markov_transitions": "training",
            "seeds": [0, 1],
        },
        "rows": [
            {"key": "quality", "name": "ours", "metrics": ours},
            {"key": "baseline.markov", "name": "last-item Markov", "metrics": markov},
        ],
        "extra": {"quality.collision_rate": Figure(0.15, "share")},
        "by_popularity": {"ours": {"0": Figure(0.0, "share"), "1-4": Figure(0.02, "share", (0.01, 0.04))}},
    }


def test_metrics_json_holds_every_figure_beside_machine_and_versions(tmp_path: Path) -> None:
    named = quality_report.write(report(), tmp_path / "work")
    stored = json.loads((tmp_path / "work" / "metrics.json").read_text())
    assert stored["quality.recall10"] == {"value": 0.0851, "unit": "share", "spread": [0.081, 0.089]}
    assert stored["baseline.markov.ndcg10"] == {"value": 0.0427, "unit": "share"}
    assert stored["quality.collision_rate"]["value"] == 0.15
    assert set(named) == {name for name in stored if "." in name}
    assert stored["machine"]["cores"] >= 1
    assert stored["machine"]["cpu"]
    assert "numpy" in stored["versions"]
    assert stored["protocol"]["exclude_seen"] is True
    assert stored["rows"]["baseline.markov"] == "last-item Markov"
    assert not list((tmp_path / "work").glob("*.part"))


def test_test_evaluations_are_counted_across_writes(tmp_path: Path) -> None:
    counts = []
    for split in ("validation", "test", "validation", "test"):
        quality_report.write(report(split), tmp_path)
        counts.append(json.loads((tmp_path / "metrics.json").read_text())["test_evaluations"])
    assert counts == [0, 1, 1, 2]


def test_a_foreign_metrics_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(DataError, match="does not say how often test was evaluated"):
        quality_report.write(report(), tmp_path)
    assert (tmp_path / "metrics.json").read_text() == "[]"


def test_markdown_says_the_protocol_and_marks_what_is_missing() -> None:
    text = quality_report.markdown(report())
    for said in ("22,363 cases", "seen items removed", "position, then file order", "beam 50", "seeds 0, 1"):
        assert said in text
    assert "Markov counted training transitions" in text
    assert "| | Recall@10 | NDCG@10 | SID Recall@10 |" in text
    assert "| last-item Markov | 0.0658 [0.0620, 0.0690] | 0.0427 | - |" in text
    assert "| quality.collision_rate | 0.1500 | share |" in text


def test_the_console_table_carries_its_protocol() -> None:
    console = Console(record=True, width=160, quiet=False, file=None, force_terminal=False)
    with console.capture() as captured:
        quality_report.print_table(report(), console)
    text = " ".join(captured.get().split())
    assert "Small shop, 5-core" in text
    assert "0.0851 [0.0810, 0.0890]" in text
    assert "Markov counted training transitions" in text


def test_plots_are_written_as_png(tmp_path: Path) -> None:
    quality_report.write(report(), tmp_path)
    for name in ("recall10.png", "recall10_by_popularity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    without = report()
    without["by_popularity"] = {}
    quality_report.write(without, tmp_path / "other")
    assert not (tmp_path / "other" / "recall10_by_popularity.png").exists()


def test_two_rows_may_not_share_a_key() -> None:
    twice = report()
    twice["rows"][1]["key"] = "quality"
    with pytest.raises(InvalidInputError, match=r"named 'quality\.recall10'"):
        quality_report.figures(twice)


def test_figures_print_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    quality_report.print_figures(quality_report.figures(report()))
    assert capsys.readouterr().out.splitlines()[0] == "quality.recall10: 0.0851 share"
    printed: list[str] = []
    print_lines({"bench.latency_p50": Figure(12.3456789, "ms", (11.0, 13.0))}, printed.append)
    assert printed == ["bench.latency_p50: 12.3457 ms"]


def test_figures_that_no_reader_could_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'machine' is not dotted"):
        write_json(tmp_path / "bench.json", {"machine": Figure(1.0, "ms")})
    with pytest.raises(InvalidInputError, match="not a number"):
        write_json(tmp_path / "bench.json", {"bench.ratio": Figure(float("nan"), "ratio")})
    assert not list(tmp_path.iterdir())
