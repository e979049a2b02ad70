"""An extension of Sphinx: the search shows excerpts from files, too.

Sphinx's search reads them from the pages that it finds, which a browser forbids to a page that
was opened from a file. Here a script holds the texts of all pages, and only the search page loads
it.
"""
import json
from pathlib import Path

from docutils import nodes

TEXTS = {}
NO_PROSE = nodes.raw, nodes.literal_block, nodes.math, nodes.math_block
SCRIPT = """const texts = {};
window.fetch = async url => ({{ text: () => texts[url.split("/").pop()] }});
Search.htmlToText = text => text;
"""


def collect(app, pagename: str, templatename, context, doctree) -> None:
    "The prose of a page; the search page gets the script."
    if pagename == "search": app.add_js_file("excerpts.js", loading_method="defer")
    if not doctree: return
    texts = doctree.findall(nodes.Text)
    found = (text.astext() for text in texts if not isinstance(text.parent, NO_PROSE))
    TEXTS[f"{pagename}{app.builder.out_suffix}"] = " ".join(" ".join(found).split())


def write(app, exception) -> None:
    script = SCRIPT.format(json.dumps(TEXTS, sort_keys=True, ensure_ascii=False))
    if not exception: Path(app.outdir, "_static", "excerpts.js").write_text(script)


def setup(app) -> dict:
    app.connect("html-page-context", collect)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
