"""Fusing batch norms changes features by rounding, and changes nothing where it cannot be done."""

import pytest
import timm
import torch
from torch import nn

from featcache.backbone.fuse import fuse_batch_norms


def with_statistics(model):
    """Batch norms as training leaves them; fresh ones change nothing, and fusing them would show nothing."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("tf_efficientnet_lite0", 0),
        ("resnet18", 0),
        ("mobilenetv3_small_050", 0),
        ("regnetx_002", 0),
        ("convnext_atto", 0),
    ],
)
@torch.no_grad()
def test_features_stay_the_same(name, left):
    model = with_statistics(timm.create_model(name, num_classes=0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse_batch_norms(model)
    assert norms(fused) == left
    images = torch.randn(2, 3, 64, 64)
    expected, found = model(images), fused(images)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    for one, other in zip(model.forward_intermediates(images)[1], fused.forward_intermediates(images)[1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Twice(nn.Module):
    """A convolution that something else reads too, one that is used twice, and a norm before its convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.again, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.before, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.first(x)
        x = x + self.norm(x)
        x = self.other(self.again(self.again(x)))
        return self.last(self.before(x))


class _Branches(nn.Module):
    """Python that depends on values, which no trace follows."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("kind", [_Twice, _Branches])
@torch.no_grad()
def test_what_cannot_be_fused_stays(kind):
    model = with_statistics(kind())
    images = torch.randn(2, 3, 8, 8)
    fused = fuse_batch_norms(model)
    assert norms(fused) == norms(model)
    torch.testing.assert_close(fused(images), model(images), rtol=0, atol=0)
