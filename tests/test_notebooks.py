"""Each notebook runs from top to bottom, and its committed form is what a reader should see."""
import ast
import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import nb2str, read_nb
from house import (
    cells,
    exported,
    hidden,
    imported,
    MACHINE_PATH,
    module_of,
    MODULES,
    NBS,
    NOTEBOOKS,
    NUMBERED,
    parsed,
    ROOT,
)
from jobs import forked
from nbdev import test as nbdev_test
from nbdev.clean import clean_nb
from nbdev.config import get_config

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def outputs(path):
    return [o for c in cells(path, "code") for o in c.outputs]


def said(output):
    "The texts of an output."
    texts = {"text": output.get("text", ""), **output.get("data", {})}
    return [text for kind, text in texts.items() if kind.startswith("text")]


def _run(path):
    flags = get_config(path=ROOT).tst_flags.split()
    sys.exit(not nbdev_test.test_nb(path, skip_flags=flags, basepath=ROOT)[0])


@each
def test_runs(path, tmp_path):
    """Alone in an empty folder, as on Colab: it needs no file of the repository, and leaves none.
    By nbdev's own runner, in a process of its own: what it sets is no other test's concern."""
    alone = Path(shutil.copy(path, tmp_path))
    done = forked(_run, alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    left = {p for p in tmp_path.rglob("*") if p != alone}
    left = {p for p in left if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}
    assert not left, "the notebook leaves files behind"


@pytest.mark.slow
@each
def test_second_run_leaves_no_difference(path, tmp_path):
    "On the machine that made the outputs; another one may draw a pixel differently."
    for name in ("settings.ini", "nbs", "sac_lit", "docs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, tmp_path / "nbs" / "site" / "run.py", path.stem], check=True)
    made = tmp_path / "nbs" / path.name
    assert made.read_text() == path.read_text()


@each
def test_outputs_are_kept(path):
    found = outputs(path)
    assert found, "no outputs: run it with nbs/site/run.py"
    wrong = [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
    assert not wrong, "an error or a warning among the outputs"


@each
def test_is_clean(path):
    "No execution counts, no times, no metadata of editors: nothing that differs from run to run."
    nb = read_nb(path)
    before = nb2str(nb)
    clean_nb(nb)
    assert nb2str(nb) == before, "run nbs/site/run.py, or nbdev_clean"


@each
def test_names_no_machine(path):
    texts = [c.source for c in cells(path)] + [text for o in outputs(path) for text in said(o)]
    assert not [text[-300:] for text in texts if MACHINE_PATH.search(text)]


@each
def test_figures_are_small(path):
    pictures = [o.data["image/png"] for o in outputs(path) if "image/png" in o.get("data", {})]
    sizes = [len(base64.b64decode(p)) for p in pictures]
    assert all(s < 150_000 for s in sizes), sizes


@each
def test_links_lead_somewhere(path):
    texts = [c.source for c in cells(path, "markdown")]
    links = [m for t in texts for m in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", t)]
    assert not [link for link in links if not (NBS / link).exists()]


@each
def test_anchors_lead_somewhere(path):
    for text in (c.source for c in cells(path, "markdown")):
        for name, anchor in re.findall(r"\]\(([\w.]*\.ipynb)?#([^)\s]+)\)", text):
            page = NBS / name if name else path
            headings = [h for c in cells(page, "markdown")
                        for h in re.findall(r"^#+ (.+)$", c.source, re.M)]
            made = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor.lower() in made | set(map(str.lower, MODULES)), f"{name}#{anchor}"


@numbered
def test_anatomy(path):
    first, second = cells(path)[:2]
    title = re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first.source)
    assert title, "the first cell holds '# Title' and '> description' only"
    assert re.fullmatch(r"#\| default_exp \w+", second.source)
    text = "\n".join(c.source for c in cells(path, "markdown"))
    parts = ["| needs |", "| gives |", "## Exercises", "<details>"]
    parts += ["Next: ["] * (path != NUMBERED[-1])
    assert not [part for part in parts if part not in text]
    assert "colab.research.google.com" in text, "no badge: run nbs/site/badges.py"


@each
def test_needs_no_tools_of_the_repository(path):
    "A notebook runs where the package is installed with its extra `notebooks`."
    trees = [parsed(c.source) for c in cells(path, "code")]
    tops = {name.split(".")[0] for tree in trees for name in imported(tree)}
    assert not tops & {"nbdev", "execnb", "pytest", "hypothesis", "sphinx", "tests"}


@numbered
def test_prose_beside_code(path):
    prose = len(cells(path, "markdown"))
    code = len([c for c in cells(path, "code") if not hidden(c)])
    assert prose >= .6 * code, f"{prose} prose cells for {code} of code"


@each
def test_imports_stand_alone(path):
    "Building the documentation runs the cells that hold an import: such a cell holds nothing else."
    for c in cells(path, "code"):
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in parsed(c.source).body}
        assert hidden(c) or len(kinds) < 2, c.source[:200]


@numbered
def test_tests_what_it_exports(path):
    lessons = "\n".join(c.source for c in cells(path, "code") if not exported(c))
    assert re.search(r"\bassert\b|\btest_\w+\(", lessons), "no test"
    texts = [c.source for p in NUMBERED for c in cells(p, "code")]
    texts += [p.read_text() for p in (ROOT / "tests").glob("*.py")]
    everything = "\n".join(texts)
    library = [n for c in cells(path) if exported(c) for n in parsed(c.source).body]
    names = [n.name for n in library if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names = [name for name in names if not name.startswith("__")]
    unused = [n for n in names if len(re.findall(rf"\b{n}\b", everything)) < 2]
    assert not unused, "exported, and used nowhere"


def test_one_module_each():
    assert len(set(MODULES)) == len(MODULES) == len({module_of(p) for p in NUMBERED})
