"""The parts of the site that stand outside docs/: pages made of files elsewhere in the clone, and links to them.

On disk, links between pages are those that a reader of the clone follows (`../recipes/x.yaml`). On the site, files
outside docs/ become pages (PAGES), sections of one page (recipes) or plain files (the recipe.yaml of a ledger), and
each link is turned to the new place of its target. A line `<!-- include: ... -->` is replaced by the text that it
names, so that no page repeats by hand what another file says.
"""

from __future__ import annotations

import ast
import os.path
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "slimformer"
PAGES = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "results/README.md": "ledger.md",
    "README.md": "index.md",
}
FOLDERS = {
    "recipes": "recipes.md",
    "src/slimformer/methods": "reference/methods.md",
    "src/slimformer/tasks": "reference/tasks.md",
}
HOME = re.compile(r"<!-- home:begin -->\n(.*?)<!-- home:end -->", re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=[)\s])")
HEAD = re.compile(r"((?:#[^\n]*\n)*)(.*)", re.DOTALL)  # of a recipe: its first comment, the rest
INCLUDE = re.compile(r"^<!-- include: ([\w./*]+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and files from outside docs/."""
    for source, page in PAGES.items():
        if source != "README.md":
            files.append(File.generated(config, page, content=moved((ROOT / source).read_text(encoding="utf-8"), source, page)))
    for recipe in sorted(ROOT.glob("results/**/recipe.yaml")):
        files.append(File.generated(config, recipe.relative_to(ROOT).as_posix(), abs_src_path=str(recipe)))
    decisions = sorted(ROOT.glob("docs/decisions/[0-9]*.md"))
    project = next(part["Project"] for part in config.nav if "Project" in part)
    project[0] = {"Decisions": ["decisions/README.md", *(f"decisions/{page.name}" for page in decisions)]}
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page with its includes filled in and its links turned."""
    name = page.file.src_uri
    text = INCLUDE.sub(lambda asked: included(asked[1], name), markdown)
    return text if name in PAGES.values() and name != "index.md" else moved(text, f"docs/{name}", name)


# -- Links ---------------------------------------------------------------------------------------------------------------------


def moved(text: str, source: str, page: str) -> str:
    """`text` of the file `source`, with the links that it has there turned to what they are on `page`; code is left alone."""
    parts = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.DOTALL)
    turn: Callable[[re.Match[str]], str] = lambda link: turned(link[1], source, page)  # noqa: E731
    return "".join(part if index % 2 else LINK.sub(turn, part) for index, part in enumerate(parts))


def turned(link: str, source: str, page: str) -> str:
    """A link of the file `source` as the site's `page` has to write it."""
    if re.match(r"[a-z]+:|#|/", link):
        return link
    path, _, anchor = link.partition("#")
    target = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / path)).as_posix()
    place, anchor = placed(target, anchor)
    return os.path.relpath(place, PurePosixPath(page).parent.as_posix() or ".") + (f"#{anchor}" if anchor else "")


def placed(target: str, anchor: str) -> tuple[str, str]:
    """Where a file of the clone stands in the site: page and anchor."""
    file = PurePosixPath(target)
    if target in PAGES or target in FOLDERS:
        return PAGES.get(target) or FOLDERS[target], anchor
    if file.parts[0] == "docs":
        return PurePosixPath(*file.parts[1:]).as_posix(), anchor
    if file.parts[0] == "recipes":
        return "recipes.md", file.stem
    if file.suffix == ".py" and file.parts[:2] == ("src", "slimformer"):
        return f"reference/{'core' if file.parts[2] not in ('methods', 'tasks') else file.parts[2]}.md", dotted(ROOT / target)
    return target, anchor  # a ledger's recipe.yaml; anything else is a broken link, and the build says so


# -- Includes ------------------------------------------------------------------------------------------------------------------


def included(what: str, page: str) -> str:
    """The text that a page asks for: README's first part, all recipes, or the reference of names and modules."""
    if what == "README.md":
        (shown,) = HOME.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        return moved(shown, "README.md", f"docs/{page}")
    if what == "recipes":
        return "\n".join(recipes())
    if what == "slimformer.__all__":
        return "\n\n".join(f"::: slimformer.{name}" for name in public_names())
    pattern = what if what.endswith(".py") else f"{what}/[a-z]*.py"
    files = [file for file in sorted(PACKAGE.glob(pattern)) if file.name != "base.py" or what == "*/base.py"]
    shown = "|".join(public_names())  # each name has one place in the reference: the public ones have a page
    options = f'    options:\n      show_root_full_path: true\n      filters: ["!^_", "!^({shown})$"]'
    return "\n\n".join(f"::: {dotted(file)}\n{options}" for file in files)


def recipes() -> Iterator[str]:
    """Each recipe under its name: the comment at its head as text, the rest as it stands."""
    for file in sorted(ROOT.glob("recipes/*.yaml")):
        head, code = HEAD.match(file.read_text(encoding="utf-8")).groups()  # type: ignore[union-attr]
        about = re.sub(r"^# ?", "", head, flags=re.MULTILINE)
        about = re.sub(r"(^|[.:] )(\w+)(?=: )", r"\1`\2`", about, flags=re.MULTILINE)  # fields that the text explains
        yield f"## {file.stem}\n\n{about}\n```yaml\n{code}```\n"


def public_names() -> list[str]:
    """slimformer.__all__, read without importing anything."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    names: list[str] = ast.literal_eval(value)
    return names


def dotted(file: Path) -> str:
    """The name that a module is imported by."""
    return ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
