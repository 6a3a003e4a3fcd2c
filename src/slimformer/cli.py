"""The command line: compress | frontier | run | bench | verify | report | inspect | serve | list | check | demo.

Each command is a few lines over a function that Python users call too. Errors a person can act on become one message and exit
status 2; anything else is a bug and keeps its traceback. Heavy imports stand inside commands, and the options of tasks are collected
only for the commands that have them, so that --help is quick.
"""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand
from typer.main import get_command

from slimformer.errors import TRAIN_PACKAGES, ModelError, RecipeError, SlimformerError, nearest, train_is_missing
from slimformer.log import show_log
from slimformer.training.launching import helps, launched, start_all

if TYPE_CHECKING:
    from slimformer.running.result import Result
    from slimformer.tasks.base import Task

DEFAULT_TASK = "classification"  # if no task is named and the model does not say what it is for


@cache
def _task_params() -> tuple[Any, ...]:
    """The option --task and the options of all tasks, ours and third parties'; tasks that share an option share its line."""
    tasks = _tasks()
    aliases = [alias for cls in tasks.values() for alias in cls.aliases]
    helps: dict[str, dict[str, list[str]]] = {}
    numbers: set[str] = set()
    for name, cls in tasks.items():
        hints = get_type_hints(cls)
        for flag, item in cls.flags().items():
            said = item.metadata["help"]
            if type(item.default) is int:
                said = f"{said.removesuffix('.')}; {item.default} by default."
            helps.setdefault(flag, {}).setdefault(said, []).append(name)
            numbers |= {flag} if hints[item.name] is int else set()

    def text(flag: str) -> str:
        parts = helps[flag].items()
        return " ".join(part if len(users) == len(tasks) else f"{part[:-1]} ({', '.join(users)})." for part, users in parts)

    shown = f"{', '.join((*tasks, *aliases))}; by default the task that fits the model."
    options = {"task": typer.Option("--task", help=shown, metavar="<name>")}
    for flag in helps:
        options[flag.strip("-").replace("-", "_")] = typer.Option(
            flag, help=text(flag), metavar="<int>" if flag in numbers else "<text>"
        )

    def holder(**_: Any) -> None:
        """Only its signature is used."""

    hints = {name: Annotated[str | None, made] for name, made in options.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=None, annotation=hint) for name, hint in hints.items()]
    holder.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    holder.__annotations__ = hints
    app = typer.Typer(add_completion=False)
    app.command()(holder)
    return tuple(get_command(app).params)


class _Command(TyperCommand):
    """A command that refuses an option which is given twice: the last would win, and nobody would know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        twice = next(
            (param for param in order if order.count(param) > 1 and not (param.multiple or getattr(param, "is_flag", False))),
            None,
        )
        if twice is not None:
            raise RecipeError(f"{twice.opts[0]} is given {order.count(twice)} times.", help="give it once.")
        return super().parse_args(ctx, args)


class _TaskCommand(_Command):
    """A command with the options of all tasks. Its function finds those that were given in the context: flag -> text.

    An option of the command itself goes before one of a task with the same flag.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        flags = {flag for param in params for flag in param.opts}
        first = next(place for place, param in enumerate(params) if not param.required)
        return [*params[:first], *(param for param in _task_params() if param.opts[0] not in flags), *params[first:]]

    def invoke(self, ctx: Any) -> Any:
        own = {param.name for param in self.params}
        texts = {param.opts[0]: ctx.params.pop(param.name) for param in _task_params() if param.name not in own}
        ctx.obj = {flag: text for flag, text in texts.items() if text is not None}
        return super().invoke(ctx)


