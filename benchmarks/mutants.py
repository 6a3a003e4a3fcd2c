"""Breaks the package on purpose, one small change at a time, and counts how many of these mutants its tests notice.

mutmut makes the mutants (its operators, not its runner). Of each file a sample is drawn by a seed: first places, then one mutant of each.
What no run evaluates or only words is left out: annotations, decorators, docstrings, asserts, what is raised. A mutant is killed if a
test of its file's own test file fails, or takes far more time than without it. Tests that call the changed function run, the quick
ones first, with torch, the package and the tests imported already: the function gets its new code in a fork. What so survives, or is no
code of a function, is tried once more with the changed file in a copy of src/.

    python benchmarks/mutants.py --out mutants.jsonl                      # a second call goes on where the first stopped
    python benchmarks/mutants.py --out later.jsonl --again mutants.jsonl  # tries again only what survived, or has changed
    python benchmarks/mutants.py --show later.jsonl                       # the score of each file, and the survivors
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import importlib
import inspect
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/slimformer")
METHODS = (
    "distillation",
    "fisher",
    "gates",
    "group_lasso",
    "importance",
    "keep_zeros",
    "knowledge_sparse",
    "kronecker",
    "layers",
    "low_rank",
    "movement",
    "quantization",
)
TESTS = {  # file -> its own tests
    "core/budget.py": "tests/test_budget.py",
    "quantizing/grids.py": "tests/test_grids.py",
    "quantizing/calibration.py": "tests/test_calibration.py",
    "hooks/weights.py": "tests/test_weights.py",
    "hooks/points.py": "tests/test_points.py",
    "methods/_schedules.py": "tests/methods/test_schedules.py",
    **{f"methods/{name}.py": f"tests/methods/test_{name}.py" for name in METHODS},
    "forms/base.py": "tests/forms/test_forms.py",
    "forms/kronecker.py": "tests/forms/test_forms.py",
    "forms/low_rank.py": "tests/forms/test_low_rank_form.py",
    "hooks/gating.py": "tests/test_laws.py",
}
LINES, LEAST, MOST = 10, 15, 30  # a mutant for each so many lines of a file, within these bounds
PATIENCE = (
    4.0,
    10.0,
)  # times the seconds that tests take without a change, and seconds more: a mutant that takes longer is killed
WARM = (
    "torch",
    "transformers.models.bert.modeling_bert",
    "onnx",
    "onnxruntime",
    "scipy.stats",
    "sklearn.metrics",
    "hypothesis",
)
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


@dataclass(frozen=True)
class Mutant:
    """A file with one change. `change` names it, wherever it stands by now; `owner` is the function or method that it is in, or ""."""

    file: str
    line: int
    change: str
    owner: str
    code: str


@dataclass(frozen=True)
class Verdict:
    """What the tests said of one mutant."""

    file: str
    line: int
    change: str
    killed: bool
    how: str


@dataclass(frozen=True)
class Sight:
    """What a test does without any change: seconds of the processor, and the functions of the file that it calls."""

    seconds: float
    calls: tuple[str, ...]


def main() -> None:
    """Draws, tries and shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree whose src/ and tests/ are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a line of JSON for each mutant")
    parser.add_argument("--again", type=Path, help="the lines of an earlier run: what was killed there stays so")
    parser.add_argument("--only", default="", help="part of a file's name")
    parser.add_argument("--most", type=int, default=MOST, help="mutants of a file at most")
    parser.add_argument("--slow", action="store_true", help="tests marked slow too")
    parser.add_argument("--show", type=Path, help="shows the lines of a run")
    options = parser.parse_args()
    if options.show:
        show(read(options.show))
        return
    for name in WARM:
        importlib.import_module(name)
    done = {(verdict.file, verdict.change) for verdict in read(options.out)}
    killed = {(verdict.file, verdict.change): verdict for verdict in read(options.again) if verdict.killed}
    marks = () if options.slow else ("-m", "not slow")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options.root.resolve(), Path(name), options.out.resolve(), marks)
        for file in TESTS:
            if options.only in file:
                source = (options.root / PACKAGE / file).read_text(encoding="utf-8")
                todo = [
                    mutant for mutant in drawn(file, source, options.seed, options.most) if (file, mutant.change) not in done
                ]
                bench.note(*(killed[file, mutant.change] for mutant in todo if (file, mutant.change) in killed))
                bench.try_all(file, source, [mutant for mutant in todo if (file, mutant.change) not in killed])
    show(read(options.out))


# -- Drawing -------------------------------------------------------------------------------------------------------------------


