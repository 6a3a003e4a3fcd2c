"""Carries out `trim_vocabulary`: chooses the pieces, cuts student, teacher and tokenizer together, and encodes the data anew.

The teacher is cut to the same pieces, because it must read what its student reads; on training texts its answers stay the same, bit for
bit. Rivals, and the losses and speeds that are told, are those of the teacher with its whole vocabulary, which the bundle keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slimformer.core.anatomy import VOCABULARY_SITE
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.core.token_ids import named_ids
from slimformer.data.material import Material, prepare, read_texts
from slimformer.data.tokenizer_files import named_tokens, tokenizer_text, write_tokenizer
from slimformer.data.trimming import (
    SAMPLE_TEXTS,
    UNREADABLE,
    Splitting,
    Trimmed,
    compare_splits,
    count_pieces,
    trim_tokenizer,
    unknown_share,
)
from slimformer.errors import DataError, ModelError, RecipeError, shown
from slimformer.families.base import Subject, family_of, subject_of
from slimformer.files import remembered
from slimformer.measuring.records import VocabularyFacts
from slimformer.reporting.words import vocabulary_text
from slimformer.running.bundle import Bundle, Run
from slimformer.saving import checkpoint
from slimformer.tasks.base import Example, Split, Task
from slimformer.training.stage import TrimVocabulary

FACTS = "vocabulary.json"


def trim(stage: TrimVocabulary, bundle: Bundle, run: Run) -> Bundle:
    """The bundle with student, teacher, tokenizer and data of fewer pieces; ModelError if a training text could no longer be read."""
    material = bundle.material
    cut, seen = choose_pieces(stage, material.task, material.source, _known(stage, bundle))
    validation, held = (
        compare_splits(tokenizer_text(material.source), cut, _texts(material.task, material.examples[split]))
        for split in (Split.VALIDATION, Split.DEV)
    )
    facts = VocabularyFacts(
        len(cut.keep),
        bundle.subject.anatomy.every_site[VOCABULARY_SITE].size,
        held.texts,
        held.otherwise,
        held.unreadable,
        held.longer,
    )
    small = _cut(bundle, Plan({VOCABULARY_SITE: cut.keep}))
    folder = run.folder / "vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_surroundings(small.subject.model, folder, tokenizer_from=material.source)
    write_tokenizer(material.source, folder, cut.text)
    made = _reading(small, folder, facts)
    if stage.at_least == 1:
        _check_rows(material, made.material, cut)
    _tell(bundle, made, {"training": seen, "validation": validation, "dev": held}, run)
    return made


def choose_pieces(
    stage: TrimVocabulary, task: Task, source: Path, known: Iterable[int] = (), *, quick: bool = False
) -> tuple[Trimmed, Splitting]:
    """The tokenizer of the model in `source` with the pieces that the training texts need, and how it splits them.

    `known`: pieces that stay in any case. `quick`: whether no text is read; what cannot be cut is refused all the same. RecipeError if a
    training text could no longer be read.
    """
    texts = [] if quick else _texts(task, task.split(Split.TRAIN), read_texts(Path(stage.text)) if stage.text else ())
    text, config = tokenizer_text(source), checkpoint.read_config(source)
    kind = checkpoint.base_type(config)
    settled = family_of(kind).settled_pieces(config | {"model_type": kind})
    needed = {piece for piece, count in count_pieces(text, texts).items() if count >= stage.at_least}
    needed |= {value for name, value in config.items() if name.endswith("_token_id") and type(value) is int}
    cut = trim_tokenizer(text, needed | set(known), stage.characters, named_tokens(source), settled, stage.common)
    split = compare_splits(text, cut, texts)
    if split.unreadable:
        raise RecipeError(
            f"trim_vocabulary: with pieces that occur {stage.at_least} times or more, {split.unreadable:,} of {split.texts:,} training "
            "texts would have unknown words.",
            facts=[f"such as: {shown(split.example, 100)}"],
            help="lower at_least: with 1 all training texts are read as before.",
        )
    return cut, split


def refuse_strange_texts(folder: Path, examples: Sequence[Example]) -> None:
    """DataError if most words of these examples are unknown to the tokenizer in `folder`, whose vocabulary was cut for other texts."""
    some = [text for example in examples[:: max(1, len(examples) // SAMPLE_TEXTS)] for text in example.texts]
    share, word = unknown_share(tokenizer_text(folder), some)
    if share > UNREADABLE:
        raise DataError(
            f"the vocabulary of {folder} was cut to the pieces of other texts: {share:.0%} of the words here are unknown to it, such as "
            f"{shown(word, 40)}.",
            help="start from the model as it was before trim_vocabulary, and trim it with these texts.",
        )


def settle(bundle: Bundle, part: Path, folder: Path) -> Bundle:
    """The trimmed bundle reading the tokenizer in `folder`, into which `part` will be moved; its facts are kept there."""
    facts = bundle.vocabulary
    assert facts is not None
    remembered(part / FACTS, lambda: facts, VocabularyFacts)
    return replace(bundle, material=replace(bundle.material, source=folder))


def read_back(bundle: Bundle, folder: Path) -> Bundle:
    """What `trim` made of the bundle in a former run, as it lies in `folder`."""
    before, after = bundle.plan.keep.get(VOCABULARY_SITE), checkpoint.load_plan(folder).keep[VOCABULARY_SITE]
    place = None if before is None else {piece: number for number, piece in enumerate(before)}
    plan = Plan({VOCABULARY_SITE: after if place is None else tuple(place[piece] for piece in after)})
    facts: VocabularyFacts = remembered(folder / FACTS, _lost, VocabularyFacts)
    return _reading(_cut(bundle, plan), folder, facts)


def check_table(subject: Subject) -> None:
    """RecipeError if a model has no word table that can be cut."""
    if subject.anatomy.vocabulary is None:
        tables = [matrix for matrix in subject.anatomy.matrices.values() if matrix.table]
        factored = next((f"it is stored as {matrix.form}" for matrix in tables if not matrix.dense), "")
        raise RecipeError(
            f"trim_vocabulary cannot cut the word table: {factored or f'there are {len(tables)}, each with a vocabulary of its own'}.",
            help="trim first, factor after." if factored else "leave trim_vocabulary out.",
        )


def _lost() -> VocabularyFacts:
    raise ModelError(f"{FACTS} is gone from a finished stage.", help="delete the folder `work` and start again.")


def _texts(task: Task, examples: Sequence[Example], more: Iterable[str] = ()) -> list[str]:
    """All texts of examples, each once; answers too, if the model writes them."""
    texts = dict.fromkeys(text for example in examples for text in example.texts)
    if "labels" in task.piece_columns:
        texts |= dict.fromkeys(example.answer for example in examples if isinstance(example.answer, str))
    return list(texts | dict.fromkeys(more))


def _known(stage: TrimVocabulary, bundle: Bundle) -> set[int]:
    """The pieces whose numbers the models know, and those of the rows as the task encodes them."""
    material, known = bundle.material, set[int]()
    for subject in (bundle.subject, bundle.teacher):
        known |= set(named_ids(subject.model))
    if stage.at_least == 1:
        rows = material.features[Split.TRAIN].columns
        for name in material.task.piece_columns:
            known |= {int(piece) for row in rows.get(name, ()) for piece in row if piece >= 0}
    return known


def _check_rows(before: Material, after: Material, cut: Trimmed) -> None:
    """ModelError unless the training rows are the same ones in the new numbers."""
    place = {old: new for new, old in enumerate(cut.keep)}
    for name in before.task.piece_columns:
        rows, others = (item.features[Split.TRAIN].columns.get(name, ()) for item in (before, after))
        if [[place.get(piece, piece) for piece in row] for row in rows] != [list(row) for row in others]:
            raise ModelError(
                f"the tokenizer in {before.source} cannot be cut: without unused pieces it splits training texts otherwise.",
                help="keep the whole vocabulary.",
            )


def _cut(bundle: Bundle, plan: Plan) -> Bundle:
    """Student and teacher with fewer pieces; the bundle as it was stays in it."""
    check_table(bundle.subject)
    student, teacher = (subject_of(shrink(item.model, item.anatomy, plan)) for item in (bundle.subject, bundle.teacher))
    return replace(
        bundle,
        subject=student,
        plan=bundle.plan.then(plan),
        teacher=teacher,
        teacher_plan=bundle.teacher_plan.then(plan),
        ranges=None,
        whole=bundle.uncut,
    )


def _reading(bundle: Bundle, folder: Path, facts: VocabularyFacts) -> Bundle:
    """The bundle with its data as the tokenizer in `folder` reads them."""
    task = bundle.material.task
    if "labels" in task.piece_columns:  # it knows the ids that a text to be written begins and ends with
        task = task.bind(bundle.subject.model.config.to_dict())
    material = prepare(task, folder)
    if not task.labelled:
        material = replace(material, examples=bundle.material.examples)  # the teacher has answered them
    return replace(bundle, material=material, vocabulary=facts)


def _tell(before: Bundle, after: Bundle, splits: Mapping[str, Splitting], run: Run) -> None:
    assert after.vocabulary is not None
    sizes = [bundle.subject.model.num_parameters() for bundle in (before, after)]
    run.log.say(f"{vocabulary_text(after.vocabulary)}; {sizes[0]:,} parameters become {sizes[1]:,}.")
    for name, split in splits.items():
        if split.otherwise and name != "dev":
            run.log.say(f"{split.otherwise:,} of {split.texts:,} {name} texts are split otherwise too.")
        if split.unreadable:
            run.log.say(f"{split.unreadable:,} {name} texts have words that can no longer be read: {shown(split.example, 60)}.")
    run.log.event("vocabulary", **vars(after.vocabulary))
