"""Makes a server serve what an alias says: loads in threads of its own, and swaps when all is well."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from genretrieval.errors import BundleError, ConflictError, NotFoundError, UnavailableError
from genretrieval.retrieval import Retriever
from genretrieval_serving.admin.messages import ArmStatus, BundleInfo, BundleList, DeploymentStatus
from genretrieval_serving.admin.replica import Replica
from genretrieval_serving.admin.resources import Alias, AliasFields, Kind
from genretrieval_serving.admin.snapshot import Items
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.bundle_folder import BundleFolder
from genretrieval_serving.catalogue_feed import CatalogueFeed
from genretrieval_serving.deployment import Arm, Deployment, Split, preferred_levels, reserved_slots
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

# How often it is looked whether the alias, as the replica has it, asks for something else.
LOOK_SECONDS = 0.1
# A bundle that was refused is tried again after so long, twice as long each time.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a bundle is not served, how often it was tried, and when it is tried again, by the monotonic clock."""

    error: str
    tries: int
    pause: float
    retry_at: float

    @classmethod
    def after(cls, before: _Failure | None, error: str) -> _Failure:
        tries = 1 if before is None else before.tries + 1
        pause = min(FIRST_PAUSE * 2 ** min(tries - 1, 10), LONGEST_PAUSE)
        return cls(error, tries, pause, time.monotonic() + pause)

    @property
    def due(self) -> bool:
        return time.monotonic() >= self.retry_at


@dataclass(frozen=True, slots=True)
class Followed:
    """An alias, and the folder in which its bundles are."""

    folder: BundleFolder
    alias: str


