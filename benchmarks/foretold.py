"""How far off the latency table is: untrained models that are cut in several ways, their times foretold and measured.

    python benchmarks/foretold.py my-bert --data ./reviews

All are plain int8 files, timed in one race with the uncut one, by whose time the table is scaled. docs/decisions/0045-foretold-times.md
has what came of it for a MiniLM of six layers, 12 heads and 1,536 neurons on SST-2.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from slimformer import registry
from slimformer.core.anatomy import Anatomy, Kind
from slimformer.core.plan import Plan
from slimformer.core.shrink import shrink
from slimformer.data.material import timed_rows
from slimformer.exporters.base import Variant
from slimformer.families.base import subject_of
from slimformer.log import Log, show_log
from slimformer.measuring.beside import make_readable
from slimformer.measuring.latency import Latency, measure_levels
from slimformer.measuring.machine import Quiet, cores
from slimformer.measuring.sessions import open_session
from slimformer.measuring.timing import Rounds, compare, workloads
from slimformer.running.preflight import preflight
from slimformer.running.prepare import prepare_bundle
from slimformer.running.recipe import Recipe
from slimformer.running.runner import Conditions, open_recipe
from slimformer.tasks.classification import Classification

FALLING = (0.95, 0.8, 0.6, 0.4, 0.2, 0.07)  # of the units of each layer, for a model of six


def plans(anatomy: Anatomy) -> dict[str, Plan]:
    """The cuts, by what they are called on the page."""
    layers = len(anatomy.stacks[0].layers)
    falling = np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(FALLING)), FALLING)
    shares: dict[str, np.ndarray | list[float]] = {
        "half of everything": [0.5] * layers,
        "a third of everything": [1 / 3] * layers,
        "early layers kept, late ones cut": falling,
        "late layers kept, early ones cut": falling[::-1],
        "little left, most of it early": falling**2 / 2,
        "one head and 64 neurons in each layer": [0.0] * layers,
    }

    def kept(share: np.ndarray | list[float]) -> Plan:
        keep = {}
        for site in anatomy.units:
            least = 1 if site.kind is Kind.HEADS else 64
            keep[site.id] = tuple(range(min(site.size, max(least, round(share[site.layer] * site.size)))))
        return Plan(keep)

    last = f"encoder.{layers - 1}"
    gone = {
        "no last layer": (f"{last}.attention", f"{last}.ffn"),
        "no feed-forward": [f"encoder.{i}.ffn" for i in range(layers)],
    }
    return {name: kept(share) for name, share in shares.items()} | {
        name: Plan(dict.fromkeys(ids, ())) for name, ids in gone.items()
    }


def main() -> None:
    reader = argparse.ArgumentParser(description="Foretold times beside measured ones, for untrained models that are cut.")
    reader.add_argument("model", help="the folder of a tuned classifier")
    reader.add_argument("--data", required=True)
    reader.add_argument("--seconds", type=float, default=15.0, help="of timing, for each of the two workloads")
    chosen = reader.parse_args()
    recipe = Recipe(chosen.model, Classification(data=chosen.data), ())
    with tempfile.TemporaryDirectory() as place, open_recipe(recipe, Path(place) / "run", Conditions(Log(None))) as run:
        run.root.mkdir(parents=True, exist_ok=True)
        bundle, _ = prepare_bundle(preflight(recipe), run)
        subject, material, quiet = bundle.subject, bundle.material, Quiet(5.0)
        levels = measure_levels(subject, material, run.root, cores(), run.log, quiet)
        exporter = registry.find("exporters", "onnx")(agreement=0.0)
        cut = {name: subject_of(shrink(subject.model, subject.anatomy, plan)) for name, plan in plans(subject.anatomy).items()}
        sessions = {}
        for name, small in {"uncut": subject, **cut}.items():
            file = Path(place) / name / exporter.kinds_for(small.model)[Variant.INT8_DYNAMIC].name
            file.parent.mkdir()
            exporter.export(small.model, material.batches(small.inputs)[:4], file, Variant.INT8_DYNAMIC, material.task.outputs)
            make_readable(small, material.source, file.parent)
            sessions[name] = open_session(file, cores())
        errors: dict[str, list[float]] = {name: [] for name in cut}
        one, many = workloads(timed_rows(material), limit=20)
        for work, table in ((many, levels), (one, levels.single or levels)):
            timings = compare(sessions, work, Rounds(40, seconds=chosen.seconds), quiet.load())
            uncut = Latency.of(subject.anatomy, table).cost.dense
            for name, small in cut.items():
                measured = float(np.median(timings[name].round_ms() / timings["uncut"].round_ms()))
                errors[name].append(100 * (Latency.of(small.anatomy, table).cost.dense / uncut / measured - 1))
        for name, (large, single) in errors.items():
            print(f"{name:40} batch 32 {large:+4.0f} %   batch 1 {single:+4.0f} %")


if __name__ == "__main__":
    with show_log():
        main()
