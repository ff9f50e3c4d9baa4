"""Does the admin store keep its promises when writers race for slots and processes are killed?

First a race in SQLite and in PostgreSQL: processes of many threads each bind keywords to too few slots, release them,
count a shared counter up by etag, and make rules in pairs; as many replicas follow the changes. Then rounds of such
writers in which the writing process, or PostgreSQL, is killed (SIGKILL) at a random moment.

After each the whole audit is replayed and compared with what is stored, with what the writers were answered and with
what the replicas saw. PostgreSQL is a cluster of its own; without its binaries there is SQLite alone. No kill shows
what a power cut would do: what the kernel has, it keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from genretrieval.errors import (
    EtagMismatchError,
    SlotsExhaustedError,
    UnavailableError,
)
from genretrieval.figures import Figure
from genretrieval_serving.admin.resources import (
    AuditEvent,
    Binding,
    BlockEffect,
    Fields,
    KeywordFields,
    Kind,
    Resource,
    RuleFields,
    Selector,
    SlotRef,
)
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create, Delete, Operation, Update
from genretrieval_serving.faults.processes import PATIENCE_S, PostgresCluster
from genretrieval_serving.observability import configure_logging

COUNTER = "counter"
ITEMS = Selector(item_ids=["item-1"])


def open_store(url: str) -> SqlStore:
    """Without quarantine, so that slots change hands as often as they can."""
    return SqlStore.open(url, quarantine=timedelta(0))


def prepare(url: str, n_slots: int) -> None:
    """Slots to race for, and the shared counter."""
    store = open_store(url)
    store.sync_slots([SlotRef(level=code % 2, code=code) for code in range(n_slots)])
    store.apply(Call("prepare"), [Create(Kind.KEYWORDS, COUNTER, KeywordFields(text=COUNTER, note="0"))])
    store.close()


class Writer:
    """One thread of a writing process. What it was answered goes to standard output, a line an answer."""

    def __init__(self, store: SqlStore, name: str, stop: threading.Event, output: threading.Lock) -> None:
        self.store = store
        self.name = name
        self.stop = stop
        self.output = output
        self.rng = random.Random(name)
        self.bound: list[str] = []
        self.made = 0

    def run(self, operations: int) -> None:
        """Do so many operations, or fewer if asked to stop."""
        try:
            for _ in range(operations):
                if self.stop.is_set():
                    break
                with suppress(EtagMismatchError):
                    self.step()
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)  # one thread that fails must not pass for a writer that had done

    def step(self) -> None:
        """One operation, drawn by chance."""
        chance = self.rng.random()
        if chance < 0.3:
            try:
                etag = self.store.get(Kind.KEYWORDS, COUNTER).etag
            except UnavailableError:
                return
            self.persist(Update(Kind.KEYWORDS, COUNTER, one_more, etag))
            return
        self.made += 1
        fresh = f"{self.name}-{self.made}"
        if chance < 0.5:
            rule = RuleFields(effect=BlockEffect(kind="block", items=ITEMS), note=fresh)
            self.persist(*(Create(Kind.RULES, f"pair-{fresh}-{side}", rule) for side in "ab"))
        elif chance < 0.75 and self.bound:
            self.release()
        else:
            keyword = KeywordFields(text=fresh, binding=Binding(items=ITEMS))
            try:
                self.persist(Create(Kind.KEYWORDS, fresh, keyword))
            except SlotsExhaustedError:
                self.release()
            else:
                self.bound.append(fresh)

    def release(self) -> None:
        """Unbind or delete a keyword that it has bound."""
        if self.bound:
            keyword = self.bound.pop(self.rng.randrange(len(self.bound)))
            if self.rng.random() < 0.5:
                self.persist(Delete(Kind.KEYWORDS, keyword))
            else:
                self.persist(Update(Kind.KEYWORDS, keyword, unbound))

    def persist(self, *operations: Operation) -> None:
        """Do it and say so. While the database is away the call is repeated; its key makes that once at most."""
        call = Call(self.name, idempotency_key=f"{self.rng.getrandbits(64):x}", fingerprint="same")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                resources = self.store.apply(call, operations)
                break
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        names = [f"{operation.kind.value}/{operation.id}" for operation in operations]
        answer = [[name, r.revision, r.etag] for name, r in zip(names, resources, strict=True)]
        with self.output:
            print(json.dumps(answer), flush=True)


def one_more(resource: Resource) -> Fields:
    """The counter, one higher."""
    return KeywordFields(text=COUNTER, note=str(int(resource.note) + 1))


def unbound(resource: Resource) -> Fields:
    """A keyword without its binding."""
    return KeywordFields(text=resource.id)


def write(url: str, name: str, writers: int, operations: int) -> None:
    """A writing process; it ends when its work is done or its standard input closes."""
    stop = threading.Event()
    output = threading.Lock()

    def heed() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=heed, daemon=True).start()
    store = open_store(url)
    threads = [
        threading.Thread(target=Writer(store, f"{name}.{i}", stop, output).run, args=(operations,))
        for i in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    # The thread that reads standard input cannot be woken, and what is open at the end of an interpreter is of no
    # interest here.
    sys.stdout.flush()
    os._exit(0)


class WritingProcess:
    """`write` in a process that can be killed."""

    def __init__(self, url: str, name: str, writers: int, operations: int) -> None:
        arguments = ["--write", url, "--name", name, "--writers", str(writers), "--operations", str(operations)]
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", __name__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers: list[tuple[str, int, str]] = []
        self.answered = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # A line that was cut off by the kill was not an answer yet.
            if line.endswith("\n"):
                self.answers += [tuple(part) for part in json.loads(line)]
                self.answered.set()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._end()

    def stop(self) -> None:
        """Ask it to end, and wait."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.join()

    def join(self) -> None:
        """Wait until its work is done."""
        self._end()
        assert self.process.returncode == 0, f"the writers ended with {self.process.returncode}"

    def _end(self) -> None:
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


