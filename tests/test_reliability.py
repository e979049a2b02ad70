"""What the verdict without labels is worth: the study in small, and the results of the whole."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from house import NBS
from jobs import tiny

from sac_lit import reliability as module
from sac_lit.reliability import main, reliability
from sac_lit.verdict import score, verdict


@pytest.mark.slow
def test_study_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tiny(module.BASE)
    monkeypatch.setattr(module, "BASE", base)
    monkeypatch.setattr(module, "SETTINGS", {"SAC": "", "no noise": "--sac.noise"})
    monkeypatch.setattr(module, "DAMAGE", dict([*module.DAMAGE.items()][2:4]))
    main(["--seeds", "0", "--out", "mine.json"])
    found = json.loads((tmp_path / "mine.json").read_text())
    rows = found["rows"]
    assert "--seeds 0" in found["command"]
    assert [r["network"] for r in rows] == ["trained"] * 2 + ["damaged"] * len(module.DAMAGE)
    assert all(0 <= r["sac"] <= 100 and r["verdict"] == verdict(r["score"]) for r in rows)
    assert "rank correlation" in capsys.readouterr().out
    run = str(next((tmp_path / "runs").glob("verdict_seed0_*noise")))
    main(["--seeds", "0", "--runs", run, "--out", "more.json"])
    *before, last = json.loads((tmp_path / "more.json").read_text())["rows"]
    assert before == rows and last["score"] == rows[1]["score"]


def test_reliability():
    gain = np.linspace(-5, 5, 21)
    table = pd.DataFrame({"gain": gain, "score": gain ** 3})
    table["verdict"] = table["score"].map(verdict)
    found = reliability(table)
    assert math.isclose(found["rank correlation"], 1) and found["from"] <= 1
    assert found["harmful"] == found["good"] == 9           # 1 to 5 points; half a point is none
    assert (found["named worse"], found["named better"]) == (8, 9)   # limits of -2 and .5
    assert found["called better"] == found["called worse"] == 0
    table["score"] = -table["score"]
    assert math.isclose(reliability(table)["rank correlation"], -1)


def test_the_measured_reliability():
    "The scores in the results follow from their measures."
    rows = json.loads((NBS / "results" / "reliability.json").read_text())["rows"]
    for row in rows:
        before, after = ({k: v[i] for k, v in row["measures"].items()} for i in (0, 1))
        assert math.isclose(score(before, after), row["score"], abs_tol=.05)
        assert row["verdict"] == verdict(row["score"])
    assert sum(row["network"] == "trained" for row in rows) >= 24
