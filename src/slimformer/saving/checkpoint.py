"""Saves and loads models: config.json, plan.json, model.safetensors, tokenizer files, and ranges.json if training quantized activations.

A saved model's `model_type` is "slimformer_<base>", so that plain AutoModel refuses the folder instead of filling the missing
parts with random weights; `import slimformer` registers the type with the Auto classes. Loading builds an empty skeleton,
shrinks it by the plan and takes every weight by name. Plain transformers folders load too. No pickle, no remote code.
Matrices with many zeros are stored without them, and all large ones in smaller values on request: `sparse.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer.core.plan import Plan
from slimformer.core.ranges import RANGES_FILE, Ranges
from slimformer.errors import ModelError, PlanError
from slimformer.files import whole_folder
from slimformer.saving.sparse import LEAST_ZEROS, Values, pack, read_tensors, zero_shares

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PREFIX = "slimformer_"
WEIGHTS = "model.safetensors"
MODEL_FOLDER = "model"  # a delivered folder holds the PyTorch model in this one
OWN_FILES = ("plan.json", RANGES_FILE)  # these stand beside config and weights of a model that we saved
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.ckpt")


def save(
    model: PreTrainedModel,
    plan: Plan,
    folder: Path,
    *,
    tokenizer_from: Path,
    sparse: bool = True,
    values: Values = "float32",
    ranges: Ranges | None = None,
) -> None:
    """Writes a model folder that `load` reads, whole or not at all.

    Args:
        model: The model, cut or not.
        plan: Everything that was cut since the dense model; `Plan()` if nothing was.
        folder: The folder to write; one that exists is replaced.
        tokenizer_from: A folder with the tokenizer files to copy.
        sparse: Whether matrices with many zeros are stored without them (docs/sparse-file.md).
        values: "float16" or "int8" stores these and all other large matrices in fewer bytes, without any error if their values are
            on such a grid. The matrices of the outputs stay float32.
        ranges: The ranges of activations, if training learned them.

    Raises:
        OutputError: The disk is full or read-only.
        ModelError: Values do not fit into float16 or int8.

    Example:
        >>> from pathlib import Path
        >>> from slimformer import Plan, anatomy_of, load, save, shrink
        >>> from slimformer.testing.tiny import tiny
        >>> model, plan = tiny("bert"), Plan({"encoder.0.heads": (1, 3)})
        >>> save(shrink(model, anatomy_of(model), plan), plan, Path("cut"), tokenizer_from=Path("dense"))
        >>> load("cut").bert.encoder.layer[0].attention.self.query.out_features
        16
    """
    with whole_folder(folder) as part:
        write(model, plan, part, tokenizer_from=tokenizer_from, sparse=sparse, values=values, ranges=ranges)


def write(
    model: PreTrainedModel,
    plan: Plan,
    folder: Path,
    *,
    tokenizer_from: Path,
    sparse: bool = True,
    values: Values = "float32",
    ranges: Ranges | None = None,
) -> None:
    """Writes the same files into a folder that is there already (one the caller makes whole)."""
    from safetensors.torch import save_file

    base_type = model.config.model_type
    ours = {"model_type": PREFIX + base_type, "slimformer": {"base_model_type": base_type, "plan": plan.digest()}}
    tensors, metadata = pack(unshared(model), values, exact=heads(model)) if sparse else (unshared(model), {})
    save_file(
        tensors, folder / WEIGHTS, metadata=metadata or {"format": "pt"}
    )  # a single entry, because safetensors writes several in random order
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read
    (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    if ranges is not None:
        (folder / RANGES_FILE).write_text(ranges.to_json() + "\n", encoding="utf-8")
    _write_config(_base_config(model) | ours, folder)
    copy_tokenizer(tokenizer_from, folder)


def write_surroundings(model: PreTrainedModel, folder: Path, *, tokenizer_from: Path) -> None:
    """Writes what other tools read beside an exported file: the config of the uncut model, and the tokenizer files."""
    folder.mkdir(exist_ok=True)
    _write_config(_base_config(model), folder)
    copy_tokenizer(tokenizer_from, folder)


def save_dense(path: str | Path, folder: str | Path) -> None:
    """Writes the model at `path` as a plain transformers folder, which Auto classes and pipelines read without slimformer.

    The matrices have the shapes before the cut, with zeros for what is gone: the answers are the same, and the model is as large and
    as slow as the original. The ONNX files are what is small and fast.

    Args:
        path: A folder that slimformer delivered or saved.
        folder: The folder to write; one that exists is replaced.

    Raises:
        ModelError: The model cannot be loaded.
        PlanError: No plain weights give the same answers: an ELECTRA of narrow embeddings lacks its first attention.
        OutputError: The disk is full or read-only.

    Example:
        >>> from slimformer import load, save_dense
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("plain")
        >>> save_dense("plain", "dense")
        >>> load("dense").num_parameters() == load("plain").num_parameters()
        True
    """
    source = model_folder(path)
    with whole_folder(Path(folder)) as part:
        write_dense(load(source), load_plan(source), part, tokenizer_from=source)


def write_dense(model: PreTrainedModel, plan: Plan, folder: Path, *, tokenizer_from: Path) -> None:
    """Writes the model in the shapes before the cut into a folder that is there already: a plain transformers folder."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    from slimformer.core.shrink import unshrink
    from slimformer.families.base import anatomy_of

    with init_empty_weights(include_buffers=False):
        empty = type(model)(model.config)
    dense = unshrink(model, empty, anatomy_of(empty), plan)
    save_file(unshared(dense), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    write_surroundings(model, folder, tokenizer_from=tokenizer_from)


def _base_config(model: PreTrainedModel) -> dict[str, Any]:
    """The config of the model as transformers knows it: the sizes are those before the cut."""
    import transformers

    config = model.config.to_dict()
    for private in ("_name_or_path", "_attn_implementation_internal", "_attn_implementation"):
        config.pop(private, None)
    names = {"model_type": model.config.model_type, "architectures": [type(model).__name__]}
    return config | names | {"dtype": "float32", "transformers_version": transformers.__version__}


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer files that `source` has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def unshared(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict with each tensor once: tied weights keep their first name."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key in seen and tensor.numel():
            continue
        seen.add(key)
        state[name] = tensor.detach().contiguous()
    return state


def heads(model: PreTrainedModel) -> frozenset[str]:
    """Names of the matrices that give a model's outputs; they keep float32, as they do in int8 files."""
    from slimformer.core.anatomy import PointRole
    from slimformer.families.base import anatomy_of

    points = anatomy_of(model).points.values()
    return frozenset(f"{module}.weight" for point in points if point.role is PointRole.HEAD for module in point.modules)


def load(path: str | Path) -> PreTrainedModel:
    """The model saved at `path`, in float32 and eval mode: a plain transformers model, with smaller layers if it was cut.

    Args:
        path: A folder that slimformer or `save_pretrained` wrote.

    Returns:
        The model, of the class that its config names.

    Raises:
        ModelError: The folder holds no model, or a name or shape of its weights does not match its config and plan.

    Example:
        >>> from slimformer import load
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("plain")
        >>> load("plain").training
        False
    """
    folder = model_folder(path)
    config = read_config(folder)
    if str(config["model_type"]).startswith(PREFIX):
        return _load_cut(folder, config)
    return load_dense(folder)


def model_folder(path: str | Path) -> Path:
    """The folder with the PyTorch model: `path` itself, or the folder `model` in it if slimformer delivered `path`."""
    folder = Path(path)
    inner = folder / MODEL_FOLDER
    return inner if (inner / "plan.json").is_file() and not (folder / "plan.json").exists() else folder


def load_plan(path: str | Path) -> Plan:
    """The plan of everything that was cut from the model at `path`.

    Args:
        path: A model folder.

    Returns:
        What is left, in the numbering of the original model; an empty plan for a plain transformers folder.

    Raises:
        PlanError: plan.json is not one that slimformer wrote.

    Example:
        >>> from slimformer import Plan, load_plan
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("plain")
        >>> load_plan("plain") == Plan()  # nothing was cut
        True
    """
    file = model_folder(path) / "plan.json"
    return Plan.from_json(file.read_text(encoding="utf-8")) if file.is_file() else Plan()


def load_ranges(path: str | Path) -> Ranges | None:
    """The ranges of activations of the model at `path`, if training learned them."""
    file = model_folder(path) / RANGES_FILE
    return Ranges.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; ModelError if it is missing or no config."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder with a model.", help="name a folder with config.json, tokenizer and model.safetensors."
        )
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} holds no config.json.", help="name a folder that save_pretrained() wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="save the model again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type.", help="name a folder that save_pretrained() wrote.")
    return config


