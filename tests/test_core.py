"The confusion matrix against counting by hand; random numbers that depend on their key alone."
import contextlib
import json
import os
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sac_lit import core
from sac_lit.core import (
    ASIDE,
    CLASSES,
    clean_exit,
    colorize,
    colors_of,
    ConfusionMatrix,
    generator,
    IGNORE_INDEX,
    lookup,
    NAMES,
    progress,
    read_json,
    read_text,
    regular_file,
    result_file,
    seed_of,
    Stopped,
    UserError,
    written_aside,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)


# ---------------------------------------------------------------- class table

def test_class_table_is_one_to_one():
    assert len(CLASSES) == len(NAMES) == 19
    for column in ("name", "color", "cityscapes_id", "synthia_id"):
        assert len({getattr(c, column) for c in CLASSES}) == 19
    assert [c.cityscapes_id for c in CLASSES] == sorted(c.cityscapes_id for c in CLASSES)


def test_colorize_maps_each_value_by_the_table():
    labels = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    colors = colorize(labels)
    assert colors.shape == (2, 8, 16, 3) and colors.dtype == np.uint8
    flat = colors.reshape(256, 3)
    assert [tuple(c) for c in flat[:19].tolist()] == [c.color for c in CLASSES]
    assert not flat[19:].any()
    assert np.array_equal(colorize(labels.long()), colors) and np.array_equal(
        colorize(labels.numpy()), colors
    )


def test_colours_of_any_class_list():
    assert colors_of(NAMES) == tuple(c.color for c in CLASSES)
    mixed = colors_of(("water", "road", "ship", "sky"))
    assert (
        mixed[1] == CLASSES[0].color
        and mixed[3] == CLASSES[10].color
        and mixed == colors_of(["water", "road", "ship", "sky"])
    )
    many = np.array(colors_of([f"class {i}" for i in range(255)]))
    assert many.min() >= 0 and many.max() <= 255 and len(np.unique(many, axis=0)) == 255
    few = many[:20].astype(int)
    everything = [np.zeros(3), np.full(3, 255), *few]  # black has no class, white is the paper
    assert min(np.abs(a - b).max() for k, a in enumerate(everything) for b in everything[:k]) > 60
    with_sky = colors_of([f"class {i}" for i in range(10)] + ["sky"])
    assert min(np.abs(np.subtract(c, CLASSES[10].color)).max() for c in with_sky[:-1]) > 60
    assert tuple(colorize(np.array([[3]]), mixed)[0, 0]) == mixed[3]


# ---------------------------------------------------------------- confusion matrix

@st.composite
def maps(draw):  # number of classes, predictions and labels (255 among them)
    C, n = draw(st.integers(1, 6)), draw(st.integers(0, 40))
    pred = draw(st.lists(st.integers(0, C - 1), min_size=n, max_size=n))
    label = draw(st.lists(st.integers(0, C - 1) | st.just(IGNORE_INDEX), min_size=n, max_size=n))
    return C, torch.tensor(pred, dtype=torch.int64), torch.tensor(label, dtype=torch.int64)


@quick
@given(maps())
def test_iou_is_intersection_over_union(case):
    C, pred, label = case
    cm, keep = ConfusionMatrix(C).update(pred, label), label != IGNORE_INDEX
    assert cm.counts.sum() == keep.sum()
    for c in range(C):
        a, b = (pred == c) & keep, label == c
        union = (a | b).sum().item()
        if union: assert cm.iou()[c].item() == pytest.approx((a & b).sum().item() / union)
        else: assert cm.iou()[c].isnan()
    seen = [x for x in cm.iou().tolist() if x == x]
    if seen: assert cm.miou() == pytest.approx(sum(seen) / len(seen)) and 0 <= cm.miou() <= 1


@quick
@given(maps(), st.integers(0, 40), st.randoms(use_true_random=False))
def test_order_and_division_of_the_pixels_do_not_matter(case, cut, random):
    C, pred, label = case
    whole = ConfusionMatrix(C).update(pred, label)
    order = torch.tensor(random.sample(range(len(pred)), len(pred)), dtype=torch.int64)
    p, l = pred[order], label[order]
    parts = ConfusionMatrix(C).update(p[:cut], l[:cut]) + ConfusionMatrix(C).update(
        p[cut:], l[cut:]
    )
    assert torch.equal(parts.counts, whole.counts)
    one_after_the_other = ConfusionMatrix(C).update(p[:cut], l[:cut]).update(p[cut:], l[cut:])
    assert torch.equal(one_after_the_other.counts, whole.counts)


