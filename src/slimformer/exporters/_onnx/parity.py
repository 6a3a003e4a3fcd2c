"""Parity: runs a file on the batches that it was made with, and compares its outputs with the model's.

A float file must give the model's numbers; an int8 file must give its answers on most rows. A file that does neither is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from slimformer.core.deciding import answers_apart
from slimformer.core.pooling import SENTENCE_VECTOR, TOKEN_VECTORS
from slimformer.errors import ExportError, ModelError
from slimformer.exporters.base import Arrays
from slimformer.families.base import Subject

FILLING = {"attention_mask": 1}  # the value of an input that a batch lacks; 0 for all others
NEAR_VECTOR = 0.95  # the cosine to the model's vector from which a row counts as answered as before
REPORT = "this is a fault of the exporter or of a package it stands on; please report it with the model's config.json."

GraphOutputs = Mapping[str, np.ndarray]


def fill_inputs(names: Sequence[str], batch: Arrays) -> dict[str, np.ndarray]:
    """The model's inputs of a batch; as in transformers, missing token_type_ids are zeros and a missing mask is ones."""
    ids = np.asarray(batch["input_ids"])
    return {name: np.asarray(batch.get(name, np.full_like(ids, FILLING.get(name, 0))), dtype=np.int64) for name in names}


def exit_output(layer: str) -> str:
    """The name of the output of an exit, in a graph that does not stop and among the model's outputs."""
    return f"exit.{layer}"


def real_tokens(batch: Arrays) -> np.ndarray:
    """Which tokens of a batch are no padding: (batch, seq)."""
    return fill_inputs(("attention_mask",), batch)["attention_mask"] == 1


