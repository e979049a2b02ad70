"""An extension of Sphinx that makes names lead to their documentation, in prose and in code.

Names of the library lead to their block at the end of a page, those of torch to torch's pages,
whose addresses the package nbdev-pytorch holds. Nothing is fetched.
"""
import ast
import re
from functools import cache

import api
import nbformat
from directives import module_of, notebooks, page, statements
from docutils import nodes
from nbdev_pytorch._modidx import d as torch_index
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform

TORCH = {name: url for names in torch_index["syms"].values() for name, url in names.items()}
NOTEBOOKS = {page(path): path for path in notebooks()}
MODULES = {name: docname for docname, path in NOTEBOOKS.items() if (name := module_of(path))}
SYMBOLS = {name: api.module(name).symbols for name in MODULES}
PLACES = {
    f"{m}.{s.name}": f"{MODULES[m]}#{m}.{s.name}"
    for m in SYMBOLS for top in SYMBOLS[m] for s in (top, *top.members)}
NAME = r'<span class="n[a-z]*">(\w+)</span>'
DOT = '<span class="o">.</span>'
CHAIN = re.compile(  # a.b.c, not before an equals sign; whether it is called
    rf'(?<!{re.escape(DOT)}){NAME}(?:{re.escape(DOT)}{NAME})*'
    r'(?! *<span class="o">=</span>)(?P<call>(?=<span class="p">\())?')


@cache
def code_of(docname: str) -> list[ast.AST]:
    "All nodes of a page's code."
    cells = nbformat.read(NOTEBOOKS[docname], as_version=4).cells
    tops = [top for cell in cells if cell.cell_type == "code" for top in statements(cell.source)]
    return [node for top in tops for node in ast.walk(top)]


@cache
def variables(docname: str) -> set[str]:
    "Names that stand for a parameter or a variable somewhere on a page."
    nodes_of = lambda kind: (n for n in code_of(docname) if isinstance(n, kind))
    stored = {n.id for n in nodes_of(ast.Name) if isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in nodes_of(ast.arg)}


@cache
def meanings(docname: str) -> dict[str, str]:
    "What names mean in the code of a page: what it imports, and what it exports."
    found = {}
    for node in code_of(docname):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            short = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom): found[short] = f"{node.module}.{alias.name}"
            elif alias.asname: found[short] = alias.name
            else: found[short.split(".")[0]] = short.split(".")[0]
    exported = [m for m in SYMBOLS if MODULES[m] == docname]
    return found | {s.name: f"{m}.{s.name}" for m in exported for s in SYMBOLS[m]}


def in_code(name: str, docname: str) -> str | None:
    "The full name of what a dotted name stands for in the code of a page, if it is documented."
    head, dot, tail = name.partition(".")
    full = meanings(docname).get(head, head) + dot + tail if docname in NOTEBOOKS else name
    return full if full in PLACES or full in TORCH else None


@cache
def in_prose(name: str, docname: str) -> str | None:
    "The same for prose, which also names what the code of the page does not import."
    name = name.removesuffix("()")
    if full := in_code(name, docname): return full
    dots = name.count(".") + 2
    ours = [full for full in PLACES if full.endswith(f".{name}") and full.count(".") == dots]
    if len(ours) == 1: return ours[0]
    usual = f"torch.nn.functional.{name.removeprefix('F.')}"
    return usual if usual in TORCH else None


class LinkNames(SphinxTransform):
    "Backticked names become references; types in signatures mean what they mean on the page."
    default_priority = 400

    def apply(self, **kwargs) -> None:
        docname = self.env.docname
        taken = nodes.reference, nodes.title, addnodes.pending_xref
        for node in list(self.document.findall(nodes.literal)):
            target = in_prose(node.astext(), docname)
            if not target or isinstance(node.parent, taken): continue
            names = {"refdomain": "py", "reftype": "obj", "reftarget": target, "refdoc": docname}
            node.replace_self(addnodes.pending_xref("", node.deepcopy(), **names))
        for node in self.document.findall(addnodes.pending_xref):
            if node.get("reftype") != "class": continue
            node["reftarget"] = in_code(node["reftarget"], docname) or node["reftarget"]


def to_torch(app, env, node, content):
    "Resolve what Sphinx does not know."
    url = TORCH.get(node.get("reftarget"))
    return nodes.reference("", "", content, refuri=url, internal=False) if url else None


def link_code(app, pagename: str, templatename, context: dict, doctree) -> None:
    """Names in highlighted code become links; of `a.b.c` as many parts as are known.

    A name that is also a variable's is linked where it is called."""
    docname = MODULES.get(pagename.removeprefix("_modules/").replace("/", "."), pagename)
    if docname not in NOTEBOOKS: return

    def linked(match: re.Match) -> str:
        parts, first = match[0].split(DOT), match[1]
        variable = first.islower() and first in variables(docname)
        if variable and match["call"] is None: return match[0]
        words = [re.sub("<.*?>", "", part) for part in parts]
        for n in range(len(parts), 0, -1):
            full = in_code(".".join(words[:n]), docname)
            if not full: continue
            place, _, anchor = PLACES.get(full, "").partition("#")
            url = TORCH.get(full)
            if place: url = f"{app.builder.get_relative_uri(pagename, place)}#{anchor}"
            link = f'<a class="name" href="{url}">{DOT.join(parts[:n])}</a>'
            return DOT.join([link, *parts[n:]])
        return match[0]
    context["body"] = CHAIN.sub(linked, context["body"])


@cache
def source_of(app, module: str):
    "The source that viewcode shows, without an import."
    analyzer = ModuleAnalyzer.for_string(api.module(module).source, module)
    return analyzer.code, analyzer.find_tags()


def add_anchors(app, doctree) -> None:
    "To each block, the anchor that nbdev's index names, if free, and a link to the cell."
    taken = {anchor for node in doctree.findall(nodes.Element) for anchor in node["ids"]}
    for signature in doctree.findall(addnodes.desc_signature):
        name = signature["fullname"]
        if name.lower() not in taken: signature["ids"].append(name.lower())
        taken.add(name.lower())
        if "." in name: continue
        link = f'<a class="place" href="#cell-{name}">[in the text]</a>'
        signature += nodes.raw("", link, format="html")


def setup(app) -> dict:
    app.add_transform(LinkNames)
    app.connect("missing-reference", to_torch)
    app.connect("viewcode-find-source", source_of)
    app.connect("doctree-read", add_anchors)
    app.connect("html-page-context", link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
