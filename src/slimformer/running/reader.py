"""Reads recipes from YAML or plain data; all mistakes are shown together, each with its place."""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from slimformer import registry
from slimformer.errors import RecipeError, SlimformerError, nearest, readable, shown
from slimformer.files import read_small
from slimformer.measuring.latency import Levels
from slimformer.rules import rules_of
from slimformer.running.fresh import Fresh
from slimformer.running.order import conflicts
from slimformer.running.places import each_place, read_in
from slimformer.running.recipe import Bench, Export, Recipe
from slimformer.saving.hub import HUB_MODEL
from slimformer.training.stage import TASK_TEXT, Calibrate, Stage, Train, TrimVocabulary

SEED = rules_of(Recipe)["seed"]
MOST_BYTES = 1 << 20  # of a recipe file
MOST_VALUES = 100_000  # of a recipe, each alias counted as often as it is used


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Paths in it are relative to the file.

    Args:
        path: The file.

    Returns:
        The recipe, checked but for what its data and models hold.

    Raises:
        RecipeError: The file cannot be read, or holds mistakes: the message lists all of them, each with its place.

    Example:
        >>> from pathlib import Path
        >>> from slimformer import read_recipe
        >>> text = "{model: ./my-bert, task: {use: classification, data: reviews}, stages: [train: {epochs: 2}], seed: 3}"
        >>> _ = Path("recipe.yaml").write_text(text)
        >>> read_recipe("recipe.yaml").stages[0].epochs
        2.0
    """
    file = Path(path)
    data = _yaml(_text(file), file)
    return parse_recipe(data, where=str(file), base=file.parent)


def read_levels(path: str | Path) -> Levels:
    """The latency table in a YAML file, as `slimformer bench --levels` writes it; RecipeError if it cannot be read."""
    file = Path(path)
    reader = _Reader(file.parent, found=True)
    found = reader.levels(os.path.abspath(file))
    if found is None:
        raise RecipeError(
            f"{file} holds no latency table.",
            facts=reader.mistakes,
            help="`slimformer bench --levels FILE` writes one on the other machine.",
        )
    return found


def _text(file: Path) -> str:
    try:
        return read_small(file, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8: {error.reason} at byte {error.start}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
    raise RecipeError(f"cannot read the recipe {file}: {reason}.", help="name a YAML file.") from None


def _yaml(text: str, file: Path) -> Any:
    """What a YAML text holds. A key that stands twice, and aliases that expand to more than memory holds, are refused."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
            if twice is not None:
                raise yaml.MarkedYAMLError(None, None, f"the key '{twice}' stands twice", node.start_mark)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        data = yaml.load(text, Loader)  # a SafeLoader
        values = _count(data, {})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{file}{where} is not YAML: {error.problem or error.context}.", help="correct that line.") from None
    except RecursionError:
        raise RecipeError(f"{file} is nested too deeply.", help="docs/concepts.md shows a recipe.") from None
    except Exception as error:  # values such as 2024-13-01 and !!int x end in errors of Python's own types
        raise RecipeError(
            f"{file} is not YAML: {error}.", help="put text that looks like a date or a number in quotes."
        ) from None
    if values > MOST_VALUES:
        raise RecipeError(f"{file} expands to {values:.3g} values by its aliases.", help="write the recipe without aliases.")
    return data


def _count(data: Any, known: dict[int, float]) -> float:
    """How many values plain data holds, each time that it is reached; time is linear in what is stored. Circles are endless."""
    if not isinstance(data, (dict, list, tuple, set)):
        return 1
    if id(data) not in known:
        known[id(data)] = float("inf")
        items = [*data.keys(), *data.values()] if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_count(item, known) for item in items)
    return known[id(data)]


def parse_recipe(data: Any, *, where: str = "recipe", base: Path | None = None) -> Recipe:
    """A recipe from plain data, as YAML gives it; RecipeError lists all mistakes, each with its place under `where`."""
    reader = _Reader(base or Path(), found=base is not None)
    recipe = reader.recipe(data)
    if reader.mistakes:
        count = len(reader.mistakes)
        raise RecipeError(
            f"{where} has {count} mistake{'s' if count > 1 else ''}.",
            facts=reader.mistakes,
            help="docs/concepts.md shows a recipe.",
        )
    assert recipe is not None
    return recipe


def _as_use(data: Any, kind: str) -> str:
    """How to write {gates: {keep: 0.5}}, which looks like a stage."""
    name, options = next(iter(data.items())) if isinstance(data, Mapping) and len(data) == 1 else (None, None)
    if name not in registry.names(kind) or not isinstance(options, Mapping | None):
        return ""
    return "; write " + readable(
        "{" + ", ".join(f"{key}: {value}" for key, value in {"use": name, **(options or {})}.items()) + "}"
    )


def _takes_bool(hint: Any) -> bool:
    """Whether a field of this type may be true or false; pydantic would read true as 1."""
    return hint in (bool, Any) or any(_takes_bool(inner) for inner in get_args(hint))


