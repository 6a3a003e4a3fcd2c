"""The steps of a recipe, each `Bundle -> Bundle`: Train, Calibrate, Export, Bench.

What leaves a stage is always a plain transformers model without hooks or masks. `advance` runs stages in order, keeps what each
made, and takes finished ones from disk, so that a killed run goes on where it was. Nothing here owns the loop or changes shapes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, final

import numpy as np

from slimformer import registry
from slimformer.core.plan import Decision
from slimformer.data.batching import collate, epoch_order
from slimformer.data.tokenizer import load_tokenizer
from slimformer.errors import PlanError, RecipeError
from slimformer.methods.base import Context, Method
from slimformer.saving import checkpoint
from slimformer.saving.files import whole_folder, write_text
from slimformer.tasks.base import Example, Features, Split
from slimformer.training.precision import looking

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slimformer.core.anatomy import Anatomy
    from slimformer.core.cost import Cost
from slimformer.data.material import Material, encode_text, subset, unlabelled
from slimformer.running.bundle import Bundle, Run

TASK_TEXT = "task"  # what `Train.text` calls the task's own training texts
VALIDATION_ROWS = 2000  # of the validation slice that a choice looks at: one standard error is then below a point


class Stage(ABC):
    """A frozen dataclass of options with one verb."""

    kind: ClassVar[str]

    @abstractmethod
    def run(self, bundle: Bundle, run: Run) -> Bundle: ...

    def digest(self) -> str:
        """Names the stage and all its options."""
        return f"{type(self).__name__}:{self!r}"


def advance(stages: Sequence[Stage], bundle: Bundle, run: Run) -> Bundle:
    """Runs stages in order; those that a former run finished with the same options on the same model are read back."""
    from slimformer.training.runstate import model_digest

    key = hashlib.sha256(f"{model_digest(bundle.model)}{bundle.plan.digest()}{run.seed}{bundle.material.task!r}".encode())
    for number, stage in enumerate(stages, 1):
        key.update(stage.digest().encode())
        folder = run.folder / f"{number}-{stage.kind}-{key.hexdigest()[:10]}"
        done = folder / "made"
        if (done / "facts.json").is_file():
            bundle = _restore(bundle, done)
            run.log.say(f"stage {number} ({stage.kind}) is done already; going on from it.")
            continue
        clock = Clock(folder)
        made = stage.run(bundle, run.under(folder.name))
        minutes = clock.stop()
        import torch

        from slimformer.measuring.machine import peak_rss_bytes

        peak = max(bundle.peak_rss_bytes, peak_rss_bytes())
        bundle = replace(made, minutes=bundle.minutes + minutes, threads=torch.get_num_threads(), peak_rss_bytes=peak)
        _keep(bundle, done)
        for item in folder.iterdir():
            if item != done:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        run.log.event("stage", stage=stage.kind, number=number, minutes=round(minutes, 2))
    return bundle


class Clock:
    """Notes in a folder how long the work there has taken, so that a killed run's minutes are not forgotten."""

    def __init__(self, folder: Path) -> None:
        import threading

        self._folder, self._earlier, self._begin = folder, _spent(folder), time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> float:
        """Ends the counting: minutes in all."""
        self._end.set()
        self._thread.join()
        write_text(self._folder / "seconds", f"{self._seconds():.1f}")
        return self._seconds() / 60

    def _seconds(self) -> float:
        return self._earlier + time.monotonic() - self._begin

    def _tick(self) -> None:
        while not self._end.wait(10):
            write_text(self._folder / "seconds", f"{self._seconds():.1f}")


