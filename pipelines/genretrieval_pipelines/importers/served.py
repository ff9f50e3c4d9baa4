"""What servers logged (`genretrieval.served_logs`) as logs to train on, beside those of the time before.

Every answer is a request: its items were shown, and what came back under its token is what became of them.

- Where a caller recorded exposures for an answer, those were shown, and no others; else all of its items.
- An event without a logged answer, as the sample or the retention leaves it, is an interaction of its user alone,
  without request, query and rank. One that has no user either cannot be placed: it goes to
  ``quarantine/events.parquet``.
- Users have the keys that they have in the served logs; ids of earlier logs become keys by the same secret. An answer
  to nobody is a visitor of its own, so that what was asked and taken counts and no history is made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from genretrieval.bundle import load_bundle
from genretrieval.errors import DataError, InvalidInputError
from genretrieval.logs import open_tables
from genretrieval.schemas import EXPOSURE, INTERACTIONS, ITEMS, QRELS, ROW, USERS, Conformed
from genretrieval.served_logs import EVENTS, EVENTS_FOLDER, SERVED, SERVED_FOLDER, UserKeys, log_files
from genretrieval_pipelines.importers.writing import LogWriter

VISIT = "visit-"
_NO_ATTRIBUTES = ("semantic_id", "popularity")
_COLUMNS = [column.name for column in INTERACTIONS.columns]
_EVENT = ["attribution_token", "user_key", "item_id", "event", "time", "value"]


@dataclass(frozen=True)
class ServedOptions:
    """What the served logs are completed with.

    Attributes:
        bundle: whose catalogue are the items, where there are no earlier logs.
        earlier: house logs of the time before; their items, profiles and judgements stay, interactions are added.
        keys: the secret of the served logs, by which users of the earlier logs become keys.

    Raises:
        InvalidInputError: the items would come from nowhere or from two places, or earlier users would stay strangers.
    """

    bundle: Path | None = None
    earlier: Path | None = None
    keys: UserKeys | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if (self.bundle is None) == (self.earlier is None):
            raise InvalidInputError(
                "served logs hold no items: give --merge EARLIER_LOGS, or --bundle for its catalogue, not both"
            )
        if (self.earlier is None) != (self.keys is None):
            raise InvalidInputError(
                "--merge and the key of the served logs (--log-key-file or GENRETRIEVAL_LOG_KEY) go together: by it "
                "users of the earlier logs are known again"
            )


def import_served(source: Path, writer: LogWriter, options: ServedOptions) -> list[str]:
    """Turn the logs of servers into house logs.

    Args:
        source: folder of `serve --log-folder`.
        writer: takes the tables.
        options: where items and earlier logs are.

    Raises:
        DataError: there are no served logs, or the earlier logs cannot be read.
    """
    writer.sources |= {SERVED_FOLDER, EVENTS_FOLDER}
    if not log_files(source / SERVED_FOLDER) and not log_files(source / EVENTS_FOLDER):
        raise DataError(f"{source} holds no served logs; give the folder of `serve --log-folder`")
    answers, events = _scan(source / SERVED_FOLDER, SERVED), _scan(source / EVENTS_FOLDER, EVENTS)
    served = _Served(answers, events)
    earlier = None if options.earlier is None else _Earlier(options.earlier, options.keys, writer)
    notes = served.notes(writer.quarantine.with_name("events.parquet"))
    interactions = served.interactions()
    if earlier is not None:
        earlier.write_beside(served.profiles())
        interactions = pl.concat([earlier.interactions(), interactions])
        notes += earlier.notes
    else:
        assert options.bundle is not None
        catalogue = load_bundle(options.bundle).catalogue()
        writer.write(ITEMS.name, catalogue.drop(_NO_ATTRIBUTES, strict=False).lazy())
        if (profiles := served.profiles()) is not None:
            writer.write(USERS.name, profiles.lazy())
    writer.write(INTERACTIONS.name, interactions)
    return notes


def _scan(folder: Path, schema: pa.Schema) -> pl.LazyFrame:
    """All files of a kind; a column that older files lack is null."""
    empty = pl.DataFrame(schema.empty_table())
    files = log_files(folder)
    if not files:
        return empty.lazy()
    return pl.scan_parquet(files, schema=empty.schema, missing_columns="insert", extra_columns="ignore")


class _Served:
    """Answers and events, put together."""

    def __init__(self, answers: pl.LazyFrame, events: pl.LazyFrame) -> None:
        token = pl.col("attribution_token")
        self.events = events.select(_EVENT).unique(maintain_order=True)
        self.n_sent = events.select(pl.len())
        of_event = (
            self.events.filter(token.is_not_null(), pl.col("user_key").is_not_null())
            .group_by("attribution_token")
            .agg(pl.col("user_key").first().alias("known_later"))
        )
        named = answers.join(of_event, on="attribution_token", how="left", maintain_order="left")
        user = pl.coalesce("user_key", "known_later", pl.lit(VISIT) + token)
        self.answers = named.with_columns(user)
        shown = self.answers.select("attribution_token", "items").explode("items").drop_nulls("items")
        self.ranks = shown.select(
            "attribution_token",
            item_id=pl.col("items").struct.field("item_id"),
            rank_shown=pl.col("items").struct.field("rank"),
        )
        requests = self.answers.select("attribution_token", "query", "scenario", visitor="user_key", asked="time")
        joined = self.events.join(requests, on="attribution_token", how="left", maintain_order="left").join(
            self.ranks, on=["attribution_token", "item_id"], how="left", maintain_order="left"
        )
        self.joined = joined.with_columns(logged=pl.col("visitor").is_not_null())

    def interactions(self) -> pl.LazyFrame:
        """In the contract's columns, in order of time."""
        of_events = self.joined.select(
            *("item_id", "event", "query", "rank_shown", "scenario", "value"),
            user_id=pl.coalesce("user_key", "visitor"),
            timestamp="time",
            request_id=pl.when("logged").then("attribution_token"),
        ).drop_nulls("user_id")
        recorded = self.events.filter(pl.col("event") == EXPOSURE).select("attribution_token").unique()
        all_shown = (
            self.answers.join(recorded, on="attribution_token", how="anti")
            .join(self.ranks, on="attribution_token")
            .select(
                *("item_id", "query", "rank_shown", "scenario"),
                event=pl.lit(EXPOSURE),
                value=pl.lit(None, pl.Float64),
                user_id="user_key",
                timestamp="time",
                request_id="attribution_token",
            )
        )
        rows = pl.concat([all_shown, of_events], how="diagonal").with_columns(
            pl.col("timestamp").dt.replace_time_zone(None), history_index=pl.lit(None, pl.Int64)
        )
        # What is shown is there before it is taken.
        taken = pl.col("event") != EXPOSURE
        return rows.sort("timestamp", taken, "request_id", "rank_shown", maintain_order=True).select(_COLUMNS)

    def profiles(self) -> pl.DataFrame | None:
        """Of every user the profile that came with the newest answer; None where none came with any."""
        told = (
            self.answers.filter(~pl.col("user_key").str.starts_with(VISIT), pl.col("profile").list.len() > 0)
            .sort("time")
            .group_by("user_key", maintain_order=True)
            .agg(pl.col("profile").last())
            .explode("profile")
            .select(
                user_id="user_key",
                name=pl.col("profile").struct.field("name"),
                value=pl.col("profile").struct.field("value"),
            )
            .collect()
        )
        return None if told.is_empty() else told.pivot("name", index="user_id", values="value")

    def notes(self, quarantine: Path) -> list[str]:
        """What was found; events that cannot be placed are written to `quarantine`."""
        token, logged, named = pl.col("attribution_token"), pl.col("logged"), pl.col("user_key").is_not_null()
        lost = self.joined.filter(~logged, ~named).select(_EVENT).collect()
        quarantine.unlink(missing_ok=True)
        if len(lost):
            lost.write_parquet(quarantine)
        answers = self.answers.select(
            n=pl.len(),
            users=pl.col("user_key").filter(~pl.col("user_key").str.starts_with(VISIT)).n_unique(),
            nobody=pl.col("user_key").str.starts_with(VISIT).sum(),
        ).collect()
        n, users, nobody = answers.row(0)
        counted = self.joined.select(
            n=pl.len(),
            joined=logged.sum(),
            others=(logged & pl.col("rank_shown").is_null()).sum(),
            without_answer=(~logged & named & token.is_not_null()).sum(),
            organic=(~logged & named & token.is_null()).sum(),
        )
        events = counted.collect().row(0, named=True)
        lines = [
            f"answers: {n:,}, to {users:,} users, and {nobody:,} to nobody, each of whom is a visitor of its own",
            f"events: {events['n']:,}, of which {events['joined']:,} belong to a logged answer",
        ]
        further = {
            "were sent more than once and count once": self.n_sent.collect().item() - events["n"],
            "are about an item that is not in their answer, and have no rank": events["others"],
            "name an answer that is not in the log, and are interactions of their user alone": events["without_answer"],
            "name no answer, and are interactions of their user alone": events["organic"],
            f"belong to no logged answer and no user: {quarantine.name} in quarantine": len(lost),
        }
        return lines + [f"events: {count:,} {what}" for what, count in further.items() if count]


