"""The joint step: plain against one total loss, fast against plain, and from the command line."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from house import answer, cells, NBS
from jobs import log, train, weights

from sac_lit import ema_training, fast
from sac_lit.core import generator, lookup
from sac_lit.crop_fusion import crop_theta, divide, POOLS
from sac_lit.deeplabv2 import build_model
from sac_lit.ema_training import (
    forward_backward,
    MomentumNetwork,
    PLAIN,
    pseudo_supervision,
    sac_step,
    SelfSupervision,
    Views,
)
from sac_lit.fast import FAST, fast_pseudo_supervision, micro_batched, speed_up
from sac_lit.moving_threshold import ClassPrior
from sac_lit.views import NOISE, photometric_noise

SIZE = (32, 64)
POOL = """
def halves(weighted, weight):
    "The mean of the first half of the views."
    few = max(1, weighted.shape[1] // 2)
    return weighted[:, :few].sum(1), weight[:, :few].sum(1)
"""


def board_step():
    "The step as 08 writes it on a board."
    found = {}
    code = next(c.source for c in cells(NBS / "08_ema_training.ipynb", "code")
                if "def board_step" in c.source)
    exec("from sac_lit.ema_training import *\n"
         "from sac_lit.ema_training import cross_entropy, focal_loss, freeze_bn\n" + code, found)
    return found["board_step"]


def batch(seed, groups=2, crops=2, classes=19, sources=2):
    "Source images and labels, and groups of views, of random numbers."
    rng = generator(seed, "batch")
    images = torch.randn(sources, 3, *SIZE, generator=rng)
    labels = torch.randint(classes, (sources, *SIZE), generator=rng)
    labels[:, :4] = 255
    clean = torch.randn(groups, crops + 1, 3, *SIZE, generator=rng)
    noisy = clean + .1 * torch.randn(clean.shape, generator=rng)
    share = .5 + .5 * torch.rand(groups, crops + 1, generator=rng)
    share[:, 0] = 1.
    height, width = share * SIZE[0], share * SIZE[1]
    top, left = (torch.rand(share.shape, generator=rng) * (side - length)
                 for side, length in zip(SIZE, (height, width)))
    flip = torch.rand(share.shape, generator=rng) < .5
    theta = crop_theta(top, left, height, width, SIZE, flip)
    return images, labels, Views(clean, noisy, theta)


class Side:
    "A network with its teacher, prior and optimizer, and how it takes its steps."
    def __init__(self, model, how=PLAIN, lr=.01):
        self.model, self.how = model, how
        self.teacher, self.prior = MomentumNetwork(model, .9), ClassPrior(19)
        self.optimizer = torch.optim.SGD(model.parameters(), lr, momentum=.9)

    def step(self, batch, hp=SelfSupervision(), move=sac_step):
        self.teacher.update(self.model)
        return move(self.model, self.teacher, self.prior, self.optimizer, *batch, hp,
                    *[self.how] * (move is sac_step))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("deeplabv2_tiny", 19)
    with torch.no_grad():                      # statistics of the data
        for _ in range(3): model.train()(torch.randn(4, 3, *SIZE))
    return model


def gap(a, b):
    "Largest difference between the parameters of two networks."
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def same_losses(a, b):
    "Losses to rounding; rounding may tip a pixel from class to class."
    for name, most in (("loss_source", 1e-5), ("loss_target", 1e-5), ("accepted", 1e-3)):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=most)


def test_plain_equals_the_gradient_of_one_total_loss(model):
    "`board_step` of 08 adds up both losses and takes one gradient."
    move = board_step()
    ours, slow = Side(copy.deepcopy(model)), Side(copy.deepcopy(model))
    for step in range(3):
        found = ours.step(batch(step))
        source, target = slow.step(batch(step), move=move)
        torch.testing.assert_close(found["loss_source"], source)
        torch.testing.assert_close(found["loss_target"], target)
        assert .05 < found["accepted"].sum() < .99
    assert gap(ours.model, slow.model) < 1e-6 < gap(ours.model, model)
    torch.testing.assert_close(ours.prior.chi, slow.prior.chi)


@pytest.mark.parametrize("pool", POOLS)
def test_fast_equals_plain(model, pool):
    "Over several steps of SGD, without a threshold that rounding could tip over."
    hp = SelfSupervision(zeta=0., pool=pool)
    plain = Side(copy.deepcopy(model), lr=.003)
    fast = Side(speed_up(copy.deepcopy(model)), FAST, lr=.003)
    for step in range(5):
        a, b = plain.step(batch(step), hp), fast.step(batch(step), hp)
        same_losses(a, b)
    assert gap(plain.model, fast.model) < 1e-5 < gap(plain.model, model)
    assert gap(plain.teacher, fast.teacher) < 1e-5
    torch.testing.assert_close(plain.prior.chi, fast.prior.chi)


def test_fast_and_plain_give_the_same_pseudo_labels(model):
    teacher, views = MomentumNetwork(model), batch(0)[2]
    found = [make(teacher, ClassPrior(19), views) for make in
             (pseudo_supervision, fast_pseudo_supervision)]
    (labels, confidence), (fast_labels, fast_confidence) = found
    torch.testing.assert_close(confidence, fast_confidence)
    assert .05 < (labels != 255).float().mean() < .95
    assert (labels == fast_labels).float().mean() > .999


@pytest.mark.parametrize("how", [PLAIN, FAST], ids=["plain", "fast"])
def test_micro_batches_of_one_image_change_only_the_order_of_additions(model, how):
    few = replace(how, forward_backward=micro_batched(1))
    whole, parts = Side(copy.deepcopy(model), how, lr=0.), Side(copy.deepcopy(model), few, lr=0.)
    for side in (whole, parts): side.step(batch(0))
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_processes_that_share_a_group_step_as_one(model):
    "Two of the four views each, and the teacher's logits of the others."
    images, labels, views = batch(0, groups=1, crops=3)
    teacher, shares = MomentumNetwork(model), [slice(0, 2), slice(2, 4)]
    logits = [teacher(views.clean[0, mine])[None] for mine in shares]
    one = Side(copy.deepcopy(model), lr=0.)
    one.step((images, labels, views))
    for how in (PLAIN, FAST):
        sides = []
        for k, mine in enumerate(shares):
            joined = replace(how, gather=lambda mine: torch.cat(logits, 1))
            side = Side(copy.deepcopy(model), joined, lr=0.)
            part = Views(views.clean[:, mine], views.noisy[:, mine], views.theta, mine)
            side.step((images[k:k + 1], labels[k:k + 1], part))
            torch.testing.assert_close(side.prior.chi, one.prior.chi)
            sides.append(side.model)
        for p, a, b in zip(one.model.parameters(), *(m.parameters() for m in sides)):
            torch.testing.assert_close(p.grad, (a.grad + b.grad) / 2, rtol=1e-4, atol=1e-6)


def test_the_step_moves_the_student_and_the_prior_alone(model):
    side = Side(copy.deepcopy(model))
    teacher = copy.deepcopy(side.teacher.state_dict())
    sac_step(side.model, side.teacher, side.prior, side.optimizer, *batch(0))
    state = model.state_dict()
    moved = {k for k, v in side.model.state_dict().items() if not torch.equal(v, state[k])}
    assert moved == {k for k, _ in model.named_parameters()}
    assert all(torch.equal(v, teacher[k]) for k, v in side.teacher.state_dict().items())
    assert side.prior.updates == 1


@pytest.mark.parametrize("how", [PLAIN, FAST], ids=["plain", "fast"])
@pytest.mark.parametrize("broken", ["source", "target"])
def test_a_loss_that_is_no_number_stops_before_the_optimizer(model, how, broken):
    images, labels, views = batch(0)
    if broken == "source": images = images * float("nan")
    if broken == "target": views = views._replace(noisy=views.noisy * float("nan"))
    side = Side(copy.deepcopy(model), how)
    with pytest.raises(FloatingPointError, match=f"{broken} loss nan"):
        side.step((images, labels, views))
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in side.model.state_dict().items())


@pytest.mark.parametrize("how, module", [(PLAIN, ema_training), (FAST, fast)])
@pytest.mark.parametrize("name", ["fuse", "pseudo_labels"])
def test_the_equations_on_the_page_are_those_of_training(model, monkeypatch, how, module, name):
    "Whoever changes `fuse` or `pseudo_labels` changes what is learnt."
    def step():
        prior = ClassPrior(19)
        images, labels, views = batch(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.)
        return sac_step(model, MomentumNetwork(model), prior, optimizer, images, labels, views,
                        SelfSupervision(zeta=.1), how)["accepted"].sum().item()
    usual, there = step(), getattr(module, name)
    def nothing(*args, **kwargs):
        first, second = there(*args, **kwargs)
        return (first * 0, second) if name == "fuse" else (first * 0 + 255, second)
    monkeypatch.setattr(module, name, nothing)
    assert usual > 0 and step() == 0


def test_forward_backward_adds_to_gradients_that_are_there(model):
    images, labels, _ = batch(0)
    model.eval()
    once = forward_backward(model, lambda x: x.square().mean(), images)
    gradient = [p.grad.clone() for p in model.parameters()]
    again = forward_backward(model, lambda x: x.square().mean(), images, factor=2.)
    assert once == again and not once.requires_grad
    for p, g in zip(model.parameters(), gradient): torch.testing.assert_close(p.grad, 3 * g)


def test_a_pool_of_ones_own_changes_both_forms_alike(model, tmp_path, monkeypatch):
    (tmp_path / "own_pool.py").write_text(POOL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    hp = SelfSupervision(zeta=0., pool="own_pool:halves")
    plain, fast = Side(copy.deepcopy(model)), Side(speed_up(copy.deepcopy(model)), FAST)
    mean = Side(copy.deepcopy(model))
    for step in range(3):
        found = [side.step(batch(step), hp) for side in (plain, fast)]
        same_losses(*found)
        mean.step(batch(step), replace(hp, pool="mean"))
    assert gap(plain.model, fast.model) < 1e-5 < 10 * gap(plain.model, mean.model)
    views = batch(0)[2]
    _, own = pseudo_supervision(plain.teacher, ClassPrior(19), views, hp)
    _, usual = pseudo_supervision(plain.teacher, ClassPrior(19), views)
    assert (own - usual).abs().max() > .01


OWN = "--stages sac --sac.start runs/fast/model_abn --sac.loss.pool own_pool:halves".split()
RUNS = {"fast": [], "plain": ["--plain"], "own": OWN, "own_plain": [*OWN, "--plain"]}
SGD = ("--abn.optimizer sgd --sac.optimizer sgd --abn.lr 1e-3 --sac.lr 1e-3 "
       "--sac.loss.floor 0 --log-every 1").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs in one folder: fast and plain, by the mean and by a pool of one's own."
    cwd = tmp_path_factory.mktemp("step")
    (cwd / "own_pool.py").write_text(POOL)
    for name, args in RUNS.items():
        done = train(cwd, *SGD, *args, "--name", name)
        assert done.returncode == 0, done.stderr
    return cwd


@pytest.mark.trains
@pytest.mark.parametrize("fast, plain", [("fast", "plain"), ("own", "own_plain")])
def test_plain_training_gives_the_same(runs, fast, plain):
    "Losses to rounding and the same shares of pseudo labels, in every step."
    rows = log(runs, fast, event="step"), log(runs, plain, event="step")
    assert len(rows[0]) == (12 if fast == "fast" else 6)
    for a, b in zip(*rows, strict=True):
        assert a["loss_source"] == pytest.approx(b["loss_source"], rel=1e-4, abs=2e-5)
        if a["stage"] != "sac": continue
        assert a["loss_target"] == pytest.approx(b["loss_target"], rel=1e-3, abs=2e-5)
        assert a["accepted"] == pytest.approx(b["accepted"], abs=1e-3)
        assert .02 < sum(a["accepted"]) < 1
    for folder in ("model", "momentum"):
        a, b = weights(runs, fast, folder), weights(runs, plain, folder)
        for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


@pytest.mark.trains
def test_a_pool_of_ones_own_takes_effect_in_training(runs):
    fast, own = (weights(runs, name) for name in ("fast", "own"))
    assert any(not torch.equal(fast[k], own[k]) for k in fast)
    first = [log(runs, name, event="step", stage="sac")[0] for name in ("fast", "own")]
    assert first[0]["loss_source"] == first[1]["loss_source"]      # both start from one network
    assert first[0]["loss_target"] != first[1]["loss_target"]


@pytest.mark.trains
def test_exercise_an_augmentation(tmp_path, monkeypatch):
    "The answer of 08 covers a square, by keyed draws, and training takes it."
    (tmp_path / "cutout.py").write_text(answer("08_ema_training", "cutout"))
    assert len(answer("08_ema_training", "cutout").splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cutout = lookup(NOISE, "cutout:CUTOUT", "sac.noise")
    images = torch.ones(6, 3, 40, 80)
    rngs = lambda: [generator(0, "view", i) for i in range(6)]
    covered = photometric_noise(images, rngs(), {"cutout": cutout})
    assert torch.equal(covered, photometric_noise(images, rngs(), {"cutout": cutout}))
    grey = (covered == .5).float().mean((1, 2, 3))
    assert set(grey.tolist()) == {0., 1 / 16} and F.mse_loss(covered, images) > 0
    done = train(tmp_path, *SGD, "--sac.noise", "blur", "cutout:CUTOUT", "--abn.steps", "1",
                 "--sac.steps", "2", "--eval-every", "0")
    assert done.returncode == 0, done.stderr


def test_divide_is_what_a_pool_may_use():
    "A pool's pair means the same whatever its weight."
    probs = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(divide(probs * .3, torch.full((1, 1, 4, 4), .3))[0], probs)
