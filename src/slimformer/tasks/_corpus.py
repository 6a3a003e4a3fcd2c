"""The sentences of a tagger's data with their tags by name: what scheme they follow, whether they keep to it, how a model names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slimformer.data.labels import enumerate_labels, match_labels
from slimformer.data.tagged import Sentence, Tagged
from slimformer.errors import DataError, shown
from slimformer.log import remark
from slimformer.tasks._tags import OUTSIDE, Tagset, break_in, complete, has_letter, scheme_of

_MOST_TAGS = 1000  # more are no tags but another column


@dataclass(frozen=True)
class Naming:
    """How a model names the tags of the data: each type of span by its type, each tag without spans by its name."""

    target: Tagset
    types: Mapping[str, str]
    tags: Mapping[str, str]


class TagCorpus:
    """The sentences "train" and "dev", one or both of them. `labels` name tags that are numbers, if the data does not.

    DataError for tags that have no meaning, or break their scheme, unless these are to be mended (`mends`).
    """

    def __init__(self, sources: Mapping[str, Tagged], labels: Sequence[str], mends: bool) -> None:
        self.sources = sources
        self.first = sources.get("train", next(iter(sources.values())))
        self._labels = tuple(labels)
        self.tags = {kind: [self._named(source, item) for item in source.sentences] for kind, source in sources.items()}
        self._rows = self.tags.get("train", next(iter(self.tags.values())))  # what a model learns from, or is asked for
        self.used = frozenset(tag for tags in self._rows for tag in tags)
        every = sorted(self.used | {tag for rows in self.tags.values() for tags in rows for tag in tags})
        if len(every) > _MOST_TAGS:
            raise DataError(
                f"{self.first.where} has {len(every):,} different tags, so that column does not hold tags.",
                facts=[f"for instance: {enumerate_labels(every[:3])}"],
                help="name the column of the tags: --label <column>.",
            )
        self.tagset = Tagset.of(every)
        self.scheme = scheme_of(self._rows, self.tagset)
        self._unknown: dict[tuple[str, ...], list[str]] = {}
        self._check_letters()
        self._check_breaks(mends)

    def _named(self, source: Tagged, item: Sentence) -> tuple[str, ...]:
        """A sentence's tags, numbers by the names that there are for them."""
        if not all(tag.removeprefix("-").isdecimal() for tag in item.tags):
            return item.tags
        names = source.names or self.first.names or self._labels
        if not names:
            raise DataError(
                f"{source.where}: its tags are numbers, such as {item.tags[0]}, and nothing says what they mean.",
                help="name them in the order of the numbers: --labels O,B-PER,I-PER (labels: [O, B-PER, I-PER] in a recipe); a model "
                "that names its tags in config.json tells them too.",
            )
        wrong = next((place for place, tag in enumerate(item.tags) if not 0 <= int(tag) < len(names)), None)
        if wrong is not None:
            raise DataError(
                f"{source.at(item, wrong)}: the tag {item.tags[wrong]} is none of the {len(names)} that have a name.",
                facts=[f"names: {enumerate_labels(names)}"],
                help="numbers run from 0. -100 marks the pieces of a tokenizer, and here each word has a tag.",
            )
        return tuple(names[int(tag)] for tag in item.tags)

    def _check_letters(self) -> None:
        """DataError if most tags have the letter of a scheme, and some have not."""
        odd = [tag for tag in self.tagset.names if tag != OUTSIDE and not has_letter(tag)]
        if self.tagset.plain and 0 < 2 * len(odd) < len(self.tagset.names):
            raise DataError(
                f"{self.first.where}: the tag '{odd[0][:40]}' has no letter before it, and most others have one.",
                facts=[f"tags: {enumerate_labels(self.tagset.names)}"],
                help="write B-, I- (or E-, S-) before each type but O, or before none.",
            )

    def _check_breaks(self, mends: bool) -> None:
        """DataError, or a remark if they are mended, with the first tag that breaks the scheme."""
        broken = list(self._breaks()) if self.tagset.has_spans and not self.tagset.plain else []
        if not broken:
            return
        source, item, tags, place = broken[0]
        sides = tags[place - 1] if place else "the beginning", tags[place + 1] if place + 1 < len(tags) else "the end"
        begin, end = item.words[place]
        what = (
            f"{source.at(item, place)}: '{item.text[begin:end][:40]}' has the tag {tags[place]} between {' and '.join(sides)}"
        )
        if mends:
            remark(
                f"{what}, which breaks {self.scheme}; such tags, in {len(broken):,} sentences, are mended as seqeval reads them."
            )
            return
        total = sum(map(len, self.tags.values()))
        raise DataError(
            f"{what}, which breaks {self.scheme}.",
            facts=[f"sentences with such a tag: {len(broken):,} of {total:,}"],
            help="mend them in the data, or say breaks: mend (--breaks mend): such a tag then begins a span, as seqeval counts it.",
        )

    def _breaks(self) -> Iterator[tuple[Tagged, Sentence, tuple[str, ...], int]]:
        for kind, source in self.sources.items():
            for item, tags in zip(source.sentences, self.tags[kind], strict=True):
                place = break_in(tags, self.tagset, self.scheme)
                if place is not None:
                    yield source, item, tags, place

    def own_names(self) -> tuple[str, ...]:
        """The names of tags in the order of a fresh model's ids: as the data numbers them, or else in their usual order."""
        if self.used <= set(self.first.names):
            return self.first.names
        if len(self.used) < 2:
            raise DataError(
                f"{self.first.where}: every word has the tag {shown(next(iter(self.used), ''), 40)}.",
                help="a tagger needs two tags; is it the right column, and the whole file?",
            )
        return complete(sorted(self.used))

    def naming(self, names: tuple[str, ...]) -> Naming:
        """How a model with tags of these names calls those of the data; what it does not know is left out."""
        target, own = Tagset.of(names), Tagset.of(sorted(self.used))
        types = match_labels(self.tagset.types, target.types) | match_labels(own.types, target.types)
        tags = match_labels(self.tagset.names, names) | match_labels(own.names, names)
        return Naming(
            target,
            {kind: target.types[place] for kind, place in types.items()},
            {tag: names[place] for tag, place in tags.items()},
        )

    def rewritten(self, tags: Sequence[str], naming: Naming) -> tuple[str, ...]:
        """A sentence's tags as a model names them; a tag that it does not know keeps a name of its own."""
        target = naming.target
        if not (self.tagset.has_spans and target.has_spans):
            return tuple(naming.tags.get(tag, tag) for tag in tags)
        spans = [(naming.types.get(kind, kind), first, last) for kind, first, last in self.tagset.spans(tags)]
        return tuple(target.name(*part) for part in target.tags(spans, len(tags)))

    def unknown_to(self, names: tuple[str, ...]) -> list[str]:
        """Tags that a model with these names would have to learn and does not have."""
        if names not in self._unknown:
            naming = self.naming(names)
            used = {tag for tags in self._rows for tag in self.rewritten(tags, naming)}
            self._unknown[names] = sorted(used - set(names))
            renamed = [f"{kind} is {name}" for kind, name in sorted(naming.types.items()) if kind != name]
            if renamed and not self._unknown[names] and self.tagset.has_spans:
                remark(f"{self.first.where}: types of spans are read by the model's names: {', '.join(renamed[:8])}")
        return self._unknown[names]
