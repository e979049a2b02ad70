"The authors' snapshots: read without running their code, recognised, loaded, written."
import json

import numpy as np
import pytest
import torch
from house import answer
from test_networks import noise, RELEASED, released, tiny

import sac_lit.weights
from sac_lit.core import NAMES, UserError
from sac_lit.weights import load_snapshot, read_snapshot, recognise, save_snapshot


def snapshot(arch, joint=True, C=19):
    "A released file's dictionary. Tensors repeat a single number, so the file is small."
    def network(part, order):
        state = {}
        for k, shape in released(arch, C).items():
            dtype = torch.int64 if k.endswith("tracked") else torch.float32
            state[f"module.{part}.{k}"] = torch.zeros((), dtype=dtype).expand(shape)
        state[next(reversed(state))] = order.float()     # the head's last bias decides the class
        return state
    state = network("backbone", torch.arange(C))
    if joint:
        state |= network("slow_net", -torch.arange(C))
        state["module.running_conf"] = torch.full((C,), .05)
        state["module.slow_init"] = torch.ones(1)
    opt = {"state": {0: {"momentum_buffer": torch.zeros(3)}},
           "param_groups": [{"lr": 2.5e-4, "params": [0]}]}
    return {"model": state, "opt": opt, "score": np.float64(.538), "epoch": 136}


@pytest.mark.parametrize("arch", RELEASED)
def test_a_released_snapshot_loads_predicts_and_round_trips(arch, tmp_path):
    path = tmp_path / "sac.pth"
    torch.save(snapshot(arch), path)
    for which, best in (("momentum", 0), ("student", 18)):
        model = load_snapshot(path, which)
        assert (model.arch, model.num_classes) == (arch, 19)
        assert (model.names, model.training) == (NAMES, False)
        assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
        with torch.no_grad(): logits = model(noise(1, 3, 32, 40))
        assert (logits.argmax(1) == best).all()
    save_snapshot(path, model)
    again = torch.load(path, weights_only=True, mmap=True)["model"]
    expected = {f"module.backbone.{k}": shape for k, shape in released(arch).items()}
    assert {k: tuple(v.shape) for k, v in again.items()} == expected
    assert torch.equal(again[next(reversed(expected))], torch.arange(19.))


@pytest.mark.parametrize("part", ["backbone", "slow_net"])
@pytest.mark.parametrize("arch", RELEASED)
def test_a_snapshot_with_a_renamed_tensor_is_refused(arch, part, tmp_path):
    saved = snapshot(arch)
    names = [k for k in saved["model"] if part in k]
    for k in (names[0], names[len(names) // 2], names[-1]):
        state = {("module.other" if n == k else n): v for n, v in saved["model"].items()}
        torch.save(saved | {"model": state}, tmp_path / "sac.pth")
        with pytest.raises(UserError) as error: load_snapshot(tmp_path / "sac.pth")
        said = str(error.value)
        assert "sac.pth" in said and arch in said, said
        assert f"lacks {k.removeprefix('module.')}; it has besides other" in said, said


def test_both_networks_of_a_snapshot_return(tmp_path):
    a, b, x = tiny(1).eval(), tiny(2).eval(), noise(1, 3, 32, 40)
    path = tmp_path / "sac.pth"
    save_snapshot(path, a, b, torch.linspace(0, 1, 19))
    with torch.no_grad():
        assert torch.equal(load_snapshot(path)(x), a(x))
        assert torch.equal(load_snapshot(path, "momentum")(x), b(x))
    state = torch.load(path, weights_only=True)["model"]
    assert torch.equal(state["module.running_conf"], torch.linspace(0, 1, 19))
    assert state["module.slow_init"].tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["sac.pth"]
    with pytest.raises(ValueError, match="neither"): save_snapshot(tmp_path / "half.pth", a, b)


def test_a_snapshot_of_other_classes_says_how_many(tmp_path):
    saved, path = snapshot("deeplabv2_vgg16", joint=False, C=16), tmp_path / "abn.pth"
    torch.save(saved, path)
    model = load_snapshot(path)
    assert model.num_classes == 16 and model.names[0] == "class 0"
    name = "backbone.classifier.conv2d_list.1.weight"
    saved["model"][f"module.{name}"] = torch.zeros(19, 1024, 3, 3)
    torch.save(saved, path)
    with pytest.raises(UserError, match=f"with 16 classes.*another shape {name}"):
        load_snapshot(path)


@pytest.mark.parametrize("change, words", [
    (lambda s: s | {"opt": json.JSONEncoder()}, "json.encoder.JSONEncoder.*could run code"),
    (lambda s: s["model"], "no snapshot, which"),
    (lambda s: s | {"model": [1]}, "no snapshot, which"),
    (lambda s: s | {"model": {5: torch.zeros(1)}}, "no snapshot, which"),
    (lambda s: torch.zeros(1), "no snapshot, which"),
    (lambda s: {"model": {"layer1.weight": torch.zeros(1)}},
     "lacks .* and [0-9]+ more; it has besides layer1.weight")])
def test_what_is_no_snapshot_is_refused(change, words, tmp_path):
    path = tmp_path / "abn.pth"
    torch.save(change(snapshot("deeplabv2_vgg16", joint=False)), path)
    with pytest.raises(UserError, match=words): load_snapshot(path)


def test_a_snapshot_without_the_network_asked_for(tmp_path):
    path = tmp_path / "abn.pth"
    torch.save(snapshot("deeplabv2_vgg16", joint=False), path)
    assert load_snapshot(path).arch == "deeplabv2_vgg16"
    with pytest.raises(UserError, match="no momentum network"): load_snapshot(path, "momentum")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read"): load_snapshot(path)
    with pytest.raises(UserError, match="no such file"): load_snapshot(tmp_path / "absent.pth")


SCORES = {"float64": np.float64(.5), "float32": np.float32(.5), "array": np.arange(3),
          "key": {np.int64(3): 1}}


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("score", SCORES)
def test_nothing_of_numpy_is_run(score, core, tmp_path):
    "Files from before NumPy 2 name its functions differently; neither name is followed."
    saved = snapshot("deeplabv2_vgg16", joint=False) | {"score": SCORES[score]}
    path = tmp_path / "abn.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    old, new = b"cnumpy._core.multiarray\n", f"cnumpy.{core}.multiarray\n".encode()
    path.write_bytes(path.read_bytes().replace(old, new))
    assert load_snapshot(path).num_classes == 19


@pytest.mark.parametrize("arch", RELEASED)
def test_a_network_is_recognised_by_its_names(arch):
    state = {f"backbone.{k}": torch.empty(shape, device="meta")
             for k, shape in released(arch, 7).items()}
    model = recognise(state)
    assert (model.arch, model.num_classes) == (arch, 7)
    assert all(p.is_meta for p in model.parameters())


def test_the_exercise_names_the_rarest_classes(tmp_path):
    space = dict(vars(sac_lit.weights))
    exec(answer("02a_weights", "rarest"), space)
    path = tmp_path / "sac.pth"
    save_snapshot(path, tiny(1), tiny(2), torch.linspace(1, 0, 19))
    assert space["rarest"](path) == ["bicycle", "motorcycle", "train"]
    save_snapshot(path, tiny(1))
    assert "running_conf" not in read_snapshot(path)
    with pytest.raises(KeyError): space["rarest"](path)
