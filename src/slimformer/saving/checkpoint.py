"""Saves and loads models: config.json, plan.json, model.safetensors, tokenizer files, and ranges.json if training quantized activations.

A saved model's `model_type` is "slimformer_<base>", so that plain AutoModel refuses the folder instead of filling the missing
parts with random weights; `import slimformer` registers the type with the Auto classes. Loading builds an empty skeleton,
shrinks it by the plan and takes every weight by name. Plain transformers folders load too. No pickle, no remote code.
Matrices with many zeros are stored without them, and all large ones in smaller values on request: `sparse.py`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from slimformer.core.plan import Plan
from slimformer.core.pooling import EMBEDDER, SENTENCE_VECTOR
from slimformer.core.ranges import RANGES_FILE, Ranges
from slimformer.errors import ModelError, PlanError
from slimformer.families.base import anatomy_of, family_of
from slimformer.files import read_small, whole_folder
from slimformer.saving.building import blueprint, empty_model, reading, refuse_labels, silence
from slimformer.saving.cross_encoder import cross_encoder_facts
from slimformer.saving.folders import CONFIG, model_folder, refuse_adapter, stranger
from slimformer.saving.headers import WEIGHTS, StoredWeights, has_weights, inner_file, read_object, stored_weights
from slimformer.saving.heads import (
    LABEL_FIELDS,
    STEPS_UNREAD,
    Parts,
    Source,
    class_named,
    encoder_of,
    find_source,
    is_computed,
    parts_for,
    purpose_of,
    type_of_class,
    with_article,
)
from slimformer.saving.hub import local_folder
from slimformer.saving.resaving import GENERATION, PLAN_FILE, PREFIX, keep_saving, write_base_config, write_own_facts
from slimformer.saving.sentence_folder import is_sentence_folder, read_sentence_folder
from slimformer.saving.sparse import LEAST_ZEROS, Values, pack, read_tensors, zero_shares

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from transformers import PretrainedConfig, PreTrainedModel

OWN_FILES = (PLAN_FILE, RANGES_FILE)  # these stand beside config and weights of a model that we saved
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
    "spm.model",
    "source.spm",
    "target.spm",
)
_log = logging.getLogger(__name__)


def save(
    model: PreTrainedModel,
    plan: Plan,
    folder: str | Path,
    *,
    tokenizer_from: str | Path,
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
        >>> from slimformer import Plan, anatomy_of, load, save, shrink
        >>> from slimformer.testing.tiny import tiny
        >>> model, plan = tiny("bert"), Plan({"encoder.0.heads": (1, 3)})
        >>> save(shrink(model, anatomy_of(model), plan), plan, "cut", tokenizer_from="dense")
        >>> load("cut").bert.encoder.layer[0].attention.self.query.out_features
        16
    """
    with whole_folder(Path(folder)) as part:
        write(model, plan, part, tokenizer_from=Path(tokenizer_from), sparse=sparse, values=values, ranges=ranges)


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

    tensors, metadata = pack(unshared(model), values, exact=heads(model)) if sparse else (unshared(model), {})
    save_file(
        tensors, folder / WEIGHTS, metadata=metadata or {"format": "pt"}
    )  # a single entry, because safetensors writes several in random order
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read
    write_own_facts(model, plan, folder, ranges)
    copy_tokenizer(tokenizer_from, folder)


