"""The texts that a teacher writes for the training rows: made once, by beam search, and kept on disk.

Paper: Kim and Rush: Sequence-Level Knowledge Distillation (EMNLP 2016), section 3.2: the student is trained on what the teacher's
beam search finds, instead of on the data's own texts. Differs: tokens are kept as the teacher wrote them and are not spelled out in
between, so that they are the same for a student with the same vocabulary. A text that is as long as it may be ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimformer.data.batching import collate, sorted_by_length
from slimformer.data.material import features_digest
from slimformer.digests import digest
from slimformer.errors import ModelError
from slimformer.families.base import Subject
from slimformer.files import remembered
from slimformer.log import Log
from slimformer.saving.tensors import model_digest
from slimformer.tasks.base import Features

AT_ONCE = 64  # rows that are written at a time, from short ones to long ones
FILE_BATCHES = 8  # batches of a file: a run that is killed loses no more than these


def written_by(teacher: Subject, features: Features, longest: int, folder: Path, log: Log) -> Features:
    """The rows with the texts that the teacher writes for them, with the beams of its own generation config.

    Args:
        teacher: An encoder-decoder with a generation config.
        features: Rows of a task that writes texts.
        longest: Tokens that a text may have, its end included.
        folder: Where the texts are kept, under a name of all that they depend on.
        log: Gets the progress.

    Returns:
        The same rows, with other `labels` and `decoder_input_ids`.

    Raises:
        ModelError: The teacher does not say with which token a text ends.
    """
    config, end = _config(teacher, longest)
    key = digest(model_digest(teacher.model), features_digest(features, ("input_ids",)), config.to_json_string())
    batches = sorted_by_length(features.lengths(), AT_ONCE)
    texts: list[list[int]] = [[] for _ in range(len(features))]
    with log.track("the teacher writes", len(features)) as advance, teacher.evaluating():
        done = 0
        for start in range(0, len(batches), FILE_BATCHES):
            some = batches[start : start + FILE_BATCHES]
            file = folder / f"written-{key}" / f"{start // FILE_BATCHES:05}.json"
            part = remembered(file, partial(_write_all, teacher, features, some, config, end), list[list[list[int]]])
            for rows, written in zip(some, part, strict=True):
                for row, text in zip(rows, written, strict=True):
                    texts[row] = text
                done += len(rows)
            advance(done)
    first = int(config.decoder_start_token_id)
    columns = {
        **features.columns,
        "labels": [np.asarray(text, dtype=np.int32) for text in texts],
        "decoder_input_ids": [np.asarray([first, *text[:-1]], dtype=np.int32) for text in texts],
    }
    return replace(features, columns=columns)


def _config(teacher: Subject, longest: int) -> tuple[Any, int]:
    """The teacher's generation config for texts of at most `longest` tokens, and the token that ends one."""
    import copy

    config = copy.deepcopy(teacher.model.generation_config)
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    start = getattr(teacher.model.config, "decoder_start_token_id", None)
    if not isinstance(end, int):
        raise ModelError(
            "the teacher's generation config does not say with which token a text ends.",
            help="write eos_token_id into its generation_config.json.",
        )
    config.decoder_start_token_id = config.decoder_start_token_id if isinstance(config.decoder_start_token_id, int) else start
    config.max_length, config.max_new_tokens = longest + 1, None  # the token that a decoder starts with is counted
    config.do_sample, config.num_return_sequences, config.return_dict_in_generate = False, 1, False
    return config, end


def _write_all(teacher: Subject, features: Features, batches: list[list[int]], config: Any, end: int) -> list[list[list[int]]]:
    return [_write(teacher, features, rows, config, end) for rows in batches]


def _write(teacher: Subject, features: Features, rows: list[int], config: Any, end: int) -> list[list[int]]:
    """What the teacher writes for these rows, up to the end of each and with it."""
    columns = collate(features, rows, ("input_ids", "attention_mask"))
    given: Mapping[str, torch.Tensor] = {name: torch.from_numpy(column).to(teacher.device) for name, column in columns.items()}
    with torch.no_grad():
        written = teacher.model.generate(**given, generation_config=config)[:, 1:].tolist()  # type: ignore[operator]
    found = []
    for text in written:
        whole = text[: text.index(end)] if end in text else text[:-1]
        found.append([*whole, end])
    return found