class Replica:
    """Follows the changes as a serving process does."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self.revision = 0
        self.view: dict[str, Resource] = {}
        self.problems: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            with suppress(UnavailableError):
                self.follow()

    def follow(self) -> None:
        """Take over what changed."""
        changes = self.store.changes(self.revision)
        if changes.revision < self.revision:
            self.problems.append(f"a replica saw revision {changes.revision} after {self.revision}")
        for kind, resource in changes.resources:
            if not self.revision < resource.revision <= changes.revision:
                self.problems.append(f"{kind.value}/{resource.id} of revision {resource.revision} came out of order")
            self.view[f"{kind.value}/{resource.id}"] = resource
        self.revision = changes.revision

    def end(self) -> list[str]:
        """What it saw against what there is: a revision that became visible late would be missing."""
        self._stop.set()
        self._thread.join()
        self.follow()
        everything = self.store.changes(0)
        if self.view != {f"{kind.value}/{resource.id}": resource for kind, resource in everything.resources}:
            self.problems.append("a replica that followed the changes does not have what is stored")
        self.store.close()
        return self.problems


@dataclass
class Outcome:
    """What a scenario has shown."""

    problems: list[str] = field(default_factory=list)
    answers: int = 0

    def add(self, other: Outcome) -> None:
        """Count another one's in."""
        self.problems += other.problems
        self.answers += other.answers


def all_events(store: SqlStore) -> list[AuditEvent]:
    """The whole audit, oldest first."""
    events, token = store.audit(size=1000)
    while token:
        page, token = store.audit(size=1000, token=token)
        events += page
    return events[::-1]


def all_resources(store: SqlStore) -> dict[str, dict[str, Any]]:
    """Everything that is stored, deleted or not, by name."""
    found: dict[str, dict[str, Any]] = {}
    for kind in Kind:
        page = store.page(kind, size=1000, show_deleted=True)
        while True:
            found |= {f"{kind.value}/{r.id}": r.model_dump(mode="json") for r in page.resources}
            if not page.next_page_token:
                break
            page = store.page(kind, size=1000, token=page.next_page_token, show_deleted=True)
    return found