def write_surroundings(model: PreTrainedModel, folder: Path, *, tokenizer_from: Path) -> None:
    """Writes what other tools read beside an exported file: the config of the uncut model, and the tokenizer files."""
    folder.mkdir(exist_ok=True)
    write_base_config(model, folder)
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
        PlanError: No plain weights give the same answers: an ELECTRA of narrow embeddings lacks its first attention, or a Marian that of
            one side.
        OutputError: The disk is full or read-only.

    Example:
        >>> from slimformer import load, save_dense
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("plain")
        >>> save_dense("plain", "dense")
        >>> load("dense").num_parameters() == load("plain").num_parameters()
        True
    """
    source = local_folder(path)
    with whole_folder(Path(folder)) as part:
        write_dense(load(source), load_plan(source), part, tokenizer_from=source)


def write_dense(model: PreTrainedModel, plan: Plan, folder: Path, *, tokenizer_from: Path) -> None:
    """Writes the model in the shapes before the cut into a folder that is there already: a plain transformers folder."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    from slimformer.core.shrink import unshrink

    with init_empty_weights(include_buffers=False):
        empty = type(model)(model.config)
    dense = unshrink(model, empty, anatomy_of(empty), plan)
    save_file(unshared(dense), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    write_surroundings(model, folder, tokenizer_from=tokenizer_from)


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

    points = anatomy_of(model).points.values()
    names = (f"{module}.weight" for point in points if point.role is PointRole.HEAD for module in point.modules)
    return frozenset(_tied(model).get(name, name) for name in names)


def load(path: str | Path, *, revision: str | None = None) -> PreTrainedModel:
    """The model saved at `path`, in float32 and eval mode: a plain transformers model, with smaller layers if it was cut.

    The `save_pretrained` of a model that was cut, and so a Trainer's checkpoints, write a folder that loads again.

    Args:
        path: A folder that slimformer or `save_pretrained` wrote, a delivered folder, or the hub id of one, `owner/name[@revision]`.
        revision: The commit, tag or branch of a hub id.

    Returns:
        The model, of the class that its weights are for.

    Raises:
        ModelError: The folder holds no model, or a name or shape of its weights does not match its config and plan.

    Example:
        >>> from slimformer import load
        >>> from slimformer.testing.tiny import tiny
        >>> tiny("bert").save_pretrained("plain")
        >>> load("plain").training
        False
    """
    return load_folder(local_folder(path, revision))


def load_folder(folder: Path, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """As `load`, of the very folder; `changes` are fields of the config that replace those of config.json."""
    raw = read_config(folder)
    return _load_cut(folder, raw | dict(changes or {})) if _is_cut(raw) else load_dense(folder, config_changes=changes)


def load_as(
    folder: Path, auto_class: str, changes: Mapping[str, Any], seed: int, lender: Path | None = None
) -> PreTrainedModel:
    """The model in a folder as one for a task: as it is if it has the head, else its encoder with another one.

    `changes` are the fields of the config that the task needs, if the head is another. A folder that we wrote, whose encoder has
    learned from a teacher, then gets the head of the model in `lender`, if its shapes agree; others get a fresh one, and the same
    `seed` gives the same. A remark says which.
    """
    raw = read_config(folder)
    if auto_class == EMBEDDER and not _is_cut(raw):
        return load_embedder(folder)
    if not _is_cut(raw):
        own = _source(folder, raw).tuned == auto_class.removeprefix("AutoModelFor")
        return load_dense(folder) if own else load_dense(folder, auto_class, changes, seed)
    if is_tuned(folder, auto_class):
        return _load_cut(folder, raw)
    return _load_cut_as(folder, raw, auto_class, changes, seed, lender)


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
    text = _read_text(local_folder(path), PLAN_FILE)
    return Plan() if text is None else Plan.from_json(text)


def load_ranges(path: str | Path) -> Ranges | None:
    """The ranges of activations of the model at `path`, if training learned them."""
    text = _read_text(local_folder(path), RANGES_FILE)
    return None if text is None else Ranges.from_json(text)


def _read_text(folder: Path, name: str) -> str | None:
    """The text of a file of a folder; None if it has none of that name."""
    file = inner_file(folder, name)
    try:
        return None if file is None else read_small(file).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", help="copy the whole folder again.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; ModelError if it is missing or no config, with what the folder is instead if that can be told."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder with a model.",
            help="name a folder with config.json, tokenizer and model.safetensors, or a model on the hub: owner/name.",
        )
    file = inner_file(folder, CONFIG)
    if file is None:
        raise stranger(folder) or ModelError(
            f"{folder} holds no config.json.", help="name a folder that save_pretrained() wrote."
        )
    config = read_object(file)
    if "model_type" not in config:
        names = config.get("architectures")
        config["model_type"] = type_of_class(names[0]) if isinstance(names, list) and names else None
    if not isinstance(config.get("model_type"), str):
        raise stranger(folder) or ModelError(
            f"{file} names no model_type.",
            help='name a folder that save_pretrained() wrote, or add the type of the model, such as "model_type": "bert".',
        )
    refuse_labels(folder, config)
    return config | cross_encoder_facts(folder)  # the files of CrossEncoder are the newer ones


def model_config(folder: Path, auto_class: str = "") -> dict[str, Any]:
    """config.json of a folder with weights; its labels are those of the trained head, also if config.json does not name them.

    For the Auto class of vectors it also says how these are made.
    """
    raw = read_config(folder)
    if _is_cut(raw):
        return raw
    return dict(_source(folder, raw).raw) | (
        _vector_facts(folder) if auto_class == EMBEDDER and is_sentence_folder(folder) else {}
    )


def base_type(config: Mapping[str, Any]) -> str:
    """The transformers model_type behind ours: "slimformer_bert" -> "bert"."""
    return str(config["model_type"]).removeprefix(PREFIX)


def weights_of(folder: Path) -> StoredWeights:
    """What the headers of a model folder's weights say; ModelError for pickles, gaps, torn files, and for what is no model at all."""
    if not has_weights(folder):
        error = stranger(folder)
        if error is not None:
            raise error
    refuse_adapter(folder)
    return stored_weights(folder)


def check_weights(folder: Path) -> None:
    """ModelError if a folder's weights are not there, torn, or hold values that are not finite; each tensor is read for that."""
    from safetensors import safe_open

    strange = []
    for file in weights_of(folder).files:
        with reading(folder, file.name), safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - a file of safetensors is no mapping
                tensor = stream.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                    strange.append(name)
    if strange:
        raise ModelError(
            f"{folder}: {len(strange)} tensors hold values that are not finite (nan or inf), and so will its outputs.",
            facts=sorted(strange)[:3],
            help="train it again with a lower learning rate if its training diverged, or copy it again if the file is damaged.",
        )


def sparse_matrices(path: str | Path) -> tuple[str, ...]:
    """Ids of the encoder's matrices that the model at `path` was saved without the zeros of; no weight is read."""
    folder = model_folder(Path(path))
    raw = read_config(folder)
    if not _is_cut(raw):
        return ()
    stored = weights_of(folder)
    model = _design_of(folder, raw, stored).empty()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shares = {name: share for file in stored.files for name, share in zero_shares(file, shapes).items()}
    return tuple(
        matrix.id
        for matrix in anatomy_of(model).encoder_matrices()
        if shares.get(f"{matrix.module}.weight", 0.0) >= LEAST_ZEROS
    )


def skeleton(path: str | Path, auto_class: str) -> PreTrainedModel:
    """The names and shapes of the model at `path`, without its weights; as `auto_class` if it has no head yet."""
    folder = model_folder(Path(path))
    raw = read_config(folder)
    if _is_cut(raw):
        tuned = is_tuned(folder, auto_class)
        model = _design_of(folder, raw, weights_of(folder), None if tuned else auto_class).empty()
    elif auto_class == EMBEDDER:
        model = _dense_skeleton(_source(folder, raw), EMBEDDER, _vector_facts(folder)).model
    else:
        source = _source(folder, raw)
        tuned = source.tuned == auto_class.removeprefix("AutoModelFor")
        model = _dense_skeleton(source, None if tuned else auto_class, {}).model
    _take_generation(model, folder)
    return model


# -- Folders that we wrote -----------------------------------------------------------------------------------------------------


def is_cut_folder(raw: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json holds a model that was cut here."""
    return _is_cut(raw)


def _is_cut(raw: Mapping[str, Any]) -> bool:
    return str(raw["model_type"]).startswith(PREFIX)


def _load_cut(folder: Path, raw: Mapping[str, Any]) -> PreTrainedModel:
    stored = weights_of(folder)
    design = _design_of(folder, raw, stored)
    skeleton = design.empty()
    state = _read_state(stored, {name: tensor.shape for name, tensor in skeleton.state_dict().items()}, {}, _codes_of(skeleton))
    _check_names(folder, skeleton, state)
    return _filled(design, state, load_ranges(folder))


def _filled(design: _Design, state: dict[str, Tensor], ranges: Ranges | None) -> PreTrainedModel:
    """The cut model with these weights, of which tied ones may stand there once, and computed ones be missing."""
    from slimformer.forms.base import Formed  # needs torch

    model = design.empty(buffers=True)
    lacking = set(model.state_dict()) - set(state)
    for name, source in _tied(model).items():
        state.setdefault(name, state[source])
    with reading(design.folder, WEIGHTS):
        state |= _computed(model, set(model.state_dict()) - set(state))
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights(missing_keys=lacking, recompute_mapping=False)  # two that are stored apart stay apart
    for path, module in model.named_modules():
        wrong = module.wrong_codes() if isinstance(module, Formed) else None
        if wrong is not None:
            raise ModelError(
                f"{design.folder}: '{path}' holds codes that are wrong: {wrong}.", help="copy the whole folder again."
            )
    _take_generation(model, design.folder)
    _say(design.remarks)
    keep_saving(model, design.plan, ranges)
    return model.eval()


@dataclass(frozen=True)
class _Design:
    """Everything that the shapes of a folder that we wrote follow from."""

    folder: Path
    cls: type[PreTrainedModel]
    config: PretrainedConfig
    plan: Plan
    remarks: tuple[str, ...]

    def empty(self, *, buffers: bool = False) -> PreTrainedModel:
        """The cut model without its weights."""
        from slimformer.core.shrink import shrink  # needs torch

        whole = empty_model(self.cls, self.config, self.folder, buffers=buffers)
        try:
            with reading(self.folder, PLAN_FILE):
                return shrink(whole, anatomy_of(whole), self.plan.within_layers())
        except PlanError as error:
            raise ModelError(f"{self.folder}: plan.json does not fit config.json: {error.what}", help=error.help) from None


def _load_cut_as(
    folder: Path, raw: Mapping[str, Any], auto_class: str, changes: Mapping[str, Any], seed: int, lender: Path | None
) -> PreTrainedModel:
    """The encoder of a folder that we wrote, with the head of another class: that of the model in `lender`, or a fresh one."""
    import torch

    stored = weights_of(folder)
    own, design = _design_of(folder, raw, stored), _design_of(folder, raw, stored, auto_class, changes)
    skeleton = design.empty()
    prefix = f"{skeleton.base_model_prefix}."
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    have = {name: tensor.shape for name, tensor in own.empty().state_dict().items()}
    state = {
        name: tensor
        for name, tensor in _read_state(stored, have, {}, _codes_of(skeleton)).items()
        if name in wanted and name.startswith(prefix)
    }
    new = {name for name in wanted if not name.startswith(prefix) or ".pooler." in name} | set(_tied(skeleton))
    _compare(folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, wanted, new, "config.json and plan.json")
    lacking = sorted(set(wanted) - set(state) - set(_tied(skeleton)))
    head = {} if lender is None else load_folder(lender).state_dict()
    had = with_article(own.cls.__name__)
    if all(name in head and tuple(head[name].shape) == wanted[name] for name in lacking):
        _say([f"{folder}: it is {had}; its head ({lacking[0]}, ...) is copied from the teacher {lender}."])
    else:
        with silence(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = design.cls(design.config).state_dict()
        _say([f"{folder}: it is {had}; its encoder is taken, and the head of the {design.cls.__name__} is new."])
    state |= {name: head[name].clone() for name in lacking}
    return _filled(design, state, None)


def _design_of(
    folder: Path,
    raw: Mapping[str, Any],
    stored: StoredWeights,
    auto_class: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> _Design:
    """The design of a folder that we wrote, as it is or with the head of another class and `changes` to its config."""
    kind = base_type(raw)
    family_of(kind)
    facts = raw.get("slimformer")
    names = raw.get("architectures")
    if not isinstance(facts, dict) or not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"{folder}/config.json is not one that slimformer wrote.", help="make the model again.")
    cls = class_named(names[0], kind)
    if cls is None:
        raise ModelError(
            f"{folder}/config.json names the class '{names[0]}', which transformers does not have for the type {kind}.",
            help="copy the whole folder again.",
        )
    if inner_file(folder, PLAN_FILE) is None:
        raise ModelError(
            f"{folder} holds no plan.json.", help="copy the whole folder: without the plan its shapes are unknown."
        )
    plan = load_plan(folder)
    if plan.digest() != facts.get("plan"):
        raise ModelError(
            f"{folder}: plan.json ({plan.digest()}) is not the plan of this model ({facts.get('plan')}).",
            help="copy the whole folder again.",
        )
    if auto_class is not None:
        raw = {name: value for name, value in raw.items() if name not in LABEL_FIELDS}
        cls = _parts(auto_class, kind).cls
    fields = blueprint(folder, raw, stored, planned=len(plan.keep) + len(plan.forms))
    return _Design(folder, cls, fields.config(kind, changes), plan, fields.remarks)


def _check_names(folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """ModelError unless `state` holds every name of the model in its shape, tied ones once, and nothing else."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    may_lack = {name for name, source in _tied(model).items() if source in state}
    may_lack |= {name for name in wanted if is_computed(model, name)}
    _compare(
        folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, wanted, may_lack, "config.json and plan.json"
    )


def _computed(model: PreTrainedModel, names: Set[str]) -> dict[str, Tensor]:
    """Those tensors that a model computes itself, such as sinusoidal positions."""
    found: dict[str, Tensor] = {}
    for path in {name.rpartition(".")[0] for name in names}:
        module = model.get_submodule(path).to_empty(device="cpu")
        model._init_weights(module)
        found |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    return found


def _take_generation(model: PreTrainedModel, folder: Path) -> None:
    """How a folder says that its model generates: the number of beams, the longest output; older ones say it in config.json."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    file = inner_file(folder, GENERATION)
    with reading(folder, CONFIG if file is None else GENERATION):
        if file is None:
            model.generation_config = GenerationConfig.from_model_config(dict(read_config(folder)))
        else:
            model.generation_config = GenerationConfig.from_dict(read_object(file))


def _compare(
    folder: Path, have: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], may_lack: Set[str], source: str
) -> None:
    """ModelError unless the tensors that are there have the wanted names and shapes."""
    missing = sorted(set(wanted) - set(have) - may_lack)
    unknown = sorted(set(have) - set(wanted))
    wrong = sorted(name for name in set(have) & set(wanted) if tuple(have[name]) != tuple(wanted[name]))
    facts = [f"missing: {name}" for name in missing[:3]] + [f"unknown: {name}" for name in unknown[:3]]
    facts += [f"shape: {name} is {tuple(have[name])}, expected {tuple(wanted[name])}" for name in wrong[:3]]
    if facts:
        raise ModelError(
            f"{folder}: the weights do not match {source} "
            f"({len(missing)} missing, {len(unknown)} unknown, {len(wrong)} of another shape).",
            facts=facts,
            help="copy the whole folder again, or make the model again; a model that was cut is saved with slimformer.save and its plan.",
        )


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Names that share their tensor with another name: name -> the other."""
    return dict(model.all_tied_weights_keys or {})


# -- Plain transformers folders ------------------------------------------------------------------------------------------------


def load_embedder(folder: Path) -> PreTrainedModel:
    """A folder of sentence-transformers as one model that gives vectors; ModelError if it is none, or cannot be computed here."""
    found = read_sentence_folder(folder)
    _say(found.remarks)
    return load_dense(folder, EMBEDDER, _vector_facts(folder), more=found.dense_state())


def _vector_facts(folder: Path) -> dict[str, Any]:
    """What a folder of sentence-transformers adds to its config.json."""
    return {SENTENCE_VECTOR: read_sentence_folder(folder).head.to_config()}


def load_dense(
    folder: Path,
    auto_class: str | None = None,
    config_changes: Mapping[str, Any] | None = None,
    seed: int = 17,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> PreTrainedModel:
    """A plain transformers folder as the class that its weights are for, or as `auto_class` with a fresh head if they have none for it.

    Only a head may be fresh, and the same `seed` gives the same one: encoder weights that are missing, unknown or of another shape
    raise ModelError. A remark says what was found against the word of config.json. `more`: weights that come from other files.
    """
    import torch

    source = _source(folder, read_config(folder))
    dense = _dense_skeleton(source, auto_class, config_changes or {})
    wanted = {name: tensor.shape for name, tensor in dense.model.state_dict().items()}
    state = _read_state(source.stored, wanted, dense.names) | dict(more)
    with silence(), torch.random.fork_rng(devices=[]), reading(folder, WEIGHTS):
        torch.manual_seed(seed)
        model: PreTrainedModel = type(dense.model).from_pretrained(
            None, config=dense.model.config, state_dict=state, dtype="float32", **dense.options
        )
    _take_generation(model, folder)
    _say((*(said for said in source.remarks if auto_class != EMBEDDER or STEPS_UNREAD not in said), *dense.remarks))
    return model.eval()


@dataclass(frozen=True)
class _Dense:
    """A plain model without its weights, and the name in the file of each tensor that is taken from there."""

    model: PreTrainedModel
    names: Mapping[str, str]
    remarks: tuple[str, ...]
    options: Mapping[str, Any]  # of its class


def _source(folder: Path, raw: Mapping[str, Any]) -> Source:
    family_of(base_type(raw))
    return find_source(folder, raw, weights_of(folder))


def _dense_skeleton(source: Source, auto_class: str | None, changes: Mapping[str, Any]) -> _Dense:
    """The model of a plain folder, whose names and shapes agree with the headers of its weights; nothing is read or allocated."""
    folder, kind = source.folder, base_type(source.raw)
    _refuse_half(source, kind)
    parts = source.parts if auto_class is None else _parts(auto_class, kind)
    if auto_class is None and source.problem:
        raise ModelError(
            f"{folder} does not load: {source.problem}.",
            help=source.cure,
        )
    fresh = not source.holds(parts)
    shared = sorted(parts.head & set(source.tops)) if fresh and source.parts.purpose == "MaskedLM" else []
    raw = {name: value for name, value in source.raw.items() if not (fresh and name in LABEL_FIELDS)}
    fields = blueprint(folder, raw, source.stored)
    remarks = list(fields.remarks)
    if fresh and (source.problem or source.parts.head):
        had = source.problem or f"it is {with_article(source.parts.cls.__name__)}"
        taken = "its encoder and what the heads share are" if shared else "its encoder is"
        remarks.append(f"{folder}: {had}; {taken} taken, and the head of the {parts.cls.__name__} is new.")
    known = {name: value for name, value in changes.items() if name not in LABEL_FIELDS} | {
        name: changes[name] for name in LABEL_FIELDS if name in changes
    }
    if known.keys() & set(LABEL_FIELDS):
        fields = replace(fields, fields={name: value for name, value in fields.fields.items() if name not in LABEL_FIELDS})
    pooled = any(name.startswith("pooler.") for name in source.body)
    options = {} if pooled or not encoder_of(kind).pooled or parts.head else {"add_pooling_layer": False}
    model = empty_model(parts.cls, fields.config(kind, known), folder, **options)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {f"{parts.prefix}{name}": own for name, own in source.body.items()}
    names = {name: own for name, own in names.items() if name in wanted or ".pooler." not in f".{name}"}
    if not fresh:
        names |= {name: own for name, own in source.tops.items() if name in wanted}
    names |= {name: source.tops[name] for name in shared}
    new = {name for name in wanted if fresh and (not name.startswith(parts.prefix) or ".pooler." in name)} - set(shared)
    have = {name: source.stored.tensors[own].shape for name, own in names.items()}
    _compare(folder, have, wanted, new | set(_tied(model)) | {name for name in wanted if is_computed(model, name)}, CONFIG)
    return _Dense(model, names, tuple(remarks), options)


def _refuse_half(source: Source, kind: str) -> None:
    """ModelError for the encoder alone of a type whose models are cut with their decoder."""
    family = family_of(kind)
    decoder = family.skeleton.decoder if family.decodes else None
    if decoder is not None and not any(name.startswith(f"{decoder.layers}.") for name in source.body):
        raise family.refusal(source.parts.cls.__name__, str(source.folder))


def _parts(auto_class: str, kind: str) -> Parts:
    """The parts of the class for a model type; ModelError if transformers has none."""
    parts = parts_for(auto_class, kind)
    if parts is None:
        raise ModelError(f"transformers has no {auto_class} for the type {kind}.", help="name a model of another type.")
    return parts


def is_tuned(folder: Path, auto_class: str) -> bool:
    """Whether the folder holds a model with a trained head for this kind of task; whether its labels fit, `Task.bind` says."""
    raw, purpose = read_config(folder), auto_class.removeprefix("AutoModelFor")
    if auto_class == EMBEDDER and not _is_cut(raw):
        return is_sentence_folder(folder)
    if not _is_cut(raw) and has_weights(folder):
        source = _source(folder, raw)
        parts = parts_for(auto_class, base_type(raw))
        return source.tuned == purpose or (parts is not None and bool(source.tuned) and source.holds(parts))
    names = raw.get("architectures")
    return isinstance(names, list) and any(purpose_of(str(name)) == purpose for name in names)


def head_problems(folder: Path) -> list[str]:
    """Why the weights of a plain folder have not the head that its config.json names; empty if they have it, or if it was cut."""
    raw = read_config(folder)
    problem = "" if _is_cut(raw) or not has_weights(folder) else _source(folder, raw).problem
    return [problem] if problem else []


# -- Weights -------------------------------------------------------------------------------------------------------------------


def _codes_of(model: PreTrainedModel) -> dict[str, dtype]:
    """The parameters that hold whole numbers: codes of a form."""
    return {name: tensor.dtype for name, tensor in model.named_parameters() if not tensor.is_floating_point()}


def _read_state(
    stored: StoredWeights,
    shapes: Mapping[str, Sequence[int]],
    names: Mapping[str, str],
    codes: Mapping[str, dtype] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The tensors of a folder as float32. `names`: the model's name of each -> the file's; without any, all under the file's names.

    Those that `codes` names stay the whole numbers that they are.

    ModelError if one has another type than a float: no rounding makes weights of it.
    """
    state: dict[str, Tensor] = {}
    for file in stored.files:
        state |= read_tensors(file, shapes)
    if names:
        state = {name: state[own] for name, own in names.items()}
    coded = {name: state.pop(name) for name, kind in codes.items() if name in state and state[name].dtype == kind}
    whole = [name for name in sorted(state) if not state[name].is_floating_point() or state[name].element_size() < 2]
    if whole:
        kind = str(state[whole[0]].dtype).removeprefix("torch.")
        raise ModelError(
            f"{stored.folder}: '{whole[0]}' is stored as {kind}, and weights are float32, float16 or bfloat16.",
            help="save the model again in float32; one that another tool quantized must be named as it was before.",
        )
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()} - {"float32"})
    if kinds:
        _say([f"{stored.folder}: the weights are stored as {', '.join(kinds)}; they are computed with as float32."])
    state = {name: tensor.float() for name, tensor in state.items()}
    strange = _not_finite(state)
    if strange:
        _say(
            [
                f"{stored.folder}: {len(strange)} tensors hold values that are not finite (nan or inf), the first is {strange[0]}."
            ]
        )
    return state | coded


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold nan or inf."""
    return sorted(name for name, tensor in state.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all()))


def _say(remarks: Iterable[str]) -> None:
    for remark in remarks:
        _log.warning("%s", remark)


# -- The Auto classes ----------------------------------------------------------------------------------------------------------


def register_auto_classes() -> bool:
    """Teaches "slimformer_<base>" folders to AutoConfig and the AutoModel classes; done once by `import slimformer`.

    False if a type is left, because its module is being imported just then: to be called again.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from slimformer import registry

    def loader(config_class: Any, suffix: str) -> Any:
        def from_pretrained(_: Any, path: str | Path, *args: Any, **options: Any) -> Any:
            return _load_as(suffix, path, options)

        return type(
            f"Slim{suffix or 'Model'}", (), {"config_class": config_class, "from_pretrained": classmethod(from_pretrained)}
        )

    suffixes = ("", *(f"For{purpose}" for purpose in ("SequenceClassification", "QuestionAnswering", "TokenClassification")))
    suffixes += ("ForMaskedLM", "ForPreTraining", "ForSeq2SeqLM")
    missing = False
    for name in registry.names("families"):
        for kind in registry.find("families", name).model_types:
            if PREFIX + kind in CONFIG_MAPPING:
                continue
            try:
                registry.find("families", name)().model_class("")  # imports those that are not transformers' own
                base = type(transformers.AutoConfig.for_model(kind))
            except (ImportError, AttributeError):
                missing = True
                continue
            own = type(f"Slim{base.__name__}", (base,), {"model_type": PREFIX + kind, "__module__": __name__})
            transformers.AutoConfig.register(PREFIX + kind, own)
            for suffix in suffixes:
                getattr(modeling_auto, f"AutoModel{suffix}").register(own, loader(own, suffix))
    return not missing


def _load_as(suffix: str, path: str | Path, options: Mapping[str, Any]) -> Any:
    """What an Auto class gives for a folder of ours: the options of `from_pretrained` that make sense for it count."""
    import torch
    import transformers

    from slimformer.core.shrink import cuts_of

    inner = options.get("subfolder") or ""
    folder = local_folder(Path(path) / inner if Path(path).is_dir() else path, options.get("revision"))
    folder = folder / inner if not Path(path).is_dir() and (folder / inner).is_dir() else folder
    raw, config = read_config(folder), options.get("config")
    changes = {}
    if config is not None:  # the caller's own config, or that of the folder with the caller's changes
        with reading(folder, CONFIG):
            told = transformers.AutoConfig.for_model(**{**raw, "model_type": config.model_type}).to_dict()
        changes = {
            name: value for name, value in config.to_dict().items() if value != told.get(name) and name not in _OF_THE_CALL
        }
    model: Any = load_folder(folder, changes)
    if suffix and purpose_of(type(model).__name__) != suffix.removeprefix("For"):
        raise ModelError(f"{path} holds a {type(model).__name__}, not one that ends in {suffix}.")
    cuts = cuts_of(model)
    if suffix == "" and cuts is not None:
        model = model.base_model
        keep_saving(model, cuts.plan, cuts.ranges)
    for name in ("output_hidden_states", "output_attentions"):
        if changes.get(name):
            setattr(model.config, name, changes[name])
    attention = options.get("attn_implementation") or getattr(config, "_attn_implementation", None)
    if attention == "eager" or options.get("attn_implementation"):
        model.set_attn_implementation(attention)
    kind = options.get("dtype", options.get("torch_dtype"))
    if kind not in (None, "auto"):
        model = model.to(dtype=getattr(torch, kind) if isinstance(kind, str) else kind)
    place = options.get("device_map")
    if isinstance(place, (int, torch.device)) or (isinstance(place, str) and place not in ("auto", "balanced", "sequential")):
        model = model.to(device=place)
    return (model, _NOTHING_MISSING) if options.get("output_loading_info") else model


_OF_THE_CALL = frozenset(
    ("model_type", "slimformer", "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype")
)
_NOTHING_MISSING: Mapping[str, Sequence[str]] = dict.fromkeys(
    ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ()
)