app = typer.Typer(
    help="Makes a fine-tuned transformer several times smaller and faster, writes ONNX files, and measures what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: slimformer compress ./my-bert --data ./reviews --speedup 3 --out ./small",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from slimformer import __version__

        typer.echo(f"slimformer {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


ModelName = Annotated[str, typer.Argument(help="A model: a folder, or its name on the hub (owner/name).")]
RateOption = Annotated[
    float | None, typer.Option(help="Peak learning rate of the distillation; the model's width decides by default.")
]
BatchOption = Annotated[int, typer.Option(help="Examples per training step.")]
SeedOption = Annotated[int, typer.Option(help="Seed of all random numbers.")]
EngineOption = Annotated[
    str,
    typer.Option(help="'kernels' searches for the compiled kernels, which skip zeros; 'onnx' for ONNX Runtime alone."),
]
VocabularyOption = Annotated[
    str,
    typer.Option(help="'trim' cuts the word table to the pieces that the training texts need; 'whole' leaves it as it is."),
]


def _home(place: Path | None) -> Path | None:
    """The path with the home for its ~, which a shell leaves in --out=~/small."""
    return place and place.expanduser()


Out = Annotated[
    Path,
    typer.Option(
        help="Folder for the result; the same command resumes a run that was stopped.",
        callback=_home,
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to time with; all cores by default.")]
Wait = Annotated[
    float,
    typer.Option(
        "--wait", min=0, max=86_400, help="Seconds to wait in all for a quiet machine before timing; 0 does not wait."
    ),
]


@app.command(
    "compress",
    cls=_TaskCommand,
    epilog="Example: slimformer compress ./my-bert --data ./reviews --speedup 3 --max-loss 1 --out ./small",
)
def compress_command(
    context: typer.Context,
    model: ModelName,
    out: Out,
    speedup: Annotated[
        float, typer.Option(help="How many times as fast as the dense model in ONNX Runtime in fp32, at batch 32.")
    ] = 3.0,
    max_loss: Annotated[
        float, typer.Option(help="Points of the metric that the result may lose (0.01 of accuracy is one point).")
    ] = 1.0,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of distillation, copies of rows included; the data's size decides by default.")
    ] = None,
    lr: RateOption = None,
    batch_size: BatchOption = 32,
    tries: Annotated[
        int, typer.Option(help="How many sizes are trained at most, from the fastest on, if the loss is too large.")
    ] = 3,
    rivals: Annotated[
        bool, typer.Option(help="Also train a smaller dense model to compare with, which takes as long as the result itself.")
    ] = True,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Minutes for everything, rivals and the final measurement included; it says what is left out or shortened for it."
        ),
    ] = None,
    vocabulary: VocabularyOption = "whole",
    engine: EngineOption = "onnx",
    seed: SeedOption = 17,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Make a model smaller and faster, export it and report what that costs."""
    _need_train()
    from slimformer.running.recipe import RIVALS
    from slimformer.running.search import compress

    task = _task(context.obj, model)
    result = compress(
        model,
        task,
        out,
        speedup=speedup,
        max_loss=max_loss,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        tries=tries,
        rivals=RIVALS if rivals else tuple(name for name in RIVALS if name != "small-dense"),
        minutes=minutes,
        vocabulary=vocabulary,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        command=_command(),
        threads=threads,
        wait_seconds=wait,
    )
    _show(result)


@app.command(
    "frontier",
    cls=_TaskCommand,
    epilog="Example: slimformer frontier ./my-bert --data ./reviews --speedups 2,3,4,6,8 --minutes 60 --out ./family",
)
def frontier_command(
    context: typer.Context,
    model: ModelName,
    out: Out,
    speedups: Annotated[
        str, typer.Option(help="How many times as fast as the dense model in fp32 the models are at batch 32, in rising order.")
    ] = "2,3,4,6,8",
    megabytes: Annotated[
        str | None,
        typer.Option(
            help="For models that are asked for by their size too: the megabytes of the best file, in falling order. Such as 8,5."
        ),
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Points of the metric within which models are recommended; all of them are delivered.")
    ] = 1.0,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of distillation of each model; the data's size decides by default.")
    ] = None,
    lr: RateOption = None,
    batch_size: BatchOption = 32,
    rivals: Annotated[
        bool, typer.Option(help="Also train a smaller dense model, as long as the model of the middle speed.")
    ] = True,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes for everything; it says what is left out or shortened for it."),
    ] = None,
    vocabulary: VocabularyOption = "whole",
    engine: EngineOption = "onnx",
    latency: Annotated[
        Path | None,
        typer.Option(
            help="A table that `slimformer bench --levels` wrote on another machine: the speeds are then those there."
        ),
    ] = None,
    seed: SeedOption = 17,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Make models of several speeds and sizes in one run, each from the one before, and show the curves."""
    _need_train()
    from rich.console import Console

    from slimformer.reporting.family import draw_family
    from slimformer.running.frontier import compress_family
    from slimformer.running.recipe import RIVALS

    family = compress_family(
        model,
        _task(context.obj, model),
        out,
        speedups=_numbers(speedups, "--speedups", "x"),
        megabytes=_numbers(megabytes or "", "--megabytes", "MB"),
        max_loss=max_loss,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        rivals=RIVALS if rivals else tuple(name for name in RIVALS if name != "small-dense"),
        minutes=minutes,
        vocabulary=vocabulary,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        latency=latency,
        command=_command(),
        threads=threads,
        wait_seconds=wait,
    )
    console = Console()
    console.print(draw_family(family))
    console.print(f"models: {out / 'points'}   page: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    for line in family.lines():
        console.print(line, markup=False, highlight=False)
    if not family.kept:
        raise typer.Exit(1)


def _numbers(text: str, flag: str, unit: str) -> tuple[float, ...]:
    """Numbers with commas or spaces between them; each may have the unit behind it, as the models' names have: "2x,3x"."""
    parts = text.replace(",", " ").lower().split()
    try:
        return tuple(float(part.removesuffix(unit.lower())) for part in parts)
    except ValueError:
        raise RecipeError(
            f"{flag} must be numbers with commas between them, not {text!r}.", help=f"such as {flag} 2,3,4."
        ) from None


def _seeds(text: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--seeds must be whole numbers from 0 on, not {text!r}.", help="such as --seeds 1,2,3.")
    return tuple(map(int, parts))


def _need_cluster(address: str | None, processors: int | None) -> None:
    if address is None and processors is not None:
        raise RecipeError("--processors is for trainings on a cluster.", help="name one with --ray, or leave it out.")


RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="<address>",
        help="Train side by side on this Ray cluster ('auto', host:port), or 'local' for this machine.",
    ),
]
Processors = Annotated[
    int | None, typer.Option(min=1, help="Processors for each training on the cluster; by default all are shared out.")
]


@app.command("run", cls=_Command, epilog="Example: slimformer run recipes/sst2-fisher.yaml --out runs/sst2-fisher")
def run_command(
    recipes: Annotated[list[Path], typer.Argument(help="YAML recipes; each of several has a folder of its own below --out.")],
    out: Out,
    seeds: Annotated[
        str | None, typer.Option(metavar="<numbers>", help="Run each recipe with each of these seeds, such as 1,2,3.")
    ] = None,
    ray: RayAddress = None,
    processors: Processors = None,
    model: Annotated[
        str | None, typer.Option(help="The model to take instead of the recipe's: where it is on this machine, or a hub name.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data to take instead of those that the recipe names.")] = None,
    threads: Threads = None,
    wait: Wait = 60.0,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the outputs and files of teachers, which several runs can share; it may grow to gigabytes."
        ),
    ] = None,
) -> None:
    """Run a recipe, stage by stage, or several; run it again and it resumes."""
    _need_train()
    _need_cluster(ray, processors)
    if len(recipes) == 1 and seeds is None and ray is None:
        from slimformer.running.runner import run

        result = run(
            recipes[0], out, model=model, data=data, command=_command(), threads=threads, wait_seconds=wait, cache=cache
        )
        _show(result)
        return
    from slimformer.running.sweep import run_several

    found = run_several(
        recipes,
        out,
        seeds=_seeds(seeds),
        cluster=ray,
        processors=processors,
        model=model,
        data=data,
        threads=threads,
        wait_seconds=wait,
        cache=cache,
    )
    for line in found.lines():
        typer.echo(line)
    if (out / "report.html").is_file():
        typer.echo(f"page: {out / 'report.html'}")
    if found.failed:
        raise typer.Exit(1)


