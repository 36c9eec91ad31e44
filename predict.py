"""Colorize photos with trained weights, at full resolution.

    python predict.py old_photo.jpg                       # → colorized/old_photo.jpg
    python predict.py old_photo.jpg --output color.png    # → color.png
    python predict.py album/ --output album_colorized     # a folder, with the folders in it
    python predict.py album/ --saturation 1.3 --compare   # livelier colors, beside the gray

The photos themselves are never changed. A result that exists is kept, unless --overwrite is given.
"""

from utils.stop import Stop, end_quietly

if __name__ == '__main__':
    end_quietly()  # Ctrl-C during the imports below needs no traceback

import io
import os
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.ExifTags import TAGS
from torch.nn import ModuleList
from tqdm import tqdm

from pretrained_unet import PretrainedUNet
from unet import UNet
from utils import cli
from utils.checkpoint import atomic_write, load_tensors, load_weights
from utils.cli import UsageError
from utils.color import is_gray, luminance, merge_luminance
from utils.device import Precision, available_cpus, choose_device
from utils.photos import MOST_PIXELS, list_photos, open_photo, to_pixels, to_rgb

FORMATS = 'AVIF', 'BMP', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP'  # all others become PNG
QUALITY = dict(AVIF=95, WEBP=100)  # JPEG has 98; a little less costs more than a gray level
OPAQUE = 'BMP', 'JPEG', 'PPM'
# the others may tell how the photo's own pixels were stored
EXIF_TAGS = """Make Model Software DateTime Artist Copyright ImageDescription ExifOffset GPSInfo
    XResolution YResolution ResolutionUnit""".split()
DONE, EXISTS, LEFT = 'done', 'exists', 'left'  # what became of a photo


def parse_args(argv):
    parser = cli.ArgumentParser(prog='predict.py', description=__doc__)
    add = parser.add_argument
    add('photos', nargs='+', help='photos, and folders of photos')
    add('--weights', action='append', help='from colorize.py [unet.pth]; repeat it for a mean')
    add('--output', type=Path, default='colorized', help="the results' folder, or one's own name")
    parser.add_flag('--overwrite', 'replace results that exist')
    add('--size', type=cli.image_size, help="what the network sees: shorter side [the training's]")
    add('--saturation', type=cli.factor, default=1.0, help='times the color that is predicted')
    parser.add_flag('--compare', 'show gray, colorized and, where it has color, original in a row')
    parser.add_device()
    return parser.parse_intermixed_args(argv)


def colorize(net, photo, size=None, saturation=1.0):
    """Colorize a PIL image of any mode: return RGB of the same size and luminance.

    `net` is a network, or a ModuleList of several. `size` is the shorter side of what it sees, in
    pixels: by default that of its training. `saturation` multiplies the color.
    """
    gray = to_rgb(photo).convert('L')
    chroma = 128 + 255 * saturation * predict_chroma(net, gray, size)
    planes = (Image.fromarray(plane.numpy()) for plane in chroma.round().clamp(0, 255).byte())
    cb, cr = (plane.resize(gray.size, Image.Resampling.BILINEAR) for plane in planes)
    return Image.merge('YCbCr', (gray, cb, cr)).convert('RGB')


@torch.inference_mode()
def predict_chroma(net, gray, size=None):
    """Return the chroma that the network gives a gray PIL image: float (2, H, W) on the CPU.

    It is JFIF's Cb and Cr, as in Pillow's YCbCr, in [-0.5, 0.5]: the mean of all `looks` of the
    network, or of several, at the size of the largest. Raises FloatingPointError.
    """
    looks = [
        look_at(gray, each, scale * (size or each.image_size), is_mirrored)
        for each in (net if isinstance(net, ModuleList) else [net])
        for scale, is_mirrored in each.looks
    ]
    largest = max(look.shape[-2:] for look in looks)
    looks = [F.interpolate(look, largest, mode='bilinear') for look in looks]
    return torch.cat(looks).mean(0).cpu()


