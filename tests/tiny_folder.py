"""A model folder as a user has it, and data that it can learn: a tiny trained BERT, its tokenizer, and a few hundred sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LABELS = ("bad", "good")
OPENERS = ("the", "this", "a", "my", "their", "our")
THINGS = ("film", "room", "meal", "story", "phone", "show", "song", "place")
LINKS = ("was", "is", "seemed", "looked", "felt")
DEGREES = ("very", "quite", "rather", "so", "truly", "simply")
WORDS = {
    "bad": ("dull", "awful", "boring", "cold", "broken", "sad", "weak", "poor"),
    "good": ("great", "fine", "lovely", "warm", "bright", "happy", "strong", "rich"),
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_REFUSE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def refusing(*packages: str) -> str:
    """Lines of Python after which none of these packages can be imported."""
    return _REFUSE.format(refused=set(packages))


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences with their labels: the one word of WORDS in each decides."""
    generator = np.random.default_rng(seed)

    def one(of: tuple[str, ...]) -> str:
        return of[int(generator.integers(len(of)))]

    rows = []
    for number in range(count):
        label = LABELS[number % 2]
        degrees = [one(DEGREES) for _ in range(int(generator.integers(0, 9)))]
        rows.append((" ".join([one(OPENERS), one(THINGS), one(LINKS), *degrees, one(WORDS[label])]), label))
    return rows


def write_data(folder: Path, train: int = 400, dev: int = 60) -> Path:
    """train.tsv and dev.tsv with the columns sentence and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", train), ("dev", dev))):
        lines = ["sentence\tlabel", *("\t".join(row) for row in sentences(count, seed))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> Any:
    """tokenizer.json over the words of the data, with the special tokens of BERT; returns the tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL, *OPENERS, *THINGS, *LINKS, *DEGREES, *(word for label in LABELS for word in WORDS[label])]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )
    return tokenizer


def write_pieces(folder: Path) -> Any:
    """The same as a WordPiece in lower case: the words, and letters to split others into."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = write_tokenizer(folder)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    known = dict.fromkeys([*sorted(words.get_vocab(), key=words.token_to_id), *letters, *(f"##{letter}" for letter in letters)])
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = words.post_processor
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_model(
    folder: Path, *, trained: bool = True, bare: bool = False, words: Callable[[Path], Any] = write_tokenizer, **changes: Any
) -> Path:
    """A BERT of hidden size 32 that tells LABELS apart (if `trained`), or only its encoder without a head (if `bare`).

    `words` writes its tokenizer.
    """
    import torch

    from slimformer.testing.tiny import tiny

    tokenizer = words(folder)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
    shape = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 0, "num_labels": 2, "hidden_dropout_prob": 0.0}
    model = tiny("bert", **(shape | {"attention_probs_dropout_prob": 0.0} | names | changes))
    if trained:
        tokenizer.enable_padding(pad_id=0)
        rows = sentences(256, seed=7)
        encoded = tokenizer.encode_batch([text for text, _ in rows])
        ids = torch.tensor([row.ids for row in encoded])
        mask = torch.tensor([row.attention_mask for row in encoded])
        labels = torch.tensor([LABELS.index(label) for _, label in rows])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(40):
            some = slice(step % 4 * 64, step % 4 * 64 + 64)
            loss = model(input_ids=ids[some], attention_mask=mask[some], labels=labels[some]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    (model.eval().base_model if bare else model.eval()).save_pretrained(folder)
    return folder


def write_home(folder: Path) -> Path:
    """A folder with a trained `model` and little `data` for it."""
    write_model(folder / "model")
    write_data(folder / "data", train=80, dev=40)
    return folder


def recipe_in(home: Path, *stages: Any) -> Any:
    """A recipe for what `write_home` wrote, with a short bench and no rivals."""
    from slimformer.running.recipe import Bench, Recipe
    from slimformer.tasks.classification import Classification

    return Recipe(str(home / "model"), Classification(data=str(home / "data")), stages, bench=Bench(rivals=(), seconds=0.3))


TUNED_AND_CUT: list[dict[str, Any]] = [  # the stages of a run from an encoder to files
    {"train": {"epochs": 8, "lr": 3e-3}},
    {"calibrate": {"method": {"use": "fisher", "keep": 0.7}}},
    {"train": {"epochs": 1, "lr": 1e-3, "task_weight": 0.1, "methods": [{"use": "distillation"}]}},
]


def run_quickly(model: Path, task: dict[str, Any], stages: list[dict[str, Any]], out: Path) -> None:
    """Runs stages on a model, then exports and measures what is left; any loss is allowed, and no quiet machine is waited for."""
    import slimformer

    ending = [{"export": {"choose_within": 100.0}}, {"bench": {"seconds": 0.2, "rivals": []}}]
    slimformer.run({"model": str(model), "task": task, "stages": [*stages, *ending]}, out, threads=1, wait_seconds=0)


PRIVATE = {"ledger.jsonl", "report.html", "log.jsonl", "changed.jsonl", ".lock", ".slimformer"}


def kept_from_others(out: Path) -> set[str]:
    """Files of a result that `push_to_hub` leaves out, but for those that it should."""
    from slimformer import Result

    there = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    there = {name for name in there if not name.startswith("given")}  # the model and the data that the run was given
    return there - {file.relative_to(out).as_posix() for file in Result.read(out).shipped_files()} - PRIVATE
