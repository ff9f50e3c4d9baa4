"""From stored admin state to the `Edits` of a request.

For every request in this order: its query is normalised; rules are matched against that and against the scenario;
synonyms are added to the query that the model reads; bound keywords are found in what was asked and in what was added.
Words are whole words as `genretrieval.keywords` understands them, so a script without spaces needs no others.
"""

from __future__ import annotations

import math
import re
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from itertools import chain

import numpy as np
import polars as pl
from ahocorasick_rs import AhoCorasick
from pydantic_core import SchemaError, SchemaValidator, core_schema

from genretrieval.edits import NO_EDITS, Boost, BoundKeyword, Edits, Pin, Rows
from genretrieval.errors import RequestError
from genretrieval.keywords import normalise, with_edges
from genretrieval.request import Filters, RetrieveRequest
from genretrieval.servable import Catalogue
from genretrieval_serving.admin.resources import (
    Alias,
    Binding,
    BlockEffect,
    BoostEffect,
    Condition,
    Fields,
    Keyword,
    KeywordFields,
    Kind,
    PinEffect,
    QueryMatch,
    Resource,
    Rule,
    RuleFields,
    Selector,
    SlotRef,
    Synonyms,
    SynonymsFields,
)
from genretrieval_serving.admin.store import Changes

# Of a pattern all counted repetitions together, as if each stood in the next. The time of a search grows with the
# pattern as it is written out; within this bound the worst that was found took 27 ms on the longest query.
MAX_REPETITIONS = 100
_REPETITION = re.compile(r"\\[xuUpP]\{[^}]*\}|\\.|\{\s*(?P<least>\d+)\s*(?:,\s*(?P<most>\d*)\s*)?\}", re.DOTALL)
_UNESCAPED = re.compile(r"\\.|[^\\]+", re.DOTALL)


def _marked(text: str) -> str:
    """`text` such that a marked text contains it where it stands as whole words."""
    return with_edges(normalise(text))


def _folded(text: str) -> str:
    """`text` without the difference of case and width alone."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _regex(pattern: str) -> SchemaValidator:
    """Rust's engine, whose time is linear in the text, by way of pydantic, which compiles a pattern once.

    Escapes stay as they are, a capital one means something else; the rest is folded as queries are.

    Raises:
        SchemaError: the pattern does not compile.
    """
    folded = _UNESCAPED.sub(lambda part: part[0] if part[0][0] == "\\" else _folded(part[0]), pattern)
    return SchemaValidator(core_schema.str_schema(pattern=folded, regex_engine="rust-regex"))


def _repetitions(pattern: str) -> int:
    counted = (found for found in _REPETITION.finditer(pattern) if found["least"])
    return math.prod(max(1, int(found["most"] or found["least"])) for found in counted)


class _Words:
    """Finds texts in a query; both are marked."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(dict.fromkeys(texts))
        self._automaton = AhoCorasick(self.texts, store_patterns=False)

    def spans(self, query: str) -> list[tuple[int, int, str]]:
        """Where each of them begins and ends, wherever one stands."""
        found = self._automaton.find_matches_as_indexes(query, overlapping=True)
        return [(start, end, self.texts[i]) for i, start, end in found]

    def found(self, query: str) -> set[str]:
        """Those that stand in it."""
        return {text for _, _, text in self.spans(query)}


class _Texts:
    """Title, brand and categories of each item, marked, from one state of a catalogue to the next.

    To mark those of a large catalogue takes a minute, so rows that are as they were keep theirs.
    """

    def __init__(self) -> None:
        self._read = pl.DataFrame()
        self._marked = pl.Series(dtype=pl.String)
        self._preparing = threading.Lock()

    def of(self, table: pl.DataFrame) -> pl.Series:
        """The text of every row of a catalogue's table."""
        read = table.select("item_id", *(name for name in ("title", "brand", "categories") if name in table.columns))
        with self._preparing:
            known = min(len(self._read), len(read)) if self._read.schema == read.schema else 0
            marked = self._marked.head(known)
            if known:
                differs = [self._read[name].head(known).ne_missing(read[name].head(known)) for name in read.columns]
                rows = np.flatnonzero(np.any(differs, axis=0))
                marked = marked.scatter(rows, _marked_rows(read[rows]))
            self._read, self._marked = read, marked.append(_marked_rows(read[known:]))
            return self._marked


