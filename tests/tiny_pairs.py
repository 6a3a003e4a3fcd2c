"""An encoder-decoder's folder as a user has it, and texts that it can learn: a tiny trained model, its tokenizer, a few hundred pairs.

The other language has a word of its own for each, in the same order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

OPENERS = {"the": "der", "this": "dieser", "my": "mein", "our": "unser"}
THINGS = {"film": "streifen", "room": "raum", "song": "schlager", "place": "platz", "meal": "imbiss", "show": "auftritt"}
LINKS = {"was": "war", "is": "ist", "seemed": "schien"}
DEGREES = {"very": "sehr", "quite": "recht", "so": "so", "truly": "wirklich"}
QUALITIES = {"dull": "matt", "cold": "kalt", "warm": "lau", "bright": "hell", "great": "toll", "poor": "arm"}
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
PAD, END = 0, 1


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences with their translations."""
    generator = np.random.default_rng(seed)

    def one(of: dict[str, str]) -> tuple[str, str]:
        return list(of.items())[int(generator.integers(len(of)))]

    rows = []
    for _ in range(count):
        opener, thing, link, quality = (one(words) for words in (OPENERS, THINGS, LINKS, QUALITIES))
        degrees = [one(DEGREES) for _ in range(int(generator.integers(0, 3)))]
        read = (opener, thing, link, *degrees, quality)
        written = (opener, thing, link, *degrees, quality)
        rows.append((" ".join(word for word, _ in read), " ".join(word for _, word in written)))
    return rows


def write_pairs(folder: Path, train: int = 300, dev: int = 40) -> Path:
    """train.en, train.de, dev.en and dev.de."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", train), ("dev", dev))):
        for side, lines in zip(("en", "de"), zip(*pairs(count, seed), strict=True), strict=True):
            (folder / f"{name}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_joint_tokenizer(folder: Path) -> Any:
    """tokenizer.json over the words of both sides, which ends each text with </s>; returns the tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    lists = (OPENERS, THINGS, LINKS, DEGREES, QUALITIES)
    words = [
        *SPECIAL,
        *dict.fromkeys([*(word for of in lists for word in of), *(word for of in lists for word in of.values())]),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    return tokenizer


def speaker(kind: str, vocabulary: int, **changes: Any) -> Any:
    """A tiny model of this type that starts with padding, as Marian does, and ends with </s>."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from slimformer.testing.tiny import tiny_config

    ids = {"vocab_size": vocabulary, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD, "dropout": 0.0}
    ids |= {"decoder_vocab_size": vocabulary} if kind == "marian" else {}
    ids |= {"bos_token_id": 3} if kind != "t5" else {"dropout_rate": 0.0}
    ids |= {"init_std": 0.1} if kind != "t5" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(tiny_config(kind, **(ids | changes)))
    model.generation_config.num_beams, model.generation_config.max_length = 2, 16
    return model


def write_speaker(folder: Path, kind: str = "marian", *, steps: int = 120, **changes: Any) -> Path:
    """A model of width 32, with two beams, that translates the sentences of `pairs` after so many steps."""
    import torch

    tokenizer = write_joint_tokenizer(folder)
    model = speaker(kind, tokenizer.get_vocab_size(), **changes)
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    read, written = (tokenizer.encode_batch(list(side)) for side in zip(*pairs(256, seed=7), strict=True))
    ids, mask = (torch.tensor([getattr(row, name) for row in read]) for name in ("ids", "attention_mask"))
    labels = torch.tensor([row.ids for row in written])
    labels[torch.tensor([row.attention_mask for row in written]) == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        some = slice(step % 4 * 64, step % 4 * 64 + 64)
        loss = model(input_ids=ids[some], attention_mask=mask[some], labels=labels[some]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return folder