def look_at(gray, net, size, is_mirrored):
    """Return the chroma (1, 2, H, W) of a copy of a photo, or of its mirror image.

    The copy's shorter side is about `size`, its longer at most 4 * `size`.
    """
    scale = min(size / min(gray.size), 4 * size / max(gray.size))
    seen = [max(8, 8 * round(side * scale / 8)) for side in gray.size]  # a UNet's multiples
    x = to_pixels(gray.resize(seen, Image.Resampling.BILINEAR))
    device = next(net.parameters()).device
    x = x[None, None].to(device) / 127.5 - 1
    with Precision('auto', device).autocast:
        y = net(x.flip(3)).float().flip(3) if is_mirrored else net(x).float()
    if not y.isfinite().all():
        raise FloatingPointError('with these weights, the network computes no finite colors')
    color = merge_luminance(y, (x + 1) / 2)
    red, _, blue = (color - luminance(color)).split(1, dim=1)
    return torch.cat([blue / 1.772, red / 1.402], dim=1)


def format_of(path):
    """Return the name of the format that a path's suffix stands for, as Pillow has it, or None."""
    return Image.registered_extensions().get(path.suffix.lower())


def read_exif(photo):
    """Return what an open upright photo's EXIF tells of it and its camera, as bytes."""
    try:
        exif = photo.getexif()
        for tag in [tag for tag in exif if TAGS.get(tag) not in EXIF_TAGS]:
            del exif[tag]
        return exif.tobytes() if len(exif) else b''
    except Exception:  # a damaged EXIF costs the EXIF, not the photo
        return b''


def draw_result(photo, format, colorize, compare=False):
    """Return the photo as `colorize` (RGB → RGB) makes it, with the transparency that it has.

    With `compare`, gray, colorized and original (if that has color) are side by side.
    """
    alpha = None
    if photo.has_transparency_data and photo.mode[0] not in 'IF' and format not in OPAQUE:
        alpha = photo.convert('RGBA').getchannel('A')
        photo = photo.convert('RGBA').convert('RGB')
    parts = [colorize(photo)]
    if compare:
        original = to_rgb(photo)
        parts.insert(0, original.convert('L').convert('RGB'))
        if not is_gray(to_pixels(original)):
            parts.append(original)
    if alpha:
        for part in parts:
            part.putalpha(alpha)
    return parts[0] if len(parts) == 1 else side_by_side(parts)


