"""Makes a student of any kind from its teacher, before anything trains it: what can be taken over is.

The tokenizer is the teacher's, or has a smaller vocabulary, trained on the texts of the task: a piece that the teacher knows then begins
with the teacher's row of it, and any other with the mean of the rows that it is made of.

A transformer of the teacher's type takes its tensors of equal shape, from layers spread evenly over the teacher's (Turc et al. 2019 and
DistilBERT begin so), and its tables in the directions in which the word table varies most. Any other student gets word vectors:
`static` what the teacher makes of each word piece alone, reduced by PCA and weighed by how rare the piece is, as model2vec does;
`bilstm`, `cnn` and `mobilebert` the teacher's word table, reduced in the same way. No layer of a teacher fits between the
bottlenecks of the last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slimformer.data.retraining import check_retrainable, descent, retrain_tokenizer, shared_pieces
from slimformer.data.tokenizer import cutting, load_tokenizer, max_length_of, pad_id_of
from slimformer.data.tokenizer_files import named_tokens, parsed_tokenizer, tokenizer_text, write_tokenizer
from slimformer.data.trimming import count_pieces
from slimformer.errors import ModelError, RecipeError
from slimformer.families.base import Subject, family_of, subject_of
from slimformer.hooks.capture import Capture
from slimformer.methods.distillation import Distillation, partners
from slimformer.methods.shared_projections import directions, inherited
from slimformer.registry import name_of
from slimformer.running.readings import refuse_strange_ids
from slimformer.saving import checkpoint
from slimformer.saving.building import without_bars
from slimformer.saving.heads import parts_for
from slimformer.tasks.base import Split, Task
from slimformer.training.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

FOLLOWS = ("num_labels", "id2label", "label2id", "problem_type", "architectures", "model_type", "slimformer")  # not taken over
RARE = 1e-3  # the constant a of a piece's weight a / (a + share): Arora et al. 2017, section 3, try 1e-3 to 1e-4
WORD_SIZE = 0.3  # root mean square of the numbers in a new word table
_PIECES_AT_ONCE = 1024
_log = logging.getLogger(__name__)


def check_student(use: str, teacher: Path, task: Task, stages: Sequence[Stage], vocabulary: int | None = None) -> None:
    """RecipeError or ModelError if no such student can be made for the task, or if a stage asks for what it has not."""
    family, theirs = family_of(use), checkpoint.base_type(checkpoint.read_config(teacher))
    if family.classes == "transformers" and use != theirs and not family.any_teacher:
        raise RecipeError(
            f"model: a student of the type {use} cannot read what its teacher reads, which is a {theirs}.",
            help=f"say use: {theirs}, or mobilebert, static, bilstm or cnn, which take any teacher's tokenizer.",
        )
    if parts_for(task.auto_class, use) is None:
        raise RecipeError(
            f"model: a {use} student gives one answer for a text, and the task {name_of(task)} needs another.",
            help=f"say use: {theirs}, with a smaller config.",
        )
    if family.classes != "transformers":
        check_stages(use, stages)
    if vocabulary is not None:
        check_retrainable(tokenizer_text(teacher))
        refuse_strange_ids(task, stages)


def refuse_student(folder: Path) -> None:
    """ModelError for a model without layers, where some are to be cut."""
    kind = checkpoint.base_type(checkpoint.read_config(folder))
    if family_of(kind).classes != "transformers":
        raise ModelError(
            f"{folder} is a {kind} student, which has no layers to cut.",
            help="compress its teacher, or put what a student allows into a recipe: trim_vocabulary, distillation, quantization.",
        )


def check_stages(kind: str, stages: Sequence[Stage]) -> None:
    """RecipeError if a method looks at layers, or cuts them, and a model of this kind has none."""
    facts = []
    for number, stage in enumerate(stages):
        for method in stage.methods:
            effects, where = method.effects(), f"stages[{number}]: {name_of(method)}"
            seen = sorted(effects.needs - {Capture.LOGITS})
            if seen and isinstance(method, Distillation):
                facts.append(f"{where} compares {' and '.join(seen)}: set hidden: 0, and leave out its other terms but logits")
            elif (
                seen
                or effects.chooses
                or effects.shares
                or (effects.decides and not effects.learns_grids)
                or not effects.neutral
            ):
                facts.append(f"{where} works on layers: leave it out")
    if facts:
        raise RecipeError(f"a {kind} student has no layers.", facts=facts, help="distillation with hidden: 0 teaches it.")


def write_student(
    use: str,
    config: Mapping[str, Any],
    task: Task,
    teacher: Path,
    seed: int,
    folder: Path,
    stages: Sequence[Stage] = (),
    *,
    vocabulary: int | None = None,
) -> None:
    """Writes config, weights and tokenizer of a student without a head into a folder that is there.

    `vocabulary`: so many word pieces, trained on the texts of the task, in the place of the teacher's. RecipeError or ModelError if it
    cannot be made: see `check_student`; also if the sizes do not fit each other. DataError if the texts give no such vocabulary.
    """
    import torch
    import transformers

    check_student(use, teacher, task, stages, vocabulary)
    guide = subject_of(checkpoint.load_folder(teacher))
    if guide.anatomy.vocabulary is None:
        raise ModelError(
            f"the teacher {teacher} has no plain word table.", help="name the teacher as it was before that was factored."
        )
    words = _words(guide, teacher, task, vocabulary)
    given = guide.model.config.to_dict() | dict(words.named)
    family_of(use).model_class("")
    same = use == given["model_type"]
    taken = (
        {name: value for name, value in given.items() if name not in (*FOLLOWS, *family_of(use).per_layer)}
        if same
        else {"pad_token_id": given.get("pad_token_id")}
    )
    places = guide.family.positions(given)
    if family_of(use).any_teacher and not same and places is not None:
        taken["max_position_embeddings"] = places
    try:
        sizes = transformers.AutoConfig.for_model(use, **(taken | {"vocab_size": len(words)} | dict(config)))
        with torch.random.fork_rng(devices=[]), without_bars():
            torch.manual_seed(seed)
            student = subject_of(transformers.AutoModel.from_config(sizes).eval())
            said = take_over(student, guide, words) if same else take_words(student, guide, task, teacher, words)
            student.model.save_pretrained(folder)
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError, IndexError) as error:
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise RecipeError(
            f"a {use} student cannot be built from this config: {reason.strip().rstrip('.')}.",
            help="correct the sizes in model.config.",
        ) from None
    write_tokenizer(teacher, folder, words.text)
    _log.warning("the student is a %s of %s parameters; %s.", use, f"{student.model.num_parameters():,}", said)
    if words.text is not None:
        alike = len(shared_pieces(tokenizer_text(teacher), words.text))
        _log.warning("it reads %s word pieces of its own, %s of which its teacher knows too.", f"{len(words):,}", f"{alike:,}")


# -- Its words -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """The word pieces of a student: `parts` are the teacher's pieces that each is made of, by its id.

    `text`: the tokenizer.json that has them, None if it is the teacher's own. `named`: the fields of a config that name pieces.
    """

    parts: Sequence[tuple[int, ...]]
    text: str | None = None
    named: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.parts)

    def rows(self, table: Tensor) -> Tensor:
        """A row for each piece of a table that has one for each of the teacher's: the mean of those of its parts."""
        return table if self.text is None else inherited(table, self.parts)


