"""Blocks of documentation, one for each exported symbol, read from a module's source, not imported.

A block is a directive of Sphinx's Python domain in MyST: signature, docstring, and the comments
beside the parameters as nbdev's docments have them, which say the shapes.
"""
import ast
import io
import json
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from sphinx.pycode.ast import unparse

ROOT = Path(__file__).parents[2]


@dataclass
class Symbol:
    "What is said about one exported name, or one method of an exported class."
    name: str                                      # as in `Class.method`
    kind: str                                      # directive of the Python domain
    signature: str = ""
    doc: str = ""
    bases: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)   # of parameters, and "return"
    members: list["Symbol"] = field(default_factory=list)


def module(name: str) -> "Module":
    "A module of the library by its full name."
    return Module(name, (ROOT / f"{name.replace('.', '/')}.py").read_text())


class Module:
    "The exported symbols of one module, in the order of its source."
    def __init__(self, name: str, source: str):
        self.name, self.source = name, source
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [t for t in tokens if t.type == tokenize.COMMENT]
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in comments}
        self.alone = {t.start[0] for t in comments if not t.line[:t.start[1]].strip()}
        body = ast.parse(source).body
        lists = [n.value for n in body if isinstance(n, ast.Assign) and "__all__" in names_of(n)]
        exported = ast.literal_eval(lists[0]) if lists else []
        found = {n: node for node in body for n in names_of(node) if n in exported}
        self.symbols = [self.symbol(n, node) for n, node in found.items()]

    def text(self, node: ast.AST) -> str:
        "The source of an expression, on one line."
        return " ".join(ast.get_source_segment(self.source, node).split())

    def default(self, node: ast.AST) -> str:
        "A default value, or three dots for one that Sphinx cannot show in a signature."
        try: unparse(node, self.source)
        except NotImplementedError: return "..."
        return self.text(node)

    def symbol(self, name: str, node: ast.AST) -> Symbol:
        if isinstance(node, ast.ClassDef): return self.of_class(name, node)
        if isinstance(node, ast.FunctionDef): return self.of_function(name, node, "function")
        value = self.text(node.value)
        short = len(value) < 60 and "\\" not in value
        return Symbol(name, "data", value if short else "", self.comments.get(node.lineno, ""))

    def of_function(self, name: str, node: ast.FunctionDef, kind: str) -> Symbol:
        marks, doc = {self.text(d) for d in node.decorator_list}, ast.get_docstring(node) or ""
        if "property" in marks: return Symbol(name, "property", doc=doc)
        skip = kind in ("method", "class") and "staticmethod" not in marks
        args = [a for a in ast.walk(node.args) if isinstance(a, ast.arg)]
        args = sorted(args, key=lambda a: (a.lineno, a.col_offset))[skip:]
        returns = f" -> {self.text(node.returns)}" if node.returns else ""
        signature = f"({self.parameters(node.args, skip)}){returns}"
        return Symbol(name, kind, signature, doc, notes=self.notes(args, node))

    def parameters(self, args: ast.arguments, skip: bool) -> str:
        "The parameters as written, with a space around the = of one that has an annotation."
        plain = [*args.posonlyargs, *args.args]
        defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
        shown = [self.parameter(*pair) for pair in zip(plain, defaults)][skip:]
        if args.vararg: shown.append("*" + self.parameter(args.vararg))
        elif args.kwonlyargs: shown.append("*")
        shown += [self.parameter(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults)]
        if args.kwarg: shown.append("**" + self.parameter(args.kwarg))
        return ", ".join(shown)

    def parameter(self, arg: ast.arg, default: ast.AST | None = None) -> str:
        typed = f": {self.kind(arg.annotation)}" if arg.annotation else ""
        equal = " = " if typed else "="
        return arg.arg + typed + (equal + self.default(default) if default is not None else "")

    def notes(self, args: list[ast.arg], node: ast.FunctionDef) -> dict[str, str]:
        "A comment belongs to the last parameter on its line, or to what is returned."
        last = {a.end_lineno: a.arg for a in args if a.end_lineno < node.body[0].lineno}
        if node.returns: last[node.returns.end_lineno] = "return"
        return {name: self.comments[line] for line, name in last.items() if line in self.comments}

    def kind(self, annotation: ast.AST) -> str:
        "A type, without what `Annotated` tells the command line of it."
        bare = isinstance(annotation, ast.Subscript) and self.text(annotation.value) == "Annotated"
        return self.text(annotation.slice.elts[0] if bare else annotation)

    def field(self, node: ast.AnnAssign) -> str:
        "A field of a dataclass, as a parameter."
        default = f" = {self.default(node.value)}" if node.value else ""
        return f"{node.target.id}: {self.kind(node.annotation)}{default}"

    def field_note(self, node: ast.AnnAssign) -> str:
        "The comment beside a field of a dataclass, or alone on the lines above it."
        if node.end_lineno in self.comments: return self.comments[node.end_lineno]
        lines, line = [], node.lineno - 1
        while line in self.alone:
            lines.insert(0, self.comments[line])
            line -= 1
        return " ".join(lines)

    def of_class(self, name: str, node: ast.ClassDef) -> Symbol:
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        fields = [n for n in fields if "ClassVar" not in self.text(n.annotation)]
        bases = [self.text(base) for base in node.bases]
        symbol = Symbol(name, "class", doc=ast.get_docstring(node) or "", bases=bases)
        for start in (m for m in methods if m.name == "__init__"):
            made = self.of_function(name, start, "class")
            symbol.signature, symbol.notes = made.signature, made.notes
        if fields:
            symbol.signature = "(" + ", ".join(map(self.field, fields)) + ")"
            notes = {f.target.id: self.field_note(f) for f in fields}
            symbol.notes = {name: note for name, note in notes.items() if note}
        public = [m for m in methods if not m.name.startswith("_")]
        symbol.members = [self.of_function(f"{name}.{m.name}", m, "method") for m in public]
        return symbol