def parse_task(data: Any) -> Any:
    """A task from plain data, {use: name, option: value, ...}; RecipeError lists all mistakes."""
    reader = _Reader(Path())
    task = reader.named(data, "tasks", "task")
    if reader.mistakes:
        raise RecipeError(
            "this task cannot be used.", facts=reader.mistakes, help="`slimformer list NAME` shows the options of a task."
        )
    return task


_STAGES = ("train", "calibrate", "trim_vocabulary", "export", "bench")
EVERY_EXPORT = ("to", "choose_within", "values", "openvino")  # these options of `export` suit every exporter


class _Reader:
    """Reads plain data, collecting mistakes with their places instead of stopping at the first."""

    def __init__(self, base: Path, found: bool = False) -> None:
        self.base = base
        self.found = found  # in a file, whose paths can be looked for
        self.mistakes: list[str] = []

    def recipe(self, data: Any) -> Recipe | None:
        if not isinstance(data, Mapping):
            self.mistakes.append("the recipe must be a mapping with model, task and stages")
            return None
        known = ("model", "task", "stages", "teacher", "seed", "latency")
        for key in data:
            if key not in known:
                self.mistakes.append(f"{key}: unknown key; {nearest(str(key), known)}")
        for key in ("model", "task", "stages"):
            if key not in data:
                self.mistakes.append(f"{key}: missing")
        built = data.get("model")
        fresh = self.build(Fresh, built, "model") if isinstance(built, Mapping) else None
        for key in ("model", "teacher"):
            if key in data and not isinstance(data[key], str) and not (key == "model" and isinstance(built, Mapping)):
                self.mistakes.append(f"{key}: must be a path, not {shown(data[key])}")
        seed = data.get("seed", 17)
        if not SEED.holds(seed):
            self.mistakes.append(f"seed: must be {SEED.says}, not {shown(seed)}")
        task = self.named(data["task"], "tasks", "task") if "task" in data else None
        latency = self.levels(data["latency"]) if "latency" in data else None
        stages, export, bench = self.stages(data.get("stages", []))
        if self.mistakes or task is None:
            self.mistakes += [
                f"{key}: {shown(data[key])} does not exist" for key in ("model", "teacher") if self.lacks(data.get(key))
            ]
            return None
        teacher = self.path(data["teacher"]) if "teacher" in data else None
        model = fresh or self.path(data["model"])
        return Recipe(model, task, tuple(stages), teacher, seed, export, bench, latency)

    def levels(self, data: Any) -> Levels | None:
        """The table that the recipe holds, or that of a file which it names."""
        if isinstance(data, str):
            file = Path(self.path(data))
            try:
                data = _yaml(_text(file), file)
            except RecipeError as error:
                self.mistakes.append(f"latency: {str(error).splitlines()[0].replace('the recipe', 'the table')}")
                return None
        found: Levels | None = self.build(Levels, data, "latency")
        return found

    def path(self, name: str) -> str:
        """A path in the recipe, which is relative to the recipe's folder; a name that is no path there stays as it is."""
        return read_in(self.base, name)

    def lacks(self, name: Any) -> bool:
        """Whether a model is named by a path that does not exist. It is asked only if there are other mistakes to tell it with."""
        return self.found and isinstance(name, str) and not HUB_MODEL.fullmatch(name) and not os.path.exists(self.path(name))

    def stages(self, data: Any) -> tuple[list[Stage], Export, Bench]:
        found: list[Stage] = []
        export, bench = Export(), Bench()
        if not isinstance(data, Sequence) or isinstance(data, str):
            self.mistakes.append("stages: must be a list")
            return found, export, bench
        for index, entry in enumerate(data):
            place = f"stages[{index}]"
            if not isinstance(entry, Mapping) or len(entry) != 1:
                self.mistakes.append(f"{place}: must be one of {', '.join(_STAGES)} with its options")
                continue
            kind, options = next(iter(entry.items()))
            place = f"{place}.{kind}"
            made: Any = None
            if kind == "train":
                made = self.train(options, place)
            elif kind == "calibrate":
                made = self.calibrate(options, place)
            elif kind == "trim_vocabulary":
                made = self.trim(options, place)
            elif kind == "export":
                export = self.export(options, place) or export
            elif kind == "bench":
                bench = self.build(Bench, options, place) or bench
            else:
                self.mistakes.append(f"{place}: unknown stage; {nearest(str(kind), _STAGES)}")
            if made is not None:
                self.mistakes += [f"{place}: {mistake}" for mistake in conflicts(made, found)]
                found.append(made)
        return found, export, bench

    def train(self, options: Any, place: str) -> Train | None:
        options = dict(options) if isinstance(options, Mapping) else options
        entries = options.pop("methods", []) if isinstance(options, dict) else []
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            self.mistakes.append(f"{place}.methods: must be a list")
            entries = []
        methods = [self.named(entry, "methods", f"{place}.methods[{number}]") for number, entry in enumerate(entries)]
        deciding = [registry.name_of(m) for m in methods if m is not None and m.effects().decides]
        for number, method in enumerate(methods):
            if method is not None and method.effects().one_shot:
                name = registry.name_of(method)
                self.mistakes.append(f"{place}.methods[{number}]: '{name}' looks once; put it in a calibrate stage")
        if len(deciding) > 1:
            self.mistakes.append(f"{place}: {' and '.join(deciding)} both decide what to cut; give each its own stage")
        text = options.get("text") if isinstance(options, dict) else None
        if isinstance(text, str):
            options["text"] = text if text == TASK_TEXT else self.path(text)
            if not any(method.effects().needs_teacher for method in methods if method is not None):
                self.mistakes.append(f"{place}.text: text has no labels, so there is nothing to learn; add distillation")
        if isinstance(options, dict) and isinstance(options.get("augment_model"), str):
            options["augment_model"] = self.path(options["augment_model"])
        stage: Train | None = self.build(Train, options, place)
        return None if stage is None else replace(stage, methods=tuple(method for method in methods if method is not None))

    def export(self, options: Any, place: str) -> Export | None:
        """The options of an exporter stand beside those of every export: each is checked by the class that it belongs to."""
        name = options.get("to", "onnx") if isinstance(options, Mapping) else "onnx"
        if name not in registry.names("exporters"):
            self.mistakes.append(
                f"{place}.to: there is no {shown(name)}; {nearest(readable(str(name)), registry.names('exporters'))}"
            )
            return None
        if name == "onnx":
            export: Export | None = self.build(Export, options, place)
            return export
        own = {key: value for key, value in options.items() if key not in EVERY_EXPORT}
        exporter = self.build(registry.find("exporters", name), own, place)
        shared = {key: value for key, value in options.items() if key in EVERY_EXPORT}
        export = self.build(Export, shared, place)
        return None if exporter is None or export is None else replace(export, options=own)

    def calibrate(self, options: Any, place: str) -> Calibrate | None:
        if not isinstance(options, Mapping) or set(options) != {"method"}:
            self.mistakes.append(f"{place}: needs method, and nothing else")
            return None
        method = self.named(options["method"], "methods", f"{place}.method")
        if method is not None and not method.effects().one_shot:
            self.mistakes.append(f"{place}.method: '{registry.name_of(method)}' has to train; put it in a train stage")
        return Calibrate(method) if method is not None else None

    def trim(self, options: Any, place: str) -> TrimVocabulary | None:
        if isinstance(options, Mapping) and isinstance(options.get("text"), str):
            options = {**options, "text": self.path(options["text"])}
        stage: TrimVocabulary | None = self.build(TrimVocabulary, options, place)
        return stage

    def named(self, data: Any, kind: str, place: str) -> Any:
        """{use: name, option: value, ...} as an instance; a bare string is a name without options."""
        if isinstance(data, str):
            data = {"use": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
            self.mistakes.append(f"{place}: needs use, the name of one of the {kind}{_as_use(data, kind)}")
            return None
        name = data["use"]
        if name not in registry.names(kind):
            self.mistakes.append(f"{place}.use: there is no '{name}'; {nearest(name, registry.names(kind))}")
            return None
        options = {key: value for key, value in data.items() if key != "use"}
        for key in registry.find(kind, name).paths if kind == "tasks" else ():
            if key in options:
                options[key] = each_place(options[key], self.path)  # several: two parallel texts, or the data of several tasks
        return self.build(registry.find(kind, name), options, place)

    def build(self, cls: type[Any], options: Any, place: str) -> Any:
        """A dataclass from plain options, checked by pydantic; unknown names get the nearest known one."""
        from pydantic import TypeAdapter, ValidationError

        options = {} if options is None else options
        if not isinstance(options, Mapping):
            self.mistakes.append(f"{place}: must be a mapping of options, not {shown(options)}")
            return None
        known = [entry.name for entry in dataclasses.fields(cls) if entry.name not in {"methods", "method", "options"}]
        unknown = [key for key in options if key not in known]
        self.mistakes += [f"{place}.{key}: unknown option; {nearest(str(key), known)}" for key in unknown]
        hints = get_type_hints(cls)
        truths = (
            [key for key, value in options.items() if isinstance(value, bool) and not _takes_bool(hints[key])]
            if not unknown
            else []
        )
        self.mistakes += [f"{place}.{key}: must be a number or text, not {str(options[key]).lower()}" for key in truths]
        if unknown or truths:
            return None
        try:
            return TypeAdapter(cls).validate_python(dict(options))
        except ValidationError as error:
            for item in error.errors():
                path = "".join(f".{part}" for part in item["loc"])
                given = f", not {shown(item['input'])}" if item["loc"] else ""
                self.mistakes.append(f"{place}{path}: {item['msg'].removeprefix('Value error, ')}{given}")
        except RecipeError as error:  # each of its facts begins with the name of an option
            self.mistakes += [f"{place}.{fact}" for fact in error.facts] or [f"{place}: {error.what}"]
        except SlimformerError as error:
            self.mistakes += [f"{place}: {fact}" for fact in error.facts or (error.what,)]
        return None
