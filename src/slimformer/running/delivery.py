"""From a finished model to what a person holds: files, the choice among them on validation examples, the bench on dev, the page.

The one idea: whatever is chosen is chosen on the validation slice, whatever is reported is measured on dev, and the rivals run in the
same rounds as ours. Nothing is trained or cut here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimformer import registry
from slimformer.data.material import Material
from slimformer.exporters.base import FILES, OPENVINO, SHIPPED, Variant
from slimformer.running.bundle import Bundle, Run
from slimformer.saving import checkpoint
from slimformer.saving.files import whole_folder, write_text
from slimformer.saving.sparse import Values, rounding
from slimformer.tasks.base import Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimformer.measuring.records import Goal, Heading
    from slimformer.measuring.scoring import Entry, Measurement
from slimformer.running.rivals import Rival, facts_of, openvino_int8
from slimformer.running.trials import Trial, _digest, _fitted, _tuned, read_notes


def measure_all(entries: Sequence[Entry], material: Material, run: Run, heading: Heading, seconds: float) -> Measurement:
    """Everything side by side on dev: scores, sizes, speeds; the first entry is the baseline."""
    from slimformer.measuring.machine import quiet
    from slimformer.measuring.scoring import measure
    from slimformer.measuring.timing import Rounds

    load, rounds = quiet(run.wait_seconds), Rounds(30, seconds=seconds)
    return measure(entries, material.examples[Split.DEV], heading, rounds=rounds, load=load, seed=run.seed)


def _entry(item: Rival, material: Material, threads: int) -> Entry:
    from slimformer.measuring.scoring import Entry
    from slimformer.measuring.sessions import open_session

    session = open_session(item.path, threads, item.runtime)
    return Entry(
        name=item.name,
        role=item.role,
        precision=str(item.variant),
        session=session,
        task=_tuned(session, material),
        features=material.features[Split.DEV],
        facts=item.facts or {},
    )


def deliver(
    bundle: Bundle,
    exported: Path,
    out: Path,
    run: Run,
    *,
    best: Trial,
    rivals: Sequence[Rival],
    recipe: str,
    target: Goal | None,
    task_options: Mapping[str, Any],
    model_name: str,
    task_name: str,
    command: str,
    seconds: float = 60.0,
    openvino: bool = False,
    fused: bool = False,
    openvino_file: bool = False,
    values: Values = "float32",
) -> Measurement:
    """Measures the files in `exported` beside the rivals and fills `out`: model, ONNX files, card, page, ledger, recipe.

    `openvino`: our files of standard operators run there too, where it is installed. `fused`: the fused fp32 file that lies in `exported`
    is measured, not delivered. `openvino_file`: our model is delivered and measured as OpenVINO's own int8 file besides, made by NNCF.
    `values`: how large and sparse matrices are stored in model.safetensors; what rounding that means is in the log and on the card.
    The ledger row and every file that another tool needs are there when this returns; a call that was killed can be made again.
    """
    from slimformer.measuring.records import Facts, Heading, Standing
    from slimformer.reporting.answers import changed_answers
    from slimformer.reporting.card import Card, write_card
    from slimformer.reporting.ledger import LEDGER, append_record, write_facts
    from slimformer.reporting.page import Details, write_page

    material = bundle.material
    digest = _digest(recipe)
    shared = facts_of(bundle, bundle.teacher, run, digest, values)

    def mine(variant: str, path: Path, name: str = "", runtime: str = "onnxruntime", *, chosen: bool = False) -> Rival:
        facts = {**shared, "chosen": chosen, "target": target}
        return Rival(f"slimformer {name or FILES[variant].label}", str(Standing.OURS), path, variant, runtime, facts)

    ours = [mine(variant, exported / FILES[variant].name, chosen=variant == best.variant) for variant in SHIPPED]
    if openvino and find_spec("openvino") is not None:
        engine = registry.find("runtimes", "openvino")()
        standard = [item for item in ours if engine.accepts(item.path)]
        ours += [mine(item.variant, item.path, f"{FILES[item.variant].label} in OpenVINO", "openvino") for item in standard]
    if fused:
        ours.append(mine(Variant.FUSED, exported / FILES[Variant.FUSED].name))
    made = run.root / "openvino"
    if openvino_file:
        run.log.say("making OpenVINO's int8 file by NNCF.")
        path = openvino_int8(exported / FILES[Variant.FLOAT].name, bundle.model, material, made)
        ours.append(mine(Variant.INT8_STATIC, path, OPENVINO.label, "openvino"))
    entries = [_entry(item, material, run.threads) for item in (*rivals, *ours)]
    own = {FILES[variant].name: entry.task for variant, entry in zip(SHIPPED, entries[len(rivals) :], strict=False)}
    if openvino_file:
        own[OPENVINO.name] = entries[-1].task
    found = measure_all(entries, material, run, Heading(model_name, task_name), seconds)
    chosen = next(record for record in found.records if record.chosen)
    told = Facts(
        best=FILES[best.variant].name,
        task=dict(task_options),
        max_length=material.max_length,
        metric=material.task.metric,
        name=f"{model_name} (slimformer)",
        model=model_name,
        fitted={name: options for name, task in own.items() if (options := _fitted(material.task, task))},
        **shared,
    )
    with whole_folder(run.root / "delivery") as part:
        checkpoint.write(bundle.model, bundle.plan, part, tokenizer_from=material.source, values=values, ranges=bundle.ranges)
        stored = _stored(bundle.model, values)
        if stored:
            run.log.say(f"model.safetensors: {stored}.")
        for variant in SHIPPED:
            (part / FILES[variant].name).write_bytes((exported / FILES[variant].name).read_bytes())
        for file in made.iterdir() if openvino_file else ():
            (part / file.name).write_bytes(file.read_bytes())
        write_facts(part, told)
        write_text(part / "recipe.yaml", recipe)
        texts = [example.texts for example in material.examples[Split.DEV][:2]]
        notes = tuple(read_notes(exported).get(FILES[best.variant].name, []))
        code = own.get(chosen.file, material.task).snippet(part, chosen.file, texts, material.max_length)
        write_card(part, Card(chosen, found.records, code, base_model=model_name, notes=notes, stored=stored))
        before, after = found.scored[rivals[0].name], found.scored[chosen.name]
        differences = changed_answers(before, after, material.examples[Split.DEV])
        write_page(found.records, part / "report.html", Details(changed=differences, command=command))
        for record in found.records:
            append_record(part / LEDGER, record)
    for file in sorted((run.root / "delivery").iterdir()):
        file.replace(out / file.name)
    return found


def _stored(model: PreTrainedModel, values: Values) -> str:
    """What is to be said of values that are stored smaller; nothing where they are not."""
    if values == "float32":
        return ""
    lost = rounding(checkpoint.unshared(model), values, checkpoint.heads(model))
    how = f"rounded by at most {lost:.2g} of a matrix's largest" if lost else "exact"
    return f"matrices and word tables as {values}, {how}"