def side_by_side(parts):
    """Return PIL images of one size and mode in a row, with white gaps."""
    width, height = parts[0].size
    gap = max(2, width // 50)
    row = Image.new(parts[0].mode, (len(parts) * (width + gap) - gap, height), 'white')
    for place, part in enumerate(parts):
        row.paste(part, (place * (width + gap), 0))
    return row


def encode(result, photo, format):
    """Return the content of a file of the result, with what of the open photo still applies."""
    profile = photo.info.get('icc_profile')
    if profile and profile[16:20] != b'RGB ':
        profile = None
    result.info, content = {}, io.BytesIO()  # Image.merge keeps the photo's, where not all applies
    quality = QUALITY.get(format, 98)
    result.save(content, format, exif=read_exif(photo), icc_profile=profile, quality=quality)
    return content.getbuffer()


def colorize_file(path, result, net, size=None, saturation=1.0, compare=False, overwrite=False):
    """Colorize the photo `path`; return DONE, EXISTS, or in a line why it cannot be done."""
    if os.path.lexists(result) and not overwrite:
        return EXISTS
    format = format_of(result)
    draw = partial(colorize, net, size=size, saturation=saturation)
    try:
        with open_photo(path) as photo:
            picture = draw_result(photo, format, draw, compare)
            content = encode(picture, photo, format)
        result.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(content, result, sync=False)
        return DONE
    except Exception as error:  # decoders, encoders and devices raise nearly anything
        return (str(error) or repr(error)).splitlines()[0]


def load_network(path, device='cpu'):
    """Return the network whose weights are in a file, for use on a --device. Raises UsageError."""
    state = load_tensors(path) if os.path.exists(path) else {}
    net = PretrainedUNet() if 'middle_conv.weight' in state else UNet()
    load_weights(net, path).eval()
    net.to(choose_device(device), memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = False  # hardly two photos have the same shape
    return net


def find_results(paths, output):
    """Return {result: photo}, and [(photo, why it has no result)] for the rest.

    `output` is the folder of the results, or for one photo the result. Raises UsageError.
    """
    pairs = find_photos(paths, output)
    photos, results, refused = {real(photo) for photo, _ in pairs}, {}, []
    for photo, result in pairs:
        if real(result) in photos:
            refused.append((photo, f'{result} is one of the photos; give another --output'))
        elif results.setdefault(result, photo) != photo:
            refused.append((photo, f'{result} is the result of {results[result]!r}'))
    return results, refused


def find_photos(paths, output):
    """Return (photo, result) for all photos in files and folders. Raises UsageError.

    Results in `output`, which may lie in such a folder, are no photos. Of several folders, each
    has its results in a folder of its own name.
    """
    if format_of(output) and not output.is_dir():
        if format_of(output) not in FORMATS or len(paths) > 1 or os.path.isdir(paths[0]):
            raise UsageError(f'--output {output}: name a folder, or for one photo a .jpg or .png')
        return [(paths[0], output)]
    pairs, inside = [], real(output) + os.sep
    for path in paths:
        if not os.path.isdir(path):
            pairs.append((path, result_path(output / os.path.basename(path))))
            continue
        home = os.path.basename(os.path.abspath(path)) if len(paths) > 1 else ''
        for name in list_photos(path):
            photo = os.path.join(path, name)
            if not real(photo).startswith(inside):
                pairs.append((photo, result_path(output / home / name)))
    if not pairs:
        raise UsageError(f'no photos but those in --output {output}')
    return pairs


def result_path(path):
    """Return a result's path: it ends with .png where its photo's format is not written."""
    return path if format_of(path) in FORMATS else path.with_suffix('.png')


def real(path):
    """Return what all paths to a file have in common, also on disks that ignore case."""
    return os.path.realpath(path).casefold()


def run(args):
    """Colorize all photos that were asked for; return the exit code. Raises UsageError."""
    stop = Stop()
    results, refused = find_results(list(dict.fromkeys(args.photos)), args.output)
    net = ModuleList()
    for path in args.weights or ['unet.pth']:
        net.append(load_network(path, args.device))
        if net[-1].about:
            print(f'{path}: {net[-1].about}')
    options = args.size, args.saturation, args.compare, args.overwrite

    def work(photo, result):
        return LEFT if stop.signum else colorize_file(photo, result, net, *options)

    start = time.perf_counter()
    threads = max(1, min(available_cpus(), MOST_PIXELS // 48_000_000))  # of so many each
    # with one of torch's own threads in each, results do not depend on their number
    with stop, ThreadPoolExecutor(threads, '', torch.set_num_threads, [1]) as pool:
        outcomes = pool.map(work, results.values(), results)
        bar = tqdm(outcomes, 'colorizing', len(results), False, unit=' photos', disable=None)
        outcomes = list(zip(results.values(), bar, strict=True))
    return report(refused + outcomes, args.output, time.perf_counter() - start, stop)


def report(outcomes, output, seconds, stop):
    """Print what became of the photos, [(photo, outcome)]; return the exit code."""
    for photo, outcome in outcomes:
        if outcome not in (DONE, EXISTS, LEFT):
            print(f'predict.py: {photo!r}: {outcome}', file=sys.stderr)
    count = Counter(outcome for _, outcome in outcomes)
    finished = count[DONE] + count[EXISTS]
    if count[EXISTS]:
        kept = f'{count[EXISTS]} of {len(outcomes)}'
        print(f'skipped, because the result exists: {kept}; --overwrite replaces results')
    if stop.signum:
        line = f'stopped; {finished} of {len(outcomes)} photos are done, in {output}'
        print(f'predict.py: {line}', file=sys.stderr)
        return 128 + stop.signum
    if done := count[DONE]:
        print(f'{done} photo{"s" * (done > 1)} in {output} ({done / seconds:.1f} photos/s)')
    return 0 if finished == len(outcomes) else 1


def main(argv=None):
    cli.print_any_name()
    args = parse_args(argv)
    warnings.filterwarnings('ignore', module='PIL')  # of what it reads all the same
    try:
        return run(args)
    except Exception as error:
        return cli.exit_code(error, 'predict.py')


if __name__ == '__main__':
    sys.exit(main())