def drawn(file: str, source: str, seed: int, most: int = MOST) -> list[Mutant]:
    """The sample of a file's mutants, in the order of its lines."""
    module, places = mutations(source)
    count = min(len(places), most, max(LEAST, min(MOST, len(source.splitlines()) // LINES)))
    draw = random.Random(f"{seed} {file}")
    sample = []
    for place in draw.sample(places, count):
        item = draw.choice(place)
        code = module.deep_replace(item.original_node, item.mutated_node).code
        lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0))[2:]
        line = int(lines[0].split()[1].split(",")[0].lstrip("-"))
        sample.append(Mutant(file, line, "\n".join(lines[1:]), owner_of(source, line), code))
    return sorted(sample, key=lambda mutant: mutant.line)


def mutations(source: str) -> tuple[Any, list[list[Any]]]:
    """The parsed file, and all its mutations by the place that they change."""
    import libcst
    from libcst.metadata import MetadataWrapper
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):  # type: ignore[misc]
        """mutmut's own, which passes decorated functions over because of how it runs mutants, and looks at every message."""

        def _skip_node_and_children(self, node: Any) -> bool:
            if isinstance(node, libcst.FunctionDef):
                return False
            words = isinstance(node, libcst.SimpleString) and " " in node.value
            return words or isinstance(node, (libcst.Raise, libcst.Assert)) or bool(super()._skip_node_and_children(node))

    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(libcst.parse_module(source)).visit(visitor)
    places: dict[Any, list[Any]] = {}
    for item in visitor.mutations:
        places.setdefault(item.original_node, []).append(item)
    return module, list(places.values())


def owner_of(source: str, line: int) -> str:
    """The function, or the method as Class.method, whose body has this line."""
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for item in inside:
            if isinstance(item, ast.FunctionDef) and item.lineno <= line <= (item.end_lineno or 0):
                return f"{node.name}.{item.name}" if isinstance(node, ast.ClassDef) else item.name
    return ""


# -- Trying --------------------------------------------------------------------------------------------------------------------


class Bench:
    """Tries the mutants of one file after the other, and writes a line for each verdict."""

    def __init__(self, root: Path, scratch: Path, out: Path, marks: Sequence[str]) -> None:
        self.root, self.scratch, self.out, self.marks = root, scratch, out, marks
        shutil.copytree(root / "src", scratch / "src", ignore=shutil.ignore_patterns("__pycache__"))

    def note(self, *verdicts: Verdict) -> None:
        """Writes verdicts down."""
        with self.out.open("a", encoding="utf-8") as lines:
            for verdict in verdicts:
                lines.write(json.dumps(asdict(verdict)) + "\n")
                print(f"{'killed' if verdict.killed else 'SURVIVED'} {verdict.file}:{verdict.line} {verdict.how}", flush=True)

    def try_all(self, file: str, source: str, mutants: Sequence[Mutant]) -> None:
        """First within one session of pytest, then what is left with the changed file in its place."""
        if not mutants:
            return
        left, seen = self.scratch / "left.json", self.scratch / "seen.json"
        for old in (left, seen):
            old.unlink(missing_ok=True)
        session = Session(self, file, mutants, seen, left)
        if forked(lambda: self.pytest([TESTS[file]], session)) or not left.exists():
            raise SystemExit(f"{TESTS[file]} fails without any change")
        sights = {name: Sight(*item) for name, item in json.loads(seen.read_text(encoding="utf-8")).items()}
        target = self.scratch / PACKAGE / file
        for index in json.loads(left.read_text(encoding="utf-8")):
            mutant = mutants[index]
            tests = tests_of(mutant, sights)
            if not tests:
                self.note(Verdict(file, mutant.line, mutant.change, False, "no test calls it"))
                continue
            target.write_text(mutant.code, encoding="utf-8")
            status = forked(lambda tests=tests: self.pytest(tests), sum(sights[name].seconds for name in tests) + 5)  # type: ignore[misc]
            self.note(Verdict(file, mutant.line, mutant.change, status != 0, f"in its place: {status}"))
            target.write_text(source, encoding="utf-8")

    def pytest(self, tests: Sequence[str], *plugins: Any) -> int:
        """In a fork: the status of these tests, with the copy of src/."""
        os.chdir(self.root)
        sys.dont_write_bytecode = True
        os.environ["PYTHONPATH"] = str(self.scratch / "src")
        sys.path.insert(0, str(self.scratch / "src"))
        temporary = self.scratch / f"tmp-{os.getpid()}"
        return int(pytest.main([*PYTEST, *self.marks, f"--basetemp={temporary}", *tests], plugins=list(plugins)))


