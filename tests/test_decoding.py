"""Texts are searched as transformers searches them: by hand and by trying all, and options that are not honoured are refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimformer import decoding
from slimformer.decoding import Rules, Settings, read_settings, search

START, END = 0, 1


class Toy:
    """A decoder whose scores depend on the last token alone, and on the sentence: (sentences, words, words) log probabilities."""

    def __init__(self, tables: np.ndarray) -> None:
        self.tables, self.names = tables, np.arange(len(tables))
        self.rows_run: list[int] = []

    def first(self, ids: np.ndarray) -> np.ndarray:
        return self._scores(self.names, ids)

    def next(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return self._scores(np.repeat(self.names, len(ids) // len(self.names)), ids)

    def keep(self, sentences: np.ndarray) -> None:
        self.names = self.names[sentences]

    def _scores(self, names: np.ndarray, ids: np.ndarray) -> np.ndarray:
        self.rows_run.append(len(ids))
        with np.errstate(divide="ignore"):
            return np.log(self.tables[names, ids]).astype(np.float32)


def toy(*rows: dict[int, dict[int, float]], words: int = 5) -> Toy:
    tables = np.zeros((len(rows), words, words))
    for place, row in enumerate(rows):
        for token, after in row.items():
            for word, share in after.items():
                tables[place, token, word] = share
    return Toy(tables)


def settings(**options: object) -> Settings:
    return Settings.of({"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "max_length": 6, **options})


def test_two_beams_find_what_the_greedy_search_misses() -> None:
    # 2 is likelier than 3, but what follows 3 is surer: 0.4 * 0.9 > 0.5 * 0.5 > ...
    table = {START: {2: 0.5, 3: 0.4, END: 0.1}, 2: {END: 0.5, 4: 0.5}, 3: {END: 0.9, 4: 0.1}, 4: {END: 1.0}}
    assert search(toy(table), 1, settings())[0].tolist() == [START, 2, END]
    assert search(toy(table), 1, settings(num_beams=2, length_penalty=0.0))[0].tolist() == [START, 3, END]


def test_a_length_penalty_weighs_the_sum_by_the_power_of_the_length() -> None:
    # log 0.4 = -0.916 for one token; log(0.6 * 0.6) = -1.022 for two: the mean, -0.511, is better.
    table = {START: {END: 0.4, 2: 0.6}, 2: {END: 0.6, 3: 0.4}, 3: {END: 0.5, 4: 0.5}, 4: {END: 1.0}}
    texts = {power: search(toy(table), 1, settings(num_beams=2, length_penalty=power))[0].tolist() for power in (0.0, 1.0)}
    assert texts == {0.0: [START, END], 1.0: [START, 2, END]}


@pytest.mark.parametrize("power", [0.0, 0.7, 1.5])
def test_beams_that_hold_every_text_find_the_best_of_all(power: float) -> None:
    generator = np.random.default_rng(3)
    words, longest = 4, 5
    tables = generator.dirichlet(np.ones(words), (6, words))
    chosen = settings(num_beams=words**longest, max_length=longest, length_penalty=power, early_stopping="never")
    found = search(Toy(tables), 6, chosen)
    for table, text in zip(tables, found, strict=True):
        scores = {}
        for length in range(1, longest):
            for tail in itertools.product(range(words), repeat=length):
                if END in tail[:-1] or (tail[-1] != END and length < longest - 1):
                    continue
                steps = zip((START, *tail), tail, strict=False)
                scores[START, *tail] = sum(np.log(table[before, after]) for before, after in steps) / length**power
        assert tuple(text.tolist()) == max(scores, key=lambda item: scores[item])


@pytest.mark.parametrize("beams", [1, 3])
def test_sentences_that_are_done_leave_the_batch(beams: int) -> None:
    quick = {START: {END: 0.6, 2: 0.4}, 2: {END: 0.6, 3: 0.4}, 3: {END: 0.6, 4: 0.4}, 4: {END: 1.0}}
    slow = {START: {2: 1.0}, 2: {3: 1.0}, 3: {4: 1.0}, 4: {END: 1.0}}
    both = toy(slow, quick, slow)
    texts = search(both, 3, settings(num_beams=beams, early_stopping=True))
    assert [text.tolist() for text in texts] == [[START, 2, 3, 4, END], [START, END], [START, 2, 3, 4, END]]
    assert both.rows_run[0] == 3
    assert both.rows_run[-1] == 2 * beams


def test_rules_bar_and_demand_words_by_hand() -> None:
    def after(tokens: list[int], **options: object) -> list[int]:
        """The words that may follow, of ten."""
        scores = Rules(settings(**options))(np.zeros((1, 10), np.float32), np.asarray([tokens]))
        return np.flatnonzero(np.isfinite(scores[0])).tolist()

    every = list(range(10))
    assert after([0, 5, 6, 5], no_repeat_ngram_size=2) == [word for word in every if word != 6]
    assert after([0, 5, 6, 5], no_repeat_ngram_size=1) == [1, 2, 3, 4, 7, 8, 9]
    assert after([0, 5], no_repeat_ngram_size=3) == every
    assert after([0, 5, 6], bad_words_ids=[[6, 7], [3], [END], [5, 6, 8]]) == [0, 1, 2, 4, 5, 6, 9]
    assert after([0, 5], min_length=3) == [word for word in every if word != END]
    assert after([0, 5, 6], min_length=3) == every
    assert after([0, 5], min_new_tokens=2) == [word for word in every if word != END]
    assert after([0], forced_bos_token_id=7) == [7]
    assert after([0, 7, 5, 5, 5], forced_eos_token_id=END) == [END]
    assert after([0], suppress_tokens=[4], begin_suppress_tokens=[5]) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert after([0, 3], suppress_tokens=[4], begin_suppress_tokens=[5]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    scores = Rules(settings(repetition_penalty=2.0))(np.asarray([[-1.0, 4.0, 3.0]], np.float32), np.asarray([[0, 1, 1]]))
    assert scores.tolist() == [[-2.0, 2.0, 3.0]]


@pytest.mark.parametrize(("words", "beams"), [(3, 1), (64, 2), (1000, 3), (1027, 2), (4000, 1)])
def test_the_best_words_are_those_of_a_full_sort(words: int, beams: int) -> None:
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(3 * beams, words)).astype(np.float32)
    scores[beams, words // 2 :] = -np.inf
    shift = draw.normal(size=(3 * beams, 1)).astype(np.float32)
    count = min(4, words * beams)
    values, places = decoding._best_words(scores, shift, 3, count)
    every = (scores + shift).reshape(3, -1)
    wanted = np.sort(np.argsort(-every, axis=1)[:, :count], axis=1)
    assert np.sort(places, axis=1).tolist() == wanted.tolist()
    assert values.tolist() == np.take_along_axis(every, places, 1).tolist()
    assert decoding._log_sums(scores)[:, 0] == pytest.approx(np.log(np.exp(scores).sum(axis=1)), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_sample": True}, "do_sample = True is not honoured"),
        ({"num_beam_groups": 2}, "num_beam_groups = 2 is not honoured"),
        ({"constraints": ["x"]}, "constraints = \\['x'\\] is not honoured"),
        ({"sequence_bias": [[[3], 1.0]]}, "sequence_bias"),
        ({"beams": 3}, "beams = 3 is not known here"),
        ({"num_beams": 0}, "num_beams must be a whole number from 1 on, not 0"),
        ({"max_length": 1.5}, "max_length must be a whole number"),
        ({"max_length": 99}, "more tokens than the decoder has positions \\(64\\)"),
        ({"early_stopping": "always"}, 'early_stopping must be true, false or "never"'),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"decoder_start_token_id": None}, "lack decoder_start_token_id"),
    ],
)
def test_options_that_are_not_honoured_are_refused_in_one_line(options: dict[str, object], said: str) -> None:
    base = {"decoder_start_token_id": START, "eos_token_id": END, "max_length": 6}
    with pytest.raises(ValueError, match=said) as error:
        Settings.of({**base, **options}, positions=64)
    assert "\n" not in str(error.value)


def test_options_that_change_nothing_are_taken() -> None:
    neutral = {
        "do_sample": False,
        "top_k": 50,
        "temperature": 1.0,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "constraints": None,
    }
    assert settings(**neutral) == settings()
    marian = {"bad_words_ids": [[58100]], "bos_token_id": 0, "decoder_start_token_id": 58100, "eos_token_id": 0, "num_beams": 4}
    marian |= {"forced_eos_token_id": 0, "max_length": 512, "pad_token_id": 58100, "renormalize_logits": True}
    found = Settings.of({**marian, "transformers_version": "4.32.0", "_from_model_config": True}, positions=512)
    assert (found.num_beams, found.bad_words_ids, found.eos_token_id) == (4, ((58100,),), (0,))


def test_lengths_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"decoder_start_token_id": 2, "max_position_embeddings": 16}), encoding="utf-8"
    )
    assert read_settings(tmp_path).max_length == 16  # its default is 20 tokens more, but no more than there are positions
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": 9, "num_beams": 3}), encoding="utf-8")
    found = read_settings(tmp_path)
    assert (found.max_length, found.num_beams, found.decoder_start_token_id) == (9, 3, 2)
    assert read_settings(tmp_path, max_new_tokens=4, num_beams=1).max_length == 5


def test_the_module_stands_alone(tmp_path: Path) -> None:
    source = Path(decoding.__file__).read_text(encoding="utf-8")
    (tmp_path / "decode.py").write_text(source, encoding="utf-8")
    code = (
        "import sys, decode; assert not {'torch', 'transformers', 'slimformer', 'onnxruntime'} & set(sys.modules); "
        "print(decode.decoder_beside(decode.Path('encoder_model_quantized.onnx')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "decoder_model_merged_quantized.onnx"
