"""The Python that a model card shows: lines that run an exported file with onnxruntime, tokenizers and numpy alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from slimformer.data.tokenizer import load_tokenizer, pad_id_of

OPEN_TOKENIZER = 'tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")'
INPUT_NAMES = 'names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}'


def python_literal(text: str) -> str:
    """A Python string literal that cannot end the Markdown code block it stands in."""
    return json.dumps(text).replace("`", "\\u0060")


def batch_snippet(folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int, *last: str) -> str:
    """Lines that run all texts as one batch; `last` are the lines that read the answer from `session` and `feeds`."""
    tokenizer = load_tokenizer(folder)
    pad = pad_id_of(tokenizer, folder)
    inputs = ", ".join(
        python_literal(text[0]) if len(text) == 1 else f"({', '.join(map(python_literal, text))})" for text in texts
    )
    return "\n".join(
        [
            "import json, pathlib, numpy as np, onnxruntime, tokenizers",
            OPEN_TOKENIZER,
            f"tokenizer.enable_truncation({max_length})",
            f"tokenizer.enable_padding(pad_id={pad}, pad_token={python_literal(tokenizer.id_to_token(pad) or '[PAD]')})",
            f"session = onnxruntime.InferenceSession({python_literal(file)})",
            f"rows = tokenizer.encode_batch([{inputs}])",
            INPUT_NAMES,
            "feeds = {i.name: np.array([getattr(row, names[i.name]) for row in rows]) for i in session.get_inputs()}",
            *last,
        ]
    )