@app.command(
    "compare", cls=_Command, epilog="Example: slimformer compare recipes/mrpc-{fisher,movement}.yaml --hours 2 --out compared"
)
def compare_command(
    recipes: Annotated[list[Path], typer.Argument(help="YAML recipes for one task.")],
    out: Out,
    hours: Annotated[float, typer.Option(help="Hours for everything.", min=0.0)],
    part: Annotated[
        float, typer.Option(help="The share of its passes that a recipe has in its short run.", min=0.01, max=1.0)
    ] = 0.25,
    model: Annotated[
        str | None, typer.Option(help="The tuned model for all of them; their first plain training stages are left out.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data to take instead of those that the recipes name.")] = None,
    students: Annotated[
        int, typer.Option(help="Try so many students of smaller shapes of --model too, fast ones on this machine.", min=0)
    ] = 0,
    ray: RayAddress = None,
    processors: Processors = None,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Try several recipes within some hours; leave the models that no other beats."""
    _need_train()
    _need_cluster(ray, processors)
    from slimformer.running.comparing import compare_recipes

    limits: dict[str, Any] = {"hours": hours, "part": part, "threads": threads, "wait_seconds": wait}
    found = compare_recipes(
        recipes, out, model=model, data=data, students=students, cluster=ray, processors=processors, **limits
    )
    for line in found.lines():
        typer.echo(line)
    if not found.kept:
        raise typer.Exit(1)
    typer.echo(f"page: {out / 'report.html'}")


@app.command("bench", cls=_TaskCommand, epilog="Example: slimformer bench ./my-bert ./small --data ./reviews")
def bench_command(
    context: typer.Context,
    models: Annotated[list[Path], typer.Argument(help="Model folders or ONNX files to compare, the baseline first.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens an input may have; what the models allow by default.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help="onnxruntime by default; may be given several times.")] = None,
    seconds: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds to time each of the two workloads.")] = 60.0,
    levels: Annotated[
        Path | None,
        typer.Option(
            help="Instead, write here what heads and neurons of one model cost on this machine, for a recipe's `latency`."
        ),
    ] = None,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Compare models side by side, in turn: quality, size and speed on this machine."""
    from rich.console import Console

    if levels is not None:
        _measure_levels(models, context.obj, levels, threads, wait)
        return

    from slimformer.reporting.terminal import draw_table
    from slimformer.running.bench import bench

    measurement = bench(
        models,
        _task(context.obj, str(models[0])) if context.obj else None,
        runtimes=tuple(runtime or ("onnxruntime",)),
        max_length=max_length,
        threads=threads,
        seconds=seconds,
        wait_seconds=wait,
    )
    Console().print(draw_table(measurement.records))


def _measure_levels(models: list[Path], texts: Mapping[str, str], file: Path, threads: int | None, wait: float) -> None:
    """Writes the latency table of one model; RecipeError if there are several, or no data."""
    _need_train()
    from slimformer.running.levels import measure_table, write_levels

    if len(models) > 1:
        raise RecipeError(f"--levels times one model, and {len(models)} are named.", help="name the model that is to be cut.")
    if not texts:
        raise RecipeError("--levels needs the task's texts, whose lengths count.", help="say --data ./folder.")
    found = measure_table(models[0], _task(texts, str(models[0])), threads=threads, wait_seconds=wait)
    write_levels(found, file, str(models[0]), threads)
    typer.echo(f"table: {file}; name it in a recipe: `latency: {file.name}`")


@app.command(
    "verify", cls=_TaskCommand, epilog="Example: slimformer verify ./small --against ./my-bert --data ./reviews --max-loss 1"
)
def verify_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="The small model: a folder, or an .onnx file.")],
    against: Annotated[Path, typer.Option(help="The model that it stands in for.")],
    max_loss: Annotated[float | None, typer.Option(help="Points of the metric that may be lost; not asked by default.")] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="How many times as fast it has to be; not asked by default.")
    ] = None,
    max_mb: Annotated[float | None, typer.Option(help="Megabytes that its file may have; not asked by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="The batch whose speed counts: 1 or 32.")] = 32,
    sure: Annotated[
        bool, typer.Option("--sure", help="The intervals have to lie within the bounds, not the values alone.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the verdict there, for a program.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write it there as a table, for a pull request.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens an input may have; what the models allow by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds to time each of the two workloads.")] = 20.0,
    threads: Threads = None,
    wait: Wait = 60.0,
) -> None:
    """Answer for a pipeline whether a small model is still good enough: the exit status is 0 if so, else 1."""
    from slimformer.files import write_text
    from slimformer.running.verify import verify

    found = verify(
        model,
        against,
        _task(context.obj, str(model)) if context.obj else None,
        max_loss=max_loss,
        min_speedup=min_speedup,
        max_mb=max_mb,
        batch=batch,
        sure=sure,
        max_length=max_length,
        threads=threads,
        seconds=seconds,
        wait_seconds=wait,
    )
    for file, text in ((json_file, found.as_json()), (markdown, found.as_markdown())):
        if file is not None:
            write_text(file, text)
    for line in found.lines():
        typer.echo(line)
    if not found.met:
        raise typer.Exit(1)


@app.command("report", cls=_Command)
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders that compress or run left, or ledger files.")],
    out: Annotated[
        Path, typer.Option(help="Folder for report.html; not one of the runs, whose own page stands there.", callback=_home)
    ] = Path("report"),
) -> None:
    """Show quality against speed and size of all runs: a table and report.html."""
    from rich.console import Console

    from slimformer.reporting.page import report
    from slimformer.reporting.terminal import draw_table

    records = report(runs, out)
    Console().print(draw_table(records))
    typer.echo(f"page: {out / 'report.html'}")