@quick
@given(maps())
def test_exchanging_label_and_prediction_transposes(case):
    C, pred, label = case
    pred, label = pred[label != IGNORE_INDEX], label[label != IGNORE_INDEX]
    a, b = ConfusionMatrix(C).update(pred, label), ConfusionMatrix(C).update(label, pred)
    assert torch.equal(a.counts, b.counts.T)
    torch.testing.assert_close(a.iou(), b.iou(), equal_nan=True)


def test_merging_leaves_both_parts_as_they_were():
    a, b = (ConfusionMatrix(3).update(torch.tensor([k]), torch.tensor([k])) for k in (0, 2))
    total = a + b
    total.update(torch.tensor([1]), torch.tensor([1]))
    assert a.counts.sum() == b.counts.sum() == 1 and total.counts.diag().tolist() == [1, 1, 1]


def test_perfect_and_absent_classes():
    label = torch.tensor([0, 0, 2, IGNORE_INDEX])
    # a prediction on an ignored pixel does not count
    cm = ConfusionMatrix(4).update(torch.tensor([0, 0, 2, 3]), label)
    assert cm.miou() == 1 and cm.iou().isnan().tolist() == [False, True, False, True]
    assert cm.miou(classes=[0, 1]) == 1
    assert np.isnan(cm.miou(classes=[1, 3])) and np.isnan(ConfusionMatrix(4).miou())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_counts_do_not_overflow_the_type_of_the_maps(dtype):
    x = torch.full((40, 50), 18, dtype=dtype)
    assert ConfusionMatrix(19).update(x, x).counts[18, 18] == 2000


@pytest.mark.parametrize("pred, label, words", [
    ([0, 0], [0], "differ in shape"),
    ([3], [0], "prediction has values from 3 to 3"),
    ([0], [3], "label has values from 3 to 3"),
    ([0, 0], [-1, 2], "label has values from -1 to 2")])
def test_what_is_no_class_is_refused_and_not_counted(pred, label, words):
    cm = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=words): cm.update(torch.tensor(pred), torch.tensor(label))
    assert not cm.counts.any()


# ---------------------------------------------------------------- random numbers by key

keys = st.lists(st.integers(-10 ** 12, 10 ** 12) | st.text(max_size=8), max_size=4).map(tuple)


@quick
@given(st.integers(0, 2 ** 63), keys)
def test_seed_is_a_function_of_the_key(seed, key):
    assert 0 <= seed_of(seed, *key) < 2 ** 32
    first = torch.rand(4, generator=generator(seed, *key))
    generator(seed, *key, 0), torch.rand(3)
    assert torch.equal(torch.rand(4, generator=generator(seed, *key)), first)


@quick
@given(st.integers(0, 100), keys, st.integers(0, 2 ** 31))
def test_the_kind_of_integer_does_not_matter(seed, key, step):
    numbers = (step, np.int64(step), torch.tensor(step))
    assert len({seed_of(seed, *key, n) for n in numbers}) == 1
    assert seed_of(torch.tensor(seed), *key) == seed_of(seed, *key)


def test_different_keys_give_different_seeds():
    all_keys = [
        (seed, stage, step, slot)
        for seed in range(2)
        for stage in ("abn", "sac")
        for step in range(500)
        for slot in range(4)
    ]
    all_keys += [
        (0, "sac", 1, 23),
        (0, "sac", 12, 3),
        (0, "sac", 123),
        (0, "sac1", 23),
        (0, "sac", "1", 23),
        (0,),
        (0, ""),
        (0, 0),
    ]
    seeds = {seed_of(*k) for k in set(all_keys)}
    # 8000 of 2^32: the odd collision is chance, more is not
    assert len(seeds) >= len(set(all_keys)) - 1