def base_type(config: Mapping[str, Any]) -> str:
    """The transformers model_type behind ours: "slimformer_bert" -> "bert"."""
    return str(config["model_type"]).removeprefix(PREFIX)


def weights_file(folder: Path) -> Path:
    """The one safetensors file of a model folder, its header checked; ModelError for pickles, gaps and cut-off files."""
    file = folder / WEIGHTS
    if not file.is_file():
        sharded = folder / f"{WEIGHTS}.index.json"
        if sharded.is_file():
            return sharded
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise ModelError(
                f"{folder} has its weights only as pickle ({pickles[0]}), which can run code and is not read.",
                help="load it where you trust it and call model.save_pretrained(folder): that writes model.safetensors.",
            )
        raise ModelError(f"{folder} holds no model.safetensors.", help="name a folder that save_pretrained() wrote.")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ModelError(f"{file} is cut off or no safetensors file ({size} bytes).", help="copy or save it again.")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ModelError(f"{file} has no readable safetensors header.", help="copy or save it again.") from None
    if 8 + length + end != size:
        raise ModelError(
            f"{file} is truncated: its header promises {8 + length + end} bytes, it has {size}.",
            help="copy or save it again.",
        )
    return file


def sparse_matrices(path: str | Path) -> tuple[str, ...]:
    """Ids of the encoder's matrices that the model at `path` was saved without the zeros of; no weight is read."""
    from slimformer.families.base import anatomy_of

    folder = model_folder(path)
    raw = read_config(folder)
    if not str(raw["model_type"]).startswith(PREFIX):
        return ()
    model = _cut_skeleton(folder, raw)
    shares = zero_shares(weights_file(folder), {name: tensor.shape for name, tensor in model.state_dict().items()})
    return tuple(
        matrix.id
        for matrix in anatomy_of(model).encoder_matrices()
        if shares.get(f"{matrix.module}.weight", 0.0) >= LEAST_ZEROS
    )


