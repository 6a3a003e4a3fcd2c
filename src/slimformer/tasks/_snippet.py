"""The Python that a model card shows: lines that run an exported file with onnxruntime, tokenizers and numpy alone, or in any runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

OPEN_TOKENIZER = 'tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")'
INPUT_NAMES = 'names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}'


def python_literal(text: str) -> str:
    """A Python string literal that cannot end the Markdown code block it stands in."""
    return json.dumps(text).replace("`", "\\u0060")


def open_file(file: str) -> tuple[str, ...]:
    """Lines that open a file in ONNX Runtime as `session`. Idle threads that spin would slow down whatever else runs."""
    return (
        "options = onnxruntime.SessionOptions()",
        "options.intra_op_num_threads = 2  # cores that it may use",
        'options.add_session_config_entry("session.intra_op.allow_spinning", "0")',
        f'session = onnxruntime.InferenceSession({python_literal(file)}, options, providers=["CPUExecutionProvider"])',
    )


def batch_snippet(folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int, *last: str) -> str:
    """Lines that run all texts as one batch; `last` are the lines that read the answer from `session` and `feeds`."""
    return "\n".join(
        [
            "import json, pathlib, numpy as np, onnxruntime, tokenizers",
            *_rows(folder, texts, max_length, *open_file(file)),
            "feeds = {i.name: np.array([getattr(row, names[i.name]) for row in rows], np.int64) for i in session.get_inputs()}",
            *last,
        ]
    )


def runtime_snippet(folder: Path, file: str, texts: Sequence[tuple[str, ...]], max_length: int, runtime: str) -> str:
    """Lines that run all texts as one batch in a runtime of slimformer's registry, and print the shapes of the outputs."""
    opening = f"run = open_session(pathlib.Path({python_literal(file)}), 1, {python_literal(runtime)})"
    return "\n".join(
        [
            "import pathlib, numpy as np, tokenizers",
            "from slimformer.measuring.sessions import open_session",
            *_rows(folder, texts, max_length, opening),
            "feeds = {name: np.array([getattr(row, part) for row in rows], np.int64) for name, part in names.items()}",
            "print({name: array.shape for name, array in run(feeds).items()})",
        ]
    )


def _rows(folder: Path, texts: Sequence[tuple[str, ...]], max_length: int, *opening: str) -> list[str]:
    """Lines that open the tokenizer and the file, and encode the texts as `rows`."""
    from slimformer.data.tokenizer import load_tokenizer, pad_id_of

    tokenizer = load_tokenizer(folder)
    pad = pad_id_of(tokenizer, folder)
    inputs = ", ".join(
        python_literal(text[0]) if len(text) == 1 else f"({', '.join(map(python_literal, text))})" for text in texts
    )
    return [
        OPEN_TOKENIZER,
        f"tokenizer.enable_truncation({max_length})",
        f"tokenizer.enable_padding(pad_id={pad}, pad_token={python_literal(tokenizer.id_to_token(pad) or '[PAD]')})",
        *opening,
        f"rows = tokenizer.encode_batch([{inputs}])",
        INPUT_NAMES,
    ]