def run_model(subject: Subject, batch: Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The named outputs of the PyTorch model on a batch; of a model with exits what its end says, and what each exit says."""
    with torch.no_grad(), answers_apart(subject.model) as said:
        result = subject.model(**subject.feed(fill_inputs(subject.inputs, batch)), return_dict=True)
        every = {name: result[name] for name in outputs} | {exit_output(layer): logits for layer, logits in said().items()}
    return {name: value.float().cpu().numpy() for name, value in every.items()}


def run_graph(session: Any, names: Sequence[str], batch: Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The named outputs of a session on a batch."""
    return dict(zip(outputs, session.run(list(outputs), fill_inputs(names, batch)), strict=True))


def check_finite(reference: Sequence[GraphOutputs]) -> None:
    """ModelError if the model's own outputs are not finite."""
    for expected in reference:
        strange = next((name for name, value in expected.items() if not np.isfinite(value).all()), None)
        if strange is not None:
            raise ModelError(
                f"the model itself gives no finite '{strange}' (NaN or infinity) on real examples, before anything is exported.",
                help="its weights are damaged or its training diverged: train it again with a lower learning rate, or copy it again.",
            )


def check_parity(
    session: Any,
    variant: str,
    batches: Sequence[Arrays],
    names: Sequence[str],
    reference: Sequence[GraphOutputs],
    *,
    tolerance: float | None,
    agreement: float,
) -> tuple[float, float]:
    """The largest difference over all outputs, and the share of answers that are the same: one for each row, or for each token.

    ModelError if the model's own outputs are not finite. ExportError if an output has another shape or is not finite; if a number
    differs by more than `tolerance` of the largest output; or, with no tolerance, if the share of answers is below `agreement`.
    """
    outputs = list(reference[0])
    answers = answers_in(outputs)
    check_finite(reference)
    worst, worst_shape, agreeing, rows, kind = 0.0, (0, 0), 0, 0, "rows"
    top = max(float(np.abs(item[name]).max()) for item in reference for name in answers)
    pairs = list(zip(batches, reference, strict=True))
    per_token = {name for name in outputs if all(item[name].shape == batch["input_ids"].shape for batch, item in pairs)}
    for batch, expected in pairs:
        got: GraphOutputs = run_graph(session, names, batch, outputs)
        for name in outputs:
            if got[name].shape != expected[name].shape or not np.isfinite(got[name]).all():
                raise ExportError(
                    f"the {variant} file gives no finite '{name}' of shape {expected[name].shape}.",
                    facts=[f"shape: {got[name].shape}"],
                    help=REPORT,
                )
            gaps = np.abs(got[name] - expected[name])
            if name in per_token or (gaps.ndim == 3 and gaps.shape[:2] == batch["input_ids"].shape):
                gaps = gaps[real_tokens(batch)]  # what stands at padding is read by no one
            difference = float(gaps.max(initial=0.0))
            if name not in answers:  # as a share of the largest one, where an answer differs by a share of the largest answer
                difference *= max(1.0, top) / max(1.0, float(np.abs(expected[name]).max()))
            if difference > worst:
                worst, worst_shape = difference, batch["input_ids"].shape
        if per_token:
            got, expected = ({**item, **unpad(item, per_token, batch)} for item in (got, expected))
        same = np.logical_and.reduce(
            [
                near(got[name], expected[name]) if name == SENTENCE_VECTOR else agree(got[name], expected[name], top)
                for name in answers
            ]
        )
        if same.ndim > 1:  # an answer for each token
            same, kind = same[real_tokens(batch)], "tokens"
        agreeing += int(same.sum())
        rows += same.size
    share = agreeing / rows
    if tolerance is None and share < agreement:
        raise ExportError(
            f"the {variant} file answers as the model does on {share:.1%} of {rows} {kind} only.",
            facts=[f"least allowed: {agreement:.0%}", f"largest difference: {worst:.3g} of {top:.3g}"],
            help="this CPU may saturate int8 sums: try weight_bits=7 (export: {reduce_range: true}); or ship the fp32 file.",
        )
    if tolerance is not None and worst > tolerance * max(1.0, top):
        raise ExportError(
            f"the {variant} file differs from the model by {worst:.2g} on a batch of {worst_shape[0]} x {worst_shape[1]}.",
            facts=[f"allowed: {tolerance * max(1.0, top):.2g}", f"largest output: {top:.3g}"],
            help=REPORT,
        )
    return worst, share


def squared_error(session: Any, batches: Sequence[Arrays], names: Sequence[str], reference: Sequence[GraphOutputs]) -> float:
    """Squared error of a session's outputs, as a share of the squared outputs of the model; only finite outputs count."""
    wrong = square = 0.0
    for batch, expected in zip(batches, reference, strict=True):
        for name, value in run_graph(session, names, batch, answers_in(expected)).items():
            real = np.isfinite(expected[name])
            wrong += float(np.square(value[real] - expected[name][real]).sum())
            square += float(np.square(expected[name][real]).sum())
    return wrong / max(square, 1e-12)


def answers_in(outputs: Collection[str]) -> list[str]:
    """The outputs that say what the model answers, not what its answer is made of.

    >>> answers_in(["sentence_embedding", "last_hidden_state"]), answers_in(["last_hidden_state"])
    (['sentence_embedding'], ['last_hidden_state'])
    """
    return [name for name in outputs if name != TOKEN_VECTORS or SENTENCE_VECTOR not in outputs]


def unpad(outputs: GraphOutputs, names: Iterable[str], batch: Arrays) -> dict[str, np.ndarray]:
    """Outputs with one value per token, with padding as the last thing that an answer could be."""
    real = real_tokens(batch)
    return {name: np.where(real, outputs[name], -np.inf) for name in names}


def near(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Rows whose vectors point the same way, (rows,): with a cosine of NEAR_VECTOR or more."""
    lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1)
    return np.asarray((got * expected).sum(-1) >= NEAR_VECTOR * lengths)


def agree(got: np.ndarray, expected: np.ndarray, top: float) -> np.ndarray:
    """Rows with the same answer, (rows,), or tokens, (rows, tokens). Near ties, within a tenth of the largest output, are the same."""
    if expected.shape[-1] == 1:
        return np.asarray(np.abs(got - expected).max(axis=-1) <= 0.1 * top)
    chosen = np.take_along_axis(expected, got.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    return np.asarray(expected.max(axis=-1) - chosen <= 0.1 * top)
