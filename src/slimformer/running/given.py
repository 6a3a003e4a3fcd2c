"""Takes requests as people bring them from Python: models in memory, recipes and tasks as paths, names or plain data.

A model in memory is written once, whole, as a folder inside the output folder. From there on it is a model like any other: the recipe
names that folder, and a run resumes from it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slimformer import registry
from slimformer.core.pooling import EMBEDDER
from slimformer.digests import digest, digest_files
from slimformer.errors import ModelError, OutputError, RecipeError, SlimformerError, nearest
from slimformer.files import own_folder, owned_purpose, refuse_foreign, remove_folder
from slimformer.running.fresh import Fresh
from slimformer.running.reader import parse_recipe, parse_task, read_recipe
from slimformer.running.recipe import Recipe
from slimformer.saving.building import without_bars
from slimformer.saving.hub import local_folder
from slimformer.saving.sentence_told import told_folder
from slimformer.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIVEN = "given"  # the folder for a model in memory, inside the output folder
TOLD = "given-told"  # that for a copy of a model with what a person says of it
MERGE = "merge it first: model = model.merge_and_unload()."


def given_recipe(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from itself, the path of a YAML file, or plain data; RecipeError for anything else."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, os.PathLike)):
        return read_recipe(recipe)
    if isinstance(recipe, Mapping):
        return parse_recipe(recipe)
    raise RecipeError(
        f"a {_kind(recipe)} is no recipe.", help="give a Recipe, the path of a YAML file, or its content as a dict."
    )


def moved(recipe: Recipe, model: Any = None, data: Any = None) -> Recipe:
    """The recipe with its model and data from where they are now; RecipeError if its task takes no data."""
    if model is not None:
        recipe = replace(recipe, model=os.fspath(model) if isinstance(model, os.PathLike) else model)
    if data is not None:
        if not hasattr(recipe.task, "data"):
            raise RecipeError(f"the task {registry.name_of(recipe.task)} of this recipe takes no data.", help="leave data out.")
        recipe = replace(recipe, task=replace(cast(Any, recipe.task), data=data))
    return recipe


def refuse_gone(recipe: Recipe) -> None:
    """RecipeError if a path in the recipe leads to nothing, as after a move to another machine."""
    named = {"model": recipe.model, "teacher": recipe.teacher, "data": getattr(recipe.task, "data", None)}
    gone = [f"{key}: {place}" for key, place in named.items() if isinstance(place, str) and _leads_nowhere(place)]
    if gone:
        raise RecipeError(
            "what this recipe names is not here.",
            facts=gone,
            help="say where it is now: --model ./folder, --data ./folder (in Python model=, data=), or correct the recipe. A teacher "
            "that another recipe makes is there once that one has run.",
        )


def _leads_nowhere(place: str) -> bool:
    """Whether a name is surely a path, and nothing is there; other names may be on the hub."""
    return (os.path.isabs(place) or place.startswith(("./", "../"))) and not os.path.exists(place)


def given_task(task: Task | str | Mapping[str, Any]) -> Task:
    """A task from itself, from {use: name, option: value, ...} as in a recipe, or from a name that settles everything.

    RecipeError for a name that says no data, and for anything else.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return parse_task(task)
    example = "give a task object: slimformer.tasks.Classification(data=...)."
    if inspect.isclass(task) and issubclass(task, Task):
        raise RecipeError(
            f"{task.__name__} is a class and names no data.", help=f"make a task of it: {task.__name__}(data=...)."
        )
    if not isinstance(task, str):
        raise RecipeError(f"a {_kind(task)} is no task.", help=example)
    classes = {name: registry.find("tasks", name) for name in registry.names("tasks")}
    for name, cls in classes.items():
        if task == name:
            if any(item.metadata["required"] for item in cls.flags().values()):
                raise RecipeError(
                    f"the task '{task}' names no data.", help=f"give a task object: slimformer.tasks.{cls.__name__}(data=...)."
                )
            settled: Task = cls()
            return settled
        if task in cls.aliases:
            alias: Task = cls.from_flags({}, cls.aliases[task])
            return alias
    known = [*classes, *(alias for cls in classes.values() for alias in cls.aliases)]
    raise RecipeError(f"there is no task '{task}'; {nearest(task, known)}.", help=example)