def _words(teacher: Subject, folder: Path, task: Task, vocabulary: int | None) -> Pieces:
    """The teacher's own words, or so many that are trained on the task's texts."""
    if vocabulary is None:
        assert teacher.anatomy.vocabulary is not None
        return Pieces([(piece,) for piece in range(teacher.anatomy.vocabulary.size)])
    old = tokenizer_text(folder)
    texts = (text for item in task.split(Split.TRAIN) for text in item.texts)
    new = retrain_tokenizer(old, texts, vocabulary, named_tokens(folder))
    made, known = (parsed_tokenizer(text).get_vocab(with_added_tokens=True) for text in (new, old))
    tokens = {index: token for token, index in known.items()}
    fields = teacher.model.config.to_dict()
    named = {name: value for name, value in fields.items() if name.endswith("_token_id") and type(value) is int}
    return Pieces(
        descent(old, new), new, {name: made[tokens[value]] for name, value in named.items() if tokens.get(value) in made}
    )


# -- A transformer ---------------------------------------------------------------------------------------------------------------


def take_over(student: Subject, teacher: Subject, pieces: Pieces) -> str:
    """Gives a student what its teacher has in the same shape, and tables in fewer columns; says how much that was."""
    import torch

    state, theirs = student.model.state_dict(), _encoder(teacher)
    layers = dict(zip(student.anatomy.layers, _sources(student, teacher), strict=True))
    table = f"{student.anatomy.matrices['embeddings.word'].module}.weight"
    words = theirs.get(table)
    if words is not None:
        theirs[table] = pieces.rows(words)
    tables = {f"{name}.weight" for name, module in student.model.named_modules() if isinstance(module, torch.nn.Embedding)}
    equal = narrowed = 0
    with torch.no_grad():
        for name, tensor in state.items():
            layer = next((path for path in layers if name.startswith(f"{path}.")), None)
            source = theirs.get(name if layer is None else layers[layer] + name.removeprefix(layer))
            if source is None or words is None:
                continue
            if source.shape == tensor.shape:
                tensor.copy_(source)
                equal += 1
            elif name in tables and source.shape[0] == tensor.shape[0] and source.shape[1] == words.shape[1] > tensor.shape[1]:
                tensor.copy_(source @ directions(words, tensor.shape[1]))
                narrowed += 1
    return f"{equal} of its {len(state)} tensors are the teacher's, and {narrowed} tables in fewer columns"