class Rollout:
    """Follows an alias: `begin`, then `start`, then `stop`. Thread-safe.

    A bundle that cannot be served never replaces one that is: it is logged, counted, shown in `status`, and tried
    again, less and less often. Each arm stands for itself, so that a canary that fails leaves the primary alone. The
    alias is followed on while a bundle is being loaded: the end of a canary waits for no other one.
    """

    def __init__(
        self,
        followed: Followed,
        replica: Replica,
        store: SqlStore,
        metrics: Metrics,
        feed: CatalogueFeed | None = None,
    ) -> None:
        """A rollout that has loaded nothing yet.

        Args:
            followed: what the alias is, and where bundles are.
            replica: knows what the alias says.
            store: where it is kept which slots can be bound.
            metrics: where failures are counted.
            feed: brings the catalogues of bundles to their present state; None where they stay as they were exported.
        """
        self.folder, self.alias = followed.folder, followed.alias
        self._replica, self._store, self._metrics, self._feed = replica, store, metrics, feed
        self._deployment: Deployment | None = None
        self._arms: dict[str, Arm] = {}
        self._failures: dict[str, _Failure] = {}
        # Why the alias is not followed at present.
        self._error: str | None = None
        self._declared_for: object = None
        # One bundle at a time: each takes memory, and the cores from requests.
        self._loading = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rollout", daemon=True)
        self._load_thread: threading.Thread | None = None

    def begin(self) -> Deployment:
        """Load the bundle of the alias; the one before, where that cannot be served. Takes a while.

        Raises:
            NotFoundError: there is no such alias.
            BundleError: neither can be served.
        """
        alias = self._wanted()
        if alias is None:
            raise NotFoundError(
                f"there is no alias {self.alias} in the admin store; make it with `genretrieval bundles create "
                f"{self.alias} BUNDLE --bundles {self.folder.path} --store URL`"
            )
        arm = self._load(alias.bundle)
        if arm is None and alias.previous is not None:
            log.error("bundle_before_served", alias=self.alias, wanted=alias.bundle, bundle=alias.previous)
            arm = self._load(alias.previous)
        if arm is None:
            raise BundleError(self._failures[alias.bundle].error)
        self._deployment = Deployment(arm)
        self._declare_slots()
        return self._deployment

    def start(self) -> None:
        """Follow from now on."""
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Follow no more; a bundle that is being loaded gets `grace` seconds. For threads."""
        self._stopping.set()
        late = time.monotonic() + grace
        if self._thread.is_alive():
            self._thread.join(max(0.0, late - time.monotonic()))
        if self._load_thread is not None:
            self._load_thread.join(max(0.0, late - time.monotonic()))

    def check(self, aliases: Sequence[AliasFields], *, allow_unbound: bool) -> None:
        """Open every bundle that aliases name and that is not served here, and see whether the admin state holds.

        Raises:
            ConflictError: a bundle cannot be served, or bindings and rules cannot hold on it and `allow_unbound` does
                not leave them out.
        """
        for name in dict.fromkeys(name for alias in aliases for name in alias.bundles):
            if name in self._arms:
                continue
            with self._loading:
                try:
                    retriever = self._open(name)
                    items = Items(retriever.catalogue, retriever.bundle.manifest.reserved_slots)
                    self._replica.view(items, allow_unbound=allow_unbound).drop()
                except BundleError as error:
                    raise ConflictError(f"{error}. The alias stays as it is") from error

    def status(self) -> DeploymentStatus:
        """What this server answers with, and what the alias asks of it."""
        assert self._deployment is not None
        alias, (primary, canary, share) = self._wanted(), self._deployment.split
        arms = [self._status(primary, None if alias is None else alias.bundle, 1.0 - share)]
        wanted = None if alias is None or alias.canary is None else alias.canary.bundle
        if canary is not None or wanted is not None:
            arms.append(self._status(canary, wanted, share))
        return DeploymentStatus(alias=self.alias, error=self._error, arms=arms)

    def bundles(self) -> BundleList:
        """Bundles of the folder, as their manifests say."""
        return BundleList(bundles=[self._info(name) for name in self.folder.names()])

    def _follow(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS if self._error is None else FIRST_PAUSE):
            try:
                self._advance()
            except Exception as error:
                # Whatever is met, what is served goes on, and the alias is followed as soon as it can be.
                if self._error is None:
                    self._metrics.bundle_load_failures.inc()
                    log.error("alias_not_followed", alias=self.alias, retry_in=FIRST_PAUSE, exc_info=error)
                self._error = str(error) or repr(error)
            else:
                if self._error is not None:
                    log.info("alias_followed_again", alias=self.alias)
                self._error = None

    def _advance(self) -> None:
        """One step towards what the alias asks for."""
        alias = self._wanted()
        if alias is None:
            return
        self._place(alias)
        self._declare_slots()
        if self._stopping.is_set() or (self._load_thread is not None and self._load_thread.is_alive()):
            return
        for name in alias.bundles:
            failure = self._failures.get(name)
            if name not in self._arms and (failure is None or failure.due):
                self._load_thread = threading.Thread(target=self._load, args=(name,), name="load", daemon=True)
                self._load_thread.start()
                return

    def _wanted(self) -> Alias | None:
        alias = self._replica.get(Kind.ALIASES, self.alias)
        return alias if isinstance(alias, Alias) else None

    def _place(self, alias: Alias) -> None:
        """Let what is loaded answer as the alias says, and give up what it names no more."""
        assert self._deployment is not None
        before = self._deployment.split
        split = Split(self._arms.get(alias.bundle, before.primary))
        canary = self._arms.get(alias.canary.bundle) if alias.canary else None
        if alias.canary and canary not in (None, split.primary):
            split = Split(split.primary, canary, alias.canary.share)
        if split != before:
            for arm in split.named.values():
                if self._feed is not None and arm not in self._deployment.arms:
                    self._feed.catch_up(arm)
            self._deployment.become(split)
            names = {name: self._name_of(arm) for name, arm in split.named.items()}
            log.info("bundles_serving", alias=self.alias, **names, share=split.share)
        for name, arm in list(self._arms.items()):
            if arm not in self._deployment.arms and name not in alias.bundles:
                self._arms.pop(name).close()
        for name in self._failures.keys() - alias.bundles:
            self._failures.pop(name, None)

    def _open(self, name: str) -> Retriever:
        """A bundle on its catalogue as it is now."""
        retriever = self.folder.open(name)
        return retriever if self._feed is None else self._feed.current(retriever)

    def _load(self, name: str) -> Arm | None:
        """Make a bundle ready to answer; None where it cannot be served."""
        begun = time.monotonic()
        log.info("bundle_loading", bundle=name)
        try:
            with self._loading:
                arm = Arm("loaded", self._open(name), self._replica, prepare_first=self._deployment is not None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, a panic in Rust too, what is served goes on
            before = self._failures.get(name)
            failure = self._failures[name] = _Failure.after(before, str(error))
            self._metrics.bundle_load_failures.inc()
            log.error("bundle_refused", bundle=name, error=str(error), tries=failure.tries, retry_in=failure.pause)
            return None
        self._failures.pop(name, None)
        self._arms[name] = arm
        seconds = round(time.monotonic() - begun, 3)
        log.info("bundle_loaded", bundle=name, bundle_version=arm.manifest.version, seconds=seconds)
        return arm

    def _declare_slots(self) -> None:
        """Let words be bound to the slots that all bundles have which any server answers with, now or soon.

        Slots that are bound stay so, whatever is declared; replicas with another bundle may still answer with them.
        """
        assert self._deployment is not None
        aliases = [alias for alias in self._replica.all(Kind.ALIASES) if isinstance(alias, Alias)]
        named = frozenset(name for alias in aliases for name in alias.bundles)
        # One that has just been loaded may be asked for no more.
        answering = self._deployment.arms
        arms = {name: arm for name, arm in list(self._arms.items()) if name in named or arm in answering}
        if self._declared_for == (of := (named, frozenset(arms))):
            return
        manifests = [arm.manifest for arm in arms.values()]
        for name in named - arms.keys():
            with suppress(BundleError):  # what cannot be read is served nowhere
                manifests.append(self.folder.manifest(name))
        shared = set.intersection(*(set(reserved_slots(manifest)) for manifest in manifests))
        slots = sorted(shared, key=lambda slot: (slot.level, slot.code))
        try:
            self._store.sync_slots(slots, preferred_levels(self._deployment.primary.retriever))
        except UnavailableError as error:
            log.warning("slots_not_declared", error=str(error))
            self._stopping.wait(FIRST_PAUSE)
        else:
            self._declared_for = of

    def _name_of(self, arm: Arm | None) -> str | None:
        return next((name for name, held in list(self._arms.items()) if held is arm), None)

    def _status(self, arm: Arm | None, wanted: str | None, share: float) -> ArmStatus:
        failure = self._failures.get(wanted or "")
        status = status_of(arm, share).model_copy(update={"wanted": wanted, "bundle": self._name_of(arm)})
        if failure is None:
            return status
        due = datetime.now(UTC) + timedelta(seconds=failure.retry_at - time.monotonic())
        return status.model_copy(update={"error": failure.error, "failures": failure.tries, "retry_at": due})

    def _info(self, name: str) -> BundleInfo:
        try:
            m = self.folder.manifest(name)
        except BundleError as error:
            return BundleInfo(name=name, error=str(error))
        return BundleInfo(
            name=name,
            version=m.version,
            uuid=m.uuid,
            parent_uuid=m.parent_uuid,
            created=m.created,
            items=m.n_items,
            metrics=m.metrics,
        )


def status_of(arm: Arm | None, share: float) -> ArmStatus:
    """An arm as it is; of a canary that is not there, that it is not."""
    if arm is None:
        return ArmStatus(arm="canary", share=share)
    retriever = arm.retriever
    return ArmStatus(
        arm="canary" if arm.name == "canary" else "primary",
        version=arm.manifest.version,
        uuid=arm.manifest.uuid,
        since=arm.since,
        share=share,
        items=len(retriever.catalogue.item_ids) - len(retriever.catalogue.gone),
        catalogue_revision=retriever.catalogue.revision,
    )