@app.command("inspect", cls=_Command)
def inspect_command(
    model: ModelName,
    others: Annotated[
        list[Path] | None,
        typer.Argument(help="With --profile: .onnx files of the model, and folders of compressed ones, to profile beside it."),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=1_000_000, help="Tokens per example, 128 by default; with --profile it may be given several times."
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure where time and bytes go, by component and layer, instead.")
    ] = False,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=4096, help="With --profile: texts in a run; 1 and 32 by default.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="With --profile: a file with a text on each line, instead of random words; a tab parts a pair."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --profile: folder for profile.html.", callback=_home)] = None,
    threads: Threads = None,
) -> None:
    """Show what can be cut: sites, parameters and MACs per layer; or, with --profile, where the time goes."""
    _need_train()
    from rich.console import Console

    lengths = tuple(length or (128,))
    if profile:
        from slimformer.reporting.profiles import draw_profiles, write_profiles
        from slimformer.running.profiling import profile_model

        batches = tuple(batch or (1, 32))
        found = profile_model(model, others or (), lengths=lengths, batches=batches, threads=threads, texts=texts)
        for table in draw_profiles(found):
            Console().print(table, "")
        if out is not None:
            typer.echo(f"page: {write_profiles(found, out)}")
        return
    _refuse_extras(others, lengths, batch, texts or out)
    from slimformer.reporting.inspection import inspect
    from slimformer.reporting.terminal import draw_inspection

    Console().print(draw_inspection(inspect(model, lengths[0])))


