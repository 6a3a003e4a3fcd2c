"""Cutting the vocabulary: rows of tables and their heads, the ids in configs, and tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from tiny_folder import DEGREES, LABELS, LINKS, OPENERS, SPECIAL, THINGS, WORDS, write_data, write_model
from tiny_hurry import count_speeds, hurry
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slimformer.core.anatomy import VOCABULARY_SITE
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.tokenizer_files import write_tokenizer
from slimformer.data.trimming import Splitting, compare_splits, count_pieces, script_of, trim_tokenizer
from slimformer.errors import DataError, ModelError, PlanError, RecipeError, SlimformerError
from slimformer.families.base import anatomy_of, subject_of
from slimformer.forms.kronecker import Kronecker
from slimformer.log import Log
from slimformer.methods import Distillation, Fisher, KnowledgeSparse, KroneckerFactors, Quantization
from slimformer.reporting.ledger import read_facts, read_records
from slimformer.running.bundle import Run
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.reader import parse_recipe, parse_task, read_recipe
from slimformer.running.recipe import Recipe
from slimformer.running.runner import run
from slimformer.running.search import compress
from slimformer.running.stages import advance, torch_outputs
from slimformer.running.vocabulary import choose_pieces
from slimformer.running.wanted import Wanted
from slimformer.saving import checkpoint
from slimformer.saving.checkpoint import load
from slimformer.tasks.base import Split
from slimformer.training.stage import Calibrate, Train, TrimVocabulary

# -- Tables --------------------------------------------------------------------------------------------------------------------

KEEP = (0, 1, 2, 7, 40, 98)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_gives_words_is_cut_with_the_table(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(model_type, auto_class="AutoModelForMaskedLM", tie_word_embeddings=tied)
    small = shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: KEEP}))
    ids, mask = torch.tensor([[2, 7, 98, 40]]), torch.ones(1, 4, dtype=torch.long)
    moved = torch.tensor([[KEEP.index(int(index)) for index in ids[0]]])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[..., list(KEEP)]
        assert torch.allclose(small(input_ids=moved, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
        small(input_ids=moved, attention_mask=mask, labels=moved)  # transformers' own loss asks the config for the size
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    checkpoint.save(small, Plan({VOCABULARY_SITE: KEEP}), tmp_path / "cut", tokenizer_from=tmp_path)
    loaded = checkpoint.load(tmp_path / "cut")
    assert loaded.get_output_embeddings().weight.shape[0] == loaded.config.vocab_size == len(KEEP)


def test_a_later_plan_counts_the_pieces_that_are_left() -> None:
    model = tiny("bert")
    small = shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: KEEP}))
    twice = shrink(small, anatomy_of(small), Plan({VOCABULARY_SITE: (0, 1, 3)}))
    assert torch.equal(twice.get_input_embeddings().weight, model.get_input_embeddings().weight[[0, 1, 7]])
    assert twice.config.pad_token_id == 1


def test_a_piece_that_the_config_names_cannot_go() -> None:
    model = tiny("roberta")
    with pytest.raises(PlanError, match="drops the piece 1, which config.json names as pad_token_id"):
        shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: (0, 2, 5)}))


def test_lists_of_ids_follow_and_forbidden_words_may_go() -> None:
    model = tiny("marian", eos_token_id=2)
    model.generation_config.eos_token_id = [2, 40]
    model.generation_config.bad_words_ids = [[98], [50]]
    small = shrink(model, anatomy_of(model), Plan({VOCABULARY_SITE: KEEP}))
    assert small.generation_config.eos_token_id == [2, 4]
    assert small.generation_config.bad_words_ids == [[5]]
    assert model.generation_config.bad_words_ids == [[98], [50]]


def test_a_factored_table_has_no_pieces_to_cut() -> None:
    model = tiny("bert")
    anatomy = anatomy_of(model)
    factored = shrink(model, anatomy, Plan({VOCABULARY_SITE: KEEP}, {"embeddings.word": Kronecker((6, 8))}))
    assert factored.config.vocab_size == len(KEEP)
    assert anatomy_of(factored).vocabulary is None
    with pytest.raises(PlanError, match="names the site 'vocabulary'"):
        shrink(factored, anatomy_of(factored), Plan({VOCABULARY_SITE: (0, 1)}))


def test_a_vocabulary_keeps_something() -> None:
    with pytest.raises(PlanError, match="keeps no piece"):
        Plan({VOCABULARY_SITE: ()}).check(anatomy_of(tiny("bert")))


# -- Tokenizers ----------------------------------------------------------------------------------------------------------------

SYLLABLES = ("ka", "lo", "mi", "né", "ru", "so", "ta", "vé", "bon", "der", "ing", "ти", "ка", "9", "x-")


def corpus(count: int, seed: int) -> list[str]:
    """Texts of random words of syllables."""
    draw = np.random.default_rng(seed)
    words = ["".join(draw.choice(SYLLABLES, draw.integers(1, 5))) for _ in range(60)]
    return [" ".join(draw.choice(words, draw.integers(1, 8))) for _ in range(count)]


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return trained(
        tokenizer, trainers.UnigramTrainer(vocab_size=220, special_tokens=special, unk_token="<unk>", show_progress=False)
    )


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made = trained(tokenizer, trainer)
    made.add_special_tokens(["<mask>"])
    return made


def marked_bpe(prefix: str, suffix: str) -> Tokenizer:
    marks = {"continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    options = {name: mark for name, mark in marks.items() if mark}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=["<s>", "<unk>"], show_progress=False, **options)
    return trained(tokenizer, trainer)


def byte_fallback() -> Tokenizer:
    made = json.loads(marked_bpe("", "").to_str())
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    made["model"]["byte_fallback"] = True
    size = len(made["model"]["vocab"])
    made["model"]["vocab"] |= {f"<0x{byte:02X}>": size + byte for byte in range(256)} | {"▁": size + 256}
    return Tokenizer.from_str(json.dumps(made))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([*corpus(600, 0), "qu zu"], trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": word_piece,
    "Unigram": unigram,
    "byte-level BPE": byte_bpe,
    "BPE with ends": lambda: marked_bpe("", "</w>"),
    "BPE with inner marks": lambda: marked_bpe("##", ""),
    "BPE with both": lambda: marked_bpe("##", "</w>"),
    "BPE with bytes": byte_fallback,
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_were_seen_are_split_as_before(kind: str) -> None:
    text = KINDS[kind]().to_str()
    seen = [*corpus(40, 1), "kaza ☃ q"]  # a sign that no kind but those of bytes can read, and a rare letter
    counts = count_pieces(text, seen)
    cut = trim_tokenizer(text, counts)
    before, after = Tokenizer.from_str(text), Tokenizer.from_str(cut.text)
    assert after.get_vocab_size() == len(cut.keep) < before.get_vocab_size()
    assert list(cut.keep) == sorted(set(cut.keep))
    for one in seen:
        for special in (True, False):
            old, new = (item.encode(one, one, add_special_tokens=special).ids for item in (before, after))
            assert [cut.keep[index] for index in new] == old
    assert compare_splits(text, cut, seen) == Splitting(len(seen), 0, 0, 1.0)
    other = compare_splits(text, cut, corpus(200, 2))
    assert 0 < other.otherwise <= other.texts
    assert other.longer > 1
    assert other.unreadable == 0  # its letters are those of texts that were seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_with_all_pieces_is_the_whole_tokenizer(kind: str) -> None:
    text = KINDS[kind]().to_str()
    size = Tokenizer.from_str(text).get_vocab_size()
    cut = trim_tokenizer(text, range(size))
    assert cut.keep == tuple(range(size))
    assert Tokenizer.from_str(cut.text).get_vocab() == Tokenizer.from_str(text).get_vocab()
    assert compare_splits(text, cut, corpus(50, 3)).otherwise == 0


def test_the_worst_score_of_a_unigram_stays() -> None:
    """By hand: an unknown sign counts 10 less than the worst piece. With z that is -70, and the three pieces (-58) win over vx, unknown
    and y (-90); without z it would be -30, and these three would win with -50."""
    scores = [("<unk>", 0.0), ("v", -19.0), ("x☃", -20.0), ("y", -19.0), ("vx", -1.0), ("other", -1.0), ("z", -60.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    assert tokenizer.encode("vx☃y").ids == [1, 2, 3]
    cut = trim_tokenizer(tokenizer.to_str(), [1, 2, 3, 4])
    assert cut.keep == (0, 1, 2, 3, 4, 6)
    assert Tokenizer.from_str(cut.text).encode("vx☃y").ids == [1, 2, 3]
    without = Tokenizer(models.Unigram([item for item in scores if item[0] not in ("other", "z")], unk_id=0))
    assert without.encode("vx☃y").tokens == ["vx", "☃", "y"]


def test_pieces_of_merges_are_found_by_hand() -> None:
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "cab", "ca"])}
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("ca", "b"), ("c", "a")]
    text = Tokenizer(models.BPE(vocabulary, merges)).to_str()
    cut = trim_tokenizer(text, [vocabulary["abc"]])  # b and c join first, then a
    assert set(Tokenizer.from_str(cut.text).get_vocab()) == {"a", "b", "c", "bc", "abc"}
    assert json.loads(cut.text)["model"]["merges"] == [["b", "c"], ["a", "bc"]]


def test_letters_stay_by_their_script() -> None:
    text = unigram().to_str()
    seen, every = (trim_tokenizer(text, count_pieces(text, ["kalo"]), how) for how in ("seen", "all"))
    kept = {kind: set(Tokenizer.from_str(cut.text).get_vocab()) for kind, cut in (("seen", seen), ("all", every))}
    assert {"q", "é", "9", "-"} <= kept["seen"]
    assert "т" not in kept["seen"]
    assert "т" in kept["all"]
    assert script_of("т") == "CYRILLIC"
    assert script_of("9") == ""
    lost = compare_splits(text, seen, ["kalo", "тика ru"])
    assert (lost.otherwise, lost.unreadable, lost.example) == (1, 1, "тика ru")


@pytest.mark.parametrize(
    "processor",
    [
        processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
        processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
        processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]),
        processors.Sequence([processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))]),
    ],
    ids=["bert", "roberta", "template", "sequence"],
)
def test_ids_of_special_tokens_follow(processor: Any) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"zzz": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[PAD]": 4, "good": 5, "film": 6}, "[UNK]")
    )
    tokenizer.pre_tokenizer, tokenizer.post_processor = pre_tokenizers.Whitespace(), processor
    tokenizer.enable_padding(pad_id=4, pad_token="[PAD]")
    tokenizer.add_special_tokens(["[NEW]"])
    cut = trim_tokenizer(tokenizer.to_str(), [6])
    assert cut.keep == (1, 2, 3, 4, 6, 7)
    rows = Tokenizer.from_str(cut.text).encode_batch(["film", "film good [NEW]"])
    assert [row.ids for row in rows] == [[1, 4, 2, 3, 3], [1, 4, 0, 5, 2]]


def test_a_tokenizer_that_draws_its_pieces_is_refused() -> None:
    text = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.1)).to_str()
    with pytest.raises(ModelError, match=r"leaves out merges by chance \(dropout\)"):
        trim_tokenizer(text, [2])


# -- In a recipe ---------------------------------------------------------------------------------------------------------------


def write_wordy_model(folder: Path) -> Path:
    """A BERT with the words of the data, hundreds of words that no text has, and letters, in a WordPiece; special tokens stand last."""
    words = [*OPENERS, *THINGS, *LINKS, *DEGREES, *(word for label in LABELS for word in WORDS[label])]
    idle, letters = [f"idle{number}" for number in range(300)], [chr(97 + place) for place in range(26)]
    tokens = [
        *idle[:150],
        *words,
        *idle[150:],
        *letters,
        *(f"##{letter}" for letter in letters),
        "ж",
        "##ж",
        *SPECIAL,
        "[MASK]",
    ]
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = tokens.index("[SEP]"), tokens.index("[CLS]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ends[0]), ("[CLS]", ends[1]))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    settings = {"model_max_length": 64, "tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
    sizes = {"vocab_size": len(tokens), "pad_token_id": tokens.index("[PAD]"), "num_labels": 2, "num_hidden_layers": 1}
    tiny("bert", **sizes, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordy_model(tmp_path_factory.mktemp("wordy") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=200, dev=40)


def recipe_of(model: Path, data: Path, *stages: dict[str, Any]) -> dict[str, Any]:
    task = {"use": "classification", "data": str(data)}
    bench = {"bench": {"seconds": 0.2, "rivals": [], "openvino": False}}
    return {"model": str(model), "task": task, "stages": [*stages, bench]}


@pytest.fixture(scope="module")
def delivered(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trimmed") / "out"
    run(parse_recipe(recipe_of(model, data, {"trim_vocabulary": {}})), out, wait_seconds=0)
    return out


@pytest.mark.slow
def test_a_trimmed_model_is_delivered_with_its_tokenizer(delivered: Path, model: Path) -> None:
    import transformers

    facts, records = read_facts(delivered), read_records([delivered / "ledger.jsonl"])
    assert facts is not None
    assert facts.vocabulary is not None
    words = facts.vocabulary
    assert words.pieces_of == load(model).config.vocab_size
    assert words.pieces < words.pieces_of - 280
    text = "the film was truly great"
    old = transformers.AutoTokenizer.from_pretrained(model)
    for place in ("", "onnx", "model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(delivered / place)
        assert len(tokenizer) == words.pieces
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == old.convert_ids_to_tokens(old(text).input_ids)
        assert tokenizer.pad_token_id == json.loads((delivered / place / "config.json").read_text())["pad_token_id"]
        assert not (delivered / place / "vocab.txt").exists()
    assert load(delivered).get_input_embeddings().num_embeddings == words.pieces
    assert json.loads((delivered / "config.json").read_text())["vocab_size"] == words.pieces
    teacher, ours = records[0], next(record for record in records if record.chosen)
    assert teacher.vocabulary is None
    assert teacher.params == load(model).num_parameters()
    assert ours.vocabulary == words
    assert "word pieces stay" in (delivered / "README.md").read_text()
    assert "word pieces stay" in (delivered / "report.html").read_text()
    assert read_recipe(delivered / "recipe.yaml").stages[0] == TrimVocabulary()


@pytest.mark.slow
def test_a_trimmed_teacher_answers_as_the_whole_one(model: Path, data: Path, tmp_path: Path) -> None:
    checked = preflight(parse_recipe(recipe_of(model, data)))
    state = Run(tmp_path, tmp_path, Log(tmp_path), threads=1)
    bundle, _ = prepare_bundle(checked, state)
    made = advance((TrimVocabulary(),), bundle, state).bundle
    for split in (Split.TRAIN, Split.VALIDATION):
        before, after = (torch_outputs(item.teacher, item.material, split, 99)[0]["logits"] for item in (bundle, made))
        assert np.array_equal(before, after)
    assert made.uncut.teacher is bundle.teacher
    assert made.uncut.material is bundle.material
    again = advance((TrimVocabulary(),), bundle, state).bundle  # read back from disk
    assert again.digest() == made.digest()
    assert again.vocabulary == made.vocabulary
    assert again.material.source == made.material.source
    twice = advance((TrimVocabulary(characters="all"), TrimVocabulary()), bundle, state).bundle
    assert twice.plan.keep[VOCABULARY_SITE] == made.plan.keep[VOCABULARY_SITE]
    assert twice.uncut.material is bundle.material
    thrice = advance((TrimVocabulary(characters="all"), TrimVocabulary()), bundle, state).bundle
    assert thrice.digest() == twice.digest()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"trim_vocabulary": {"at_least": 0}}], "at_least must be"),
        ([{"trim_vocabulary": {"characters": "none"}}], "characters"),
        ([{"trim_vocabulary": {"text": "missing.txt"}}], "cannot read the text"),
        ([{"calibrate": {"method": "kronecker"}}, {"trim_vocabulary": {}}], "trim first, factor after"),
        ([{"train": {"methods": ["quantization"]}}, {"trim_vocabulary": {}}], "has learned grids and ranges"),
        (
            [{"trim_vocabulary": {}}, {"train": {"augment": 1, "augment_model": "x"}}],
            "augment_model reads the ids of the whole vocabulary",
        ),
    ],
)
def test_what_cannot_be_trimmed_is_told_before_anything_starts(
    stages: list[dict[str, Any]], message: str, model: Path, data: Path
) -> None:
    with pytest.raises(SlimformerError) as caught:
        preflight(parse_recipe(recipe_of(model, data, *stages)))
    assert message in " ".join([caught.value.what, *caught.value.facts])


def test_a_training_text_that_could_no_longer_be_read_is_named(data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "words", trained=False)  # its tokenizer knows whole words alone
    with pytest.raises(
        RecipeError, match="occur 150 times or more, 160 of 160 training texts would have unknown words"
    ) as caught:
        preflight(parse_recipe(recipe_of(source, data, {"trim_vocabulary": {"at_least": 150}})))
    assert "such as: 'the" in caught.value.facts[0] or "such as: '" in caught.value.facts[0]


@pytest.mark.slow
def test_other_stages_follow_a_trim(model: Path, data: Path, tmp_path: Path) -> None:
    stages = (
        TrimVocabulary(),
        Calibrate(Fisher(keep=0.5, examples=32)),
        Train((Distillation(),), steps=2),
        Train((KnowledgeSparse(keep=0.5),), steps=2),
        Train((Quantization(),), steps=2),
    )
    bundle, _ = prepare_bundle(preflight(parse_recipe(recipe_of(model, data))), state := Run(tmp_path, tmp_path, Log(tmp_path)))
    made = advance(stages, bundle, state).bundle
    assert made.vocabulary is not None
    assert made.subject.model.config.vocab_size == made.vocabulary.pieces
    checkpoint.save(made.subject.model, made.plan, tmp_path / "cut", tokenizer_from=made.material.source, ranges=made.ranges)
    loaded = subject_of(load(tmp_path / "cut"))
    before, after = (torch_outputs(item, made.material, Split.DEV, 9)[0]["logits"] for item in (made.subject, loaded))
    assert np.array_equal(before, after)
    factors = Calibrate(KroneckerFactors(keep=0.6, embedding=8))
    factored = advance((*stages[:1], factors), bundle, state.under("factored")).bundle
    assert factored.subject.anatomy.matrices["embeddings.word"].shape[0] == made.vocabulary.pieces


def test_rare_pieces_may_go_if_their_words_can_be_split(model: Path, data: Path, tmp_path: Path) -> None:
    stage, task = TrimVocabulary(at_least=8), parse_task({"use": "classification", "data": str(data)})
    cut, split = choose_pieces(stage, task, model)
    assert 0 < split.otherwise < split.texts
    assert split.unreadable == 0
    more = tmp_path / "more.txt"
    more.write_text("idle7 was seen\n", encoding="utf-8")
    with_text, _ = choose_pieces(TrimVocabulary(text=str(more)), task, model)
    assert "idle7" in Tokenizer.from_str(with_text.text).get_vocab()
    assert "idle7" not in Tokenizer.from_str(cut.text).get_vocab()


def test_texts_in_another_script_are_told_from_those_of_the_trimmed_vocabulary(model: Path, data: Path, tmp_path: Path) -> None:
    cut, _ = choose_pieces(TrimVocabulary(), parse_task({"use": "classification", "data": str(data)}), model)
    whole = load(model)
    plan = Plan({VOCABULARY_SITE: cut.keep})
    folder = tmp_path / "trimmed"
    checkpoint.save(shrink(whole, anatomy_of(whole), plan), plan, folder, tokenizer_from=model)
    write_tokenizer(model, folder, cut.text)
    rows = "".join(f"жжж ж жж\t{LABELS[number % 2]}\n" for number in range(40))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + rows, encoding="utf-8")
    with pytest.raises(DataError, match=r"was cut to the pieces of other texts: 100% of the words .* such as 'жжж ж жж'"):
        preflight(parse_recipe(recipe_of(folder, tmp_path, {"train": {"steps": 1}})))
    preflight(parse_recipe(recipe_of(folder, data, {"train": {"steps": 1}})))


# -- compress ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compress_trims_if_it_is_asked_to(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    count_speeds(monkeypatch)
    task = parse_task({"use": "classification", "data": str(data)})
    options = {"speedup": 1.2, "max_loss": 100, "epochs": 1, "tries": 1, "rivals": (), "threads": 1, "wait_seconds": 0}
    result = compress(model, task, tmp_path / "out", vocabulary="trim", **options)
    ours = next(record for record in result.records if record.chosen)
    assert ours.vocabulary is not None
    assert ours.vocabulary.pieces < ours.vocabulary.pieces_of
    assert load(tmp_path / "out").config.vocab_size == ours.vocabulary.pieces
    assert read_recipe(tmp_path / "out" / "recipe.yaml").stages[0] == TrimVocabulary()


def test_a_choice_of_vocabulary_that_is_none_is_a_mistake(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="options cannot be used") as caught:
        compress(model, {"use": "classification", "data": str(data)}, tmp_path / "out", vocabulary="half")  # type: ignore[arg-type]
    assert "vocabulary" in caught.value.facts[0]
    assert Wanted().purpose(Recipe("a", parse_task("intents"), ())) == Wanted(vocabulary="whole").purpose(
        Recipe("a", parse_task("intents"), ())
    )
    assert "vocabulary" in Wanted(vocabulary="trim").purpose(Recipe("a", parse_task("intents"), ()))
