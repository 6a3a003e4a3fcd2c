"""Decides which stages may follow which: a stage must not destroy the results of those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slimformer.methods.base import Method, Zeros
from slimformer.registry import name_of
from slimformer.training.stage import Stage, Train, TrimVocabulary, parting


def conflicts(stage: Stage, before: Sequence[Stage]) -> Iterator[str]:
    """The reasons why a stage must not follow the stages `before` it: each names the loss and a remedy."""
    earlier = [method for item in before for method in item.methods]
    factoring = next((name_of(method) for method in earlier if method.effects().factors), None)
    closing = next((name_of(method) for method in earlier if method.effects().learns_grids), None)
    uneven = next((name_of(method) for method in earlier if method.effects().uneven), None)
    sharing = next((name_of(method) for method in earlier if method.effects().shares), None)
    exits = next((name_of(method) for method in earlier if method.effects().branches), None)
    sifting = next((name_of(method) for method in earlier if method.effects().sifts), None)
    zeros = _zeros_after(before)
    if exits and (isinstance(stage, Train) or stage.methods):
        after = any(method.effects().sifts or method.effects().divides for method in stage.methods)  # they come before no exits
        remedy = "leave out one of the two" if after else f"make {exits} the last stage"
        yield f"{exits} has fitted exits to the model as it is, and this stage would change it: {remedy}"
    branching = [name_of(method) for method in stage.methods if method.effects().branches]
    if branching and isinstance(stage, Train) and stage.text is not None:
        yield f"{branching[0]} chooses and learns by labels, which texts have not: leave out text"
    apart = next((name_of(method) for method in earlier if method.effects().divides), None)
    dividing = [name_of(method) for method in stage.methods if method.effects().divides]
    if dividing and isinstance(stage, Train) and stage.text is not None:
        yield f"{dividing[0]} keeps the two texts of an input apart, and a line of text is one: leave out text"
    fixing = next((name_of(method) for method in earlier if method.effects().patterns), None)
    yield from parting(stage.methods)
    adapting = [name_of(method) for method in stage.methods if method.effects().adapts]
    if apart and (dividing or adapting):
        yield f"{apart} has divided the lower layers before: leave out {(dividing or adapting)[0]}"
    if apart and isinstance(stage, TrimVocabulary):
        yield f"{apart} may know the end of a text by the id of a piece, which trim_vocabulary would change: trim first"
    if isinstance(stage, Train) and stage.augment_model and any(isinstance(item, TrimVocabulary) for item in before):
        yield "augment_model reads the ids of the whole vocabulary, which trim_vocabulary has cut before: train first, trim after"
    table = next((name_of(method) for method in earlier if method.effects().factors_table), None)
    if isinstance(stage, TrimVocabulary) and table:
        yield f"trim_vocabulary cannot cut the word table, which {table} may have factored before: trim first, factor after"
    for method in stage.methods:
        name = name_of(method)
        if method.effects().shares and uneven and not sharing:
            yield (
                f"{name} cannot make one of layers that {uneven} has cut, or stored, each in its own way: leave out one of the two, or "
                "cut all layers alike, as layers and hidden_width do"
            )
        first = "leave out one of the two" if method.effects().uneven else None
        if sharing and method.effects().cuts and not method.effects().alike:
            yield f"{name} would cut layers differently that {sharing} has made one: {first or 'cut first, share after'}"
        if sharing and method.effects().factors:
            yield f"{name} would store layers differently that {sharing} has made one: {first or 'factor first, share after'}"
        if table and method.effects().factors_table:
            yield f"{name} stores the word table in another form, as {table} may have done before: leave the table out of one of the two"
        neither = "leave out one of the two" if method.effects().adapts or method.effects().divides else None
        if sifting and (method.effects().chooses or neither):
            remedy = neither or f"first {name}, then {sifting}"
            yield f"{name} would change layers whose attention tells {sifting} which words stay: {remedy}"
        if fixing and (method.effects().cuts or method.effects().divides or method.effects().sifts):
            remedy = neither or f"first {name}, then {fixing}"
            yield f"{name} would change what the heads see whose patterns {fixing} has set: {remedy}"
        if (sifting or apart) and method.effects().patterns:
            yield f"{name} counts the words of a whole text, and {sifting or apart} has taken some away: leave out one of the two"
        if sharing and method.effects().patterns and not (method.effects().cuts or method.effects().alike):
            yield f"{name} would make layers differ that {sharing} has made one: leave out one of the two"
        if factoring and method.effects().patterns and not method.effects().cuts:
            yield f"{name} takes queries and keys out of matrices that {factoring} has factored before: first {name}, then factor"
        if factoring and method.effects().cuts:
            yield f"{name} cannot cut what {factoring} has factored before: cut first, factor after"
        if zeros and method.effects().refills and not (sharing and method.effects().shares):
            yield (
                f"{name} gives matrices new values, and the zeros that {name_of(zeros)} left would be gone: leave out "
                "one of the two"
            )
    parts = isinstance(stage, Train) and stage.freeze not in ("encoder", "everything")
    if sharing and parts and not any(method.effects().shares for method in stage.methods):
        yield f"training would part the layers that {sharing} has made one: add {sharing} to the methods of this stage"
    if closing and not any(method.effects().learns_grids for method in stage.methods):
        yield f"{closing} has learned grids and ranges, which this stage would lose: make {closing} the last stage"
    if zeros and zeros.effects().zeros is Zeros.RESULT and stage.trains_over_zeros:
        yield f"training would fill the zeros that {name_of(zeros)} left: add keep_zeros to the methods of this stage"


def _zeros_after(stages: Sequence[Stage]) -> Method | None:
    """The method whose zeros are in the matrices after these stages."""
    found: Method | None = None
    for stage in stages:
        if stage.fills_zeros:
            found = None
        found = next((method for method in stage.methods if method.effects().zeros is not Zeros.NONE), found)
    return found


def leading_stages(stages: Sequence[Stage]) -> int:
    """How many stages of plain fine-tuning a recipe begins with."""
    return next((index for index, stage in enumerate(stages) if not stage.leading), len(stages))