def _load_cut(folder: Path, raw: dict[str, Any]) -> PreTrainedModel:
    model = _cut_skeleton(folder, raw)
    state = read_tensors(weights_file(folder), {name: tensor.shape for name, tensor in model.state_dict().items()})
    _check_names(folder, model, state)
    for name, source in _tied(model).items():
        state.setdefault(name, state[source])
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def skeleton(path: str | Path, auto_class: str) -> PreTrainedModel:
    """The names and shapes of the model at `path`, without its weights; as `auto_class` if it has no head yet."""
    import transformers
    from accelerate import init_empty_weights

    folder = model_folder(path)
    raw = read_config(folder)
    if str(raw["model_type"]).startswith(PREFIX):
        return _cut_skeleton(folder, raw)
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(raw["model_type"], **fields)
        with _quiet(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = getattr(transformers, auto_class).from_config(config)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _does_not_load(folder, error) from error
    return model


def _does_not_load(folder: Path, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"{folder} does not load: {first}", help="does config.json belong to these weights?")


def _cut_skeleton(folder: Path, raw: dict[str, Any]) -> PreTrainedModel:
    """Names and shapes of a model that we saved: an empty model, cut by its plan."""
    import transformers
    from accelerate import init_empty_weights

    from slimformer.core.shrink import shrink
    from slimformer.families.base import anatomy_of, family_of

    kind = base_type(raw)
    family_of(kind)
    facts = raw.get("slimformer")
    names = raw.get("architectures")
    if not isinstance(facts, dict) or not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"{folder}/config.json is not one that slimformer wrote.", help="make the model again.")
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ModelError(f"{folder}/config.json names the class '{names[0]}', which transformers does not have.")
    if not (folder / "plan.json").is_file():
        raise ModelError(
            f"{folder} holds no plan.json.", help="copy the whole folder: without the plan its shapes are unknown."
        )
    plan = load_plan(folder)
    if plan.digest() != facts.get("plan"):
        raise ModelError(
            f"{folder}: plan.json ({plan.digest()}) is not the plan of this model ({facts.get('plan')}).",
            help="copy the whole folder again.",
        )
    fields = {key: value for key, value in raw.items() if key not in {"slimformer", "model_type"}}
    config = transformers.AutoConfig.for_model(kind, **fields)
    with init_empty_weights(include_buffers=False):
        empty = cls(config)
    try:
        return shrink(empty, anatomy_of(empty), plan)
    except PlanError as error:
        raise ModelError(f"{folder}: plan.json does not fit config.json: {error.what}", help=error.help) from None


