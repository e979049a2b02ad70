"""Exported networks against those that they were made of."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from house import answer

from sac_lit.core import generator, NAMES, UserError
from sac_lit.deeplabv2 import build_model, SegmentationModel
from sac_lit.export import export, FORMATS
from sac_lit.fast import speed_up
from sac_lit.predict import main


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = build_model("deeplabv2_tiny", 19).eval()
    for conv in net.backbone.head.conv2d_list: nn.init.normal_(conv.weight, 0, .3)
    return net


def run_onnx(path, x):
    "The file's logits and the facts in it."
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    assert [i.shape for i in session.get_inputs()] == [["batch", 3, "height", "width"]]
    y = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    return y, json.loads(session.get_modelmeta().custom_metadata_map["sac_lit"])


def run_torch(path, x):
    extra = {"sac_lit.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module()(x), json.loads(extra["sac_lit.json"])


RUN = {".onnx": run_onnx, ".pt2": run_torch}


@pytest.mark.parametrize("arch", ["deeplabv2_tiny", "deeplabv2_vgg16"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_networks_agree_at_any_size(arch, suffix, network):
    if suffix == ".onnx": pytest.importorskip("onnxruntime")
    net = network if arch == "deeplabv2_tiny" else build_model(arch, 19).eval()
    path = Path("net" + suffix)
    assert export(net, path) < 1e-4
    x = torch.randn(1, 3, 87, 50, generator=generator(0, "x"))
    y, known = RUN[suffix](path, x)
    with torch.no_grad(): torch.testing.assert_close(y, net(x), rtol=1e-3, atol=1e-4)
    assert known["names"] == list(NAMES) and known["mean"] == [.485, .456, .406]
    assert known["stride"] == net.stride
    assert [p.name for p in Path().iterdir()] == [path.name]


def test_a_network_with_fast_forms_is_exported_as_before(network):
    torch.manual_seed(0)
    fast = speed_up(build_model("deeplabv2_tiny", 19).eval())
    fast.load_state_dict(network.state_dict())
    assert export(fast, Path("net.pt2")) < 1e-4
    x = torch.randn(2, 3, 64, 96, generator=generator(0, "x"))
    with torch.no_grad(): expected = network(x)
    torch.testing.assert_close(run_torch(Path("net.pt2"), x)[0], expected, rtol=1e-3, atol=1e-4)


def test_an_export_that_differs_is_not_kept(network, monkeypatch):
    def wrong(model, images, path):
        path.touch()
        return lambda x: 1.1 * model(x)

    monkeypatch.setitem(FORMATS, ".pt2", wrong)
    with pytest.raises(UserError, match="differs from the original by"):
        export(network, Path("net.pt2"))
    with pytest.raises(UserError, match=".onnx or .pt2"): export(network, Path("net.tflite"))
    assert not list(Path().iterdir())


def test_onnxruntime_is_named_where_it_is_not_installed(monkeypatch, network):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"sac_lit\[onnx\]"): export(network, Path("a.onnx"))
    assert not list(Path().iterdir())


def test_export_command(network, capsys):
    network.save_pretrained("model")
    main(["export", "model", "net.pt2"])
    assert "written: net.pt2; any batch, height and width" in capsys.readouterr().out
    assert Path("net.pt2").exists()


def test_the_exercise_adds_a_format(network, monkeypatch):
    "Its answer is run as it stands on the page."
    code = answer("10a_export", "format")
    names = {"torch": torch, "SegmentationModel": SegmentationModel, "FORMATS": {}}
    exec(code, names)
    monkeypatch.setitem(FORMATS, ".pth", names["FORMATS"][".pth"])
    assert len(code.splitlines()) <= 20 and export(network, Path("net.pth")) == 0
