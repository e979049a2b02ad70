"""Pages that fit and say what is true: columns, lengths, names that exist, tables from results."""
import ast
import builtins
import importlib
import json
import keyword
import re
from functools import cache

import pytest
import torch
from house import (
    cells,
    code_lines,
    exported,
    hidden,
    LIB,
    MODULES,
    NBS,
    NOTEBOOKS,
    NUMBERED,
    parsed,
    ROOT,
)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
SCRIPTS = [*(ROOT / "tests").glob("*.py"), *(NBS / "site").glob("*.py"), ROOT / "setup.py"]
COLUMNS = 100
SHORT = {
    "F": "torch.nn.functional", "nn": "torch.nn", "np": "numpy", "plt": "matplotlib.pyplot",
    "TF": "torchvision.transforms.v2.functional", "sns": "seaborn", "dist": "torch.distributed"}
PLAIN_WORDS = {  # words of the field, of formats and of programs, that no code here names
    "accelerate", "berlin", "colab", "cuda", "DeepLabMobile", "diff", "dilated", "features",
    "fp16", "git", "gtFine_trainvaltest", "http", "https", "instanceIds", "ipynb", "jupyter",
    "lab", "labelIds", "labelTrainIds", "leftImg8bit_trainvaltest", "lr", "main_process_ip",
    "main_process_port", "md", "multi_gpu", "nbdev", "onnx", "pip", "png", "pt2", "push_to_hub",
    "pytest", "sh", "train_game_9K", "venv", "wandb"}


# ---------------------------------------------------------------- lines and cells

@each
def test_code_fits_the_page(path):
    long = [line for c in cells(path, "code") for line in code_lines(c) if len(line) > COLUMNS]
    assert not long


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_fit_the_page(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > COLUMNS]


@numbered
def test_exported_cells_are_short(path):
    "At most 60 lines; the drawing of the toy city may be longer."
    if path.stem == "00a_toy_city": return
    assert not [c.source[:80] for c in cells(path) if exported(c) and len(code_lines(c)) > 60]


@each
def test_a_line_holds_one_statement(path):
    "A semicolon at the end of a cell, which keeps a value from being shown, is no second one."
    for c in cells(path, "code"):
        tree = parsed(c.source)
        source = re.sub(r"^[%!].*$", "", c.source, flags=re.M).splitlines()
        ends = [source[n.end_lineno - 1].encode()[n.end_col_offset:].lstrip()
                for n in ast.walk(tree) if isinstance(n, ast.stmt)]
        assert not [end for end in ends if end[:1] == b";" and end[1:].strip()]


def test_public_names_are_shown():
    "Each name in `__all__` is used in a cell that a reader sees."
    shown = "\n".join(c.source for p in NOTEBOOKS for c in cells(p, "code")
                      if not exported(c) and not hidden(c))
    used = set(re.findall(r"\w+", shown))
    assert not [f"{m}.{name}" for m in MODULES for name in public(m) if name not in used]


@cache
def public(module):
    body = ast.parse((LIB / f"{module}.py").read_text()).body
    lists = [n for n in body if isinstance(n, ast.Assign)]
    return ast.literal_eval(next(n.value for n in lists if ast.unparse(n.targets[0]) == "__all__"))


# ---------------------------------------------------------------- names in backticks

def words_of(tree):
    "Everything that a piece of code names: variables, attributes, parameters, keys, file names."
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str): yield from re.findall(r"\w+", text)
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str): continue
        if " " not in node.value: yield from re.findall(r"\w+", node.value)   # no prose


@cache
def known():
    "Words that mean something: in code, in the names of files, in Python, among the terms."
    trees = [parsed(c.source) for p in NOTEBOOKS for c in cells(p, "code")]
    trees += [ast.parse(p.read_text()) for p in [*SCRIPTS, *LIB.glob("*.py")]]
    found = {word for tree in trees for word in words_of(tree)}
    for path in ROOT.rglob("*"):
        if path.is_file() and ".git" not in path.parts: found |= set(re.findall(r"\w+", path.name))
    found |= {"nbs", "docs", "tests", "runs", "data", "site", "results"}
    return found | set(dir(builtins)) | set(keyword.kwlist) | PLAIN_WORDS


def in_library(name):
    "Whether a dotted name is one of an installed module, such as `F.fold` or `torch.lerp`."
    head, *tail = name.split(".")
    try: tops = [(importlib.import_module(SHORT.get(head, head)), tail)]
    except (ImportError, ValueError): tops = []
    usual = torch, torch.nn, torch.nn.functional, torch.Tensor
    tops += [(thing, [head, *tail]) for thing in usual]
    for thing, parts in tops:
        for part in parts: thing = getattr(thing, part, None)
        if thing is not None: return True
    return False


def unknown(text):
    "The first name in some text in backticks that does not exist."
    if in_library(text.split("(")[0]): return None
    text = re.sub(r"'[^']*'|\"[^\"]*\"|<[^>]*>", "", text)     # strings, tags
    text = re.sub(r"(?<=\w)-(?=[a-z])", "_", text)             # options: --source-batch
    text = re.sub(r"\b\d\w*", "", text)
    if text.count(" ") > 4 and not re.search(r"[-=_(\[]", text): return None   # words that are said
    for word in re.findall(r"[A-Za-z_]\w+", text):
        placeholder = word.isupper() or word.lower().startswith("my")
        if word in known() or placeholder: continue
        if all(part in known() for part in word.split("_") if part): continue
        return word
    return None


def quoted(text):
    "What stands in backticks, outside of blocks of code."
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


@each
def test_names_in_the_prose_exist(path):
    texts = [c.source for c in cells(path, "markdown")]
    texts += [line for c in cells(path, "code") for line in c.source.splitlines()
              if line.startswith("#| fig-")]
    wrong = {q: word for text in texts for q in quoted(text) if (word := unknown(q))}
    assert not wrong


def test_names_in_docstrings_and_comments_exist():
    wrong = {}
    for module in MODULES:
        for line in (LIB / f"{module}.py").read_text().splitlines():
            wrong |= {q: (module, word) for q in quoted(line) if (word := unknown(q))}
    assert not wrong


def test_names_in_readme_and_guides_exist():
    texts = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
    wrong = {q: word for p in texts for q in quoted(p.read_text()) if (word := unknown(q))}
    assert not wrong


# ---------------------------------------------------------------- tables from results

FIGURE = re.compile(r"^[-+±~ ]*\d+\.\d+( ?[±%].*)?$")


@each
def test_no_table_of_measurements_is_typed(path):
    "A table with decimal figures is made by a cell; settings, which code holds too, are few."
    for c in cells(path, "markdown"):
        rows = [line for line in c.source.splitlines() if line.startswith("|")]
        entries = [entry.strip() for row in rows for entry in row.strip("|").split("|")]
        figures = [entry for entry in entries if FIGURE.match(entry)]
        assert len(figures) < 4, figures


@pytest.mark.parametrize("path", sorted((NBS / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_name_their_command(path):
    found = json.loads(path.read_text())
    assert isinstance(found, dict) and found.get("command"), "which command made this?"