def _check_names(folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """ModelError unless `state` holds every name of the model in its shape, tied ones once, and nothing else."""
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(state) - {name for name, source in _tied(model).items() if source in state})
    unknown = sorted(set(state) - set(wanted))
    wrong = sorted(name for name in set(state) & set(wanted) if state[name].shape != wanted[name].shape)
    facts = [f"missing: {name}" for name in missing[:3]] + [f"unknown: {name}" for name in unknown[:3]]
    facts += [f"shape: {name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}" for name in wrong[:3]]
    if facts:
        raise ModelError(
            f"{folder}: the weights do not match config.json and plan.json "
            f"({len(missing)} missing, {len(unknown)} unknown, {len(wrong)} of another shape).",
            facts=facts,
            help="copy the whole folder again, or make the model again.",
        )


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Names that share their tensor with another name: name -> the other."""
    return dict(model.all_tied_weights_keys or {})


def load_dense(
    folder: Path, auto_class: str | None = None, config_changes: Mapping[str, Any] | None = None, seed: int = 17
) -> PreTrainedModel:
    """A plain transformers folder as its own class, or as `auto_class` with a fresh head if the folder has none.

    Only a head may be fresh, and the same `seed` gives the same one: encoder weights that are missing, unknown or of another shape
    raise ModelError.
    """
    import torch
    import transformers

    raw = read_config(folder)
    weights_file(folder)
    names = raw.get("architectures") or ["AutoModel"]
    cls: Any = getattr(transformers, auto_class or names[0], None)
    if cls is None:
        raise ModelError(f"{folder}/config.json names the class '{names[0]}', which transformers does not have.")
    changes = config_changes or {}
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            known = transformers.AutoConfig.for_model(raw["model_type"]) if changes else None
            model, info = cls.from_pretrained(
                folder,
                **{name: value for name, value in changes.items() if hasattr(known, name)},
                dtype="float32",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the error below names them
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise _does_not_load(folder, error) from error
    base = f"{model.base_model_prefix}."
    extra = [name for name in info["missing_keys"] if name.startswith(base) and ".pooler." not in name]
    wrong = [str(item[0] if isinstance(item, tuple) else item) for item in info["mismatched_keys"]]
    fresh = [name for name in info["missing_keys"] if name not in extra]
    if extra or wrong or (fresh and auto_class is None):
        facts = [f"missing: {name}" for name in (extra or fresh)[:3]] + [f"shape: {name}" for name in wrong[:3]]
        raise ModelError(f"{folder}: the weights do not match config.json.", facts=facts, help="copy or save the model again.")
    for name in changes:
        if not hasattr(known, name):
            setattr(model.config, name, changes[name])  # fields that transformers does not know are saved too
    return model.eval()  # type: ignore[no-any-return]


def is_tuned(folder: Path, auto_class: str) -> bool:
    """Whether the folder holds a model with a trained head for this kind of task; whether its labels fit, `Task.bind` says."""
    suffix = auto_class.removeprefix("AutoModel")
    return any(str(name).endswith(suffix) for name in read_config(folder).get("architectures") or [])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings about fresh heads off the screen: the checks here raise an error if one matters."""
    import transformers

    before = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR + 5)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def register_auto_classes() -> None:
    """Teaches "slimformer_<base>" folders to AutoConfig and the AutoModel classes; done once by `import slimformer`."""
    import transformers
    from transformers.models.auto import modeling_auto

    from slimformer import registry

    def loader(config_class: Any, suffix: str) -> Any:
        def from_pretrained(_: Any, path: str | Path, *args: Any, **kwargs: Any) -> Any:
            model = load(path)
            if suffix == "":
                return model.base_model
            if not type(model).__name__.endswith(suffix):
                raise ModelError(f"{path} holds a {type(model).__name__}, not one that ends in {suffix}.")
            return model

        return type(
            f"Slim{suffix or 'Model'}", (), {"config_class": config_class, "from_pretrained": classmethod(from_pretrained)}
        )

    suffixes = ("", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")
    for name in registry.names("families"):
        for kind in registry.find("families", name).model_types:
            base = type(transformers.AutoConfig.for_model(kind))
            own = type(f"Slim{base.__name__}", (base,), {"model_type": PREFIX + kind, "__module__": __name__})
            transformers.AutoConfig.register(PREFIX + kind, own)
            for suffix in suffixes:
                getattr(modeling_auto, f"AutoModel{suffix}").register(own, loader(own, suffix))
