"""Queries with passages that a tiny model can learn to put in order: those with a good word in them come first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_folder import DEGREES, LINKS, OPENERS, THINGS, sentences, write_model


def queries(count: int, seed: int, passages: int = 5) -> list[dict[str, Any]]:
    """Rows with a query, and what is positive and negative for it."""
    draw = np.random.default_rng(seed)
    texts = [text for text, _ in sentences(2 * passages * count, seed)]
    good, bad = texts[1::2], texts[::2]
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        query = " ".join(str(draw.choice(words)) for words in (OPENERS, THINGS, LINKS, DEGREES, DEGREES))
        place = len(rows) * passages
        right = 1 + len(rows) % 2
        wrong = list(dict.fromkeys(bad[place : place + passages - right]))
        rows.setdefault(query, {"query": query, "positive": good[place : place + right], "negative": wrong})
    return list(rows.values())


def pair_rows(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as a row for each pair, with a label."""
    return [
        {"query": group["query"], "passage": text, "label": label}
        for group in groups
        for kind, label in (("negative", 0), ("positive", 1))
        for text in group[kind]
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_reranker(folder: Path, activation: str = "", version: int = 4, **changes: Any) -> Path:
    """A folder of a tiny BERT with one output, as sentence-transformers of a version writes it; plain without `activation`."""
    write_model(folder, trained=False, num_labels=1, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}, **changes)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    own = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    path = f"torch.nn.modules.{'activation' if activation == 'Sigmoid' else 'linear'}.{activation}"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if activation and version < 4:
        config["sbert_ce_default_activation_function"] = path
    elif activation and version < 6:
        config["sentence_transformers"] = {"activation_fn": path, "version": "4.1.0"}
    elif activation:
        facts = {"activation_fn": path, "model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": None}
        step = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(facts), encoding="utf-8")
        (folder / "modules.json").write_text(json.dumps([step]), encoding="utf-8")
        inner = {"text": {"method": "forward", "method_output_name": "logits"}}
        steps = {"transformer_task": "sequence-classification", "modality_config": inner, "module_output_name": "scores"}
        (folder / "sentence_bert_config.json").write_text(json.dumps(steps), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