def _marked_rows(table: pl.DataFrame) -> pl.Series:
    """Of every row what stands after its first column, marked."""
    again = lru_cache(maxsize=100_000)(_marked)  # brands and categories come again and again
    texts = []
    for n, (_, *row) in enumerate(table.iter_rows()):
        values = chain.from_iterable(value if isinstance(value, list) else [value] for value in row)
        texts.append("\n".join(again(str(value)) for value in values if value is not None))
        if n % 16 == 0:
            time.sleep(1e-4)  # requests go first; else each waits for whole turns of the interpreter
    return pl.Series(texts, dtype=pl.String)


class Items:
    """Items as selectors pick them, and the slots that can be bound; one for all snapshots of a catalogue."""

    def __init__(self, catalogue: Catalogue, reserved_slots: Sequence[int] = (), texts: _Texts | None = None) -> None:
        """Items of `catalogue`; `reserved_slots` is how many a level has, as its bundle's manifest says."""
        self.catalogue = catalogue
        self.reserved_slots = tuple(reserved_slots)
        self._texts = texts or _Texts()
        self._text: pl.Series | None = None

    def on(self, catalogue: Catalogue) -> Items:
        """Items of another state of the catalogue."""
        return Items(catalogue, self.reserved_slots, self._texts)

    def prepare(self) -> pl.Series:
        """Title, brand and categories of each item, marked, which text selectors look into.

        Takes a while for a large catalogue: once, and best before a selector needs it.
        """
        if self._text is None:
            self._text = self._texts.of(self.catalogue.table)
        return self._text

    def rows(self, selector: Selector) -> Rows:
        """Rows of the selected items, sorted.

        Raises:
            RequestError: a filter asks for what the catalogue does not have.
        """
        if selector.item_ids is not None:
            found = np.unique(self.catalogue.item_ids.rows_of(selector.item_ids))
            return found[found >= 0]
        selected = np.ones(len(self.catalogue.item_ids), bool)
        if selector.filters is not None:
            selected &= self.catalogue.matching(selector.filters)
        if selector.text is not None:
            selected &= self.prepare().str.contains(_marked(selector.text), literal=True).to_numpy()
        return np.flatnonzero(selected)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those that the catalogue does not have."""
        asked = list(dict.fromkeys(ids))
        return [asked[i] for i in np.flatnonzero(self.catalogue.item_ids.rows_of(asked) < 0).tolist()]

    def has_slot(self, slot: SlotRef) -> bool:
        """Whether it is a reserved slot of the bundle: the last codes of a level are."""
        if slot.level >= len(self.reserved_slots):
            return False
        size = self.catalogue.ids.codebook_sizes[slot.level]
        return size - self.reserved_slots[slot.level] <= slot.code < size

    def problems(self, resource: Fields) -> list[str]:
        """What is wrong with a resource, or with what somebody would write into one."""
        problems: list[str] = []
        match resource:
            case KeywordFields():
                problems += _word_problems("text", resource.text)
                if resource.binding is not None:
                    problems += self._selector_problems("binding.items", resource.binding.items)
                slot = resource.slot if isinstance(resource, Keyword) else None
                if slot is not None and not self.has_slot(slot):
                    problems.append(
                        f"slot: the bundle reserves no slot {slot.code} on level {slot.level}; bind the keyword again"
                    )
            case RuleFields():
                if resource.condition.query is not None:
                    problems += _match_problems(resource.condition.query)
                if isinstance(resource.effect, BoostEffect | BlockEffect):
                    problems += self._selector_problems("effect.items", resource.effect.items)
            case SynonymsFields():
                for i, term in enumerate(resource.terms):
                    problems += _word_problems(f"terms.{i}", term)
                if len({normalise(term) for term in resource.terms}) < len(resource.terms):
                    problems.append("terms: two are equal once normalised; keep one of them")
        return problems

    def _selector_problems(self, where: str, selector: Selector) -> Iterator[str]:
        if selector.text is not None:
            yield from _word_problems(f"{where}.text", selector.text)
        if selector.filters is None:
            return
        given = selector.filters
        parts = [Filters(attributes={name: values}) for name, values in given.attributes.items()]
        for part in [
            *parts,
            given.model_copy(update={"attributes": {}, "in_stock": None}),
            Filters(in_stock=given.in_stock),
        ]:
            try:
                self.catalogue.conditions(part)
            except RequestError as error:
                yield f"{where}.filters: {error}"


def _word_problems(where: str, text: str) -> Iterator[str]:
    if not any(map(str.isalnum, normalise(text))):
        yield f"{where}: {text!r} has no letter or digit; it cannot be a word"


def _match_problems(match: QueryMatch) -> Iterator[str]:
    where = "condition.query.text"
    if match.match != "regex":
        yield from _word_problems(where, match.text)
        return
    if (n := _repetitions(match.text)) > MAX_REPETITIONS:
        yield f"{where}: the counted repetitions of this regex multiply to {n}; at most {MAX_REPETITIONS} are taken"
        return
    try:
        _regex(match.text)
    except SchemaError as error:
        why = str(error).strip().splitlines()[-1].strip().removeprefix("SchemaError: ").removeprefix("error: ")
        yield f"{where}: this regex does not compile ({why}); look-around and back-references are not supported"


@dataclass(frozen=True, slots=True, eq=False)
class _BoundKeyword:
    text: str
    binding: Binding
    keyword: BoundKeyword
    settled: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    """A rule whose items are found; the text of its condition is normalised, and marked but for a regex."""

    name: str
    rule: Rule
    text: str
    regex: SchemaValidator | None
    settled: bool
    blocked: Rows = field(default_factory=lambda: NO_EDITS.blocked)
    boosts: tuple[Boost, ...] = ()
    pins: tuple[Pin, ...] = ()

    @property
    def precedence(self) -> tuple[int, str]:
        return -self.rule.priority, self.rule.id

    def finds(self, texts: Iterable[str]) -> bool:
        """Whether its regex is found in one of the texts."""
        return self.regex is not None and any(map(self.regex.isinstance_python, texts))

    def holds(self, scenario: str | None, now: datetime) -> bool:
        """Whether all holds but the condition on the query."""
        scenarios = self.rule.condition.scenarios
        return (not scenarios or scenario in scenarios) and self.rule.valid_at(now)


@dataclass(frozen=True, slots=True, eq=False)
class _Synonyms:
    """Terms by their marked text, and those of them that bring the others."""

    name: str
    terms: dict[str, str]
    bring: frozenset[str]
    settled = True


_Applied = Keyword | Rule | Synonyms
# `settled`: all its items are named and found, so that no change of the catalogue can add one.
_Compiled = _BoundKeyword | _Rule | _Synonyms


def _union(rules: tuple[_Rule, ...]) -> Rows:
    return np.unique(np.concatenate([rule.blocked for rule in rules]))


class AdminSnapshot:
    """Admin state at one revision on one catalogue, immutable. A resource that cannot be applied is left out.

    Attributes:
        items: what selectors pick from.
        revision: of the state.
        resources: those that are not deleted, by name, e.g. ``keywords/labubu``.
        broken: why a resource is left out, by its name.
    """

    def __init__(
        self,
        items: Items,
        revision: int,
        resources: dict[str, tuple[Kind, Resource]],
        compiled: dict[str, _Compiled],
        broken: dict[str, str],
    ) -> None:
        """Use `empty`, then `updated`."""
        self.items = items
        self.revision = revision
        self.resources = resources
        self.broken = broken
        self._compiled = compiled
        bound = [part for part in compiled.values() if isinstance(part, _BoundKeyword)]
        rules = [part for part in compiled.values() if isinstance(part, _Rule)]
        synonyms = [part for part in compiled.values() if isinstance(part, _Synonyms)]
        # The store keeps their texts apart; should it not, the smallest name wins, whatever the order of changes.
        self._bound = {part.text: part for part in sorted(bound, key=lambda part: part.keyword.name, reverse=True)}
        self._bound_words = _Words(self._bound)
        self._always, self._regexes = [], []
        self._exact: defaultdict[str, list[_Rule]] = defaultdict(list)
        self._contained: defaultdict[str, list[_Rule]] = defaultdict(list)
        for rule in rules:
            match rule.rule.condition:
                case Condition(query=None):
                    self._always.append(rule)
                case Condition(query=QueryMatch(match="exact")):
                    self._exact[rule.text].append(rule)
                case Condition(query=QueryMatch(match="contains")):
                    self._contained[rule.text].append(rule)
                case _:
                    self._regexes.append(rule)
        self._brought_by: defaultdict[str, list[_Synonyms]] = defaultdict(list)
        for part in synonyms:
            for text in part.bring:
                self._brought_by[text].append(part)
        self._query_words = _Words(chain(self._contained, *(part.terms for part in synonyms)))
        self._nothing = replace(NO_EDITS, revision=revision)
        # Requests carry few different sets of blocking rules: none, or those that always apply.
        self._union = lru_cache(maxsize=64)(_union)

    @classmethod
    def empty(cls, items: Items) -> AdminSnapshot:
        """Nothing bound and no rules, at revision 0."""
        return cls(items, 0, {}, {}, {})

    def updated(self, changes: Changes) -> AdminSnapshot:
        """The snapshot after `changes`; only the items of what changed are looked for."""
        if not changes.resources:  # as after each change of items, which only the audit tells of
            return self._at(changes.revision)
        return self._resolved(self.items, changes, dict(self._compiled), dict(self.broken))

    def _at(self, revision: int) -> AdminSnapshot:
        """The same state at a later revision."""
        later = copy(self)
        later.revision, later._nothing = revision, replace(NO_EDITS, revision=revision)
        return later

    def on(self, items: Items) -> AdminSnapshot:
        """The same state on another state of its catalogue; what is settled is kept, unless rows have moved."""
        rows_stay = items.catalogue.keeps_rows_of(self.items.catalogue)
        settled = {name: part for name, part in self._compiled.items() if part.settled and rows_stay}
        rest = [found for name, found in self.resources.items() if name not in settled]
        return self._resolved(items, Changes(self.revision, rest), settled, {})

    def _resolved(
        self, items: Items, changes: Changes, compiled: dict[str, _Compiled], broken: dict[str, str]
    ) -> AdminSnapshot:
        resources = dict(self.resources)
        for kind, resource in changes.resources:
            name = f"{kind}/{resource.id}"
            for known in (resources, compiled, broken):
                known.pop(name, None)
            if resource.deleted_at is not None:
                continue
            resources[name] = kind, resource
            if isinstance(resource, Alias) or not _applies(resource):
                continue
            if problems := items.problems(resource):
                broken[name] = "; ".join(problems)
                continue
            try:
                compiled[name] = _compile(name, resource, items)
            except Exception as error:  # noqa: BLE001 - no resource may keep the others from being applied
                broken[name] = f"{type(error).__name__}: {error}"
        return AdminSnapshot(items, changes.revision, resources, compiled, broken)

    def problems(self) -> list[str]:
        """What cannot hold on this catalogue: resources that are left out, and bindings all of whose ids are gone."""
        found = [f"{name}: {why}" for name, why in self.broken.items()]
        for name, part in self._compiled.items():
            if isinstance(part, _BoundKeyword) and (ids := part.binding.items.item_ids) and not len(part.keyword.rows):
                found.append(f"{name}: binding.items: the catalogue has none of the {len(ids)} items")
        return sorted(found)

    def validate(self, fields: Fields) -> None:
        """Find what is wrong with a resource before it is stored. It may select nothing.

        Raises:
            RequestError: with every problem.
        """
        if problems := self.items.problems(fields):
            raise RequestError("; ".join(problems))

    def missing(self, fields: Fields) -> list[str]:
        """Item ids that a resource names and the catalogue does not have; they may arrive."""
        return self.items.missing(_ids(fields))

    def edits(self, request: RetrieveRequest, now: datetime) -> Edits:
        """What this state changes for a request.

        Args:
            request: as it came; its query and scenario decide.
            now: bindings and rules outside of their time do not count.
        """
        query = _marked(request.query or "")
        words = self._query_words.found(query) if query else set()
        rules = self._rules(request, query, words, now)
        synonyms, added = self._synonyms(words)
        bound = self._keywords("\n".join([query, *added]), now) if query else []
        if not rules and not synonyms and not bound:
            return self._nothing
        blocking = tuple(rule for rule in rules if len(rule.blocked))
        pins: dict[int, Pin] = {}
        for pin in chain.from_iterable(rule.pins for rule in rules):
            pins.setdefault(pin.row, pin)
        return Edits(
            query=" ".join([request.query or "", *added.values()]) if added else None,
            bound=tuple(bound),
            blocked=self._union(blocking) if blocking else NO_EDITS.blocked,
            boosts=tuple(chain.from_iterable(rule.boosts for rule in rules)),
            pins=tuple(pins.values()),
            applied=(*(r.name for r in rules), *(s.name for s in synonyms), *(keyword.name for keyword in bound)),
            revision=self.revision,
        )

    def _rules(self, request: RetrieveRequest, query: str, words: set[str], now: datetime) -> list[_Rule]:
        """Rules that match, those that prevail first."""
        matched = list(self._always)
        if query:
            matched += self._exact.get(query, ())
            matched += chain.from_iterable(self._contained.get(text, ()) for text in words)
        if query and self._regexes:
            # A regex may be meant for what people type or for what that is normalised to: "shoes" is "shoe".
            typed = " ".join(_folded(request.query or "").split())
            texts = {typed, normalise(typed)}
            matched += (rule for rule in self._regexes if rule.finds(texts))
        return sorted((r for r in matched if r.holds(request.scenario, now)), key=lambda rule: rule.precedence)

    def _synonyms(self, words: set[str]) -> tuple[list[_Synonyms], dict[str, str]]:
        """Synonym sets that match, and the terms that they add, by marked text."""
        matched = {part.name: part for text in words for part in self._brought_by.get(text, ())}
        sets = [matched[name] for name in sorted(matched)]
        terms = chain.from_iterable(part.terms.items() for part in sets)
        return sets, {text: term for text, term in terms if text not in words}

    def _keywords(self, text: str, now: datetime) -> list[BoundKeyword]:
        """Keywords bound now, as they stand in a marked text; one inside of a longer one does not count."""
        found: dict[str, BoundKeyword] = {}
        covered = 0
        for _, end, word in sorted(self._bound_words.spans(text), key=lambda span: (span[0], -span[1])):
            part = self._bound[word]
            if end > covered and part.binding.valid_at(now):
                covered = end
                found.setdefault(word, part.keyword)
        return list(found.values())


def _applies(resource: _Applied) -> bool:
    """Whether it can change a request at all, now or later."""
    if isinstance(resource, Keyword):
        return resource.binding is not None and resource.slot is not None
    return resource.enabled


def _ids(fields: Fields) -> list[str]:
    """Item ids that a resource names."""
    if isinstance(fields, KeywordFields):
        return (fields.binding.items.item_ids or []) if fields.binding else []
    if isinstance(fields, RuleFields):
        if isinstance(fields.effect, PinEffect):
            return [item.item_id for item in fields.effect.items]
        return fields.effect.items.item_ids or []
    return []


def _compile(name: str, resource: _Applied, items: Items) -> _Compiled:
    """A resource without problems, its items found."""
    settled = bool(ids := _ids(resource)) and not items.missing(ids)
    if isinstance(resource, Keyword):
        assert resource.binding is not None
        assert resource.slot is not None
        rows = items.rows(resource.binding.items)
        keyword = BoundKeyword(name, resource.text, resource.slot.level, resource.slot.code, rows)
        return _BoundKeyword(_marked(resource.text), resource.binding, keyword, settled)
    if isinstance(resource, Synonyms):
        terms = {_marked(term): " ".join(term.split()) for term in resource.terms}
        return _Synonyms(name, terms, frozenset(list(terms)[: None if resource.kind == "two_way" else 1]))
    query, effect = resource.condition.query, resource.effect
    regex = _regex(query.text) if query is not None and query.match == "regex" else None
    text = _marked(query.text) if query is not None and regex is None else ""
    rule = _Rule(name, resource, text, regex, settled)
    if isinstance(effect, PinEffect):
        placed = sorted(effect.items, key=lambda item: item.position)
        rows = items.catalogue.item_ids.rows_of([item.item_id for item in placed])
        pins = [Pin(name, row, item.position - 1) for row, item in zip(rows.tolist(), placed, strict=True) if row >= 0]
        return replace(rule, pins=tuple(pins))
    rows = items.rows(effect.items)
    if isinstance(effect, BlockEffect):
        return replace(rule, blocked=rows)
    return replace(rule, boosts=(Boost(name, rows, effect.amount if effect.kind == "boost" else -effect.amount),))
