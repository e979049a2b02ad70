"""Where things are, for the tests about the repository itself."""
import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
NBS, LIB = ROOT / "nbs", ROOT / "sac_lit"
NUMBERED = sorted(NBS.glob("[0-9]*.ipynb"))  # in the order of reading
NOTEBOOKS = [*NUMBERED, *sorted(NBS.glob("[!0-9]*.ipynb"))]
MACHINE_PATH = re.compile(  # a place that exists on one machine only
    r"(?<![\w.~])/(?:home|root|tmp|work)\b|site-package[s]/")


def cells(path: Path, kind: str | None = None) -> list:
    "The cells of a notebook, of one kind if given."
    return [c for c in nbformat.read(path, as_version=4).cells if kind in (None, c.cell_type)]


def code_blocks(path: Path) -> list[str]:
    "The Python in the prose of a notebook, most of it answers of exercises."
    prose = "\n".join(c.source for c in cells(path, "markdown"))
    return re.findall(r"^```python\n(.*?)^```", prose, re.M | re.S)


def answer(notebook: str, name: str) -> str:
    "The code of an exercise's folded answer, which begins with the comment `# answer: name`."
    blocks = code_blocks(NBS / f"{notebook}.ipynb")
    return next(b for b in blocks if b.startswith(f"# answer: {name}\n"))


def module_of(path: Path) -> str:
    "The module that a notebook exports."
    found = (re.match(r"#\| default_exp (\w+)", c.source) for c in cells(path, "code"))
    return next(m[1] for m in found if m)


def parsed(code: str) -> ast.Module:
    "The syntax tree of a cell, without its magics and shell lines."
    return ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.M))


def exported(cell) -> bool:
    "Whether a cell is part of the library."
    return cell.cell_type == "code" and bool(re.match(r"#\|\s*export", cell.source))


def hidden(cell) -> bool:
    "Whether a cell is not shown."
    return cell.source.startswith(("#| hide", "#|hide"))


def code_lines(cell) -> list[str]:
    "The lines of code of a cell: no directives, no empty lines."
    return [x for x in cell.source.splitlines() if x.strip() and not x.lstrip().startswith("#|")]


def imported(tree: ast.AST) -> set[str]:
    "Full names of the modules that some code imports: `sac_lit.x`; `x.*` for `from x import *`."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        base = ".".join(["sac_lit"] * (node.level > 0) + [node.module] * bool(node.module))
        for alias in node.names:
            if alias.name == "*": found.add(f"{base}.*")
            else: found.add(base if base != "sac_lit" else f"{base}.{alias.name}")
    return found


MODULES = [module_of(p) for p in NUMBERED]