def check(url: str, answers: Sequence[tuple[str, int, str]], n_slots: int) -> Outcome:
    """Replay the audit: everything that was answered is in it, and it leads, step by step, to what is stored."""
    store = open_store(url)
    revision, events, stored, counts = store.revision(), all_events(store), all_resources(store), store.slot_counts()
    store.close()
    problems = []
    state: dict[str, dict[str, Any]] = {}
    holders: dict[tuple[int, int], str] = {}
    done = {}
    halves: Counter[tuple[int, str]] = Counter()
    for event in events:
        before, after = state.get(event.name), event.after
        assert after is not None
        if event.before != before:
            problems.append(
                f"lost update: revision {event.revision} of {event.name} does not start where the last ended"
            )
        if (event.revision, event.name) in done:
            problems.append(f"{event.name} has two events in revision {event.revision}")
        old, new = (slot_of(resource) for resource in (before, after))
        if old is not None:
            holders.pop(old, None)
        if new is not None and holders.setdefault(new, event.name) != event.name:
            problems.append(f"slot {new} went to {event.name} while {holders[new]} held it")
        due = after.get("binding") is not None and after["deleted_at"] is None
        if due != (new is not None):
            problems.append(f"{event.name} is {'' if due else 'not '}bound, and its slot is {new}")
        if event.name.startswith("rules/pair-"):
            halves[event.revision, event.name[:-1]] += 1
        if event.name == f"keywords/{COUNTER}" and before and str(after["note"]) != str(int(str(before["note"])) + 1):
            problems.append(f"lost update: the counter went from {before['note']} to {after['note']}")
        state[event.name] = after
        done[event.revision, event.name] = after["etag"]
    revisions = [event.revision for event in events]
    if revisions != sorted(revisions) or sorted(set(revisions)) != list(range(1, revision + 1)):
        problems.append(f"the audit does not have revisions 1 to {revision}, in order")
    if state != stored:
        differing = sorted(name for name in state.keys() | stored.keys() if state.get(name) != stored.get(name))
        problems.append(f"the audit does not lead to what is stored: {', '.join(differing[:5])}")
    problems += [f"half of {pair} in revision {of}" for (of, pair), number in halves.items() if number != 2]
    problems += [
        f"lost: {name} was answered with revision {of} and is not in it"
        for name, of, etag in answers
        if done.get((of, name)) != etag
    ]
    if counts.bound != len(holders) or counts.bound + counts.free != n_slots:
        problems.append(f"{len(holders)} of {n_slots} slots are held, but the store counts {counts}")
    return Outcome(problems, len(answers))


def slot_of(resource: dict[str, Any] | None) -> tuple[int, int] | None:
    """The slot that a resource holds."""
    slot = (resource or {}).get("slot")
    return None if slot is None else (slot["level"], slot["code"])


def race(url: str, writers: int, replicas: int, operations: int, n_slots: int) -> Outcome:
    """Writers in several processes, all at once; nobody dies, so every count must be exact."""
    prepare(url, n_slots)
    followers = [Replica(url) for _ in range(replicas)]
    with ExitStack() as stack:
        processes = [WritingProcess(url, f"race{i}", writers, operations) for i in range(replicas)]
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            process.join()
    problems = [problem for follower in followers for problem in follower.end()]
    answers = [answer for process in processes for answer in process.answers]
    outcome = check(url, answers, n_slots)
    outcome.problems += problems + exactly_once(url, answers)
    return outcome


def exactly_once(url: str, answers: Sequence[tuple[str, int, str]]) -> list[str]:
    """Where no writer died, what was done and what was answered are the same."""
    store = open_store(url)
    events = {(event.name, event.revision) for event in all_events(store) if event.principal != "prepare"}
    store.close()
    answered = {(name, revision) for name, revision, _ in answers}
    return [] if events == answered else [f"{len(events)} changes were made and {len(answered)} answered"]


