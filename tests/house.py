"""Where things are, for the tests about the repository itself."""
import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
NBS, LIB = ROOT / "nbs", ROOT / "sac_lit"
NUMBERED = sorted(NBS.glob("[0-9]*.ipynb"))  # in the order of reading
NOTEBOOKS = [*NUMBERED, *sorted(NBS.glob("[!0-9]*.ipynb"))]
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work)\b|site-package[s]/")  # a place that exists on one machine only


def cells(path: Path, kind: str | None = None) -> list:
    "The cells of a notebook, of one kind if given."
    return [c for c in nbformat.read(path, as_version=4).cells if kind in (None, c.cell_type)]


def module_of(path: Path) -> str:
    "The module that a notebook exports."
    return next(m[1] for c in cells(path, "code") if (m := re.match(r"#\| default_exp (\w+)", c.source)))


def parsed(code: str) -> ast.Module:
    "The syntax tree of a cell, without its magics and shell lines."
    return ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.M))


def imported(tree: ast.AST) -> set[str]:
    "Full names of the modules that some code imports, relative ones as `sac_lit.x`; `from x import *` as `x.*`."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(["sac_lit"] * (node.level > 0) + [node.module] * bool(node.module))
            found |= {f"{base}.*" if a.name == "*" else base if base != "sac_lit" else f"{base}.{a.name}" for a in node.names}
    return found


MODULES = [module_of(p) for p in NUMBERED]
