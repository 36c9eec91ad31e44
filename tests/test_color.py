import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from utils import color


def test_luminance_is_pillow_s():
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    y = transforms.ToTensor()(photo)[None]
    gray = torch.from_numpy(np.asarray(photo.convert('L')).copy())
    assert (color.luminance(y)[0, 0] * 255 - gray).abs().max() <= 0.51


def test_the_luminance_merge_keeps_color_and_has_the_luminance_everywhere():
    torch.manual_seed(0)
    gray = torch.rand(4, 1, 64, 64)
    gray[0], gray[1] = 0, 1
    for wild in torch.randn(4, 3, 64, 64), torch.zeros(4, 3, 64, 64):
        merged = color.merge_luminance(wild, gray)
        assert merged.min() >= -1e-6 and merged.max() <= 1 + 1e-6
        assert (color.luminance(merged) - gray).abs().max() < 1e-5
    assert torch.equal(merged, gray.expand_as(merged))  # black has no color to keep

    # inside the cube it takes away exactly what is wrong in brightness
    y = 0.3 + 0.4 * torch.rand(4, 3, 64, 64)
    brighter = y + 0.2 * torch.randn(4, 1, 64, 64)
    merged = color.merge_luminance(brighter, color.luminance(y))
    assert torch.allclose(merged, y, atol=1e-6)
    # a prediction that is right stays as it is, at the cube's faces too
    y = torch.rand(4, 3, 64, 64).mul(4).round().div(4)
    assert torch.allclose(color.merge_luminance(y, color.luminance(y)), y, atol=1e-5)


def test_colorfulness():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (40, 30, 3)).astype(float)
    rg = photo[..., 0] - photo[..., 1]
    yb = (photo[..., 0] + photo[..., 1]) / 2 - photo[..., 2]
    by_hand = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    y = torch.from_numpy(photo / 255).permute(2, 0, 1)[None]
    assert color.colorfulness(y).item() == pytest.approx(by_hand)
    # all one blue: no deviation, and the signed means 0 and -255
    blue = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert color.colorfulness(blue).item() == pytest.approx(0.3 * 255, abs=0.002)
    assert color.colorfulness(torch.full((1, 3, 4, 4), 0.4)).item() < 0.002


def test_dullness_is_what_a_photo_lacks_of_the_truth_s_colorfulness():
    torch.manual_seed(0)
    y = torch.rand(2, 3, 8, 8)
    half = color.luminance(y) + (y - color.luminance(y)) / 2
    missing = color.colorfulness(y) / 2 / 255  # the colorfulness is in proportion to the chroma
    torch.testing.assert_close(color.dullness(half, y), missing)
    assert color.dullness(y, half).tolist() == color.dullness(y, y).tolist() == [0, 0]
