# ruff: noqa: F401, F811
"""A list of classes, proposed by looking at label maps."""
import os

import numpy as np
import pytest
from PIL import Image
from test_audit import audited
from test_findings import streets

from sac_lit.audit import main
from sac_lit.image_files import read_class_table


@pytest.fixture
def described(capsys, tmp_path):
    def described(place):
        "Exit status, the list of classes and what is said beside it."
        status = 0
        try: main(["describe", str(place)])
        except SystemExit as e: status = e.code
        out, err = capsys.readouterr()
        return status, out, err
    return described


def test_what_is_proposed_is_in_order(streets, described, audited):
    status, out, err = described(streets/"maps")
    assert status == 0 and [line.split("  #")[0] for line in out.splitlines()] == [
        "0 background", "255 class_255"]
    (streets/"classes.txt").write_text(out)
    command = ("folder", "--images", streets/"photos", "--labels", streets/"maps",
               "--classes", streets/"classes.txt")
    assert audited(*command)[0] == 0 and "6 of 6 files read" in err


def test_colours_are_proposed(streets, described, audited):
    for path in (streets/"maps").glob("*.png"):
        grey = np.asarray(Image.open(path))
        Image.fromarray(np.stack([grey, grey // 2, grey // 5], -1)).save(path)
    _, out, _ = described(streets/"maps")
    (streets/"classes.txt").write_text(out)
    table = read_class_table(streets/"classes.txt")
    assert {*table.colors} == {0, 0xff7f33} and len(table.ignored) == 1


@pytest.mark.parametrize("values, lines", [
    ([0, 1, 255], ["0 class_0", "1 class_1", "255 -"]),
    ([3, 1000], ["3 class_3", "1000 class_1000"]),
    ([1, 2, 3], ["1 class_1", "2 class_2", "3 class_3"])])
def test_numbers_are_proposed(tmp_path, described, values, lines):
    np.save(tmp_path/"y.npy", np.repeat([values], 4, 0))
    assert [x.split("  #")[0] for x in described(tmp_path)[1].splitlines()] == lines


def test_nothing_to_describe(tmp_path, described):
    assert described(tmp_path/"none")[0] == described(tmp_path)[0] == 2
    os.mkfifo(tmp_path/"y.png")
    status, out, err = described(tmp_path)
    assert status == 2 and not out and "a pipe" in err and err.count("\n") == 1


def test_photographs_are_no_label_maps(streets, described):
    for path in (streets/"photos").glob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    status, out, err = described(streets/"photos")
    assert status == 2 and "saved as JPEG" in err
