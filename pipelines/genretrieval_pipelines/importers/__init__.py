"""Logs of others and of our own servers, as they lie on disk, as the folder that `prepare_logs` of the core reads.

An importer is a function of `IMPORTERS`; a further format is one more entry. Each reads its files line by
line, and a line it cannot use goes to ``quarantine/lines.jsonl`` with its number and the reason. What rows
mean together (unknown items, duplicates, order) is not looked at here: `prepare_logs` does that for every
source alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from genretrieval.errors import DataError
from genretrieval.logs import writing_logs
from genretrieval_pipelines.importers.amazon import import_amazon_2014
from genretrieval_pipelines.importers.house import import_house
from genretrieval_pipelines.importers.kuaisearch import import_kuaisearch
from genretrieval_pipelines.importers.served import ServedOptions, import_served
from genretrieval_pipelines.importers.writing import LogWriter

Importer = Callable[[Path, LogWriter], list[str]]
"""Writes the tables of a source folder; returns notes for people."""

IMPORTERS: dict[str, Importer] = {
    "house": import_house,
    "amazon-2014": import_amazon_2014,
    "kuaisearch": import_kuaisearch,
}


SERVED_LOGS = "served"
"""The format that needs to be told where items are (`ServedOptions`)."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import wrote.

    Attributes:
        source_format: of `import_logs`.
        output: the log folder.
        rows: rows written of each table.
        rejected: lines set aside of each source file.
        notes: what was left out on purpose.
    """

    source_format: str
    output: Path
    rows: dict[str, int]
    rejected: dict[str, int]
    notes: list[str]

    def lines(self) -> list[str]:
        """The report for people, one line a fact."""
        written = [f"{table}: {rows:,} rows" for table, rows in self.rows.items()]
        rejected = [f"{file}: {lines:,} lines could not be used" for file, lines in self.rejected.items()]
        return [*written, *rejected, *self.notes]


def import_logs(source_format: str, source: Path, output: Path, served: ServedOptions | None = None) -> ImportReport:
    """Import a data set, or what servers logged.

    The tables appear in `output` when all of them are written; tables of an earlier import are replaced.

    Args:
        source_format: a key of `IMPORTERS`, or `SERVED_LOGS`.
        source: the folder of the released files, or of `serve --log-folder`.
        output: the log folder to write.
        served: what served logs are completed with; for no other format.

    Raises:
        DataError: if the format is unknown, a file that must be there is not, no item could be read, or `output`
            holds what no import wrote.
    """
    if (source_format == SERVED_LOGS) != (served is not None):
        raise DataError(
            f"a bundle, earlier logs and a key are for {SERVED_LOGS}, which needs them, not {source_format}"
        )
    importer = partial(import_served, options=served) if served is not None else IMPORTERS.get(source_format)
    if importer is None:
        raise DataError(f"no importer is called {source_format!r}; there are {', '.join(IMPORTERS)} and {SERVED_LOGS}")
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give the folder that holds the released files")
    if source.resolve() == output.resolve():
        raise DataError(f"{output} is the source itself; give another folder to write to")
    with writing_logs(output, "imported"), LogWriter(output) as writer:
        notes = importer(source, writer)
        if not writer.rows.get("items"):
            raise DataError(
                f"no item could be read from {source}; lines that failed, if any, are in {writer.quarantine}"
            )
        names = {path.name for path in source.iterdir() if not path.name.startswith(".")}
        unread = sorted(names - writer.sources)
    if unread:
        notes.append(f"not read: {', '.join(unread)}")
    return ImportReport(source_format, output, dict(writer.rows), dict(writer.rejected), notes)
