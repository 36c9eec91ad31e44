"""Arithmetic of gray and color, on batches of photos (B, 3, H, W) in [0, 1]."""

import math

import torch

GAIN, VIVIDNESS = 'Gain over the gray copy (dB)', "vividness (% of the truth's colorfulness)"
OBJECTIVE = 'objective (the lowest is the best)'
GRAY = 4.0  # a colorfulness below this is a tint: muted colors, as of mist and snow, begin above


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


def psnr(squared_error):
    """Return the peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1].

    At most 100 dB, so that an exact photo does not make it infinite.
    """
    return -10 * math.log10(max(squared_error, 1e-10))


def colorfulness(y):
    """Return the colorfulness of each photo: (B, 3, H, W) in [0, 1] → (B,).

    0 is gray, 33 moderately, 59 quite colorful. M^(3) (values to 255) of Hasler and Süsstrunk,
    "Measuring colourfulness in natural images", Human Vision and Electronic Imaging VIII, 2003.
    """
    red, green, blue = (255 * y).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    mean = opponents.mean(2)
    variance = (opponents - mean[..., None]).square().mean(2)
    # clamped, because the gradient of a square root is infinite at 0
    return variance.sum(0).clamp(min=1e-6).sqrt() + 0.3 * mean.norm(dim=0)


def dullness(color, y):
    """Return by how much each photo is less colorful than the truth y: → (B,).

    Both are (B, 3, H, W) in [0, 1]; the colorfulness counts from 0 to 1. Too much color is 0.
    """
    # not squared, which would give most weight to the few most colorful photos
    return ((colorfulness(y) - colorfulness(color)) / 255).relu()


def is_gray(photo):
    """Tell whether a photo, uint8 (H, W, 3), has no color worth learning from."""
    step = max(1, min(photo.shape[:2]) // 64)  # some 4,000 pixels tell as much as all
    sample = photo[::step, ::step].permute(2, 0, 1)[None].float() / 255
    return colorfulness(sample).item() < GRAY


def measure(prediction, x, y):
    """Return what is averaged over photos to tell how good a prediction is: a dict of (B,).

    `prediction` is the network's, (B, 3, H, W), for x (B, 1, H, W) in [-1, 1]; y is the truth,
    (B, 3, H, W) in [0, 1]. "Colorized" is what predict.py makes of it: at the photo's luminance.
    """

    def squared_error(image):
        return (image - y).square().flatten(1).mean(1)

    gray = (x + 1) / 2
    colorized = merge_luminance(prediction, gray)
    return {
        'validation loss': squared_error(prediction),
        'error of colorized': squared_error(colorized),
        'error of gray copy': squared_error(gray),
        'dullness': dullness(colorized, y),
        'colorfulness': colorfulness(colorized),
        'colorfulness of truth': colorfulness(y),
    }


def to_metrics(means):
    """Return the metrics of a validation from the means of what `measure` returns.

    PSNR in dB, from the mean squared error over all photos: the mean of the photos' own PSNRs would
    hang on the few that are nearly gray.
    """
    colorized, gray = psnr(means['error of colorized']), psnr(means['error of gray copy'])
    return {
        'validation loss': means['validation loss'],
        'dullness': means['dullness'],
        'PSNR of colorized': colorized,
        GAIN: colorized - gray,
        VIVIDNESS: 100 * means['colorfulness'] / means['colorfulness of truth'],
    }
