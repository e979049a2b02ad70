"""The notebooks as their readers see them, for readme.py and build.py: directives followed.

nbdev's processors follow nbdev's directives. Quarto's (echo, include, output, label, fig-alt,
fig-cap), which they leave in place, are followed here as far as they hide something; all are
handed on in the metadata of the cell.
"""
import ast
import re
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, strip_ansi

NBS = Path(__file__).parents[1]
FIRST, LAST = ("index", "method"), ("own_images", "changing")   # pages beside the numbered ones
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")      # relative: path, anchor
CALLOUT = re.compile(  # kind, attributes, body
    r"^::: *\{\.callout-(\w+)([^}]*)\}\n(.*?)\n:::$", re.M | re.S)


def notebooks() -> list[Path]:
    "In the order of reading."
    named = lambda names: [NBS / f"{name}.ipynb" for name in names]
    return [*named(FIRST), *sorted(NBS.glob("[0-9]*.ipynb")), *named(LAST)]


def page(path: Path) -> str:
    "The name of a notebook's page: its own without the number, as nbdev has it."
    return re.sub(r"^\d+[a-z]?\d?_", "", path.stem)


def module_of(path: Path) -> str:
    "The full name of the module that a notebook exports; empty where it exports none."
    found = re.search(r"#\| default_exp (\w+)", path.read_text())
    return f"sac_lit.{found[1]}" if found else ""


def statements(source: str) -> list[ast.stmt]:
    "Those of a cell, without its magics and shell lines."
    return ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body


def title_of(attributes: str) -> str:
    "The title of a callout, empty where it has none."
    return (re.search(r'title="([^"]*)"', attributes) or ["", ""])[1]


def mark_export(cell) -> None:
    if "export" in (cell.directives_ or {}): cell.metadata["exported"] = True


def value(text: str) -> str:
    "That of a directive: plain, or quoted as in YAML."
    return re.sub(r'\\(["\\])', r"\1", text[1:-1]) if text[:1] == '"' else text.strip("'")


def follow(cell: nbformat.NotebookNode) -> bool:
    "Keep Quarto's options of a code cell as metadata `options`; false where it is not shown."
    if cell.cell_type != "code": return True
    lines = re.findall(r"^#\| *([\w-]+) *: *(.*?) *$", cell.source, re.M)
    options = {name: value(text) for name, text in lines}
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    cell.metadata["options"] = options
    if options.get("output") == "false": cell.outputs = []
    return options.get("include") != "false" and bool(cell.source.strip())


def read(path: Path, *more) -> nbformat.NotebookNode:
    "The notebook, by nbdev's processors and any more of them."
    procs = [mark_export, strip_ansi, hide_line, filter_stream_, clean_magics, hide_, *more]
    processed = NBProcessor(path, procs, process=True).nb
    nb = nbformat.reads(nb2str(processed), as_version=4)
    nb.cells = [cell for cell in nb.cells if follow(cell)]
    return nb
