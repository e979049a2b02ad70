"""Blocks of documentation, one for each exported symbol, read from the source of a module (which is not imported).

A block is a directive of Sphinx's Python domain in MyST: signature, docstring, and the comments beside the parameters
as nbdev's docments have them, which say the shapes.
"""
import ast
import io
import json
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from sphinx.pycode.ast import unparse


@dataclass
class Symbol:
    "What is said about one exported name, or one method of an exported class."
    name: str                                      # as in `Class.method`
    kind: str                                      # directive of the Python domain
    signature: str = ""
    doc: str = ""
    bases: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)   # comment beside each parameter; "return" beside what is returned
    members: list["Symbol"] = field(default_factory=list)


class Module:
    "The exported symbols of one module, in the order of its source."
    def __init__(self, path: Path):
        self.name, self.source = f"{path.parent.name}.{path.stem}", path.read_text()
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        body = ast.parse(self.source).body
        exported = next((ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and "__all__" in names_of(n)), [])
        found = {name: node for node in body for name in names_of(node) if name in exported}
        self.symbols = [self.symbol(name, node) for name, node in found.items()]

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
        return Symbol(name, "data", value if len(value) < 60 and "\\" not in value else "", self.comments.get(node.lineno, ""))

    def of_function(self, name: str, node: ast.FunctionDef, kind: str) -> Symbol:
        marks = {self.text(d) for d in node.decorator_list}
        if "property" in marks: return Symbol(name, "property", doc=ast.get_docstring(node) or "")
        args, skip = node.args, kind in ("method", "class") and "staticmethod" not in marks
        nodes = sorted((a for a in ast.walk(args) if isinstance(a, ast.arg)), key=lambda a: (a.lineno, a.col_offset))[skip:]
        signature = "(" + self.parameters(args, skip) + ")" + (f" -> {self.text(node.returns)}" if node.returns else "")
        return Symbol(name, kind, signature, ast.get_docstring(node) or "", notes=self.notes(nodes, node))

    def parameters(self, args: ast.arguments, skip: bool) -> str:
        "The parameters as written, with a space around the = of one that has an annotation."
        def one(arg, default=None, star=""):
            typed = f": {self.text(arg.annotation)}" if arg.annotation else ""
            equal = (" = " if typed else "=") + self.default(default) if default is not None else ""
            return star + arg.arg + typed + equal
        plain = [*args.posonlyargs, *args.args]
        shown = [one(*pair) for pair in zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults)][skip:]
        if args.vararg: shown.append(one(args.vararg, star="*"))
        elif args.kwonlyargs: shown.append("*")
        shown += [one(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults)]
        return ", ".join(shown + ([one(args.kwarg, star="**")] if args.kwarg else []))

    def notes(self, args: list[ast.arg], node: ast.FunctionDef) -> dict[str, str]:
        "A comment belongs to the last parameter on its line, or to what is returned."
        last = {a.end_lineno: a.arg for a in args if a.end_lineno < node.body[0].lineno}
        if node.returns: last[node.returns.end_lineno] = "return"
        return {name: self.comments[line] for line, name in last.items() if line in self.comments}

    def of_class(self, name: str, node: ast.ClassDef) -> Symbol:
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in self.text(n.annotation)]
        symbol = Symbol(name, "class", doc=ast.get_docstring(node) or "", bases=[self.text(b) for b in node.bases])
        for start in (m for m in methods if m.name == "__init__"):
            made = self.of_function(name, start, "class")
            symbol.signature, symbol.notes = made.signature, made.notes
        if fields:
            symbol.signature = "(" + ", ".join(self.text(f) for f in fields) + ")"
            symbol.notes = {f.target.id: self.comments[f.end_lineno] for f in fields if f.end_lineno in self.comments}
        symbol.members = [self.of_function(f"{name}.{m.name}", m, "method") for m in methods if not m.name.startswith("_")]
        return symbol


def names_of(node: ast.AST) -> list[str]:
    "The names that a statement defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def block(symbol: Symbol, depth: int = 0) -> str:
    "The directive for a symbol, with those of its members inside."
    fence, is_data = ":" * (5 - depth), symbol.kind == "data"
    lines = [f"{fence}{{py:{symbol.kind}}} {symbol.name}{'' if is_data else symbol.signature}"]
    if is_data and symbol.signature: lines.append(f":value: {json.dumps(symbol.signature)}")
    lines += ["", symbol.doc, ""]
    if symbol.bases: lines += ["Based on " + ", ".join(f"`{base}`" for base in symbol.bases) + ".", ""]
    lines += [":returns: " + text if name == "return" else f":param {name}: {text}" for name, text in symbol.notes.items()]
    return "\n".join([*lines, "", *(block(m, depth + 1) for m in symbol.members), fence, ""])


def reference(module: Module) -> str:
    "The section that ends the page of a notebook."
    blocks = "\n".join(block(s) for s in module.symbols)
    return f"## Reference\n\nWhat `{module.name}` exports, in the order of this page.\n\n```{{py:currentmodule}} {module.name}\n```\n\n{blocks}"


def summary(modules: dict[str, Module]) -> str:
    "The page that names everything: for each page, a table of what has a description, and the other names."
    parts = ["# Reference\n\n> Every name that the library exports, by module, with the first line of its description\n"]
    for docname, module in modules.items():
        refs = {s.name: f"{{py:obj}}`{s.name} <{module.name}.{s.name}>`" for s in module.symbols}
        rows = [f"| {refs[s.name]} | {s.doc.splitlines()[0]} |" for s in module.symbols if s.doc]
        others = ", ".join(refs[s.name] for s in module.symbols if not s.doc)
        parts.append("\n".join([f"## {module.name}\n", f"Explained in {{doc}}`{docname}`.\n", "| | |", "|---|---|", *rows, "", f"Also: {others}\n" if others else ""]))
    return "\n".join(parts)
