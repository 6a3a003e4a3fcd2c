"""A first search: the passages that share most words with a query, by TF-IDF."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_WORDS = 200_000  # of the vocabulary
_PLACES = 1 << 23  # scores that are computed at once: 32 MB


def nearest_passages(
    queries: Sequence[str], passages: Sequence[str], without: Sequence[Sequence[str]], count: int
) -> list[tuple[str, ...]]:
    """For each query at most `count` of the passages, the nearest first, but none of those in `without`. Ties go by place.

    >>> nearest_passages(["a red fox"], ["the blue whale", "red wine", "the red fox"], [["the red fox"]], 2)
    [('red wine', 'the blue whale')]
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(passages) < 2:
        return [() for _ in queries]
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=_MOST_WORDS, dtype=np.float32, token_pattern=r"(?u)\w+")
    try:
        index = vectorizer.fit_transform(passages)  # (passages, words)
    except ValueError:  # no word in any of them
        return [tuple(passage for passage in passages if passage not in own)[:count] for own in without]
    found: list[tuple[str, ...]] = []
    step = max(1, _PLACES // len(passages))
    for start in range(0, len(queries), step):
        some = vectorizer.transform(queries[start : start + step])
        scores = (some @ index.T).toarray()  # (some, passages)
        for row, own in zip(scores, without[start : start + step], strict=True):
            wanted = min(len(row), count + len(own))
            best = np.argsort(-row, kind="stable")[:wanted] if wanted > len(row) // 4 else _top(row, wanted)
            banned = set(own)
            near = [passages[place] for place in best if passages[place] not in banned]
            found.append(tuple(near[:count]))
    return found


def _top(row: object, wanted: int) -> list[int]:
    """The places of the largest numbers, the largest first, ties by place; faster than sorting all."""
    import numpy as np

    values = np.asarray(row)
    least = np.partition(values, len(values) - wanted)[len(values) - wanted]
    above = np.flatnonzero(values > least)
    level = np.flatnonzero(values == least)[: wanted - len(above)]
    places = np.concatenate([above, level])
    return [int(place) for place in places[np.lexsort((places, -values[places]))]]
