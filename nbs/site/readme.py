"""README.md from nbs/index.ipynb: `python nbs/site/readme.py`. Its figures go to docs/README_files.

directives.py follows the directives and nbconvert writes the Markdown. Figures and callouts are
written as GitHub shows them best.
"""
import base64
import posixpath
import re
import shutil
from pathlib import Path

import nbformat
from directives import CALLOUT, LINK, read, title_of
from nbconvert import MarkdownExporter
from nbdev.processors import rm_export

ROOT = Path(__file__).parents[2]
FIGURES = "docs/README_files"
NOTE = "<!-- Made from nbs/index.ipynb by nbs/site/readme.py: edit the notebook. -->"


def for_github(text: str) -> str:
    "Links are relative to the repository instead of nbs/; callouts become alerts."
    link = lambda m: f"]({posixpath.normpath(f'nbs/{m[1]}')}{m[2] or ''})"
    return CALLOUT.sub(alert, LINK.sub(link, text))


def alert(callout: re.Match) -> str:
    kind, attributes, body = callout.groups()
    title = title_of(attributes)
    heading = [f"**{title}**", ""] if title else []
    lines = [f"[!{kind.upper()}]", *heading, *body.strip().splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def take_figures(cell: nbformat.NotebookNode, number: int) -> dict[str, bytes]:
    "The PNGs of a cell by path; Markdown that shows them takes their place among its outputs."
    taken, options = {}, cell.metadata.options
    caption = options.get("fig-cap", "")
    for output in cell.outputs:
        if "image/png" not in output.get("data", {}): continue
        name = options.get("label", f"figure-{number}") + (f"-{len(taken) + 1}" if taken else "")
        path = f"{FIGURES}/{name}.png"
        taken[path] = base64.b64decode(output.data["image/png"])
        output.data = {"text/markdown": f"![{options.get('fig-alt', caption)}]({path})"}
    if taken and caption:
        data = {"text/markdown": f"*{caption}*"}
        cell.outputs.append(nbformat.v4.new_output("display_data", data))
    return taken


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its figures by path."
    nb, figures = read(notebook, rm_export), {}
    nb.metadata["language_info"] = {"name": "python"}   # names the fences
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = for_github(cell.source)
            continue
        hidden = cell.metadata.options.get("echo") == "false"
        if hidden: cell.metadata["transient"] = {"remove_source": True}
        figures |= take_figures(cell, len(figures) + 1)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return f"{NOTE}\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", figures


def main() -> None:
    text, figures = readme()
    (ROOT / "README.md").write_text(text)
    shutil.rmtree(ROOT / FIGURES, ignore_errors=True)
    (ROOT / FIGURES).mkdir(parents=True)
    for path, data in figures.items(): (ROOT / path).write_bytes(data)


if __name__ == "__main__": main()
