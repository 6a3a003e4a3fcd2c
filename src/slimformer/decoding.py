"""Writes texts with the ONNX files of an encoder-decoder: greedy and beam search in numpy, with the results of transformers' `generate`.

This file stands alone: it needs numpy, onnxruntime and tokenizers, and lies as `decode.py` beside the files that it runs.

    from decode import TextWriter
    write = TextWriter(".")              # a folder with encoder_model.onnx, decoder_model_merged.onnx, tokenizer.json and configs
    print(write(["A dog runs.", "Two men talk."]))

    python decode.py encoder_model.onnx < sentences.txt > translations.txt

How it searches stands in generation_config.json, as transformers reads it; `Settings` lists the options that are honoured. An option
that would change the result and is not honoured raises ValueError. Beam search follows transformers 5 (`GenerationMixin._beam_search`):
the K = `num_beams` likeliest continuations go on, those among them that end are kept apart with log p / length^length_penalty, and
a sentence is done when no running one can be better. Differences: sentences that are done leave the batch; ties go to the
smaller token, as far as they are looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # how the names of the two files begin; the rest is the same
_NONE = np.float32(-1e9)  # the score of a beam that is none, as in transformers
WORDS_AT_ONCE = 64  # words that are searched by their maximum first
ROWS_AT_ONCE = 8  # rows of scores whose exponentials are added up at once
LEAVING = 8  # sentences that are done leave the batch when they are one in so many


# -- Settings ----------------------------------------------------------------------------------------------------------------

# Options with the values that change nothing; with another one a result could not be that of transformers.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1, 1.0),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "low_memory": (False,),
    "use_mtp": (False,),
    "is_assistant": (False,),
    "max_time": (),
    "stop_strings": (),
    "constraints": (),
    "force_words_ids": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "dola_layers": (),
    "assistant_early_exit": (),
}
# Options that change no text of a search without sampling.
# fmt: off
UNREAD = frozenset((
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "bos_token_id",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size", "transformers_version", "_from_model_config", "generation_kwargs",
    "trust_remote_code",
))
# fmt: on
DEFAULT_NEW_TOKENS = 20  # of transformers, where nothing else is said


@dataclass(frozen=True)
class Settings:
    """How a text is searched, by transformers' names; `max_length` and `min_length` count the token that a decoder starts with.

    `eos_token_id` holds all tokens that end a text, `bad_words_ids` sequences that are never written. `length_penalty` is the power
    of the length that a sum of log probabilities is divided by; above 0 it favours long texts. `early_stopping`: True ends a sentence
    when it has `num_beams` texts, False when no better one is likely, "never" when none is possible.
    """

    decoder_start_token_id: int
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_beams: int = 1
    max_length: int = DEFAULT_NEW_TOKENS + 1
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    renormalize_logits: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], positions: int | None = None) -> Settings:
        """The settings that the content of a generation_config.json stands for.

        `positions`: how many tokens the decoder can write. ValueError for an option that is not honoured, and for one with a wrong value.
        """
        given = {name: value for name, value in options.items() if value is not None}
        known = {field.name for field in fields(cls)} | {"max_new_tokens", "min_new_tokens"}
        for name, value in given.items():
            if name in NEUTRAL and value not in NEUTRAL[name] and value not in ((), [], {}):
                raise ValueError(
                    f"the generation option {name} = {value!r} is not honoured: this search writes the same text every time."
                )
            if name not in known and name not in NEUTRAL and name not in UNREAD:
                raise ValueError(
                    f"the generation option {name} = {value!r} is not known here: take it out of generation_config.json."
                )
        start = given.get("decoder_start_token_id", options.get("bos_token_id"))
        if start is None:
            raise ValueError("the generation options lack decoder_start_token_id, the token that a decoder starts with.")
        longest = given.get("max_length")
        if "max_new_tokens" in given:
            longest = given["max_new_tokens"] + 1
        elif longest is None:
            longest = min(DEFAULT_NEW_TOKENS + 1, positions or DEFAULT_NEW_TOKENS + 1)
        values = {name: value for name, value in given.items() if name in known} | {
            "decoder_start_token_id": start,
            "max_length": longest,
            "min_length": max(given.get("min_length", 0), given["min_new_tokens"] + 1 if "min_new_tokens" in given else 0),
            "eos_token_id": _numbers(given.get("eos_token_id", ())),
            "bad_words_ids": tuple(tuple(words) for words in given.get("bad_words_ids", ())),
        }
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            values[name] = _numbers(values.get(name, ()))
        if isinstance(values.get("forced_eos_token_id"), list):
            values["forced_eos_token_id"] = tuple(values["forced_eos_token_id"])
        settings = cls(**{name: value for name, value in values.items() if not name.endswith("_new_tokens")})
        settings._check(positions)
        return settings

    def _check(self, positions: int | None) -> None:
        for name, least in (("num_beams", 1), ("max_length", 2), ("min_length", 0), ("no_repeat_ngram_size", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"the generation option {name} must be a whole number from {least} on, not {value!r}.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f'the generation option early_stopping must be true, false or "never", not {self.early_stopping!r}.'
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"the generation option repetition_penalty must be above 0, not {self.repetition_penalty!r}.")
        if positions is not None and self.max_length > positions + 1:
            raise ValueError(
                f"the generation option max_length = {self.max_length} asks for more tokens than the decoder has positions ({positions})."
            )


def _numbers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def read_settings(folder: Path, **options: Any) -> Settings:
    """The settings of a folder with config.json and generation_config.json; `options` go before what stands there."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file = folder / "generation_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        if said.get(name) is None:
            said[name] = config.get(name)
    if {"max_length", "max_new_tokens"} & options.keys():
        said = {name: value for name, value in said.items() if name not in ("max_length", "max_new_tokens")}
    return Settings.of({**said, **options}, positions_of(config))


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens a decoder of this config can write; None if there is no end."""
    places = config.get("max_position_embeddings")
    return places if isinstance(places, int) and "relative_attention_num_buckets" not in config else None


# -- What may come next ------------------------------------------------------------------------------------------------------


class Rules:
    """Bars words, or demands one, by the settings: what transformers calls logits processors, in its order."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        bad = [words for words in settings.bad_words_ids if words not in [(end,) for end in settings.eos_token_id]]
        self.barred = np.asarray(
            sorted({words[0] for words in bad if len(words) == 1} | set(settings.suppress_tokens)), np.int64
        )
        self.phrases = [words for words in bad if len(words) > 1]
        self.ends = np.asarray(settings.eos_token_id, np.int64)

    def __call__(self, scores: np.ndarray, tokens: np.ndarray, sure: np.ndarray | float = 0.0) -> np.ndarray:
        """Scores of all words (rows, words), changed in place, after tokens (rows, said); `sure`: that of a word without another."""
        settings, said = self.settings, tokens.shape[1]
        rows = np.arange(len(scores))
        if settings.repetition_penalty != 1.0:
            chosen = scores[rows[:, None], tokens]
            penalty = np.float32(settings.repetition_penalty)
            scores[rows[:, None], tokens] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
        size = settings.no_repeat_ngram_size
        if size and said + 1 >= size and said >= size:
            windows = np.lib.stride_tricks.sliding_window_view(tokens, size, axis=1)  # (rows, places, size)
            same = (windows[:, :, :-1] == tokens[:, None, said - size + 1 :]).all(axis=2)
            row, place = np.nonzero(same)
            scores[row, windows[row, place, -1]] = -np.inf
        if len(self.barred):
            scores[:, self.barred] = -np.inf
        for phrase in self.phrases:
            if len(phrase) <= said:
                same = (tokens[:, said - len(phrase) + 1 :] == phrase[:-1]).all(axis=1)
                scores[same, phrase[-1]] = -np.inf
        if said < settings.min_length and len(self.ends):
            scores[:, self.ends] = -np.inf
        if settings.forced_bos_token_id is not None and said == 1:
            _demand(scores, settings.forced_bos_token_id, sure)
        if settings.forced_eos_token_id is not None and said == settings.max_length - 1:
            _demand(scores, settings.forced_eos_token_id, sure)
        begin = 1 if settings.forced_bos_token_id is None else 2
        if settings.begin_suppress_tokens and said == begin:
            scores[:, list(settings.begin_suppress_tokens)] = -np.inf
        return scores

    def bars(self, said: int) -> bool:
        """Whether anything could change after so many tokens."""
        settings = self.settings
        return bool(
            settings.repetition_penalty != 1.0
            or settings.no_repeat_ngram_size
            or len(self.barred)
            or self.phrases
            or said < settings.min_length
            or (settings.begin_suppress_tokens and said <= 2)
            or (settings.forced_bos_token_id is not None and said == 1)
            or (settings.forced_eos_token_id is not None and said == settings.max_length - 1)
        )


