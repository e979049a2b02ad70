"""README.md from nbs/index.ipynb: `python nbs/site/readme.py`. Its figures go to docs/README_files.

nbdev's processors follow nbdev's directives and nbconvert writes the Markdown. Quarto's directives (echo, include,
output, label, fig-alt, fig-cap) and callouts, which neither of them knows, are followed here, as GitHub shows them best.
"""
import base64
import posixpath
import re
import shutil
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, strip_ansi

ROOT = Path(__file__).parents[2]
FIGURES = "docs/README_files"
NOTE = "<!-- Made from nbs/index.ipynb by nbs/site/readme.py: edit the notebook. -->"


def for_github(text: str) -> str:
    "Links are relative to the repository instead of nbs/; callouts become alerts."
    link = lambda m: f"]({posixpath.normpath(f'nbs/{m[1]}')}{m[2] or ''})"
    text = re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)
    return re.sub(r"^::: *\{\.callout-(\w+)([^}]*)\}\n(.*?)\n:::$", alert, text, flags=re.M | re.S)


def alert(callout: re.Match) -> str:
    kind, attributes, body = callout.groups()
    title = re.search(r'title="([^"]*)"', attributes)
    lines = [f"[!{kind.upper()}]", *([f"**{title[1]}**", ""] if title else []), *body.strip().splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def take_figures(cell: nbformat.NotebookNode, options: dict, number: int) -> dict[str, bytes]:
    "The PNGs of a cell by path; Markdown that shows them takes their place among its outputs."
    taken = {}
    for output in cell.outputs:
        if "image/png" not in output.get("data", {}): continue
        path = f"{FIGURES}/{options.get('label', f'figure-{number}')}{f'-{len(taken) + 1}' if taken else ''}.png"
        taken[path] = base64.b64decode(output.data["image/png"])
        output.data = {"text/markdown": f"![{options.get('fig-alt', options.get('fig-cap', ''))}]({path})"}
    if taken and "fig-cap" in options: cell.outputs.append(nbformat.v4.new_output("display_data", {"text/markdown": f"*{options['fig-cap']}*"}))
    return taken


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its figures by path."
    procs = [strip_ansi, hide_line, filter_stream_, rm_export, clean_magics, hide_]
    nb = nbformat.reads(nb2str(NBProcessor(notebook, procs, process=True).nb), as_version=4)
    nb.metadata["language_info"] = {"name": "python"}   # names the fences
    figures, kept = {}, []
    for cell in nb.cells:
        options = {k: v.strip("\"'") for k, v in re.findall(r"^#\| *([\w-]+) *: *(.*?) *$", cell.source, re.M)} if cell.cell_type == "code" else {}
        if options.get("include") == "false": continue
        kept.append(cell)
        if cell.cell_type == "markdown":
            cell.source = for_github(cell.source)
            continue
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if options.get("output") == "false": cell.outputs = []
        if options.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
        figures |= take_figures(cell, options, len(figures) + 1)
    nb.cells = kept
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return f"{NOTE}\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", figures


def main() -> None:
    text, figures = readme()
    (ROOT / "README.md").write_text(text)
    shutil.rmtree(ROOT / FIGURES, ignore_errors=True)
    (ROOT / FIGURES).mkdir(parents=True)
    for path, data in figures.items(): (ROOT / path).write_bytes(data)


if __name__ == "__main__": main()