def _spent(folder: Path) -> float:
    try:
        return float((folder / "seconds").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _keep(bundle: Bundle, folder: Path) -> None:
    with whole_folder(folder) as part:
        checkpoint.write(bundle.model, bundle.plan, part, tokenizer_from=bundle.material.source, ranges=bundle.ranges)
        facts = {"minutes": bundle.minutes, "threads": bundle.threads, "peak_rss_bytes": bundle.peak_rss_bytes}
        (part / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _restore(bundle: Bundle, folder: Path) -> Bundle:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    ranges = checkpoint.load_ranges(folder)
    return replace(bundle, model=checkpoint.load(folder), plan=checkpoint.load_plan(folder), ranges=ranges, **facts)


def refuse_cuts(methods: Sequence[Method], model: PreTrainedModel) -> None:
    """PlanError, before any work is done, where a method would choose among units whose matrices are factored already."""
    from slimformer.families.base import anatomy_of

    cutting = [registry.name_of(method) for method in methods if method.effects().cuts]
    if not cutting:
        return
    anatomy = anatomy_of(model)
    for site in anatomy.sites.values():
        factored = anatomy.factored(site)
        if factored:
            raise PlanError(
                f"{cutting[0]} chooses what to cut, and '{site.id}' can no longer be cut: '{factored[0].id}' is stored as "
                f"{factored[0].form}.",
                help="cut first, factor after.",
            )


def context_of(bundle: Bundle, run: Run, model: PreTrainedModel, cost: str) -> Context:
    """The context of a stage's methods; `cost` is what their budgets count."""
    import torch

    from slimformer.families.base import anatomy_of, family_of

    anatomy = anatomy_of(model)
    names = (*family_of(model.config.model_type).inputs(model), "labels")
    features = bundle.material.features[Split.TRAIN]

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        taken, device = 0, next(model.parameters()).device  # training moves the model after this context is made
        for rows in epoch_order(features.lengths(), 32, run.seed, 0):
            if taken >= count:
                return
            rows = rows[: count - taken]
            taken += len(rows)
            yield {name: torch.from_numpy(array).to(device) for name, array in collate(features, rows, names).items()}

    return Context(
        model=model,
        anatomy=anatomy,
        plan=bundle.plan,
        task=bundle.material.task,
        cost=cost_of(cost, model, anatomy, bundle.material, run),
        teacher=bundle.teacher,
        teacher_anatomy=anatomy_of(bundle.teacher),
        batches=batches,
        generator=torch.Generator().manual_seed(run.seed),
        memo=run.memo,
    )


def cost_of(unit: str, model: PreTrainedModel, anatomy: Anatomy, material: Material, run: Run) -> Cost:
    """What a plan costs in "parameters", in "macs" of an average training example, or in measured "latency"."""
    from slimformer.core import cost
    from slimformer.measuring.latency import measured

    if unit == "parameters":
        return cost.parameters(model, anatomy)
    if unit == "macs":
        return cost.macs(anatomy, material.features[Split.TRAIN].lengths())
    if unit == "latency":
        return measured(model, anatomy, material, run).cost
    raise RecipeError(f"there is no cost '{unit}'.", help="use macs, parameters or latency.")


@final
@dataclass(frozen=True)
class Train(Stage):
    """Trains with any methods; none is plain fine-tuning. What the methods decide is cut at the end.

    `text`: a file with a text on each line, or "task" for the task's own training texts: then no labels are read, the task's loss
    is left out, and all there is to learn comes from the teacher.
    `augment`: copies of each row with words replaced by like ones, from the embedding table or from the masked language model in the
    folder `augment_model`; an epoch is then 1 + augment times as long. For distillation: labels may no longer fit.
    """

    methods: tuple[Method, ...] = ()
    epochs: float = 3.0
    lr: float = 3e-5
    batch_size: int = 32
    task_weight: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.1
    freeze: Literal["nothing", "embeddings", "encoder", "everything"] = "nothing"
    dropout: bool = True  # off where a student should follow its teacher closely and there is little time
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    trackers: tuple[str, ...] = ()
    text: str | None = None
    augment: int = 0
    augment_model: str | None = None

    kind: ClassVar[str] = "train"
    __pydantic_config__: ClassVar[dict[str, bool]] = {"arbitrary_types_allowed": True}  # a method is a class of its own

    def __post_init__(self) -> None:
        if self.augment < 0:
            raise ValueError(f"augment must be 0 or above, got {self.augment}")
        if self.augment_model is not None and not self.augment:
            raise ValueError("augment_model says how words are replaced: set augment too")

    def settings(self, seed: int) -> Any:
        from slimformer.training.loop import Freeze, Settings

        ours = {"methods", "dropout", "text", "augment", "augment_model"}
        options = {name: value for name, value in vars(self).items() if name not in ours}
        if self.text is not None:
            options["task_weight"] = 0.0
        return Settings(**{**options, "freeze": Freeze(self.freeze)}, seed=seed)

    def prepared(self, bundle: Bundle, run: Run) -> Context:
        """A copy of the bundle's model ready to train, with all that stands around its methods."""
        import torch

        refuse_cuts(self.methods, bundle.model)
        deciding = [method.cost for method in self.methods if method.effects().chooses]
        model = copy.deepcopy(bundle.model)
        if not self.dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        return context_of(bundle, run, model, deciding[0] if deciding else "macs")

    def rows(self, bundle: Bundle, run: Run) -> Features:
        """What is trained on: the task's rows or a text's, augmented where that is asked for."""
        features = self._plain_rows(bundle.material)
        if not self.augment:
            return features
        from slimformer.data.augmentation import augment_rows
        from slimformer.forms.base import Formed

        masked = checkpoint.load_dense(Path(self.augment_model)) if self.augment_model else None
        words = bundle.teacher.get_input_embeddings()  # its neighbours mean something, whatever became of the student's
        table = words.matrix().detach() if isinstance(words, Formed) else cast("Tensor", words.weight)
        run.log.event("augmenting", rows=len(features), copies=self.augment)
        return augment_rows(features, load_tokenizer(bundle.material.source), table, self.augment, run.seed, masked)

    def _plain_rows(self, material: Material) -> Features:
        if self.text is None:
            return material.features[Split.TRAIN]
        if self.text == TASK_TEXT:
            return unlabelled(material.features[Split.TRAIN])
        return encode_text(Path(self.text), load_tokenizer(material.source), material.max_length)

    def run(self, bundle: Bundle, run: Run) -> Bundle:
        from slimformer.training.loop import train

        context = self.prepared(bundle, run)
        features = self.rows(bundle, run)
        if self.text is not None:
            run.log.say(f"learning from the teacher on {len(features):,} texts without labels.")
        trained = train(
            context,
            features,
            self.methods,
            self.settings(run.seed),
            run.folder,
            run.log,
            evaluate=lambda model: validation_score(model, bundle.material),
            cache=run.cache or run.root,
        )
        decision = trained.decision
        small = _cut(context, decision, run)
        if not self.dropout:
            _copy_dropout(bundle.model, small)
        run.log.event("trained", **{name: value for name, value in vars(trained).items() if name != "decision"})
        return replace(bundle, model=small, plan=bundle.plan.then(decision.plan), ranges=decision.ranges)


def _cut(context: Context, decision: Decision, run: Run) -> PreTrainedModel:
    """The model that a stage's decision leaves, with what is to be said of it; TargetError where that would be nothing."""
    from slimformer.core.budget import something_left
    from slimformer.core.shrink import shrink

    something_left(context.anatomy, decision.plan)
    for note in decision.notes:
        run.log.say(note)
    return shrink(context.model.eval(), context.anatomy, decision)


def _copy_dropout(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Gives each dropout of `target` the rate it has in `source`; sublayers that went took theirs along."""
    import torch

    rates = {name: module.p for name, module in source.named_modules() if isinstance(module, torch.nn.Dropout)}
    for name, module in target.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rates[name]


@final
@dataclass(frozen=True)
class Calibrate(Stage):
    """A one-shot method: looks at some batches, decides, cuts; no optimiser."""

    method: Method

    kind: ClassVar[str] = "calibrate"

    def run(self, bundle: Bundle, run: Run) -> Bundle:
        name = registry.name_of(self.method)
        refuse_cuts((self.method,), bundle.model)
        run.log.say(f"{name}: choosing {'how to store it' if self.method.effects().factors else 'what to keep'}.")
        context = context_of(bundle, run, copy.deepcopy(bundle.model), self.method.cost)
        state = self.method.attach(context)
        try:
            decision = self.method.decide(state, context)
        finally:
            state.close()
        small = _cut(context, decision, run)
        return replace(bundle, model=small, plan=bundle.plan.then(decision.plan), ranges=decision.ranges)


def validation_score(model: PreTrainedModel, material: Material) -> float:
    """The task's metric of a model in PyTorch on the validation slice, with what is fitted there."""
    outputs, features, examples = torch_outputs(model, material, Split.VALIDATION, VALIDATION_ROWS)
    return material.task.tune(outputs, features, examples).score(outputs, features, examples)[material.task.metric]


def torch_outputs(
    model: PreTrainedModel, material: Material, split: Split, limit: int
) -> tuple[dict[str, np.ndarray], Features, Sequence[Example]]:
    """What a model in memory says about at most `limit` examples of a split."""
    import torch

    from slimformer.families.base import family_of
    from slimformer.measuring.scoring import evaluate

    features, examples = subset(material, split, limit)
    names = family_of(model.config.model_type).inputs(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def runner(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad(), looking(device):
            output = model(**{name: torch.from_numpy(batch[name]).to(device) for name in names if name in batch})
        return {name: output[name].float().cpu().numpy() for name in material.task.outputs}

    try:
        return dict(evaluate(runner, features, 64)), features, examples
    finally:
        model.train(was_training)