@contextmanager
def given_model(model: Any, tokenizer: Any, out: Path, name: str = GIVEN) -> Iterator[str]:
    """The path or hub name of a model; one in memory is first written to the folder `name` in `out`, unless it is there already.

    If the block raises, a folder that was written here is removed again: nothing is left of a request that never began.

    Raises:
        ModelError: It is neither a path nor a model of transformers, it cannot be saved as it is, or its tokenizer is missing.
        OutputError: `out` holds another model that was given in memory, or something else.
    """
    if isinstance(model, (str, os.PathLike)):
        if tokenizer is not None and name == GIVEN:
            raise ModelError(
                f"the tokenizer of {os.fspath(model)} is read from its folder.", help="give tokenizer= with a model in memory."
            )
        yield os.fspath(model)
        return
    model, tokenizer = _inner(model, tokenizer)
    called = _name_of(model)
    purpose = f"{called} {_content_digest(model, tokenizer)}"
    with _written(out, name, called, purpose, lambda part: _write(model, tokenizer, part)) as folder:
        yield folder


@contextmanager
def _written(out: Path, name: str, called: str, purpose: str, write: Callable[[Path], None]) -> Iterator[str]:
    """The folder `name`/`called` in `out`, which `write` fills unless it is there already for the same purpose."""
    home = out / name
    folder = home / called
    there = owned_purpose(home)
    if there not in (None, purpose):
        raise OutputError(
            f"{home} holds another model that was given in memory.",
            facts=[f"there: {there}", f"now: {purpose}"],
            help="choose another out for this model, or delete the folder to start over.",
        )
    fresh, alone = there is None, not out.exists()
    if fresh:
        refuse_foreign(out)
    try:
        if fresh:
            with own_folder(home, purpose) as part:
                (part / called).mkdir()
                write(part / called)
        yield str(folder)
    except BaseException:
        if fresh and not owned_purpose(out):
            remove_folder(home)
            if alone and out.is_dir() and not any(out.iterdir()):
                out.rmdir()
        raise


@contextmanager
def given_models(recipe: Recipe, tokenizer: Any, out: Path) -> Iterator[Recipe]:
    """The recipe with a name or path for each of its models, as `given_model` gives it."""
    narrows = any(method.effects().narrows for stage in recipe.stages for method in stage.methods)
    with ExitStack() as stack:
        teacher = recipe.teacher
        if teacher is not None:
            teacher = stack.enter_context(given_model(teacher, tokenizer, out, f"{GIVEN}-teacher"))
            teacher = stack.enter_context(told_model(teacher, recipe.task, out, f"{TOLD}-teacher"))
        built = recipe.model
        if isinstance(built, Fresh):
            model = stack.enter_context(_built(built, replace(recipe, teacher=teacher), out))
        else:
            model = stack.enter_context(given_model(built, tokenizer, out))
            model = stack.enter_context(told_model(model, recipe.task, out, narrows=narrows))
        yield replace(recipe, model=model, teacher=teacher)


@contextmanager
def told_model(model: str, task: Task, out: Path, name: str = TOLD, *, narrows: bool = False) -> Iterator[str]:
    """The path or hub name of a model; or of a copy in the folder `name` in `out`, if the task's options say more of it than its folder.

    `narrows`: whether its hidden states will become narrower. ModelError if the task must know more of the model.
    """
    if task.auto_class != EMBEDDER or _leads_nowhere(model):
        yield model
        return
    folder = local_folder(model)
    write = told_folder(folder, task.told_vectors, narrows=narrows)
    if write is None:
        yield model
        return
    called = re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII).strip(".-") or "model"
    said = [str(getattr(task, name, "")) for name in ("pooling", "normalize", "dimension", "query_prompt", "passage_prompt")]
    purpose = f"{called} {digest(digest_files([folder]), *said, str(narrows))}"
    with _written(out, name, called, purpose, write) as copy:
        yield copy