def kill_round(
    url: str, name: str, rng: random.Random, writers: int, n_slots: int, postgres: PostgresCluster | None
) -> Outcome:
    """Kill, at a random moment of their work, the writers, or PostgreSQL if it is given (the writers then go on)."""
    prepare(url, n_slots)
    follower = Replica(url)
    process = WritingProcess(url, name, writers, operations=10**9)
    try:
        assert process.answered.wait(PATIENCE_S), "the writers never began"
        time.sleep(rng.uniform(0, 1))
        if postgres is not None:
            postgres.crash(rng)
            process.answered.clear()
            assert process.answered.wait(PATIENCE_S), "the writers never went on"
            time.sleep(rng.uniform(0, 0.1))
            process.stop()
    finally:
        process.kill()
    outcome = check(url, process.answers, n_slots)
    outcome.problems += follower.end()
    if postgres is not None:
        outcome.problems += exactly_once(url, process.answers)
    return outcome


@contextmanager
def new_sqlite() -> Iterator[str]:
    """URL of a new file."""
    with tempfile.TemporaryDirectory(prefix="genretrieval-sqlite-") as folder:
        yield f"sqlite:///{folder}/admin.db"


def admin_store_faults(
    rounds: int = 100, writers: int = 50, replicas: int = 4, operations: int = 20, seed: int = 0
) -> tuple[dict[str, Figure], list[str]]:
    """All scenarios.

    Args:
        rounds: of killed processes.
        writers: threads of a writing process.
        replicas: writing processes of a race, and replicas that follow it.
        operations: of each writer in the race.
        seed: of what is killed when.

    Returns:
        Figures, and every problem that was found in words.
    """
    rng = random.Random(seed)
    total, figures = Outcome(), {}
    binaries = PostgresCluster.binaries()
    with ExitStack() as stack:
        postgres = None if binaries is None else stack.enter_context(PostgresCluster(binaries))
        for kind in ["sqlite"] if postgres is None else ["sqlite", "postgresql"]:
            url = stack.enter_context(new_sqlite()) if postgres is None or kind == "sqlite" else postgres.database()
            outcome = race(url, writers, replicas, operations, n_slots=writers * replicas // 2)
            figures[f"faults.admin_store.race.{kind}.writers"] = Figure(writers * replicas, "threads")
            figures[f"faults.admin_store.race.{kind}.changes"] = Figure(outcome.answers, "changes")
            figures[f"faults.admin_store.race.{kind}.problems"] = Figure(len(outcome.problems), "problems")
            total.add(outcome)
        killed: Counter[str] = Counter()
        answers = 0
        for number in range(rounds):
            victim = ["sqlite_writer"] if postgres is None else ["sqlite_writer", "postgresql_writer", "postgresql"]
            chosen = victim[number % len(victim)]
            with new_sqlite() as file:
                url = file if postgres is None or chosen == "sqlite_writer" else postgres.database()
                crashed = postgres if chosen == "postgresql" else None
                outcome = kill_round(url, f"kill{number}", rng, min(writers, 8), 12, crashed)
            killed[chosen] += 1
            answers += outcome.answers
            total.add(outcome)
        figures["faults.admin_store.kill9_rounds"] = Figure(rounds, "rounds")
        for chosen, number in killed.items():
            figures[f"faults.admin_store.kill9.{chosen}"] = Figure(number, "rounds")
        figures["faults.admin_store.kill9.changes"] = Figure(answers, "changes")
    for kind in ("lost", "half", "slot"):
        number = sum(problem.startswith(kind) for problem in total.problems)
        figures[f"faults.admin_store.{kind}"] = Figure(number, "problems")
    figures["faults.admin_store.problems"] = Figure(len(total.problems), "problems")
    return figures, total.problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One writing process of a race.")
    parser.add_argument("--write", required=True, help="URL of the store.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--writers", type=int, required=True)
    parser.add_argument("--operations", type=int, required=True)
    given = parser.parse_args()
    configure_logging("warning", sys.stderr)  # standard output is answers
    write(given.write, given.name, given.writers, given.operations)
