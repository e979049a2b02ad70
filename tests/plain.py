"""The joint step written the obvious way, as the yardstick of the fast one: every map at full resolution, all views at once.

It computes what `sac_step` computes. Convolutions and batch norms follow one another, the head is a sum of dilated convolutions,
logits are upsampled before the loss, pseudo labels go through a one-hot map, and the metric counts int64 pairs.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from sac_lit.crop_fusion import invert_theta, warp
from sac_lit.deeplabv2 import ASPP


class PlainASPP(ASPP):
    def forward(self, x): return sum(conv(x) for conv in self.conv2d_list)


def plain_network(model: nn.Module) -> nn.Module:
    "The same network with the plain head."
    for m in model.modules():
        if type(m) is ASPP: m.__class__ = PlainASPP
    return model


def upsample(logits, size): return F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)


def cross_entropy(logits, labels, class_weight=None):  # (B, H, W)
    return F.cross_entropy(upsample(logits, labels.shape[-2:]), labels, class_weight, reduction="none", ignore_index=255)


def fuse(probs, theta):  # (B, T, C, H, W), (B, T, 2, 3) -> (B, T, C, H, W)
    (B, T), size = probs.shape[:2], probs.shape[-2:]
    x, theta = probs.flatten(0, 1), theta.flatten(0, 1)
    seen = warp(torch.ones_like(x[:, :1]), invert_theta(theta), size).unflatten(0, (B, T))
    canvas = warp(x, invert_theta(theta), size).unflatten(0, (B, T)).sum(1) / seen.sum(1)
    back = warp(canvas.repeat_interleave(T, 0), theta, size)
    return (back / warp(torch.ones_like(back[:, :1]), theta, size)).unflatten(0, (B, T))


def pseudo_labels(probs, chi, zeta=.75, beta=1e-3, floor=0.):  # (N, C, H, W) -> (N, H, W) twice
    confidence, dominant = probs.max(1, keepdim=True)
    only = torch.zeros_like(probs).scatter_(1, dominant, confidence)                 # (N, C, H, W)
    limit = (zeta * (1 - (-chi / beta).exp()) * only.amax((2, 3))).clamp(min=floor)  # (N, C)
    accepted = (only > limit[..., None, None]).any(1)
    return torch.where(accepted, dominant[:, 0], 255), confidence[:, 0]


def sac_step(model, teacher, prior, optimizer, images, labels, views, hp):
    "One step; the losses."
    for m in model.train().modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    optimizer.zero_grad()
    loss_source = cross_entropy(model(images), labels).mean()
    loss_source.backward()
    size = views.clean.shape[-2:]
    with torch.no_grad():
        probs = upsample(teacher(views.clean.flatten(0, 1)), size).softmax(1).unflatten(0, views.clean.shape[:2])
        prior.update(probs)
        pseudo, confidence = pseudo_labels(fuse(probs, views.theta).flatten(0, 1), prior.chi, hp.zeta, hp.beta, hp.floor)
    loss_target = (confidence * cross_entropy(model(views.noisy.flatten(0, 1)), pseudo, (1 - prior.chi) ** hp.lam)).mean()
    (hp.target_weight * loss_target).backward()
    optimizer.step()
    return loss_source.detach(), loss_target.detach()


def count(pred, label, num_classes=19):  # counts (C, C)
    keep = label != 255
    return torch.bincount(label[keep].long() * num_classes + pred[keep].long(), minlength=num_classes ** 2).view(num_classes, num_classes)
