"""Reads recipes from YAML or plain data; all mistakes are shown together, each with its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimformer import registry
from slimformer.errors import RecipeError, SlimformerError, nearest
from slimformer.measuring.latency import Levels
from slimformer.running.order import conflicts
from slimformer.running.recipe import Bench, Export, Recipe
from slimformer.training.stage import TASK_TEXT, Calibrate, Stage, Train


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file. Paths in it are relative to the file.

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
    import yaml

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {file}: {error}.", help="name a YAML file.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not YAML: {str(error).splitlines()[0]}", help="check its indentation.") from None
    return parse_recipe(data, where=str(file), base=file.parent)


def parse_recipe(data: Any, *, where: str = "recipe", base: Path | None = None) -> Recipe:
    """A recipe from plain data, as YAML gives it; RecipeError lists all mistakes, each with its place under `where`."""
    reader = _Reader(base or Path())
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


EVERY_EXPORT = ("to", "choose_within", "values", "openvino")  # these options of `export` suit every exporter


class _Reader:
    """Reads plain data, collecting mistakes with their places instead of stopping at the first."""

    def __init__(self, base: Path) -> None:
        self.base = base
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
        for key in ("model", "teacher"):
            if key in data and not isinstance(data[key], str):
                self.mistakes.append(f"{key}: must be a path, not {data[key]!r}")
        seed = data.get("seed", 17)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            self.mistakes.append(f"seed: must be a whole number from 0, not {seed!r}")
        task = self.named(data["task"], "tasks", "task") if "task" in data else None
        latency = self.build(Levels, data["latency"], "latency") if "latency" in data else None
        stages, export, bench = self.stages(data.get("stages", []))
        if self.mistakes or task is None:
            return None
        teacher = self.path(data["teacher"]) if "teacher" in data else None
        return Recipe(self.path(data["model"]), task, tuple(stages), teacher, seed, export, bench, latency)

    def path(self, name: str) -> str:
        """A path as it is seen from the recipe's folder; a name that is no path there stays as it is."""
        beside = self.base / name
        return str(beside) if not Path(name).is_absolute() and beside.exists() else name

    def stages(self, data: Any) -> tuple[list[Stage], Export, Bench]:
        found: list[Stage] = []
        export, bench = Export(), Bench()
        if not isinstance(data, Sequence) or isinstance(data, str):
            self.mistakes.append("stages: must be a list")
            return found, export, bench
        for index, entry in enumerate(data):
            place = f"stages[{index}]"
            if not isinstance(entry, Mapping) or len(entry) != 1:
                self.mistakes.append(f"{place}: must be one of train, calibrate, export, bench with its options")
                continue
            kind, options = next(iter(entry.items()))
            place = f"{place}.{kind}"
            made: Any = None
            if kind == "train":
                made = self.train(options, place)
            elif kind == "calibrate":
                made = self.calibrate(options, place)
            elif kind == "export":
                export = self.export(options, place) or export
            elif kind == "bench":
                bench = self.build(Bench, options, place) or bench
            else:
                self.mistakes.append(f"{place}: unknown stage; {nearest(str(kind), ('train', 'calibrate', 'export', 'bench'))}")
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
            self.mistakes.append(f"{place}.to: there is no '{name}'; {nearest(str(name), registry.names('exporters'))}")
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

    def named(self, data: Any, kind: str, place: str) -> Any:
        """{use: name, option: value, ...} as an instance; a bare string is a name without options."""
        if isinstance(data, str):
            data = {"use": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
            self.mistakes.append(f"{place}: needs use, the name of one of the {kind}")
            return None
        name = data["use"]
        if name not in registry.names(kind):
            self.mistakes.append(f"{place}.use: there is no '{name}'; {nearest(name, registry.names(kind))}")
            return None
        options = {key: value for key, value in data.items() if key != "use"}
        for key in registry.find(kind, name).paths if kind == "tasks" else ():
            if isinstance(options.get(key), str):
                options[key] = self.path(options[key])
        return self.build(registry.find(kind, name), options, place)

    def build(self, cls: type[Any], options: Any, place: str) -> Any:
        """A dataclass from plain options, checked by pydantic; unknown names get the nearest known one."""
        from pydantic import TypeAdapter, ValidationError

        options = {} if options is None else options
        if not isinstance(options, Mapping):
            self.mistakes.append(f"{place}: must be a mapping of options, not {options!r}")
            return None
        known = [entry.name for entry in dataclasses.fields(cls) if entry.name not in {"methods", "method", "options"}]
        unknown = [key for key in options if key not in known]
        self.mistakes += [f"{place}.{key}: unknown option; {nearest(str(key), known)}" for key in unknown]
        if unknown:
            return None
        try:
            return TypeAdapter(cls).validate_python(dict(options))
        except ValidationError as error:
            for item in error.errors():
                path = "".join(f".{part}" for part in item["loc"])
                given = f", not {item['input']!r}" if item["loc"] else ""
                self.mistakes.append(f"{place}{path}: {item['msg'].removeprefix('Value error, ')}{given}")
        except RecipeError as error:  # each of its facts begins with the name of an option
            self.mistakes += [f"{place}.{fact}" for fact in error.facts] or [f"{place}: {error.what}"]
        except SlimformerError as error:
            self.mistakes += [f"{place}: {fact}" for fact in error.facts or (error.what,)]
        return None
