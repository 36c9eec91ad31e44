"""Arithmetic of grey and colour, on batches of photos (B, 3, H, W) in [0, 1]."""
import torch


def luminance(y):
    """Luma of ITU-R BT.601, as Pillow's 'L': (B, 3, H, W) → (B, 1, H, W), in the same range."""
    red, green, blue = y.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def with_luminance(y, gray):
    """The colour of y (B, 3, H, W) at the luminance `gray` (B, 1, H, W) in [0, 1], in [0, 1] too.

    Keeps y's difference from its own grey, made smaller where it would leave the cube of colours,
    so that the luminance is `gray` everywhere. (The orthogonal projection, the nearest colour of
    that luminance, cannot lead away from the truth, but turns what y has wrong in brightness into
    a cast of colour: on photos the result was worse.)
    """
    chroma = y - luminance(y)
    room = torch.where(chroma > 0, 1 - gray, gray) / chroma.abs().clamp(min=1e-6)
    return gray + chroma * room.amin(1, keepdim=True).clamp(max=1)


def psnr(prediction, y):
    """Peak signal-to-noise ratio of each photo in dB, (B, 3, H, W) in [0, 1] → (B,).

    At most 100 dB, lest one exact photo make a mean infinite.
    """
    return -10 * (prediction - y).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def colorfulness(y):
    """Of each photo, (B, 3, H, W) in [0, 1] → (B,): 0 is grey, 33 moderately, 59 quite colourful.

    The metric M^(3) of Hasler and Süsstrunk, "Measuring colourfulness in natural images", Human
    Vision and Electronic Imaging VIII, 2003, on values up to 255.
    """
    red, green, blue = (255 * y).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    deviation, mean = torch.std_mean(opponents, dim=2, correction=0)
    return deviation.norm(dim=0) + 0.3 * mean.norm(dim=0)