def _refuse_extras(others: list[Path] | None, lengths: tuple[int, ...], batch: list[int] | None, path: Path | None) -> None:
    """RecipeError for what only a profile has."""
    from slimformer.errors import RecipeError

    if others or len(lengths) > 1 or batch or path is not None:
        raise RecipeError("several files or lengths, --batch, --texts and --out are of a profile.", help="add --profile.")


@app.command("join", cls=_Command, epilog="Example: slimformer join mood=./mood-bert topic=./topic-bert --out ./both")
def join_command(
    models: Annotated[list[str], typer.Argument(metavar="task=model ...", help="Each task and its classifier: task=./folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the joined model.", callback=_home)],
) -> None:
    """Join classifiers of one encoder to one model with an answer for each task."""
    _need_train()
    from slimformer.running.joining import join_classifiers

    pairs = [text.partition("=") for text in models]
    # A shell reads ~ at the beginning of a word only, and not in task=~/model.
    named = {name if mark else Path(name).name: os.path.expanduser(place) if mark else name for name, mark, place in pairs}
    if len(named) < len(models):
        raise RecipeError("two tasks have one name.", help="name each task: mood=./mood topic=./topic.")
    join_classifiers(named, out)


@app.command("serve", cls=_Command, epilog="Example: slimformer serve ./small --port 8000")
def serve_command(
    model: Annotated[Path, typer.Argument(help="A folder that compress or run wrote, or one with an ONNX file.")],
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine reaches it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")] = 8000,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; all cores by default.")] = None,
    max_length: Annotated[int | None, typer.Option(min=4, max=100_000, help="Tokens a text may have.")] = None,
    max_items: Annotated[int, typer.Option(min=1, help="Texts in a request.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=1, help="Texts that may wait; requests beyond are answered with 429.")] = 1024,
) -> None:
    """Serve a model over HTTP: embeddings, classes, scores of a query's texts, or spans."""
    from slimformer.serving.batching import Limits
    from slimformer.serving.server import serve

    limits = Limits(items=max_items, waiting=max_waiting)
    serve(model, host=host, port=port, threads=threads, max_length=max_length, limits=limits)


@app.command("list", cls=_Command, epilog="Example: slimformer list gates")
def list_command(
    name: Annotated[
        str | None,
        typer.Argument(help="Show every option of this method, task, exporter, form or stage (train, export, bench)."),
    ] = None,
) -> None:
    """List the families, methods, forms, tasks, exporters and runtimes there are, or the options of one."""
    _need_train()
    from slimformer import registry
    from slimformer.describing import STAGES, describe, lines_of

    if name is not None:
        typer.echo("\n\n".join("\n".join(lines_of(item)) for item in describe(name)))
        return
    for kind in registry.KINDS:
        typer.echo(f"{kind}:")
        for item in registry.names(kind):
            source = registry.source(kind, item)
            from_ = "" if source == "slimformer" else f" (from the package {source})"
            text = f"{item:<18} {registry.summary(kind, item)}{from_}"
            typer.echo(textwrap.fill(text, 80, initial_indent="  ", subsequent_indent=" " * 21))
    typer.echo(f"stages: {', '.join(STAGES)}\n`slimformer list NAME` shows the options of one.")


@app.command("check", cls=_Command)
def check_command(
    name: Annotated[
        str | None, typer.Argument(help="A family, method, form, task, exporter or runtime; all without it.")
    ] = None,
) -> None:
    """Check that plug-ins keep their contracts, on tiny models."""
    _need_train()
    from slimformer.testing.checks import check

    failed = False
    for line, good in check(name):
        failed |= not good
        typer.echo(f"{'ok    ' if good else 'FAILED'} {line}")
    if failed:
        raise typer.Exit(1)


@app.command("demo", cls=_Command)
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the result.", callback=_home)] = Path("demo"),
    speedup: Annotated[float, typer.Option(help="Times faster than the dense model.")] = 3.0,
    minutes: Annotated[float, typer.Option(help="Minutes for everything.")] = 4.7,
) -> None:
    """Compress a real six-layer BERT for a built-in task; needs the extra slimformer[demo]."""
    _need_train()
    from slimformer.demo import encoder
    from slimformer.running.search import compress
    from slimformer.tasks.intents import Intents

    _show(compress(encoder(), Intents(dev=800), out, speedup=speedup, max_loss=6.0, minutes=minutes, command=_command()))


