"""Arithmetic of gray and color, on batches of photos (B, 3, H, W) in [0, 1]."""
import torch


def luminance(y):
    """Return the luma of ITU-R BT.601, as Pillow's 'L' has it.

    (B, 3, H, W) → (B, 1, H, W), in the range of y.
    """
    red, green, blue = y.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def merge_luminance(y, gray):
    """Return the color of y (B, 3, H, W) at the luminance `gray` (B, 1, H, W) in [0, 1].

    The result is in [0, 1], and its luminance is `gray` everywhere: y's difference from its own
    gray is kept, and shrunk where it would leave the color cube. (The orthogonal projection onto
    the colors of that luminance turns errors of brightness into color casts: on photos it was
    worse.)
    """
    chroma = y - luminance(y)
    room = torch.where(chroma > 0, 1 - gray, gray) / chroma.abs().clamp(min=1e-6)
    return gray + chroma * room.amin(1, keepdim=True).clamp(max=1)


def psnr(prediction, y):
    """Return the peak signal-to-noise ratio of each photo in dB: (B, 3, H, W) in [0, 1] → (B,).

    At most 100 dB, so that one exact photo does not make a mean infinite.
    """
    return -10 * (prediction - y).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def colorfulness(y):
    """Return the colorfulness of each photo: (B, 3, H, W) in [0, 1] → (B,).

    0 is gray, 33 moderately, 59 quite colorful. M^(3) of Hasler and Süsstrunk, "Measuring
    colourfulness in natural images", Human Vision and Electronic Imaging VIII, 2003, on values up
    to 255.
    """
    red, green, blue = (255 * y).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    deviation, mean = torch.std_mean(opponents, dim=2, correction=0)
    return deviation.norm(dim=0) + 0.3 * mean.norm(dim=0)