class Session:
    """A plug-in of pytest that, instead of running the collected tests once, runs those of each mutant in a fork."""

    def __init__(self, bench: Bench, file: str, mutants: Sequence[Mutant], seen: Path, left: Path) -> None:
        self.bench, self.file, self.mutants, self.seen, self.left = bench, file, mutants, seen, left

    def pytest_runtestloop(self, session: Any) -> bool:
        gc.freeze()
        if forked(lambda: self.look(session.items)):
            os._exit(1)
        sights = {name: Sight(*item) for name, item in json.loads(self.seen.read_text(encoding="utf-8")).items()}
        items = {item.nodeid: item for item in session.items}
        left = []
        for index, mutant in enumerate(self.mutants):
            tests = tests_of(mutant, sights)
            module = sys.modules.get("slimformer." + self.file.removesuffix(".py").replace("/", "."))
            change = patch(module, mutant) if mutant.owner and tests else None
            if change is None:
                left.append(index)
                continue
            seconds = sum(sights[name].seconds for name in tests)
            status = forked(lambda change=change, tests=tests: self.run(change, [items[name] for name in tests]), seconds)  # type: ignore[misc]
            if status == 0:
                left.append(index)
            else:
                self.bench.note(Verdict(self.file, mutant.line, mutant.change, True, f"status {status}"))
        self.left.write_text(json.dumps(left), encoding="utf-8")
        return True

    def look(self, items: Sequence[Any]) -> int:
        """In a fork: runs each test without a change and writes down what it calls."""
        path, found = str(self.bench.scratch / PACKAGE / self.file), {}
        for item, following in zip(items, [*items[1:], None], strict=True):
            calls: set[str] = set()

            def note(frame: Any, _: str, __: Any, calls: set[str] = calls) -> None:
                if frame.f_code.co_filename == path:
                    calls.add(frame.f_code.co_qualname.split(".<locals>")[0])

            began = time.process_time()
            sys.settrace(note)
            try:
                failed = fails(item, following)
            finally:
                sys.settrace(None)
            if failed:
                return 1
            found[item.nodeid] = (time.process_time() - began, sorted(calls))
        self.seen.write_text(json.dumps(found), encoding="utf-8")
        return 0

    def run(self, change: Callable[[], None], items: Sequence[Any]) -> int:
        """In a fork: 1 if one of these tests fails with the change."""
        change()
        return int(any(fails(item, following) for item, following in zip(items, [*items[1:], None], strict=True)))


def fails(item: Any, following: Any) -> bool:
    """Whether a collected test fails."""
    from _pytest.runner import runtestprotocol

    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def tests_of(mutant: Mutant, sights: Mapping[str, Sight]) -> list[str]:
    """The tests that may notice a mutant, the quick ones first: those that call its function; all if it is in none."""
    some = [name for name, sight in sights.items() if not mutant.owner or mutant.owner in sight.calls]
    return sorted(some, key=lambda name: sights[name].seconds)


def patch(module: Any, mutant: Mutant) -> Callable[[], None] | None:
    """What gives the mutant's function its new code; None if that is not where the change is."""
    found: Any = module
    for part in mutant.owner.split("."):
        found = vars(found).get(part)
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    function = inspect.unwrap(found) if callable(found) else None
    code = dict(codes(compile(mutant.code, module.__file__, "exec"))).get(mutant.owner)
    old = getattr(function, "__code__", None)
    if code is None or old is None or code.co_freevars != old.co_freevars or like(code) == like(old):
        return None
    return lambda: setattr(function, "__code__", code)


def codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """The codes of functions and methods within, by their names."""
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield item.co_qualname, item
            yield from codes(item)


def like(code: CodeType) -> tuple[Any, ...]:
    """What a code does, without its lines."""
    values = tuple(like(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, values


def forked(work: Callable[[], int], seconds: float = 0.0) -> int:
    """What `work` returns, done in a child of its own and without output; its time is bounded if `seconds` tell what it should take."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_WRONLY)
            if not os.environ.get("MUTANTS_TALK"):
                os.dup2(nothing, 1)
                os.dup2(nothing, 2)
            if seconds:
                most = int(PATIENCE[0] * seconds + PATIENCE[1])
                resource.setrlimit(resource.RLIMIT_CPU, (most, most))
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- Showing -------------------------------------------------------------------------------------------------------------------


def read(file: Path | None) -> list[Verdict]:
    """The lines of a run; none if there was no run yet."""
    if file is None or not file.exists():
        return []
    return [Verdict(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def show(verdicts: Sequence[Verdict]) -> None:
    """The score of each file and of all, and the survivors."""
    print("| file | mutants | killed | score |\n|---|---|---|---|")
    groups = {file: [verdict for verdict in verdicts if verdict.file == file] for file in TESTS}
    for file, some in (groups | {"all": list(verdicts)}).items():
        if some:
            killed = sum(verdict.killed for verdict in some)
            print(f"| {file} | {len(some)} | {killed} | {killed / len(some):.0%} |")
    for verdict in verdicts:
        if not verdict.killed:
            print(f"\n{verdict.file}:{verdict.line} ({verdict.how})\n{verdict.change}")


if __name__ == "__main__":
    main()