def _encoder(teacher: Subject) -> dict[str, Tensor]:
    """The tensors of a teacher without its head, by their names in a model without one."""
    prefix = "" if teacher.model.base_model is teacher.model else f"{teacher.model.base_model_prefix}."
    return {name.removeprefix(prefix): tensor for name, tensor in teacher.model.state_dict().items() if name.startswith(prefix)}


def _sources(student: Subject, teacher: Subject) -> list[str]:
    """The teacher's layer for each of the student's, by its name in a model without a head."""
    prefix = "" if teacher.model.base_model is teacher.model else f"{teacher.model.base_model_prefix}."
    names = [name.removeprefix(prefix) for name in teacher.anatomy.layers]
    return [names[max(0, place)] for place in partners(student.anatomy, teacher.anatomy)]


# -- Word vectors ----------------------------------------------------------------------------------------------------------------


def take_words(student: Subject, teacher: Subject, task: Task, folder: Path, pieces: Pieces) -> str:
    """Gives a student of another type than its teacher's its word vectors; says whence."""
    import torch

    layer = cast(Any, student.model.get_input_embeddings())
    table = layer.weight
    if student.model.config.model_type == "static":
        known = alone(teacher, folder)  # (pieces, hidden)
        said = "its word vectors are what the teacher makes of each piece alone"
    else:
        known = cast(Any, teacher.model.get_input_embeddings()).weight.detach()
        said = "its word vectors are the teacher's word table"
    with torch.no_grad():
        table.copy_(reduced(pieces.rows(known), table.shape[1]))
        if student.model.config.model_type == "static":
            texts = (text for item in task.split(Split.TRAIN) for text in item.texts)
            table.mul_(rarity(folder, texts, len(table), pieces.text)[:, None])
        table.mul_(WORD_SIZE / table.square().mean().sqrt().clamp_min(1e-12))
        if student.family.any_teacher and layer.padding_idx is not None:
            table[layer.padding_idx] = 0.0  # words see their neighbours, and padding is to be none
    return f"{said}, in {table.shape[1]} numbers"


def alone(teacher: Subject, folder: Path) -> Tensor:
    """What a teacher makes of each word piece alone: the mean of its last hidden states, special tokens included: (pieces, hidden)."""
    import torch

    probe = _probe(folder)
    own = [place for place, special in enumerate(probe.special_tokens_mask) if not special] or [0]
    before, after = probe.ids[: own[0]], probe.ids[own[-1] + 1 :]
    assert teacher.anatomy.vocabulary is not None
    pieces, model = torch.arange(teacher.anatomy.vocabulary.size), teacher.model.base_model
    found = []
    with torch.no_grad(), teacher.evaluating():
        for some in pieces.split(_PIECES_AT_ONCE):
            ids = torch.cat([torch.tensor([part]).expand(len(some), -1) for part in (before, after)], 1).long()
            ids = torch.cat([ids[:, : len(before)], some[:, None], ids[:, len(before) :]], 1)
            columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            states = model(**{name: columns[name] for name in teacher.inputs}).last_hidden_state  # (pieces, seq, hidden)
            found.append(states.mean(1))
    return torch.cat(found)


def reduced(vectors: Tensor, count: int) -> Tensor:
    """The vectors around their mean, in the `count` numbers that tell most of them apart (PCA); zeros fill what is too many."""
    import torch

    centred = vectors - vectors.mean(0)
    kept = centred @ directions(centred, min(count, centred.shape[1]))
    return torch.nn.functional.pad(kept, (0, count - kept.shape[1]))


def rarity(folder: Path, texts: Iterable[str], size: int, new: str | None = None) -> Tensor:
    """The weight of each word piece: a / (a + its share of the texts' pieces); special tokens have 0, unseen pieces 1.

    `new`: the tokenizer.json that stands in for that of the folder.
    """
    import torch

    text = new or tokenizer_text(folder)
    counts = count_pieces(text, texts)
    special = set(_special(folder))
    if new is not None:
        tokens, made = load_tokenizer(folder), parsed_tokenizer(new)
        moved = (made.token_to_id(str(tokens.id_to_token(piece))) for piece in special)
        special = {piece for piece in moved if piece is not None}
    total = max(1, sum(count for piece, count in counts.items() if piece not in special))
    shares = torch.zeros(size)
    for piece, count in counts.items():
        if piece < size:
            shares[piece] = count / total
    weights = RARE / (RARE + shares)
    weights[[piece for piece in special if piece < size]] = 0.0
    return weights


def _special(folder: Path) -> Iterator[int]:
    """The ids that a tokenizer puts around a text, and that of padding."""
    probe = _probe(folder)
    yield from (piece for piece, special in zip(probe.ids, probe.special_tokens_mask, strict=True) if special)
    yield pad_id_of(load_tokenizer(folder), folder)


def _probe(folder: Path) -> Any:
    """A text of one piece with the tokens that a tokenizer puts around it, and without padding, which many files ask for."""
    with cutting(load_tokenizer(folder), max_length_of(folder)) as tokenizer:
        return tokenizer.encode("a")