class _Earlier:
    """House logs of the time before, their users by keys."""

    def __init__(self, folder: Path, keys: UserKeys | None, writer: LogWriter) -> None:
        assert keys is not None
        self.folder, self.keys, self.writer = folder, keys, writer
        self.tables = open_tables(folder)
        self.notes: list[str] = []

    def interactions(self) -> pl.LazyFrame:
        """In the contract's columns, in file order."""
        if INTERACTIONS.name not in self.tables:
            return pl.LazyFrame(schema={column.name: column.dtype for column in INTERACTIONS.columns})
        return self._keyed(self._good(INTERACTIONS.name)).select(_COLUMNS)

    def write_beside(self, profiles: pl.DataFrame | None) -> None:
        """Write every table but the interactions; `profiles` of users that it has not are added."""
        for name in self.tables:
            if name == QRELS.name:
                self.writer.write(name, self._keyed(self._good(name)))
            elif name not in (INTERACTIONS.name, USERS.name):
                self._copy(name)
        if (self.folder / "relevance.parquet").is_file():
            self._copy("relevance")
        users = self._keyed(self._good(USERS.name)).collect() if USERS.name in self.tables else None
        if users is not None and profiles is not None:
            new = profiles.join(users, on="user_id", how="anti")
            kept = [pl.col(c).cast(users.schema[c], strict=False) for c in new.columns if c in users.columns]
            users = pl.concat([users, new.select(kept)], how="diagonal")
        users = profiles if users is None else users
        if users is not None:
            self.writer.write(USERS.name, users.lazy())

    def _copy(self, name: str) -> None:
        file = self.folder / f"{name}.parquet"
        source = file if file.exists() else self.folder / name
        frame = self.tables[name].frame if name in self.tables else pl.scan_parquet(source)
        self.writer.copy(name, source, frame.select(pl.len()).collect().item())

    def _good(self, name: str) -> pl.LazyFrame:
        """Rows of a table that can be read; `data check` says of the others why."""
        conformed: Conformed = self.tables[name]
        broken = pl.any_horizontal(pl.lit(False), *(rule.broken.fill_null(False) for rule in conformed.rules))
        n_broken = conformed.frame.select(broken.sum()).collect().item()
        if n_broken:
            self.notes.append(
                f"{name}: {n_broken:,} earlier rows cannot be read and were left out; "
                f"`genretrieval data check {self.folder}` says which and why"
            )
        return conformed.frame.filter(~broken).select(ROW, *conformed.columns).sort(ROW).drop(ROW)

    def _keyed(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        ids = frame.select("user_id").drop_nulls().unique().collect()["user_id"]
        keys = pl.LazyFrame({"user_id": ids, "key": [self.keys.of(user) for user in ids]}, schema_overrides=_KEYS)
        known = frame.join(keys, on="user_id", how="left", maintain_order="left")
        return known.with_columns(user_id="key").drop("key")


_KEYS = {"user_id": pl.String, "key": pl.String}
