"""The catalogue while it is served: a folder of changes that every server on it follows.

The catalogue of a bundle is that of its export with all files of the folder in the order of their names, see
`genretrieval.catalogue_changes`. Files are added and never changed; each is applied whole or not at all, and several
that are found together are one swap. One that sorts before others that were applied has the catalogue built again, so
that servers agree whatever they saw first. Only `compact` takes files away. One whose name lies in the future waits for
its time.

A folder may lie on a network file system, which tells nobody of new files, so it is looked into once a second.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import structlog

from genretrieval.bundle import CODEBOOKS
from genretrieval.catalogue_changes import (
    AHEAD,
    SUFFIX,
    CatalogueChanges,
    ChangeChecker,
    ChangesFile,
    early,
    file_name,
    time_after,
    time_of,
)
from genretrieval.errors import (
    DataError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    RequestError,
    UnavailableError,
)
from genretrieval.retrieval import Retriever
from genretrieval.servable import NO_ATTRIBUTES, Catalogue, Servable
from genretrieval_serving.deployment import Arm, Deployment
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
# A file that cannot be read and was written to so lately is taken for one that is still being written.
YOUNG_SECONDS = 30.0
# Idempotency keys hold so long, and younger files are not compacted, because they keep them.
KEPT = timedelta(days=1)
# So many groups of rows that wait for an item's ID are put together.
_WAITING = 64
# What is known of a bundle's catalogue is given up when no arm has served it for so long; loading takes less.
_UNSERVED_SECONDS = 600.0
_TOLD = 5

# Files by name, and what each comes to.
_Found = dict[str, tuple[ChangesFile, CatalogueChanges]]


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change by a call came to.

    Attributes:
        revision: of the catalogue in which it is in force here.
        file: name of the file that it was written to; empty where it was only checked.
        n_upserted: items that were added or changed.
        n_removed: items that were removed.
        missing_ids: items that were to be removed and are not there.
    """

    revision: int
    file: str
    n_upserted: int
    n_removed: int
    missing_ids: list[str]