def _built(fresh: Fresh, recipe: Recipe, out: Path) -> AbstractContextManager[str]:
    """The folder of a model that is built, if that is not there already."""
    task, seed = recipe.task, recipe.seed
    teacher = local_folder(recipe.teacher) if recipe.teacher and fresh.is_student else None
    purpose = f"{fresh.use} {fresh.digest(task, seed, teacher)}"
    return _written(out, GIVEN, fresh.use, purpose, lambda part: fresh.write(task, seed, part, teacher, recipe.stages))


def _inner(model: Any, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """A model of transformers and its tokenizer, out of what wraps them: a pipeline, a CrossEncoder, a Trainer, torch.compile."""
    from transformers import PreTrainedModel

    kind, place = _kind(model), type(model).__module__.partition(".")[0]
    if inspect.isclass(model):
        raise ModelError(f"{model.__name__} is a class.", help=f"give a model: {model.__name__}.from_pretrained(...).")
    if place == "peft" or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"the {kind} has adapters beside its weights.", help=MERGE)
    holder = model
    if not isinstance(model, PreTrainedModel):
        for name in ("_orig_mod", "module", "model"):
            inside = getattr(holder, name, None)
            if isinstance(inside, PreTrainedModel):
                model = inside
                break
        else:
            advice = {
                "sentence_transformers": "give its encoder, which is tuned for your task first: "
                "model[0].auto_model, and tokenizer=model.tokenizer.",
                "optimum": "give the PyTorch model that it was exported from.",
            }
            raise ModelError(
                f"a {kind} is no model that can be cut.",
                help=advice.get(
                    place, "give a folder, a name on the hub, or a PreTrainedModel of transformers with its tokenizer."
                ),
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ModelError(f"the model in the {kind} has adapters beside its weights.", help=MERGE)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"the weights of the {type(model).__name__} are quantized.", help="load it without quantization.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"the {type(model).__name__} has weights that are not in memory.",
            help="load it whole, without device_map or offloading.",
        )
    for name in ("tokenizer", "processing_class"):
        tokenizer = tokenizer if tokenizer is not None else getattr(holder, name, None)
    return model, _usable(tokenizer, type(model).__name__)


def _usable(tokenizer: Any, model: str) -> Any:
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if tokenizer is None:
        raise ModelError(
            f"the {model} comes without its tokenizer.", help="give it too: tokenizer=AutoTokenizer.from_pretrained(...)."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"a {_kind(tokenizer)} is no tokenizer of transformers.",
            help="give one: tokenizer=AutoTokenizer.from_pretrained(...).",
        )
    return tokenizer


def _name_of(model: PreTrainedModel) -> str:
    """A name for tables: that of the folder or hub id that the model was loaded from, or its type."""
    origin = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)
    return re.sub(r"[^\w.-]+", "-", Path(origin).name, flags=re.ASCII).strip(".-") or "model"


def _content_digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """Names weights, config and tokenizer; a tokenizer's state of truncation and padding, which calls change, takes no part."""
    from slimformer.saving.tensors import model_digest

    config = model.config.to_dict()
    settled = {name: value for name, value in config.items() if name not in {"_name_or_path", "transformers_version"}}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        words = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return digest(model_digest(model), json.dumps([settled, words], sort_keys=True, default=str))


def _write(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """The model and its tokenizer into a folder that is there; ModelError if its tokenizer cannot be used."""
    from slimformer.data.tokenizer import load_tokenizer

    try:
        with without_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"the {type(model).__name__} cannot be saved: {error}", help="save it to a folder, and give that."
        ) from None
    try:
        load_tokenizer(folder)
    except SlimformerError as error:
        raise ModelError(
            f"the {type(tokenizer).__name__} cannot be used: {error.what.replace(str(folder), 'it')}",
            help="give a fast tokenizer: AutoTokenizer.from_pretrained(...).",
        ) from None


def _kind(item: Any) -> str:
    cls = type(item)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__.partition('.')[0]} {cls.__name__}"