def _tasks() -> dict[str, type[Task]]:
    from slimformer import registry

    return {name: registry.find("tasks", name) for name in registry.names("tasks")}


def _task(texts: Mapping[str, str], model: str | None = None) -> Task:
    """The task that options of the command line (flag -> text) mean; without --task, the one that the model is for.

    RecipeError for a task that does not exist, an option that the task does not have, and data that is not named.
    """
    tasks, name = _tasks(), texts.get("--task")
    texts = {flag: text for flag, text in texts.items() if flag != "--task"}
    if name is None:
        name = _task_of_model(tasks, model, texts.get("--data", "")) if model is not None else DEFAULT_TASK
        claiming = [other for other, cls in tasks.items() if cls.claims(texts.get("--data", ""))]
        name = claiming[0] if name == DEFAULT_TASK and claiming else name
        having = [other for other, cls in tasks.items() if set(texts) <= set(cls.flags())]
        name = having[0] if name == DEFAULT_TASK and len(having) == 1 else name  # an option that one task alone has
    if name in tasks:
        return tasks[name].from_flags(texts)
    for cls in tasks.values():
        if name in cls.aliases:
            return cls.from_flags(texts, cls.aliases[name])
    known = [*tasks, *(alias for cls in tasks.values() for alias in cls.aliases)]
    raise RecipeError(f"there is no task '{name}'.", help=nearest(name, known))