def test_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    torch.rand(5, generator=generator(0, "sac", 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_processes_draw_the_same_numbers():
    "Whatever Python's hash seed, the global seed, or the order of the draws."
    code = (
        "import sys, torch; from sac_lit.core import generator;"
        "torch.manual_seed(int(sys.argv[1]));"
        "keys = [(0, 'sac', s, k) for s in range(3) for k in range(2)][::int(sys.argv[2])];"
        "draw = lambda k: torch.randint(10**9, (2,), generator=generator(*k)).tolist();"
        "print(sorted((k, draw(k)) for k in keys))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n), order],
            text=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": str(n)},
        )
        for n, order in ((1, "1"), (2, "-1"))
    ]
    a, b = (run.communicate()[0] for run in runs)
    assert a == b and "sac" in a


def test_numbers_do_not_change_between_versions():
    "These values are part of the promise: a run begun with one version continues with the next."
    assert (seed_of(0), seed_of(0, "sac", 7, 0)) == (2334269327, 3791776218)


# ---------------------------------------------------------------- what every command does

def test_an_entry_of_a_table_or_an_object_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "entries_of_core.py").write_text("twice = 2\nraise_it = 1")
    (tmp_path / "broken_entries.py").write_text("import no_such_module_at_all")
    (tmp_path / "wordy_entries.py").write_text("raise ValueError('one\\n\\n  two')")
    (tmp_path / "entries_that_exit.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    table = {"one": 1}
    assert lookup(table, "one", "--pool") == 1
    assert lookup(table, "entries_of_core:twice", "--pool") == 2
    for name, words in (("two", "no such entry"), ("entries_of_core:thrice", "AttributeError"),
                        ("nowhere:x", "ModuleNotFoundError"),
                        ("broken_entries:x", "no_such_module"),
                        ("wordy_entries:x", "ValueError: one two"),
                        ("entries_that_exit:x", "SystemExit: 0"),
                        (":", "cannot be imported")):
        with pytest.raises(UserError, match=words) as error: lookup(table, name, "--pool")
        assert str(error.value).startswith(f"--pool {name}:") and "\n" not in str(error.value)


def test_results_are_found_beside_a_notebook_or_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = result_file("toy.json")
    assert shipped.is_absolute() and json.loads(shipped.read_text())["command"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/toy.json").write_text("{}")
    assert result_file("toy.json").read_text() == "{}"
    with pytest.raises(UserError, match="results/none.json: neither here"): result_file("none.json")


@pytest.mark.parametrize("error, status, words", [
    (UserError("--seed -1: give more"), 2, "error: --seed -1: give more"),
    (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "x.txt: No such file"),
    (Stopped("step 3"), 143, "stopped as asked (step 3); go on"),
    (KeyboardInterrupt(), 130, "interrupted; go on")])
def test_a_command_ends_in_one_line(error, status, words, capsys):
    with pytest.raises(SystemExit) as end, clean_exit("go on"): raise error
    said = capsys.readouterr().err
    assert end.value.code == status and words in said and said.count("\n") == 1


def test_a_line_a_minute(monkeypatch, capsys):
    "Where nobody watches: 130 items of ten seconds each, and 10 of an hour."
    clock = [0.]
    monkeypatch.setattr(core.time, "monotonic", lambda: clock[0])
    monkeypatch.delenv("IN_TEST")
    def slow(n, seconds):
        for k in range(n):
            clock[0] += seconds
            yield k
    assert list(progress(slow(13, 10), 13)) == list(range(13))
    assert capsys.readouterr().err == ("6 of 13: 10.0 seconds each, 70 s left\n"
                                       "12 of 13: 10.0 seconds each, 10 s left\n")
    assert len(list(progress(slow(9, 3600)))) == 9
    assert capsys.readouterr().err.splitlines()[8] == "9: 3600.0 seconds each"
    assert [x for x in progress(slow(300, .5), 90000)][-1] == 299
    assert capsys.readouterr().err.startswith("120 of 90000: 2 a second, 12.5 h left\n240 of")
    assert progress(items := [1], 0) is items


def test_a_fault_of_the_library_is_not_hidden():
    with pytest.raises(ZeroDivisionError), clean_exit(): 1 / 0


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    with written_aside(path) as aside: aside.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as aside:
        aside.write_text("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["x.txt"]
    with written_aside(path) as aside: aside.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name, why", [
    ("pipe", "a pipe, where"), ("socket", "a socket, where"), ("loop", "links"),
    ("folder", "a folder, where"), ("a\0b", "null byte"), ("a" * 256, "too long"),
    ("gone", "no such file"), ("file/below", "cannot be opened"), ("large", "12 bytes, where")])
@pytest.mark.parametrize("read", [partial(regular_file, most=10), partial(read_text, most=10)])
def test_what_is_no_file_is_not_opened(read, name, why, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as s:
        with contextlib.chdir(tmp_path): s.bind("socket")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "large").write_text("a" * 12)
    with pytest.raises(UserError, match=why): read(tmp_path / name)


@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b'{"a": ', b"[" * 100_000, b"\xff{}", b"\0",
                                  b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.json"): read_json(tmp_path / "a.json")


def test_a_file_being_written_has_a_name_of_its_own(tmp_path):
    "Long names fit, and what the user has under a similar name stays."
    path = tmp_path / ("a" * 251 + ".png")
    (tmp_path / "b.tmp").write_text("mine")
    for place in (path, tmp_path / "b"):
        with written_aside(place) as aside: aside.write_text("whole")
        assert place.read_text() == "whole"
    assert (tmp_path / "b.tmp").read_text() == "mine" and not list(tmp_path.glob(ASIDE))
