"""An exported folder small enough to check by hand: a bag of words as ONNX, its tokenizer and its config. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

# Word -> logits of (bad, good); a text's logits are the sums over its words.
WEIGHTS = {
    "[PAD]": (9.0, -9.0),
    "[UNK]": (0.0, 0.0),
    "dull": (2.0, 0.0),
    "fine": (0.0, 1.0),
    "great": (0.0, 3.0),
    "film": (0.0, 0.0),
}
LABELS = ("bad", "good")


def export(
    folder: Path, names: tuple[str, ...] = ("model.onnx",), weights: dict[str, tuple[float, float]] | None = None
) -> Path:
    """Writes the folder; padding carries a wrong weight, so that only a correct mask gives correct logits."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    table = np.array(list({**WEIGHTS, **(weights or {})}.values()), dtype=np.float32)  # (vocabulary, 2)
    shape = ["batch", "seq"]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["words"]),  # (batch, seq, 2)
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),  # (batch, seq, 1)
            helper.make_node("Mul", ["words", "wide"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),  # (batch, 2)
        ],
        "bag",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([2], dtype=np.int64), "last"),
            numpy_helper.from_array(np.array([1], dtype=np.int64), "middle"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    for name in names:
        onnx.save(model, folder / name)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WEIGHTS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "slimformer_bert",
        "architectures": ["BertForSequenceClassification"],
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: number for number, label in enumerate(LABELS)},
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def data(folder: Path) -> Path:
    """Writes train.tsv and dev.tsv: the dev split holds five sentences, of which the model above gets four right."""
    folder.mkdir(parents=True, exist_ok=True)
    dev = ["great film\tgood", "dull\tbad", "dull dull film\tbad", "fine\tgood", "fine film dull\tgood"]
    train = [line for line in dev[:4] for _ in range(20)]
    for name, lines in (("train.tsv", train), ("dev.tsv", dev)):
        (folder / name).write_text("sentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder
