"Pretraining: the source loss, the step, statistics shared by processes, frozen batch norm."
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import noise, same, tiny

from sac_lit.abn_pretraining import abn_step, cross_entropy, freeze_bn, pixel_loss, share_statistics
from sac_lit.core import generator, IGNORE_INDEX
from sac_lit.deeplabv2 import param_groups

quick = settings(deadline=None, derandomize=True, max_examples=10)


def test_target_pass_moves_statistics_only():
    x, t = noise(2, 3, 32, 48), 2 + noise(3, 3, 40, 40, seed=1)
    y = torch.randint(19, (2, 32, 48), generator=generator(0, "labels"))
    a, b = tiny(), tiny()
    for model, target in ((a, None), (b, t)):
        optimizer = torch.optim.SGD(param_groups(model, .01, 1e-3), momentum=.9)
        for _ in range(3): abn_step(model, optimizer, x, y, target)
    assert same(a, b)
    moved = [not torch.equal(p, q) for (k, p), q in zip(a.named_buffers(), b.buffers())
             if "running" in k]
    assert moved and all(moved)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model, x = tiny(), noise(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 1.)
    before = copy.deepcopy(model)
    x[0, 0, 0, 0] = torch.inf
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    with pytest.raises(FloatingPointError, match="nan"):
        abn_step(model, optimizer, x, labels, x)
    assert same(before, model)


@quick
@given(st.integers(0, 2 ** 31), st.floats(0, 1))
def test_source_loss_counts_every_pixel(seed, ignored):
    g = generator(seed, "loss")
    logits = torch.randn(2, 5, 8, 8, generator=g)
    labels = torch.randint(5, (2, 8, 8), generator=g)
    labels[torch.rand(2, 8, 8, generator=g) < ignored] = IGNORE_INDEX
    weight = torch.rand(2, 8, 8, generator=g)
    known = labels != IGNORE_INDEX
    logp = logits.double().log_softmax(1)
    each = -logp.gather(1, labels.where(known, 0)[:, None])[:, 0]            # (2, 8, 8)
    expected = each[known].sum().item() / labels.numel()
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(pixel_loss(logits, labels), each.where(known, 0).float())
    weighted = (weight * each)[known].sum().item() / labels.numel()
    assert cross_entropy(logits, labels, weight).item() == pytest.approx(weighted, rel=1e-5)


def test_frozen_batch_norm_still_learns():
    model = freeze_bn(tiny().train())
    before = {k: v.clone() for k, v in model.named_buffers()}
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    cross_entropy(model(noise(2, 3, 32, 32)), labels).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.weight.grad.any() and m.bias.grad.any() and not m.training
    assert model.training
    synced = nn.SyncBatchNorm(3)
    assert freeze_bn(synced) is synced and not synced.training


# ---------------------------------------------------------------- many processes

def features():
    "A batch of six, whose halves have other means."
    return noise(6, 4, 5, 7) + torch.arange(6.)[:, None, None, None]


def normalised(layer, x):
    "Result, gradient of the features, and running statistics, after a pass in training mode."
    x = x.clone().requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked


def of_one_process(rank, processes, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    layer = share_statistics(nn.BatchNorm2d(4), torch.device("cpu"))
    part = features().chunk(processes)[rank]
    torch.save(normalised(layer, part), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_statistics_are_those_of_the_batch_of_all_processes(processes, tmp_path):
    mp.start_processes(of_one_process, (processes, tmp_path), processes, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    y, grad, *statistics = normalised(nn.BatchNorm2d(4), features())
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y, **close)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), grad, **close)
    for f in found: torch.testing.assert_close(list(f[2:]), statistics, **close)


def test_shared_statistics_keep_names_and_tensors():
    model = tiny()
    before = model.state_dict()
    after = share_statistics(model, torch.device("cpu")).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert layers and all(type(m).__name__ == "SharedBatchNorm2d" for m in layers)
