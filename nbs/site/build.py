"""The site in docs/, from the notebooks and the outputs they hold: `python nbs/site/build.py`. Nothing is executed.

Each notebook becomes a notebook in MyST's words that ends with blocks for what it exports (api.py); Sphinx makes the
pages by conf.py. A warning, such as a link that leads nowhere, is an error. A second build leaves no difference.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

import api
from directives import CALLOUT, LINK, NBS, module_of, notebooks, page, read, statements, title_of

SITE, ROOT = NBS / "site", NBS.parent
KEPT = "README_files"   # of docs/, which readme.py fills
ICONS = re.compile(r"<script[^>]*fontawesome[.]js[^>]*></script>|@font-face{[^}]*fontawesome[^}]*}")   # of all icons; site.css has the few that are used
UNUSED = ("_static/scripts/fontawesome.js", "_static/vendor", "_static/images", "**/*.map", "**/*.LICENSE.txt", ".buildinfo", "objects.inv", "_sources", "_static/locales", "_static/*webpack-macros.html")
TAGS = {"echo": ("false", "remove-input"), "code-fold": ("true", "hide-input")}


def for_myst(text: str) -> str:
    "Links lead to pages; callouts become admonitions."
    callout = lambda m: f":::{{admonition}} {title_of(m[2]) or m[1].capitalize()}\n:class: {m[1]}\n{m[3]}\n:::"
    text = LINK.sub(lambda m: f"]({page(Path(m[1]))}.ipynb{m[2] or ''})" if m[1].endswith(".ipynb") else m[0], text)
    return CALLOUT.sub(callout, re.sub(r"\]\(([\w.]*#[^)\s]*)\)", lambda m: f"]({m[1].lower()})", text))   # Jupyter's anchors have capitals


def label(names: list[str], module: str) -> nbformat.NotebookNode:
    "A line above code that is part of the library: its module, and links to the reference below."
    links = " ".join(f'<a id="cell-{name}" href="#{module}.{name}">{name}</a>' for name in names)
    return new_markdown_cell(f'<p class="library">{module} {links}</p>')


def adapt_code(cell: nbformat.NotebookNode, module: str | None) -> list[nbformat.NotebookNode]:
    "The cell with its options as tags of myst-nb; of several images, the last has the caption."
    body, options = statements(cell.source), cell.metadata.options
    names = [name for node in body for name in api.names_of(node) if not name.startswith("_")] if "exported" in cell.metadata else []
    tags = [tag for option, (value, tag) in TAGS.items() if options.get(option) == value] + ["library"] * bool(names)
    mystnb = {"image": {"alt": options.get("fig-alt", options.get("fig-cap", "Figure that the text describes"))}}
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        tags = [*tags, "hide-input"]
        mystnb |= dict.fromkeys(("code_prompt_show", "code_prompt_hide"), f"imports of the {'library' if 'exported' in cell.metadata else 'notebook'}")
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}): output.data["text/markdown"] = for_myst(output.data["text/markdown"])
    cell.metadata = {"tags": tags, "mystnb": mystnb}
    cells = [label(names, module), cell] if names else [cell]
    if "fig-cap" not in options: return cells
    if sum("image/png" in o.get("data", {}) for o in cell.outputs) > 1:
        last = deepcopy(cell)
        last.update(id=f"{cell.id}-last", outputs=[cell.outputs.pop()])
        last.metadata.tags = ["remove-input"]
        cells.append(last)
    cells[-1].metadata.mystnb = {**mystnb, "figure": {"caption": options["fig-cap"]}}
    return cells


def adapt(path: Path, module: api.Module | None) -> nbformat.NotebookNode:
    "The notebook in MyST's words, with a reference at its end."
    nb = read(path)
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = for_myst(cell.source)
    nb.cells = [c for cell in nb.cells for c in (adapt_code(cell, module and module.name) if cell.cell_type == "code" else [cell])]
    if module: nb.cells.append(new_markdown_cell(api.reference(module)))
    for i, cell in enumerate(nb.cells): cell.id = f"cell{i}"   # new ones are random
    return nb


def write_sources(folder: Path) -> None:
    "What Sphinx reads: a notebook for each page, and the page of all names."
    paths = notebooks()
    modules = {p: api.Module(ROOT / f"{name.replace('.', '/')}.py") for p in paths if (name := module_of(p))}
    for path in paths:
        nb = adapt(path, modules.get(path))
        if path.stem == "index":
            entries = [f"{p.stem.split('_')[0]} {title(p)} <{page(p)}>" for p in paths[1:]]
            nb.cells.append(new_markdown_cell("\n".join(["```{toctree}", ":hidden:", "", *entries, "reference", "```"]), id="toctree"))
        nbformat.write(nb, folder / f"{page(path)}.ipynb")
    (folder / "reference.md").write_text(api.summary({page(path): module for path, module in modules.items()}))


def title(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")


def build(out: Path) -> None:
    "The site in an empty or new folder."
    with tempfile.TemporaryDirectory() as work:
        source, html = Path(work, "source"), Path(work, "build", "html")   # myst-nb writes beside html, too
        source.mkdir()
        write_sources(source)
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", SITE, "-d", Path(work, "trees"), source, html]
        if subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}).returncode: sys.exit("the site was not built, for the reasons above")
        for pattern in UNUSED:
            for path in html.glob(pattern): shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in [*html.rglob("*.html"), *html.rglob("*.css")]: path.write_text(ICONS.sub("", path.read_text()))
        mathjax = Path(find_spec("mathjax").origin).parent / "static/mathjax/es5/tex-svg.js"   # the package django-static-mathjax
        shutil.copy(mathjax, html / "_static")
        (html / ".nojekyll").touch()
        shutil.copytree(html, out, dirs_exist_ok=True)


def main() -> None:
    docs = ROOT / "docs"
    with tempfile.TemporaryDirectory() as made:
        build(Path(made))
        for path in docs.iterdir():
            if path.name != KEPT: shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(made, docs, dirs_exist_ok=True)


if __name__ == "__main__": main()
