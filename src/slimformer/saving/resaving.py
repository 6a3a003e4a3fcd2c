"""Lets a loaded model that was cut save itself as transformers saves its own: `save_pretrained`, and so Trainer and push_to_hub.

The note of what was cut lies on the model (core/shrink.py), so that copies and further cuts have it too. Weights are written as
transformers writes them, shards and all; config.json and plan.json say what `load` needs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slimformer.core.plan import Plan
from slimformer.core.ranges import RANGES_FILE, Ranges
from slimformer.errors import ModelError, PlanError, output_errors
from slimformer.families.base import anatomy_of
from slimformer.saving.building import empty_model, reading
from slimformer.saving.folders import CONFIG
from slimformer.saving.headers import INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "slimformer_"
PLAN_FILE = "plan.json"
GENERATION = "generation_config.json"
_PUSHED = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
_SETTLED = ("_name_or_path", "_attn_implementation_internal", "_attn_implementation", "transformers_version")


def write_own_facts(model: PreTrainedModel, plan: Plan, folder: Path, ranges: Ranges | None) -> None:
    """Writes config.json, plan.json and ranges.json of a model that was cut by `plan`."""
    base_type = model.config.model_type
    ours = {"model_type": PREFIX + base_type, "slimformer": {"base_model_type": base_type, "plan": plan.digest()}}
    (folder / PLAN_FILE).write_text(plan.to_json() + "\n", encoding="utf-8")
    if ranges is not None:
        (folder / RANGES_FILE).write_text(ranges.to_json() + "\n", encoding="utf-8")
    _write_config(_base_config(model) | ours, folder)
    _write_generation(model, folder)


def write_base_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes the config.json of the model as transformers knows it: the sizes are those before the cut.

    Of a model that gives vectors it names the class of the encoder, since transformers has no class for the whole.
    """
    known: type = getattr(type(model), "encoder_class", type(model))
    _write_config(_base_config(model) | {"architectures": [known.__name__]}, folder)
    _write_generation(model, folder)


def _write_generation(model: PreTrainedModel, folder: Path) -> None:
    """Writes how an encoder-decoder generates."""
    if model.can_generate() and model.generation_config is not None:
        (folder / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")


def _base_config(model: PreTrainedModel) -> dict[str, Any]:
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if name not in _SETTLED}
    names = {"model_type": model.config.model_type, "architectures": [type(model).__name__]}
    return config | names | {"dtype": str(model.dtype).removeprefix("torch."), "transformers_version": transformers.__version__}


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- save_pretrained -----------------------------------------------------------------------------------------------------------


class SavesItself:
    """What the class of a loaded model that was cut has before transformers' own: its `save_pretrained`, and how it is copied."""

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Writes the model as `save_pretrained` of transformers does, with its options, so that `load` and the Auto classes read it.

        Files of other names in the folder stay, as a Trainer expects it. Raises ModelError before anything is written if the model's
        shapes are no longer those that its config and plan say.
        """
        _save_again(cast("PreTrainedModel", self), Path(save_directory), is_main_process, push_to_hub, options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return (_new, (type(self).__mro__[2],), *reduced[2:])


_classes: dict[type, type] = {}


def _saving_class(cls: type) -> type:
    """The class of transformers with `SavesItself` before it, under the same name."""
    if cls not in _classes:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        _classes[cls] = type(cls.__name__, (SavesItself, cls), names)
    return _classes[cls]


def _new(cls: type) -> Any:
    own: Any = _saving_class(cls)
    return own.__new__(own)


def keep_saving(model: PreTrainedModel, plan: Plan, ranges: Ranges | None) -> None:
    """Makes the model's own `save_pretrained` write a folder that `load` reads; its copies do the same."""
    from slimformer.core.shrink import remember_cuts  # needs torch

    remember_cuts(model, plan, ranges)
    if not isinstance(model, SavesItself):
        model.__class__ = _saving_class(type(model))


def _save_again(
    model: PreTrainedModel, folder: Path, is_main_process: bool, push_to_hub: bool, options: dict[str, Any]
) -> None:
    from transformers import PreTrainedModel

    from slimformer.core.shrink import cuts_of  # needs torch

    cuts = cuts_of(model)
    if cuts is None or not is_main_process:
        return
    _check_shapes(model, cuts.plan)
    pushed = {name: options.pop(name) for name in _PUSHED if name in options}
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as name:
            part = Path(name)
            PreTrainedModel.save_pretrained(model, part, **options)
            if (part / CONFIG).is_file():  # an adapter is saved without one
                write_own_facts(model, cuts.plan, part, cuts.ranges)
                for old in (*folder.glob("model*.safetensors"), folder / INDEX, folder / RANGES_FILE):
                    if not (part / old.name).exists():
                        old.unlink(missing_ok=True)
            for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG):  # config.json last
                file.chmod(0o644)
                file.replace(folder / file.name)
    if push_to_hub:
        model.push_to_hub(**{"repo_id": folder.name} | pushed)


def _check_shapes(model: PreTrainedModel, plan: Plan) -> None:
    """ModelError unless config and plan lead to the shapes that the model has."""
    from slimformer.core.shrink import shrink  # needs torch

    empty = empty_model(type(model), model.config, Path(CONFIG))
    try:
        with reading(Path(), CONFIG):
            wanted = shrink(empty, anatomy_of(empty), plan.within_layers()).state_dict()
    except PlanError as error:
        wanted, why = {}, error.what
    else:
        have = model.state_dict()
        differing = [name for name in wanted.keys() | have.keys() if name not in have or name not in wanted]
        differing = differing or [name for name in wanted if have[name].shape != wanted[name].shape]
        why = f"'{min(differing)}' differs" if differing else ""
    if why:
        raise ModelError(
            f"the shapes of this model no longer follow from its config and its plan: {why}.",
            help="change the config too, or save it with slimformer.save and its whole plan.",
        )
