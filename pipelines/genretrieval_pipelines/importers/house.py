"""A folder that is in the contract's layout already."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from genretrieval.logs import open_tables
from genretrieval_pipelines.importers.writing import LogWriter


def import_house(source: Path, writer: LogWriter) -> list[str]:
    """Check files and columns of a log folder and copy its tables as they are, and ``relevance.parquet``.

    Raises:
        DataError: naming every table and column that `prepare_logs` would refuse.
    """
    for name, conformed in open_tables(source).items():
        rows = conformed.frame.select(pl.len()).collect(engine="streaming").item()
        file = source / f"{name}.parquet"
        writer.copy(name, file if file.exists() else source / name, rows)
    relevance = source / "relevance.parquet"
    if relevance.is_file():
        writer.copy("relevance", relevance, pl.scan_parquet(relevance).select(pl.len()).collect().item())
    return []