def _demand(scores: np.ndarray, words: int | tuple[int, ...], sure: np.ndarray | float) -> None:
    scores[:] = -np.inf
    scores[:, _numbers(words)] = sure


# -- The search --------------------------------------------------------------------------------------------------------------


class Speech(Protocol):
    """A decoder that has read some sentences. Each text that it writes is a row; rows of one sentence follow one another."""

    def first(self, ids: np.ndarray) -> np.ndarray:
        """Scores of all words after the token that each sentence starts with: ids (sentences,) -> (sentences, words)."""

    def next(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Scores after one more token: row n goes on from row `rows[n]` with ids[n]: (rows, words), which the search may change."""

    def keep(self, sentences: np.ndarray) -> None:
        """Goes on with these sentences alone; `rows` of the next call count among all rows there were."""


def search(speech: Speech, sentences: int, settings: Settings) -> list[np.ndarray]:
    """The best text of each sentence: its tokens, the first and the last one included."""
    if not sentences:
        return []
    return (_greedy if settings.num_beams == 1 else _beams)(speech, sentences, settings)


def _greedy(speech: Speech, sentences: int, settings: Settings) -> list[np.ndarray]:
    rules, found = Rules(settings), {}
    open_ = np.arange(sentences)  # the sentence of each row
    tokens = np.full((sentences, 1), settings.decoder_start_token_id, np.int64)
    scores = speech.first(tokens[:, 0])
    while True:
        if rules.bars(tokens.shape[1]):
            scores = rules(scores, tokens)
        tokens = np.concatenate([tokens, scores.argmax(axis=1)[:, None]], axis=1)
        ended = _among(tokens[:, -1], settings.eos_token_id) | (tokens.shape[1] >= settings.max_length)
        found.update({int(open_[row]): tokens[row] for row in np.flatnonzero(ended)})
        rows = np.flatnonzero(~ended)
        if not len(rows):
            return [found[sentence] for sentence in range(sentences)]
        if len(rows) < len(tokens):
            speech.keep(rows)
            open_, tokens = open_[rows], tokens[rows]
        scores = speech.next(rows, tokens[:, -1])


def _beams(speech: Speech, sentences: int, settings: Settings) -> list[np.ndarray]:
    beams, power, early = settings.num_beams, settings.length_penalty, settings.early_stopping is True
    wide = max(2, 1 + len(settings.eos_token_id)) * beams  # candidates: enough to go on if all of the best end
    rules, found = Rules(settings), dict[int, np.ndarray]()
    fill = settings.pad_token_id or (settings.eos_token_id[0] if settings.eos_token_id else -1)
    names = np.arange(sentences)  # the sentence of each place in the arrays below
    running = np.full((sentences, beams, 1), settings.decoder_start_token_id, np.int64)  # tokens
    scores = np.full((sentences, beams), _NONE)  # sums of log probabilities
    scores[:, 0] = 0
    done = np.full((sentences, beams, 1), fill, np.int64)  # finished texts, the best first
    done_scores, is_done = np.full((sentences, beams), _NONE), np.zeros((sentences, beams), bool)
    lengths = np.ones((sentences, beams), np.int64)
    logits = np.repeat(speech.first(running[:, 0, 0]), beams, axis=0)  # (sentences * beams, words)
    hopeful = np.ones(sentences, bool)  # a running text may still become the best
    said = 1
    while True:
        # The likeliest continuations of all beams of a sentence.
        values, places = _candidates(logits, running.reshape(-1, said), scores, wide, rules)
        here = np.arange(len(names))[:, None]
        words = logits.shape[1]
        beam, word = places // words, places % words
        longer = np.concatenate([running[here, beam], word[:, :, None]], axis=2)  # (sentences, wide, said + 1)
        ends = _among(word, settings.eos_token_id) | (said + 1 >= settings.max_length)
        # Those that end do not go on.
        going = values + np.where(ends, _NONE, np.float32(0))
        best = _top(going, beams)
        running, scores, parents = longer[here, best], going[here, best], beam[here, best]
        # Those that end among the first K are kept if they are better than what was kept.
        ended = ends & (np.arange(wide) < beams)
        full = is_done.all(axis=1) & early
        final = values / np.float32(float(said) ** power)  # said: the tokens without the first, with this one
        final = final + np.where(full | ~hopeful, _NONE, np.float32(0))[:, None]
        final = final + np.where(ended, np.float32(0), _NONE)
        done = np.concatenate([done, np.full((*done.shape[:2], 1), fill)], axis=2)
        merged = np.concatenate([done_scores, final], axis=1)
        chosen = _top(merged, beams)
        done = np.concatenate([done, longer], axis=1)[here, chosen]
        lengths = np.concatenate([lengths, np.full((len(names), wide), said + 1)], axis=1)[here, chosen]
        is_done = np.concatenate([is_done, ended], axis=1)[here, chosen]
        done_scores = merged[here, chosen]
        said += 1
        # Whether a running text can still be better than the worst that was kept.
        ahead = settings.max_length - 1 if settings.early_stopping == "never" and power > 0 else said - 1
        possible = scores[:, :1] / np.float32(float(ahead) ** power)
        worst = np.where(is_done, done_scores.min(axis=1, keepdims=True), _NONE)
        hopeful &= (possible > worst).any(axis=1)
        settled = ~hopeful | (is_done.all(axis=1) & early)
        over = bool(settled.all() or ends.all())
        if over or settled.sum() * LEAVING >= len(names):
            for place in range(len(names)) if over else np.flatnonzero(settled):
                found[int(names[place])] = done[place, 0, : lengths[place, 0]]
            if over:
                return [found[sentence] for sentence in range(sentences)]
            rest = np.flatnonzero(~settled)
            if len(rest) < len(names):
                speech.keep(rest)
        else:
            rest = np.arange(len(names))
        rows = (
            (rest[:, None] * beams + parents[rest]).reshape(-1) if said > 2 else np.repeat(rest, beams)
        )  # the first ran alone
        names, running, scores, hopeful = names[rest], running[rest], scores[rest], hopeful[rest]
        done, done_scores, is_done, lengths = done[rest], done_scores[rest], is_done[rest], lengths[rest]
        logits = speech.next(rows, running[:, :, -1].reshape(-1))


def _candidates(
    logits: np.ndarray, tokens: np.ndarray, scores: np.ndarray, count: int, rules: Rules
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best continuations of each sentence, best first: their scores, and beam * words + word: (sentences, count) twice."""
    settings, bars = rules.settings, rules.bars(tokens.shape[1])
    penalized = bars and settings.repetition_penalty != 1.0
    normalized = bars and settings.renormalize_logits
    sums = np.zeros((len(logits), 1), np.float32) if normalized and not penalized else _log_sums(logits)
    if penalized:  # it changes log probabilities; all other rules may as well see scores
        np.subtract(logits, sums, out=logits)
        sums[:] = 0
    if bars:
        logits = rules(logits, tokens, sums)
    if normalized:
        sums = _log_sums(logits)
    values, places = _best_words(logits, scores.reshape(-1, 1) - sums, len(scores), count)
    best = np.lexsort((places, -values), axis=1)[:, :count]
    here = np.arange(len(scores))[:, None]
    return values[here, best], places[here, best]


def _log_sums(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the sum of the exponentials of each row: (rows, 1); some rows at a time, which stay in the cache."""
    top = np.maximum(logits.max(axis=1, keepdims=True), np.finfo(np.float32).min)  # of a row without a word that may follow
    sums = np.empty_like(top)
    some = np.empty_like(logits[:ROWS_AT_ONCE])
    for start in range(0, len(logits), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        shifted = np.subtract(logits[part], top[part], out=some[: len(top[part])])
        sums[part] = np.exp(shifted, out=shifted).sum(axis=1, keepdims=True)
    return np.asarray(top + np.log(np.maximum(sums, np.finfo(np.float32).tiny)), np.float32)


def _best_words(logits: np.ndarray, shift: np.ndarray, sentences: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """At least the `count` best words after the beams of each sentence: their logits + shift, and beam * words + word.

    Words are looked at in blocks: the best ones lie in the `count` blocks of a sentence with the largest maxima.
    """
    (rows, words), beams = logits.shape, len(logits) // sentences
    blocks = words // WORDS_AT_ONCE
    here, first = np.arange(sentences)[:, None], np.arange(beams)[:, None] * words  # the place of a beam's first word
    if beams * blocks <= 2 * count:
        values, places = (logits + shift).reshape(sentences, -1), np.arange(beams * words)
        best = _unordered(values, count)
        return values[here, best], places[best]
    whole = logits[:, : blocks * WORDS_AT_ONCE].reshape(rows, blocks, WORDS_AT_ONCE)
    chosen = _unordered((whole.max(axis=2) + shift).reshape(sentences, -1), count)  # (sentences, count)
    beam, block = chosen // blocks, chosen % blocks
    row = here * beams + beam
    values = (whole[row, block] + shift[row]).reshape(sentences, -1)
    places = ((beam * words + block * WORDS_AT_ONCE)[:, :, None] + np.arange(WORDS_AT_ONCE)).reshape(sentences, -1)
    rest = np.arange(blocks * WORDS_AT_ONCE, words)
    if len(rest):
        values = np.concatenate([values, (logits[:, rest] + shift).reshape(sentences, -1)], axis=1)
        places = np.concatenate(
            [places, np.broadcast_to((first + rest).reshape(1, -1), (sentences, beams * len(rest)))], axis=1
        )
    best = _unordered(values, count)
    return values[here, best], places[here, best]


def _unordered(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values of each row, in any order."""
    if count >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, -count, axis=1)[:, -count:]


def _among(words: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Which words are one of a few."""
    found = np.zeros(words.shape, bool)
    for end in ends:
        found |= words == end
    return found


def _top(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values of each row, the largest first, of equal ones the first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


# -- ONNX files --------------------------------------------------------------------------------------------------------------


class Halves:
    """The two files of an encoder-decoder, open in ONNX Runtime."""

    def __init__(self, encoder: Path, threads: int = 2, open_file: Callable[[Path, int], Any] | None = None) -> None:
        opening = open_file or _open
        self.encoder, self.decoder = opening(encoder, threads), opening(decoder_beside(encoder), threads)
        self.past = [item.name for item in self.decoder.get_inputs() if item.name.startswith("past_key_values.")]
        self.kinds = {item.name: item for item in self.decoder.get_inputs()}
        self.takes = {item.name for item in self.encoder.get_inputs()}

    def read(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> OnnxSpeech:
        """A decoder that has read these sentences: (sentences, seq) int64 twice."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = self.encoder.run(None, {name: value for name, value in feeds.items() if name in self.takes})[0]
        return OnnxSpeech(self, hidden, attention_mask)


class OnnxSpeech:
    """`Speech` by the merged decoder: keys and values of the sentences are computed once, those of the texts go round."""

    def __init__(self, halves: Halves, hidden: np.ndarray, mask: np.ndarray) -> None:
        self.halves, self.hidden, self.mask = halves, hidden, mask
        self.past: dict[str, np.ndarray] = {}  # of the texts: (rows, heads, said, size)
        self.asked: dict[str, np.ndarray] = {}  # of the sentences: (sentences, heads, tokens, size)

    def first(self, ids: np.ndarray) -> np.ndarray:
        empty = {}
        for name in self.halves.past:
            shape = [size if isinstance(size, int) else 1 for size in self.halves.kinds[name].shape]
            empty[name] = np.zeros((0, shape[1], 0, shape[3]), np.float32)
        logits, got = self._run(ids, empty, self.halves.past, again=False)
        self.past = {name: value for name, value in got.items() if ".decoder." in name}
        self.asked = {name: value for name, value in got.items() if ".encoder." in name}
        return logits

    def next(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        past = self.past
        if len(rows) != len(next(iter(past.values()))) or (rows != np.arange(len(rows))).any():
            past = {name: value[rows] for name, value in past.items()}
        logits, self.past = self._run(ids, {**past, **self.asked}, list(past), again=True)
        return logits

    def keep(self, sentences: np.ndarray) -> None:
        self.hidden, self.mask = self.hidden[sentences], self.mask[sentences]
        self.asked = {name: value[sentences] for name, value in self.asked.items()}

    def _run(
        self, ids: np.ndarray, past: Mapping[str, np.ndarray], wanted: Sequence[str], again: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The scores of all words (rows, words), and the new values of the `wanted` inputs."""
        feeds = {
            "input_ids": ids[:, None],
            "encoder_attention_mask": self.mask,
            "encoder_hidden_states": self.hidden,
            "use_cache_branch": np.asarray([again]),
            **past,
        }
        present = [name.replace("past_key_values.", "present.") for name in wanted]
        logits, *values = self.halves.decoder.run(["logits", *present], feeds)
        return np.asarray(logits[:, -1]), dict(zip(wanted, values, strict=True))


def decoder_beside(encoder: Path) -> Path:
    """The decoder that belongs to an encoder: encoder_model_quantized.onnx -> decoder_model_merged_quantized.onnx."""
    return encoder.with_name(encoder.name.replace(ENCODER, DECODER, 1))


def _open(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that spin slow down whoever runs next
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


# -- Texts -------------------------------------------------------------------------------------------------------------------


class TextWriter:
    """Writes a text for each text, with the files of a folder.

    `file` names the encoder: `encoder_model_quantized.onnx` for int8. `options` go before those of generation_config.json:
    `num_beams=5`. `prefix` is put before each text, as T5 wants it. Texts longer than `max_input` tokens are cut off.
    """

    def __init__(
        self,
        folder: str | Path = ".",
        file: str = f"{ENCODER}.onnx",
        *,
        threads: int = 2,
        prefix: str = "",
        max_input: int | None = None,
        **options: Any,
    ) -> None:
        import tokenizers

        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.settings, self.prefix = read_settings(folder, **options), prefix
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        longest = max_input or positions_of(config) or 512
        self.tokenizer.enable_truncation(longest)
        self.pair = Halves(folder / file, threads)

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> list[str]:
        """A text for each of `texts`; they are run in batches, sorted by length."""
        rows = [row.ids for row in self.tokenizer.encode_batch([self.prefix + text for text in texts])]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        found: dict[int, str] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts_of = write_batch(
                self.pair, self.settings, self.tokenizer, *padded([rows[row] for row in chosen], self.settings)
            )
            found.update(zip(chosen, texts_of, strict=True))
        return [found[row] for row in range(len(rows))]


def padded(rows: Sequence[Sequence[int]], settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as one array with padding on the right, and its mask: (rows, longest) int64 twice."""
    longest = max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))
    ids = np.full((len(rows), longest), settings.pad_token_id or 0, np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    return ids, mask


def write_batch(pair: Halves, settings: Settings, tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """A text for each row of tokens, without special tokens."""
    found = search(pair.read(ids, mask), len(ids), settings)
    return [str(text) for text in tokenizer.decode_batch([row.tolist() for row in found], skip_special_tokens=True)]


def write_lines(arguments: Sequence[str]) -> None:
    """Reads lines, writes lines: python decode.py [encoder_model.onnx]."""
    file = Path(arguments[0]) if arguments else Path(f"{ENCODER}.onnx")
    lines = [line.rstrip("\n") for line in sys.stdin]
    for text in TextWriter(file.parent, file.name)(lines):
        print(text.replace("\n", " "))


if __name__ == "__main__":
    write_lines(sys.argv[1:])
