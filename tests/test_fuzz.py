"""Files and options of every kind, damaged by chance: no traceback, no hang, nothing else changed.

Part of the long tests (`--run-slow`). The chance is hypothesis's, the same at every start."""
import hashlib
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, Phase, settings
from hypothesis import strategies as st
from jobs import command, SMALL, tiny, train
from PIL import Image

from sac_lit.config import TOY

pytestmark = [pytest.mark.slow, pytest.mark.trains]
SECONDS = 20  # for a command and its imports; one that hangs takes for ever
fuzz = settings(max_examples=300, derandomize=True, deadline=None, database=None,
                phases=[Phase.generate])          # a smaller trial that fails says no more

LABEL = "sac_lit.predict", "label", "runs/toy/model", "in", "--out", "out", "--overlay"
EVALUATE = ("sac_lit.predict", "evaluate", "runs/toy/model", "in", "--layout", "folder",
            "--labels", "maps", "--classes", "classes.txt", "--frames", "list.txt",
            "--out", "out")
AUDIT = "sac_lit.audit", "audit", "folder", "--images", "in", "--labels", "maps", "--classes", \
    "classes.txt"
REPORT = "sac_lit.train", "report", "runs/toy"
RESUME = "sac_lit.train", "toy", *SMALL, "--sac.steps", "8"
READ_BY = {  # the beginning of a file's path: the commands that read it
    "in/": (LABEL, EVALUATE, AUDIT), "maps/": (EVALUATE, AUDIT), "classes.txt": (EVALUATE, AUDIT),
    "list.txt": (EVALUATE,), "runs/toy/model/": (LABEL, EVALUATE), "runs/toy/": (REPORT, RESUME)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Images, label maps, lists, and a run."
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for place in ("in", "maps", "mine"): (root / place).mkdir()
    for k, suffix in enumerate(("png", "jpg", "tif")):
        pixels = rng.integers(0, 255, (24, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"in/{k}.{suffix}")
        Image.fromarray(rng.integers(0, 19, (24, 40), np.uint8)).save(root / f"maps/{k}.png")
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(19)))
    (root / "list.txt").write_text("0.png\n1.jpg\n")
    (root / "mine/notes.txt").write_text("not of this program")
    done = train(root)
    assert done.returncode == 0, done.stderr
    return root


def files(root):
    return sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())


def contents(root):
    "What lies outside of the folders that a command may write."
    own = {"runs", "out", "data"}
    return {p: hashlib.sha256(p.read_bytes()).digest() for p in files(root)
            if p.relative_to(root).parts[0] not in own}


def damage(path, how, rng):
    "Make something else of a file."
    old = path.read_bytes()
    path.unlink()
    if how == "pipe": os.mkfifo(path)
    elif how == "loop": path.symlink_to(path.name)
    elif how == "folder": path.mkdir()
    elif how == "null": path.symlink_to("/dev/null")
    elif how == "endless": path.symlink_to("/dev/zero")
    elif how == "gone": pass
    else: path.write_bytes(other_bytes(old, how, rng))


def other_bytes(old, how, rng):
    if how == "empty": return b""
    if how == "cut": return old[:rng.randrange(len(old) + 1)]
    if how == "noise": return rng.randbytes(rng.randrange(1, 4000))
    if how == "zeros": return b"\0" * len(old)
    if how == "twice": return old + old
    if how == "json": return rng.choice([b"null", b"[]", b"3", b'{"a": 1}', b'{"config": null}'])
    if how == "more": return old + rng.randbytes(9) + b"\n"
    flipped = bytearray(old)
    for _ in range(rng.randrange(1, 9)): flipped[rng.randrange(len(old))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


HOW = ("pipe", "loop", "folder", "null", "endless", "gone", "empty", "cut", "noise", "zeros",
       "twice", "json", "more", "flip", "flip", "flip")


def assert_ends_well(done, what):
    "With success, with defects found, or with one sentence."
    said = f"{what}\n{done.stdout}\n{done.stderr}"
    assert done.returncode in (0, 1, 2), said
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout, said
    if done.returncode == 2: assert done.stderr.strip().count("\n") <= 1, said


@fuzz
@given(st.data())
def test_damaged_files(world, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("trial") / "w"
    shutil.copytree(world, root)
    kind = data.draw(st.sampled_from(sorted(READ_BY)))
    there = [p for p in files(root) if p.relative_to(root).as_posix().startswith(kind)
             and p.stat().st_size and p.suffix != ".html"]
    path = data.draw(st.sampled_from(there))
    how = data.draw(st.sampled_from(HOW))
    module, *words = data.draw(st.sampled_from(READ_BY[kind]))
    damage(path, how, data.draw(st.randoms(use_true_random=False)))
    before = contents(root)
    done = command(root, *words, module=module, timeout=SECONDS)
    assert_ends_well(done, f"{path.relative_to(root)} {how}: {module} {' '.join(words)}")
    assert {p: x for p, x in contents(root).items() if p in before} == before
    shutil.rmtree(root.parent)


def numbers(values, prefix=""):
    "The options of a configuration that take numbers."
    for name, value in values.items():
        if isinstance(value, dict): yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float, tuple)) and value is not True and value is not False:
            yield "--" + f"{prefix}{name}".replace("_", "-")


ODD = ("nan", "inf", "-inf", "-1", "0", "1e999", "1e-999", "", "a", "None", "0x10", "\u0661", "1.5",
       "99999999999999999999", "-0.0", "1 2 3", "--", "'")


@fuzz
@given(option=st.sampled_from(sorted(numbers(asdict(tiny(TOY))))), value=st.sampled_from(ODD))
def test_odd_numbers(world, tmp_path_factory, option, value):
    "No stage is trained: what is checked is checked before."
    root = tmp_path_factory.mktemp("trial")
    shutil.copytree(world / "data", root / "data")
    words = *SMALL, "--stages", "--name", "odd", option, *value.split(" ")
    done = command(root, "toy", *words, timeout=SECONDS)
    assert_ends_well(done, f"{option} {value}")
    shutil.rmtree(root)
