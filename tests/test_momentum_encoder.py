"""The momentum encoder: math.md section 2."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from paths import golden_dir
from torch import nn

from recog_fast.memory import MomentumEncoder


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_ema_params(dtype: torch.dtype, tolerance: float) -> None:
    with np.load(golden_dir() / "ema_params__gamma099.npz") as file:
        key, query = (torch.from_numpy(file[name]).to(dtype) for name in ("in_k", "in_q"))
        moved = torch.from_numpy(file["out_k"])
    net = nn.Linear(key.numel(), 1, bias=False, dtype=dtype)
    net.weight = nn.Parameter(key[None])
    encoder = MomentumEncoder(net, gamma=0.99)
    net.weight = nn.Parameter(query[None])
    encoder.update(net)
    torch.testing.assert_close(encoder.key.get_parameter("weight")[0].double(), moved, rtol=tolerance, atol=tolerance, check_device=False)


def test_momentum_encoder_moves_parameters_and_copies_buffers() -> None:
    net = backbone()
    encoder = MomentumEncoder(net, gamma=0.9)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    old = [parameter.clone() for parameter in encoder.key.parameters()]
    images = torch.randn(6, 3, 8, 8)
    net(images).sum().backward()  # moves the running statistics
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    encoder.update(net)
    for key, before, query in zip(encoder.key.parameters(), old, net.parameters(), strict=True):
        torch.testing.assert_close(key, 0.9 * before + 0.1 * query.detach())
    for ours, theirs in zip(encoder.key.buffers(), net.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    keys = encoder(images)
    assert keys.shape == (6, 5) and not keys.requires_grad
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_momentum_encoder_mode_state_and_wrappers() -> None:
    net = backbone().eval()
    encoder = MomentumEncoder(net)
    assert not encoder.training and not encoder.key.training
    assert encoder.train().key.training
    other = MomentumEncoder(backbone())
    with torch.no_grad():
        other.key.get_parameter("3.weight").zero_()
    other.load_state_dict(encoder.state_dict())
    assert same_state(encoder, other)
    wrapped = MomentumEncoder(nn.DataParallel(net), gamma=0.5)
    wrapped.update(nn.DataParallel(net))
    wrapped.update(net)
    assert same_state(wrapped.key, net)
    assert same_state(copy.deepcopy(encoder), encoder)


def test_momentum_encoder_looks_through_compile() -> None:
    net = backbone()
    compiled = nn.Identity()  # torch.compile's wrapper without its imports: the module is its _orig_mod
    compiled._orig_mod = net
    encoder = MomentumEncoder(compiled, gamma=0.5)
    encoder.update(compiled)
    assert same_state(encoder.key, net)


def test_momentum_encoder_errors() -> None:
    net = backbone()
    with pytest.raises(ValueError, match="gamma"):
        MomentumEncoder(net, gamma=1.1)
    with pytest.raises(TypeError, match="backbone"):
        MomentumEncoder(lambda images: images)  # type: ignore[arg-type]
    encoder = MomentumEncoder(net)
    before = copy.deepcopy(encoder)
    with pytest.raises(ValueError, match="parameter '0.weight' of shape"):
        encoder.update(nn.Sequential(nn.Conv2d(3, 2, 3), *list(net)[1:]))
    with pytest.raises(ValueError, match="'3.bias' missing in the backbone"):
        encoder.update(nn.Sequential(*list(net)[:3], nn.Linear(4 * 36, 5, bias=False)))
    with pytest.raises(ValueError, match="'4.weight' missing in the key"):
        encoder.update(nn.Sequential(*net, nn.Linear(5, 5)))
    assert same_state(before, encoder)