class CatalogueFeed:
    """Follows a folder in a thread of its own: `follow`, then `stop`. Thread-safe."""

    def __init__(self, folder: Path, metrics: Metrics) -> None:
        """A feed that has read nothing yet.

        Args:
            folder: where changes are, and are written to.
            metrics: where refusals are counted.

        Raises:
            InvalidInputError: there is no such folder. It is not made, because a slip of the pen in its name would
                leave a server without any changes.
        """
        if not folder.is_dir():
            raise InvalidInputError(f"{folder} is no folder; make it, or give the one that changes are put into")
        self.folder = folder
        self._metrics = metrics
        self._deployment: Deployment | None = None
        self._of_bundle: dict[str, _Followed] = {}
        # One state follows another: whoever applies files holds it until they are served.
        self._turn = threading.RLock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="catalogue-feed", daemon=True)
        self._failing = False

    def current(self, retriever: Retriever) -> Retriever:
        """A freshly opened one on its catalogue with all changes so far; it is followed from here on.

        Raises:
            UnavailableError: the folder cannot be read.
        """
        with self._turn:
            followed = _Followed(retriever, retriever.catalogue, self._metrics)
            try:
                followed.catch_up(self.folder, self._names())
            except OSError as error:
                raise self._unreadable(error) from error
            self._of_bundle[retriever.bundle.manifest.uuid] = followed
            return retriever if followed.catalogue is retriever.catalogue else retriever.on(followed.catalogue)

    def follow(self, deployment: Deployment) -> None:
        """Begin to show every change on all arms."""
        self._deployment = deployment
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Stop following; the catalogues stay as they are.

        Changes that are just being applied get `grace` seconds; a file system that hangs keeps no server from ending.
        """
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(grace)

    def catch_up(self, arm: Arm) -> None:
        """Show one arm what is new, right before it takes over; else what was removed while it loaded would come back.

        For `genretrieval_serving.rollout`: an arm that takes no requests yet is not among those that are followed.

        Raises:
            UnavailableError: the folder cannot be read.
        """
        with self._turn:
            try:
                self._bring_up(arm, self._names())
            except OSError as error:
                raise self._unreadable(error) from error

    def refresh(self) -> None:
        """Apply and show what is new now.

        Raises:
            OSError: the folder cannot be read.
        """
        assert self._deployment is not None, "follow comes first"
        with self._turn:
            names, arms = self._names(), self._deployment.arms
            for arm in arms:
                self._bring_up(arm, names)
            latest = time.monotonic() - _UNSERVED_SECONDS
            self._of_bundle = {uuid_: one for uuid_, one in self._of_bundle.items() if one.served_at > latest}

    def change(
        self,
        table: Callable[[Catalogue], pl.DataFrame],
        *,
        call: Mapping[str, str],
        key: str | None = None,
        validate_only: bool = False,
        note: Callable[[Changed], object] = lambda _: None,
        not_made: Callable[[Changed, BaseException], object] = lambda *_: None,
    ) -> Changed:
        """Change the catalogue of every server on the folder, of this one at once.

        Args:
            table: makes the changes, for the catalogue that they are checked against.
            call: who asks, kept in the file; ``fingerprint`` tells requests apart that come with one key.
            key: of a repeated call, which changes nothing more.
            validate_only: check and answer, and write nothing.
            note: told of what is about to be changed; if it raises, nothing is. It comes first, so that no change is in
                force that nobody was told of, whenever the process dies.
            not_made: told that a change of which `note` was told could not be written, and why.

        Raises:
            RequestError: the changes do not fit the catalogue that is served.
            IdempotencyKeyReusedError: the key came before with another request.
            UnavailableError: the folder cannot be read or written to, so that nothing was changed; or the change is
                written and not yet in force here. The message says which.
        """
        assert self._deployment is not None, "follow comes first"
        with self._turn:
            try:
                self.refresh()
                return self._change(self._deployment.primary, table, dict(call), key, validate_only, note, not_made)
            except OSError as error:
                raise UnavailableError(
                    f"the folder of catalogue changes cannot be used ({error.strerror}), so nothing was changed; "
                    "see that it is there and not full, then try again"
                ) from error

    def _change(
        self,
        arm: Arm,
        table: Callable[[Catalogue], pl.DataFrame],
        call: dict[str, str],
        key: str | None,
        validate_only: bool,
        note: Callable[[Changed], object],
        not_made: Callable[[Changed, BaseException], object],
    ) -> Changed:
        names = self._names()
        token = uuid.uuid4().hex if key is None else hashlib.sha256(key.encode()).hexdigest()[:32]
        catalogue = arm.retriever.catalogue
        if key is not None and (before := next((name for name in names if token in name), None)):
            file = ChangesFile.read(self.folder / before)
            if file.call.get("fingerprint") != call.get("fingerprint"):
                raise IdempotencyKeyReusedError(
                    "the idempotency key came with another request before; use a new key for a new request"
                )
            self._see_in_force(arm, before)
            return _changed(_Followed.checker(arm.retriever, catalogue).check(file, "items"), catalogue, before)
        checker = _Followed.checker(arm.retriever, catalogue, strict=True)
        try:
            changes = checker.check(ChangesFile(table(catalogue)), "items")
        except DataError as error:
            raise RequestError(str(error)) from error
        if validate_only:
            return _changed(changes, catalogue, "")
        not_yet = self._followed(arm).early(names)
        name = _next_name([other for other in names if other not in not_yet], token)
        noted = _changed(changes, catalogue, name)
        note(noted)
        path = self.folder / name
        try:
            ChangesFile(changes.table(), arm.manifest.files.get(CODEBOOKS), call=call).write(path)
        except BaseException as error:
            # A network file system may say that it could not rename what it did rename: then the change is made.
            if not (isinstance(error, OSError) and os.path.exists(path)):
                not_made(noted, error)
                raise
        failed: Exception | None = None
        try:
            self.refresh()
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being shown, it is written
            failed = error
        self._see_in_force(arm, name, failed)
        return _changed(changes, arm.retriever.catalogue, name)

    def _see_in_force(self, arm: Arm, name: str, failed: Exception | None = None) -> None:
        if failed or not self._followed(arm).has(name):
            log.error("catalogue_change_not_in_force", file=name, exc_info=failed)
            raise UnavailableError(
                f"the change is written, as {name}, and not yet in force on this server, which goes on trying; servers "
                "that can read the folder follow it. The log says why; to send it again changes nothing more"
            ) from failed

    def _unreadable(self, error: OSError) -> UnavailableError:
        return UnavailableError(
            f"{self.folder} cannot be read ({error.strerror}), and without its changes items would be served "
            "that are sold out; see that it is mounted"
        )

    def _bring_up(self, arm: Arm, names: Sequence[str]) -> None:
        followed = self._followed(arm)
        followed.catch_up(self.folder, names)
        if followed.catalogue is not arm.retriever.catalogue:
            self._show(arm, followed.catalogue)
        followed.served_at = time.monotonic()

    def _show(self, arm: Arm, catalogue: Catalogue) -> None:
        begun = time.monotonic()
        arm.show(catalogue)
        items = len(catalogue.item_ids) - len(catalogue.gone)
        seconds = round(time.monotonic() - begun, 3)
        log.info("catalogue_shown", arm=arm.name, revision=catalogue.revision, items=items, seconds=seconds)

    def _followed(self, arm: Arm) -> _Followed:
        """What is known of an arm's bundle; of one that nobody asked `current` for, found out now."""
        uuid_ = arm.manifest.uuid
        if uuid_ not in self._of_bundle:
            catalogue = Catalogue.open(arm.retriever.bundle)
            self._of_bundle[uuid_] = _Followed(arm.retriever, catalogue, self._metrics)
        return self._of_bundle[uuid_]

    def _names(self) -> list[str]:
        """Files of the folder that are complete, as far as names say, in order."""
        with os.scandir(self.folder) as entries:
            return sorted(e.name for e in entries if e.name.endswith(SUFFIX) and not e.name.startswith("."))

    def _poll(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            try:
                self.refresh()
            except Exception as error:
                if not self._failing:
                    log.error("catalogue_changes_not_followed", folder=str(self.folder), exc_info=error)
                self._failing = True
            else:
                if self._failing:
                    log.info("catalogue_changes_followed_again", folder=str(self.folder))
                self._failing = False


class _Followed:
    """The catalogue of one bundle, with all files that were found so far.

    Attributes:
        catalogue: as it is now.
        served_at: when an arm last served it, by the monotonic clock.
    """

    def __init__(self, retriever: Retriever, exported: Catalogue, metrics: Metrics) -> None:
        self.catalogue = exported
        self.served_at = time.monotonic()
        self._files = self.checker(retriever, exported)
        self._metrics = metrics
        self._applied: set[str] = set()
        # Of items that the catalogue does not have; an ID may come for them.
        self._waiting: list[CatalogueChanges] = []
        # Name to what a file was when it was refused, so that it is read again when it is another one.
        self._refused: dict[str, tuple[int, int]] = {}
        # Names that could not be read when they were last looked at.
        self._unread: set[str] = set()
        # Names too far ahead of the clock when they were last looked at.
        self._early: set[str] = set()
        # Attributes of files that the bundle does not have.
        self._unknown: set[str] = set()
        self._vanished: set[str] = set()

    @staticmethod
    def checker(retriever: Retriever, catalogue: Catalogue, *, strict: bool = False) -> ChangeChecker:
        """Of changes of a bundle's catalogue."""
        return ChangeChecker(catalogue, retriever.bundle.manifest, retriever.features.keywords, strict)

    def has(self, name: str) -> bool:
        """Whether a file is part of the catalogue."""
        return name in self._applied

    def early(self, names: Sequence[str]) -> set[str]:
        """Files whose time has not come. What is applied stays, and what follows it, should the clock be set back."""
        now, behind = datetime.now(UTC), time_after(max(self._applied, default=""))
        if behind is not None and behind > now:
            now = max(now, behind - AHEAD)
        return set(early(names, now)) - self._applied

    def catch_up(self, folder: Path, names: Sequence[str]) -> None:
        """Apply what is new among the files of the folder."""
        self._tell_of_vanished(names)
        self._tell_of_early(names)
        passed_over = self._applied | self._early
        found = self._read(folder, [name for name in names if name not in passed_over])
        if not found:
            return
        if late := self._late(found):
            again = self._again(folder, [name for name in names if name in self._applied])
            if again is None:
                found = {name: one for name, one in found.items() if name not in late}
                if not found:
                    return
            else:
                log.info("catalogue_built_again", late=late[:_TOLD])
                found |= again
                self.catalogue, self._waiting, self._applied = self._files.catalogue, [], set()
        merged = {name for file, _ in found.values() for name in file.merges}
        applied = {name: changes for name, (_, changes) in sorted(found.items()) if name not in merged}
        self._apply(CatalogueChanges.merged(list(applied.values())))
        self._applied |= {*applied, *merged}
        self._vanished |= merged
        log.info(
            "catalogue_changes_applied",
            files=len(applied),
            last=max(applied),
            revision=self.catalogue.revision,
            unlisted=sum(changes.unlisted for changes in applied.values()),
        )

    def _late(self, found: _Found) -> list[str]:
        """Names of those that cannot come behind what is applied."""
        last = max(self._applied, default="")
        return sorted(name for name, (file, _) in found.items() if name < last or self._applied & {*file.merges})

    def _again(self, folder: Path, names: Sequence[str]) -> _Found | None:
        """Applied files once more; None where one cannot be read now, without which sold out items would come back."""
        found: _Found = {}
        for name in sorted(names, key=lambda name: name not in self._unread):
            one = self._read(folder, [name])
            if not one and name not in self._refused:
                return None
            found |= one
        return found

    def _apply(self, changes: CatalogueChanges) -> None:
        early = [part.only(changes.ids["item_id"]) for part in self._waiting] if len(changes.ids) else []
        self.catalogue = self.catalogue.updated(CatalogueChanges.merged([*early, changes]))
        items = changes.removed["item_id"]
        unknown = items.filter(pl.Series(self.catalogue.item_ids.rows_of(items) < 0))
        if len(unknown):
            self._waiting.append(changes.only(unknown))
            log.info("catalogue_items_unknown", items=len(unknown), first=unknown.head(_TOLD).to_list())
        if len(self._waiting) > _WAITING:
            self._waiting = [CatalogueChanges.merged(self._waiting)]

    def _read(self, folder: Path, names: Sequence[str]) -> _Found:
        """Files that can be applied; the others are logged and counted, once for each state that they are in.

        What is wrong with one stays so until it is another. What cannot be had is asked for again with every look.
        """
        found: _Found = {}
        for name in names:
            path = folder / name
            try:
                status = path.stat()
                state = (status.st_mtime_ns, status.st_size)
                if self._refused.get(name) == state:
                    continue
                if time_of(name) is None:
                    example = file_name(datetime.now(UTC), path.stem)
                    raise DataError(
                        f"{name} does not begin with a time in UTC, by which files are ordered; name it as in {example}"
                    )
                try:
                    file = ChangesFile.read(path)
                except DataError:
                    if 0 <= time.time() - status.st_mtime < YOUNG_SECONDS:
                        continue
                    raise
                self._unread.discard(name)
                found[name] = file, self._files.check(file, name)
                self._tell_of_unknown(name, found[name][1].unknown)
                self._refused.pop(name, None)
            except FileNotFoundError:
                continue
            except (OSError, MemoryError) as error:
                if name not in self._unread:
                    self._metrics.catalogue_changes_refused.inc()
                    log.error("catalogue_changes_unread", file=name, why=repr(error))
                self._unread.add(name)
            except (Exception, pl.exceptions.PanicException) as error:  # noqa: BLE001 - no file may hold up the others
                self._refused[name] = state
                self._metrics.catalogue_changes_refused.inc()
                why = str(error) if isinstance(error, DataError) else repr(error)
                log.warning("catalogue_changes_refused", file=name, why=why)
        return found

    def _tell_of_unknown(self, file: str, attributes: frozenset[str]) -> None:
        """A slip of the pen, or an attribute that another bundle has: the log says it once, not for every file."""
        if new := attributes - self._unknown:
            attributes_here = sorted(self._files.catalogue.table.schema.keys() - NO_ATTRIBUTES)
            log.warning("catalogue_attributes_unknown", file=file, passed_over=sorted(new), known=attributes_here)
            self._unknown |= new

    def _tell_of_early(self, names: Sequence[str]) -> None:
        """Refused as any other, but not for good: all servers apply it when its time comes."""
        not_yet = self.early(names)
        for name in sorted(not_yet - self._early):
            self._metrics.catalogue_changes_refused.inc()
            why = (
                f"{name} begins with a time that is more than {AHEAD.total_seconds() / 60:g} minutes ahead of this "
                f"server's clock, {datetime.now(UTC):%Y%m%dT%H%M%S}, and would outrank all that is written until then; "
                "it is left out until the clock comes that near. Name it by the time at which it was written, in UTC"
            )
            log.warning("catalogue_changes_refused", file=name, why=why)
        self._early = not_yet

    def _tell_of_vanished(self, names: Sequence[str]) -> None:
        """What was applied stays in force: a folder that is not mounted must not put back what is sold out."""
        vanished = self._applied.difference(names)
        if new := vanished - self._vanished:
            log.info("catalogue_changes_vanished", files=len(new), first=sorted(new)[:_TOLD])
        self._vanished = vanished


def _changed(changes: CatalogueChanges, catalogue: Catalogue, file: str) -> Changed:
    items, removed = changes.removed["item_id"], changes.removed["value"]
    taken = items.filter(removed)
    missing = taken.filter(pl.Series(catalogue.item_ids.rows_of(taken) < 0)).to_list()
    return Changed(catalogue.revision, file, len(items) - len(taken), len(taken) - len(missing), missing)


def _next_name(names: Sequence[str], token: str) -> str:
    """A name that sorts behind all others, also those of a server whose clock is ahead."""
    name = file_name(datetime.now(UTC), token)
    last = max((other for other in names if time_of(other)), default="")
    behind = time_after(last)
    return name if behind is None or last < name else file_name(behind, token)


def compact(folder: Path, bundle: Servable, older_than: timedelta = KEPT) -> tuple[str, int] | None:
    """Merge the older files of a folder into one, which takes the place of the last of them.

    Servers that run are not disturbed, and one that starts in the middle finds the same catalogue.

    Args:
        folder: that servers follow.
        bundle: that they serve; semantic IDs that it makes of words are written down.
        older_than: age of the files; younger ones keep the idempotency keys of their calls.

    Returns:
        Name of the file, and how many it stands for; None where fewer than two are old enough.

    Raises:
        DataError: a file is refused, its semantic IDs are of other codebooks than the bundle's, or it names attributes
            that the bundle does not have.
    """
    latest = time.time() - older_than.total_seconds()
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    # Servers have none of these in their catalogue, and refuse whatever is written under their names.
    out = {*early(names, datetime.now(UTC)), *(name for name in names if time_of(name) is None)}
    names = [name for name in names if name not in out]
    young = next((i for i, name in enumerate(names) if (folder / name).stat().st_mtime > latest), len(names))
    files = {name: ChangesFile.read(folder / name) for name in names[:young]}
    merged = {name for file in files.values() for name in file.merges}
    files = {name: file for name, file in files.items() if name not in merged}
    if len(files) < 2:
        return None
    codebooks = bundle.manifest.files.get(CODEBOOKS)
    if strangers := [name for name, file in files.items() if file.codebooks not in (None, codebooks)]:
        raise DataError(
            f"{', '.join(strangers[:_TOLD])}: semantic IDs of other codebooks than the bundle's, which would be lost; "
            "give the bundle that they are of, or move the files away if it is served no more. Nothing was changed"
        )
    checker = ChangeChecker(Catalogue.open(bundle), bundle.manifest, bundle.features().keywords)
    changes = CatalogueChanges.merged([checker.check(file, name) for name, file in files.items()])
    if changes.unknown:
        raise DataError(
            f"{', '.join(sorted(changes.unknown))}: the bundle has no such attributes, which would be lost; give one "
            "that has them, or move the files away that name them. Nothing was changed"
        )
    *others, last = files
    replaced = sorted({*others, *merged})
    ChangesFile(changes.table(), codebooks, changes.n_sets, tuple(replaced)).write(folder / last)
    for name in replaced:
        (folder / name).unlink(missing_ok=True)
    return last, len(files)
