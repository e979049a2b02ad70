"""Each notebook runs from top to bottom, and its committed form is what a reader should see."""
import ast
import base64
import re
import shutil
import subprocess
import sys

import pytest
from execnb.nbio import nb2str, read_nb
from house import MACHINE_PATH, MODULES, NBS, NOTEBOOKS, NUMBERED, ROOT, cells, module_of, parsed
from nbdev.clean import clean_nb
from nbdev.config import get_config

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
root, path, *flags = sys.argv[1:]
sys.exit(not test_nb(Path(path), skip_flags=flags, basepath=root)[0])
"""


def outputs(path):
    return [o for c in cells(path, "code") for o in c.outputs]


def hidden(cell):
    return cell.source.startswith(("#| hide", "#|hide"))


@each
def test_runs(path):
    "By nbdev's own runner, in a process of its own: what a notebook sets or forks is no other test's concern."
    before = set(NBS.rglob("*"))
    flags = get_config(path=ROOT).tst_flags.split()
    done = subprocess.run([sys.executable, "-c", RUN, ROOT, path, *flags], cwd=NBS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    left = {p for p in set(NBS.rglob("*")) - before if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}
    assert not left, "the notebook leaves files behind"


@pytest.mark.slow
@each
def test_second_run_leaves_no_difference(path, tmp_path):
    "On the machine that made the outputs; another one may draw a pixel differently."
    for name in ("settings.ini", "nbs", "sac_lit", "docs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, tmp_path / "nbs" / "site" / "run.py", path.stem], check=True)
    made = tmp_path / "nbs" / path.name
    assert made.read_text() == path.read_text()


@each
def test_outputs_are_kept(path):
    found = outputs(path)
    assert found, "no outputs: run it with nbs/site/run.py"
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in found), "an error or a warning among the outputs"


@each
def test_is_clean(path):
    "No execution counts, no times, no metadata of editors: nothing that differs from run to run."
    nb = read_nb(path)
    before = nb2str(nb)
    clean_nb(nb)
    assert nb2str(nb) == before, "run nbs/site/run.py, or nbdev_clean"


@each
def test_names_no_machine(path):
    said = [text for o in outputs(path) for kind, text in {"text": o.get("text", ""), **o.get("data", {})}.items() if kind.startswith("text")]
    assert not [text[-300:] for text in [c.source for c in cells(path)] + said if MACHINE_PATH.search(text)]


@each
def test_figures_are_small(path):
    sizes = [len(base64.b64decode(o.data["image/png"])) for o in outputs(path) if "image/png" in o.get("data", {})]
    assert all(s < 150_000 for s in sizes), sizes


@each
def test_links_lead_somewhere(path):
    links = [m for c in cells(path, "markdown") for m in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", c.source)]
    assert not [link for link in links if not (NBS / link).exists()]


@numbered
def test_anatomy(path):
    first, second = cells(path)[:2]
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first.source), "the first cell holds '# Title' and '> description' only"
    assert re.fullmatch(r"#\| default_exp \w+", second.source)
    text = "\n".join(c.source for c in cells(path, "markdown"))
    parts = ["| needs |", "| gives |", "## Exercises", "<details>"] + ["Next: ["] * (path != NUMBERED[-1])
    assert not [part for part in parts if part not in text]
    assert cells(path)[-1].source.endswith("nbdev.nbdev_export()")


@numbered
def test_prose_beside_code(path):
    prose, code = len(cells(path, "markdown")), len([c for c in cells(path, "code") if not hidden(c)])
    assert prose >= .6 * code, f"{prose} prose cells for {code} of code"


@each
def test_imports_stand_alone(path):
    "Building the documentation runs the cells that hold an import: such a cell holds nothing else."
    for c in cells(path, "code"):
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in parsed(c.source).body}
        assert hidden(c) or len(kinds) < 2, c.source[:200]


@numbered
def test_tests_what_it_exports(path):
    lessons = "\n".join(c.source for c in cells(path, "code") if not c.source.startswith("#| export"))
    assert re.search(r"\bassert\b|\btest_\w+\(", lessons), "no test"
    everything = "\n".join([c.source for p in NUMBERED for c in cells(p, "code")] + [p.read_text() for p in (ROOT / "tests").glob("*.py")])
    library = [n for c in cells(path, "code") if c.source.startswith("#| export") for n in parsed(c.source).body]
    exported = [n.name for n in library if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not [name for name in exported if len(re.findall(rf"\b{name}\b", everything)) < 2], "exported, and used nowhere"


def test_one_module_each():
    assert len(set(MODULES)) == len(MODULES) == len({module_of(p) for p in NUMBERED})
