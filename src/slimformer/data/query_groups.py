"""Queries with their passages: rows of one query become a group; passages of others stand in where none are said to be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from slimformer.data.nearest import nearest_passages
from slimformer.log import remark

Row = tuple[str, str, float | None]  # query, passage, and how relevant the passage is: 0 is not at all, None is not told


@dataclass(frozen=True)
class QueryGroup:
    """A query with the passages that are ranked for it, each once; `labels`: how relevant each is, None if nobody said."""

    query: str
    passages: tuple[str, ...]
    labels: tuple[float | None, ...]
    pool: int = 0  # where other passages for it are found

    @property
    def is_judged(self) -> bool:
        """Whether an order of its passages can be right or wrong: some are more relevant than others."""
        return len({label for label in self.labels if label is not None}) > 1

    def judged_part(self) -> QueryGroup:
        """The same without the passages that nobody judged."""
        kept = [place for place, label in enumerate(self.labels) if label is not None]
        return self if len(kept) == len(self.labels) else self._with(kept)

    def at_most(self, count: int) -> QueryGroup:
        """The same with at most `count` passages: the relevant ones first (but not all places go to them), the others evenly spaced."""
        if len(self.passages) <= count:
            return self
        places = range(len(self.passages))
        first = sorted((place for place in places if self.labels[place]), key=lambda place: -(self.labels[place] or 0.0))
        first = first[: max(1, count // 2)]
        others = [place for place in places if place not in first and not self.labels[place]]
        others = others or [place for place in places if place not in first]
        step = max(1.0, len(others) / (count - len(first)))
        more = [others[int(index * step)] for index in range(min(count - len(first), len(others)))]
        return self._with(sorted({*first, *more}))

    def _with(self, places: Sequence[int]) -> QueryGroup:
        return replace(
            self,
            passages=tuple(self.passages[place] for place in places),
            labels=tuple(self.labels[place] for place in places),
        )


@dataclass(frozen=True)
class Ranking:
    """The groups of a file. `pools`: passages that stand in for wrong ones, of which the data names none; () if it does."""

    where: str
    groups: tuple[QueryGroup, ...]
    pools: tuple[tuple[str, ...], ...] = ()

    def chosen(self, places: Sequence[int], count: int) -> list[QueryGroup]:
        """Some of the groups, with at most `count` passages each, of which others stand in for wrong ones if none are named."""
        if not self.pools:
            return [self.groups[place].at_most(count) for place in places]
        of_pool: dict[int, list[int]] = {}
        for place in places:
            of_pool.setdefault(self.groups[place].pool, []).append(place)
        found: dict[int, QueryGroup] = {}
        for pool, some in of_pool.items():
            passages = self.pools[pool]
            groups = [self.groups[place].at_most(max(1, count // 2)) for place in some]
            known = [self.groups[place].passages for place in some]
            near = nearest_passages([group.query for group in groups], passages, known, count - 1)
            for place, group, others in zip(some, groups, near, strict=True):
                more = others[: count - len(group.passages)]
                found[place] = replace(group, passages=(*group.passages, *more), labels=(*group.labels, *(0.0 for _ in more)))
        return [found[place] for place in places]


def by_query(where: str, rows: Iterable[Row], pools: Mapping[str, str] | None = None) -> Ranking:
    """Rows as groups, in the order in which queries come first. `pools`: the name of the pool of each passage, if there are several.

    A passage that comes twice with a query counts once, with the higher of its labels.
    """
    found: dict[str, dict[str, float | None]] = {}
    twice = apart = 0
    for query, passage, label in rows:
        own = found.setdefault(query, {})
        if passage in own:
            twice += 1
            before = own[passage]
            apart += before != label
            label = before if label is None else label if before is None else max(before, label)
        own[passage] = label
    if twice:
        differing = f", {apart:,} of them with another label, of which the higher is taken" if apart else ""
        remark(f"{where}: {twice:,} pairs occurred before and are left out{differing}.")
    labels = [label for own in found.values() for label in own.values()]
    groups = [QueryGroup(query, tuple(own), tuple(own.values())) for query, own in found.items()]
    if any(not label for label in labels):
        return Ranking(where, tuple(groups))
    names: dict[str, int] = {}
    members: list[dict[str, None]] = []
    for place, group in enumerate(groups):
        for passage in group.passages:
            pool = names.setdefault((pools or {}).get(passage, ""), len(names))
            if pool == len(members):
                members.append({})
            members[pool][passage] = None
        groups[place] = replace(group, pool=names[(pools or {}).get(group.passages[0], "")])
    which = "the same article" if pools else "other queries, those that share most words with it,"
    remark(f"{where}: no passage is said to be wrong for its query; passages of {which} stand in.")
    return Ranking(where, tuple(groups), tuple(map(tuple, members)))