def names_of(node: ast.AST) -> list[str]:
    "The names that a statement defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    targets = []
    if isinstance(node, ast.Assign): targets = node.targets
    if isinstance(node, ast.AnnAssign): targets = [node.target]
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def block(symbol: Symbol, depth: int = 0) -> str:
    "The directive for a symbol, with those of its members inside."
    fence, is_data = ":" * (5 - depth), symbol.kind == "data"
    lines = [f"{fence}{{py:{symbol.kind}}} {symbol.name}{'' if is_data else symbol.signature}"]
    if is_data and symbol.signature: lines.append(f":value: {json.dumps(symbol.signature)}")
    lines += ["", symbol.doc, ""]
    bases = ", ".join(f"`{base}`" for base in symbol.bases)
    if bases: lines += [f"Based on {bases}.", ""]
    for name, text in symbol.notes.items():
        lines.append(f":returns: {text}" if name == "return" else f":param {name}: {text}")
    return "\n".join([*lines, "", *(block(m, depth + 1) for m in symbol.members), fence, ""])


def reference(module: Module) -> str:
    "The section that ends the page of a notebook."
    lead = f"What `{module.name}` exports, in the order of this page."
    current = f"```{{py:currentmodule}} {module.name}\n```"
    return "\n\n".join(["## Reference", lead, current, "\n".join(map(block, module.symbols))])


def summary(modules: dict[str, Module]) -> str:
    "The page that names everything: for each page, what has a description, and the other names."
    parts = ["# Reference\n\n> Every name that the library exports, with the first line of its "
             "description\n"]
    for docname, module in modules.items():
        link = f"{{py:obj}}`{{0}} <{module.name}.{{0}}>`"
        refs = {s.name: link.replace("{0}", s.name) for s in module.symbols}
        first = lambda doc: doc.splitlines()[0].replace("|", "\\|")
        rows = [f"| {refs[s.name]} | {first(s.doc)} |" for s in module.symbols if s.doc]
        others = ", ".join(refs[s.name] for s in module.symbols if not s.doc)
        parts += [f"## {module.name}\n", f"Explained in {{doc}}`{docname}`.\n"]
        parts += ["| | |", "|---|---|", *rows, ""]
        if others: parts.append(f"Also: {others}\n")
    return "\n".join(parts)