def _task_of_model(tasks: Mapping[str, type[Task]], model: str, data: str) -> str:
    """The task that reads the user's data and whose models have the head that this one has; its mistakes are reported later."""
    from slimformer.saving import checkpoint
    from slimformer.saving.hub import local_folder

    try:
        folder = local_folder(Path(model).parent if os.path.isfile(model) else model)
        fitting = [
            name for name, cls in tasks.items() if "--data" in cls.flags() and checkpoint.is_tuned(folder, cls.auto_class)
        ]
        config = checkpoint.read_config(folder)
        kind = checkpoint.base_type(config)
    except ModelError:
        return DEFAULT_TASK
    told = next((name for name, cls in tasks.items() if cls.made_for(config)), None)
    if told is not None:
        return told
    fitting = [name for name in fitting if tasks[name].reads(data) or checkpoint.is_cut_folder(config)]
    fitting = [name for name in fitting if kind in tasks[name].usual_for] or fitting
    if len(fitting) > 1 and DEFAULT_TASK not in fitting:
        raise RecipeError(f"{model} could be for {' or '.join(fitting)}.", help="name one of them: --task " + fitting[0])
    return fitting[0] if fitting and DEFAULT_TASK not in fitting else DEFAULT_TASK


def _show(result: Result) -> None:
    """The table, where everything lies, and last the verdict; exit status 1 if the result is worse than doing nothing."""
    from rich.console import Console

    from slimformer.reporting.terminal import draw_table
    from slimformer.reporting.verdicts import worthless

    console = Console()
    if not result.records:
        console.print(str(result), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(draw_table(result.records))
    console.print(f"model: {result.out}   page: {result.out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    for line in result.findings:
        console.print(line, markup=False, highlight=False)
    if worthless(result.record, result.records):
        raise typer.Exit(1)


def _need_train() -> None:
    """ExtraError, before anything starts, if this is the light installation."""
    for package in TRAIN_PACKAGES:
        if find_spec(package) is None:
            raise train_is_missing(package)


def _fitted(message: str) -> str:
    """A message whose lines break between words on a terminal; elsewhere it is left alone."""
    if not sys.stderr.isatty():
        return message
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.fill(line, width, subsequent_indent="    ") for line in message.splitlines())


def _command() -> str:
    return shlex.join(["slimformer", *sys.argv[1:]])


# How long an idle OpenMP thread spins (decision 0004), and how many kernels oneDNN caches (decision 0003).
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"}


def prefer_environment() -> None:
    """Sets what is not set yet. The first is read when torch is imported, the second with the first kernel."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


LAUNCHED = ("compress", "frontier", "run", "demo")  # commands that several processes may share


def main() -> None:
    """Entry point: errors a person can act on become one message and exit status 2."""
    prefer_environment()
    if sys.argv[1:2] and sys.argv[1] in LAUNCHED:
        start_all()
    if launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch would warn of parameters that a loss may use or not
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a launcher ends all processes if one of them died
        if helps():
            sys.exit(_help_out() if sys.argv[1:2] and sys.argv[1] in LAUNCHED and not {"--help", "-h"} & set(sys.argv) else 0)
    try:
        with show_log():
            app(prog_name="slimformer")
    except SlimformerError as error:
        typer.echo(_fitted(f"{type(error).__name__}: {error}"), err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer makes this of Ctrl-C and says nothing
            typer.echo("stopped; the same `compress`, `frontier`, `run` or `demo` goes on from here.", err=True)
        raise


def _help_out() -> int:
    """What a process does that a launcher started beside the first: it helps to train, and speaks only if it is left alone."""
    from slimformer.training.processes import join

    try:
        join()
    except (SlimformerError, KeyboardInterrupt):
        return 2  # the first process says why
    return 0
