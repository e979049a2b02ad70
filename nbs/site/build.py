"""The site in docs/, from the notebooks and the outputs they hold: `python nbs/site/build.py`.

Nothing is executed. Each notebook becomes a notebook in MyST's words that ends with blocks for
what it exports (api.py); Sphinx makes the pages by conf.py. A warning, such as a link that leads
nowhere, is an error. A second build leaves no difference.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import api
import nbformat
from directives import CALLOUT, LINK, module_of, NBS, notebooks, page, read, statements, title_of
from nbformat.v4 import new_markdown_cell

SITE, ROOT = NBS / "site", NBS.parent
REPOSITORY = "https://github.com/sac-lit/sac_lit/blob/main"
KEPT = "README_files"   # of docs/, which readme.py fills
ICONS = re.compile(     # of all icons; site.css has the few that are used
    r"<script[^>]*fontawesome[.]js[^>]*></script>|@font-face{[^}]*fontawesome[^}]*}")
UNUSED = (
    "_static/scripts/fontawesome.js", "_static/vendor", "_static/images", "**/*.map",
    "**/*.LICENSE.txt", ".buildinfo", "objects.inv", "_sources", "_static/locales",
    "_static/*webpack-macros.html")
TAGS = {"echo": ("false", "remove-input"), "code-fold": ("true", "hide-input")}
HANDLED = "application/vnd.sac-lit.figure+json"   # of an output: the data of static/handled.js
BADGE = re.compile(r"\[!\[([^\]]*)\]\([^)]*badge[^)]*\)\]")   # an image from a network, in a link


def for_myst(text: str) -> str:
    "Links lead to pages; callouts become admonitions; a badge is a plain link."
    text = BADGE.sub(r"[\1]", text)
    text = LINK.sub(to_page, text)
    text = re.sub(r"\]\(([\w.]*#[^)\s]*)\)", lambda m: f"]({m[1].lower()})", text)   # as MyST's
    return CALLOUT.sub(admonition, text)


def to_page(link: re.Match) -> str:
    path, anchor = link.groups()
    if path.endswith(".ipynb"): return f"]({page(Path(path))}.ipynb{anchor or ''})"
    return f"]({REPOSITORY}/{path.removeprefix('../')})" if path.startswith("../") else link[0]


def admonition(callout: re.Match) -> str:
    kind, attributes, body = callout.groups()
    title = title_of(attributes) or kind.capitalize()
    return f":::{{admonition}} {title}\n:class: {kind}\n{body}\n:::"


def label(names: list[str], module: str) -> nbformat.NotebookNode:
    "A line above code that is part of the library: its module, and links to the reference below."
    link = '<a id="cell-{0}" href="#{1}.{0}">{0}</a>'
    links = " ".join(link.format(name, module) for name in names)
    return new_markdown_cell(f'<p class="library">{module} {links}</p>')


def adapt_code(cell: nbformat.NotebookNode, module: str | None) -> list[nbformat.NotebookNode]:
    "The cell with its options as tags of myst-nb; of several images, the last has the caption."
    body, options = statements(cell.source), cell.metadata.options
    exported = "exported" in cell.metadata
    names = [name for node in body for name in api.names_of(node)] if exported else []
    names = [name for name in names if not name.startswith("_")]
    tags = [tag for option, (value, tag) in TAGS.items() if options.get(option) == value]
    tags += ["library"] * bool(names)
    caption = options.get("fig-cap", "")
    alt = options.get("fig-alt", caption or "Figure that the text describes")
    mystnb = {"image": {"alt": alt}}
    fold = "code"
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        tags = [*tags, "hide-input"]
        fold = f"imports of the {'library' if exported else 'notebook'}"
    mystnb |= dict.fromkeys(("code_prompt_show", "code_prompt_hide"), fold)
    for data in (output.get("data", {}) for output in cell.outputs):
        if "text/markdown" in data: data["text/markdown"] = for_myst(data["text/markdown"])
    cell.metadata = {"tags": tags, "mystnb": mystnb}
    cells = [label(names, module), cell] if names else [cell]
    found = take_data(cell)
    if caption: add_caption(cells, caption)
    return cells + [handled(data) for data in found]


def take_data(cell: nbformat.NotebookNode) -> list[dict]:
    "The data of figures that can be handled, out of the outputs of a cell."
    found = [output.data[HANDLED] for output in cell.outputs if HANDLED in output.get("data", {})]
    cell.outputs = [output for output in cell.outputs if HANDLED not in output.get("data", {})]
    return found


def handled(data: dict) -> nbformat.NotebookNode:
    "Beside a still picture, what puts a figure that can be handled in its place."
    text = json.dumps(data, sort_keys=True, ensure_ascii=False).replace("</", r"<\/")
    script = '<script src="_static/handled.js" defer></script>'
    return new_markdown_cell(
        f'<script type="application/json" class="handled">{text}</script>\n{script}')


def add_caption(cells: list[nbformat.NotebookNode], caption: str) -> None:
    "Below the last image of the last cell; of several, that one gets a cell of its own."
    cell = cells[-1]
    if sum("image/png" in output.get("data", {}) for output in cell.outputs) > 1:
        last = deepcopy(cell)
        last.update(id=f"{cell.id}-last", outputs=[cell.outputs.pop()])
        last.metadata.tags = ["remove-input"]
        cells.append(last)
    cells[-1].metadata.mystnb = {**cell.metadata.mystnb, "figure": {"caption": caption}}


def adapt(path: Path, module: api.Module | None) -> nbformat.NotebookNode:
    "The notebook in MyST's words, with a reference at its end."
    nb, cells = read(path), []
    for cell in nb.cells:
        if cell.cell_type == "code": cells += adapt_code(cell, module and module.name)
        else:
            cell.source = for_myst(cell.source)
            cells.append(cell)
    if module: cells.append(new_markdown_cell(api.reference(module)))
    for i, cell in enumerate(cells): cell.id = f"cell{i}"   # new ones are random
    nb.cells = cells
    return nb


def write_sources(folder: Path) -> None:
    "What Sphinx reads: a notebook for each page, and the page of all names."
    paths = notebooks()
    modules = {path: api.module(name) for path in paths if (name := module_of(path))}
    for path in paths:
        nb = adapt(path, modules.get(path))
        if path.stem == "index": nb.cells.append(contents(paths[1:]))
        nbformat.write(nb, folder / f"{page(path)}.ipynb")
    names = api.summary({page(path): module for path, module in modules.items()})
    (folder / "reference.md").write_text(names)


def contents(paths: list[Path]) -> nbformat.NotebookNode:
    "The table of contents, which the side bar shows."
    number = lambda path: path.stem.split("_")[0] + " " if path.stem[0].isdigit() else ""
    entries = [f"{number(path)}{title(path)} <{page(path)}>" for path in paths]
    lines = ["```{toctree}", ":hidden:", "", *entries, "reference", "```"]
    return new_markdown_cell("\n".join(lines), id="toctree")


def title(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")


def build(out: Path) -> None:
    "The site in an empty or new folder."
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "source")
        html = Path(work, "build", "html")   # myst-nb writes beside html, too
        source.mkdir()
        write_sources(source)
        options = ["-q", "-W", "--keep-going", "-b", "html", "-c", SITE, "-d", Path(work, "trees")]
        env = os.environ | {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        done = subprocess.run([sys.executable, "-m", "sphinx", *options, source, html], env=env)
        if done.returncode: sys.exit("the site was not built, for the reasons above")
        tidy(html)
        shutil.copytree(html, out, dirs_exist_ok=True)


def tidy(html: Path) -> None:
    "Without what no page uses; with MathJax, so that equations need no network."
    for path in [path for pattern in UNUSED for path in html.glob(pattern)]: remove(path)
    for path in [*html.rglob("*.html"), *html.rglob("*.css")]:
        path.write_text(ICONS.sub("", path.read_text()))
    package = Path(find_spec("mathjax").origin).parent     # of django-static-mathjax
    shutil.copy(package / "static/mathjax/es5/tex-svg.js", html / "_static")
    (html / ".nojekyll").touch()


def remove(path: Path) -> None:
    if path.is_dir(): shutil.rmtree(path)
    else: path.unlink()


def main() -> None:
    docs = ROOT / "docs"
    with tempfile.TemporaryDirectory() as made:
        build(Path(made))
        for path in docs.iterdir():
            if path.name != KEPT: remove(path)
        shutil.copytree(made, docs, dirs_exist_ok=True)


if __name__ == "__main__": main()
