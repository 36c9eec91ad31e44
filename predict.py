"""Colorize photos with trained weights, at full resolution.

    python predict.py old_photo.jpg                       # → colorized/old_photo.jpg
    python predict.py old_photo.jpg --output color.png    # → color.png
    python predict.py album/ --output album_colorized     # a folder, with the folders in it
    python predict.py album/ --saturation 1.3 --compare   # livelier colors, beside the gray

The photos themselves are never changed.
"""

import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import contextlib
import io
import os
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageSequence

from unet import UNet
from utils import cli
from utils.checkpoint import load_weights
from utils.cli import UsageError
from utils.color import is_gray, luminance, merge_luminance
from utils.device import Precision, available_cpus, choose_device, free_memory
from utils.parallel import Memory, Stopped, run_in_threads, stop_signals
from utils.photos import (
    BYTES_PER_PIXEL,
    list_photos,
    open_photo,
    to_pixels,
    to_rgb,
    turn_upright,
)
from utils.results import Results

# what the network sees where the weights do not tell the size of their training: the course's
DEFAULT_SIZE = 224
# a little less quality costs more than a gray level; libtiff, which compresses, fails at much EXIF
FORMATS = dict(
    AVIF=dict(quality=95),
    BMP={},
    JPEG=dict(quality=98),
    JPEG2000={},
    PNG={},
    PPM={},
    TIFF=dict(compression='raw'),
    WEBP=dict(quality=100),
)  # all others become PNG
NETWORK_BYTES = 1100  # of memory for each pixel that the network sees
OPAQUE = 'BMP', 'JPEG', 'PPM'
# where frames are an animation or pages: elsewhere they are previews, layers or sizes
FRAMED = 'AVIF', 'GIF', 'PNG', 'TIFF', 'WEBP'
MOST_PAGES = 100  # of a TIFF are counted: Pillow takes minutes for tens of thousands
# not about the photo but about the pixels as they were stored (nearly all in TIFF), or a copy of
# them; the same for the thumbnail, which Pillow leaves out by itself
STORAGE_TAGS = {
    *range(254, 269),
    *range(273, 282),
    284,
    *range(288, 294),
    301,
    *range(317, 348),
    *range(512, 533),
    700,
    33723,
    34377,
    34675,
    37724,
}


# ---------------------------------------------------------------------------- arguments


def parse_args(argv):
    parser = cli.ArgumentParser(prog='predict.py', description=__doc__)
    add = parser.add_argument
    add(
        'photos',
        nargs='*',
        help='photos, and folders of photos (of several, each goes to a folder of its own name)',
    )
    add('--weights', default='unet.pth', help='what colorize.py saved [%(default)s]')
    add(
        '--output',
        type=Path,
        default='colorized',
        help='the folder for the results, which have '
        'the names of the photos; or, for one photo, the name of the result [%(default)s]',
    )
    add(
        '--size',
        type=cli.image_size,
        help='the shorter side of what the network sees, in '
        f'pixels [that of the training, or {DEFAULT_SIZE} where the weights do not tell]',
    )
    add(
        '--saturation',
        type=cli.factor,
        default=1.0,
        help='times the predicted color: 0 is gray, 1 to 1.5 is sensible, above 2 is garish '
        '[%(default)s]',
    )
    add(
        '--compare',
        action='store_true',
        help='results show side by side the gray photo, the '
        'colorized one, and the original if that has color',
    )
    parser.add_num_workers(available_cpus(), 'threads, each with a photo of its own')
    parser.add_device()
    # what follows '--' are photos, which parse_intermixed_args does not know
    end = argv.index('--') if '--' in argv else len(argv)
    args = parser.parse_intermixed_args(argv[:end])
    args.photos += argv[end + 1 :]
    if not args.photos:
        parser.error('name a photo, or a folder of photos')
    return args


# ---------------------------------------------------------------------------- one photo


def colorize(net, photo, size=None, saturation=1.0):
    """Colorize a PIL image of any mode: return RGB of the same size and luminance.

    `size` is the shorter side of what the network sees, in pixels: by default that of its training
    (`net.image_size`, from load_weights), else DEFAULT_SIZE. `saturation` multiplies the color.
    """
    gray = to_rgb(photo).convert('L')
    return apply_chroma(gray, predict_chroma(net, gray, size), saturation)


@torch.inference_mode()
def predict_chroma(net, gray, size=None):
    """Return the chroma that the network gives a gray PIL image: float (2, H, W) on the CPU.

    It is JFIF's Cb and Cr, as in Pillow's YCbCr, in [-0.5, 0.5]. The network sees a reduced copy,
    H×W, its shorter side about `size`, its longer at most 4 * `size`. Raises FloatingPointError.
    """
    x = to_pixels(gray.resize(seen_size(net, gray.size, size), Image.Resampling.BILINEAR))
    device = next(net.parameters()).device
    x = x[None, None].to(device) / 127.5 - 1
    with Precision('auto', device).autocast:
        y = net(x).float()
    if not y.isfinite().all():
        raise FloatingPointError('with these weights, the network computes no finite colors')
    color = merge_luminance(y, (x + 1) / 2)
    red, _, blue = (color - luminance(color))[0]
    return torch.stack([blue / 1.772, red / 1.402]).cpu()


def default_size(net):
    """Return the size of the network's training, as load_weights set it, else DEFAULT_SIZE."""
    return getattr(net, 'image_size', None) or DEFAULT_SIZE


def seen_size(net, photo_size, size=None):
    """Return the (width, height) at which the network sees a photo: multiples of 8."""
    size = size or default_size(net)
    scale = min(size / min(photo_size), 4 * size / max(photo_size))
    return [max(8, 8 * round(side * scale / 8)) for side in photo_size]


def apply_chroma(gray, chroma, saturation=1.0):
    """Lay what predict_chroma returned, times `saturation`, over the gray PIL image: RGB."""
    chroma = (128 + 255 * saturation * chroma).round().clamp(0, 255).byte()
    planes = (Image.fromarray(plane.numpy()) for plane in chroma)
    cb, cr = (plane.resize(gray.size, Image.Resampling.BILINEAR) for plane in planes)
    return Image.merge('YCbCr', (gray, cb, cr)).convert('RGB')


def colorize_anyway(net, photo, size, saturation):
    """As colorize, on the CPU where the device has not the memory for it."""
    try:
        return colorize(net, photo, size, saturation)
    except RuntimeError as error:  # each kind of device has its own
        device = next(net.parameters()).device
        if device.type == 'cpu' or 'out of memory' not in str(error):
            raise
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    on_cpu = UNet()
    on_cpu.load_state_dict(net.state_dict())
    return colorize(on_cpu, photo, size or default_size(net), saturation)


# ---------------------------------------------------------------------------- one file


def read_exif(photo):
    """Return the EXIF of an upright photo that still applies to its result, as bytes."""
    try:
        exif = photo.getexif()
        for tag in STORAGE_TAGS.intersection(exif):
            del exif[tag]
        return exif.tobytes() if len(exif) else b''
    except Exception:  # a damaged EXIF costs the EXIF, not the photo
        return b''


def draw_result(photo, format, colorize, compare=False):
    """Return the photo as `colorize` (RGB → RGB) makes it, with the transparency that it has.

    With `compare`, gray, colorized and original (if that has color) are side by side.
    """
    photo, alpha = split_alpha(photo, format)
    parts = [colorize(photo)]
    if compare:
        original = to_rgb(photo)
        gray = original.convert('L').convert('RGB')
        if is_gray(to_pixels(original)):
            parts = [gray, *parts]
        else:
            parts = [gray, *parts, original]
    if alpha:
        for part in parts:
            part.putalpha(alpha)
    return parts[0] if len(parts) == 1 else side_by_side(parts)


def split_alpha(photo, format):
    """Return the photo and its transparency, or None if it has none, or `format` holds none."""
    if format in OPAQUE or not photo.has_transparency_data or photo.mode[0] in 'IF':
        return photo, None
    photo = photo.convert('RGBA')
    return photo.convert('RGB'), photo.getchannel('A')


def side_by_side(parts):
    """Return PIL images of one size and mode in a row, with white gaps."""
    width, height = parts[0].size
    gap = max(2, width // 50)
    row = Image.new(parts[0].mode, (len(parts) * (width + gap) - gap, height), 'white')
    for place, part in enumerate(parts):
        row.paste(part, (place * (width + gap), 0))
    return row


def encode(result, photo, format, exif):
    """Return the content of a file of the result, with what of the photo still applies to it."""
    options, profile = dict(FORMATS[format]), photo.info.get('icc_profile')
    if exif:
        options['exif'] = exif
    if profile and profile[16:20] == b'RGB ':
        options['icc_profile'] = profile
    result.info, content = {}, io.BytesIO()  # Image.merge keeps the photo's, where not all applies
    result.save(content, format, **options)
    return content.getbuffer()


@dataclass
class Job:
    """A photo to colorize, and what became of it."""

    path: str
    target: Path = None  # the result
    format: str = None  # of the result; None for that of the photo
    is_done: bool = False
    note: str = ''  # what is to be said of it, in a line


def run_job(job, draw, estimate, results, memory):
    """Colorize a file, and note in the job what became of it.

    `draw(photo, format)` returns the result, `estimate(photo)` the bytes of memory that takes.
    """
    try:
        with open_photo(job.path) as photo:
            size, frames = estimate(photo), describe_frames(photo)
        with memory.reserve(size):
            colorize_file(job, draw, results)
        job.is_done = True
        if frames:
            job.note = f'the result is the first of {frames}'
    except Exception as error:  # decoders, encoders and devices raise nearly anything
        why = getattr(error, 'strerror', None) or str(error) or repr(error)
        job.note = why.splitlines()[0]


def colorize_file(job, draw, results):
    """Colorize the file job.path. Raises nearly anything."""
    with open_photo(job.path) as photo:
        turn_upright(photo)
        exif = read_exif(photo)
    format, target = job.format, job.target
    if not format:
        format, target = choose_format(photo, target)
    results.check(job.path, target)
    results.write(job.path, target, encode(draw(photo, format), photo, format, exif))


def choose_format(photo, target):
    """Return the format and path of a result: the photo's own where that format can be written."""
    format = 'JPEG' if photo.format == 'MPO' else photo.format
    return (format, target) if format in FORMATS else ('PNG', target.with_suffix('.png'))


def describe_frames(photo):
    """Return how many frames an open animation has, or pages, as text; '' for all other photos."""
    with contextlib.suppress(Exception):  # damaged ones are the decoder's business
        if photo.format == 'TIFF':
            frames = sum(1 for _ in islice(ImageSequence.Iterator(photo), MOST_PAGES + 1))
            if frames > MOST_PAGES:
                return f'more than {MOST_PAGES} frames'
        else:
            frames = getattr(photo, 'n_frames', 1) if photo.format in FRAMED else 1
        if frames > 1:
            return f'{frames} frames'
    return ''


def estimate_memory(photo, net, size):
    """Return the bytes of memory that colorizing an open photo takes at its peak."""
    width, height = seen_size(net, photo.size, size)
    on_cpu = next(net.parameters()).device.type == 'cpu'
    return BYTES_PER_PIXEL * photo.width * photo.height + on_cpu * NETWORK_BYTES * width * height


# ---------------------------------------------------------------------------- the files


def find_photos(paths, output):
    """Return Jobs for all photos in files and folders, and for what cannot be taken, with a note.

    The former have their targets in the folder `output`.
    """
    jobs, refused = [], []
    for path in paths:
        try:
            if os.path.isdir(path):
                home = os.path.basename(os.path.abspath(path)) if len(paths) > 1 else ''
                jobs += [
                    Job(os.path.join(path, name), output / home / name)
                    for name in list_photos_outside(output, path)
                ]
            elif os.path.exists(path):
                jobs.append(Job(path, output / os.path.basename(path)))
            else:
                refused.append(Job(path, note='no such file or folder'))
        except UsageError as error:
            refused.append(Job(path, note=str(error)))
    return jobs, refused


def list_photos_outside(output, folder):
    """As list_photos, without those in the folder `output`, which may lie in `folder`."""
    names = list_photos(folder)
    output, home = Path(os.path.realpath(output)), Path(os.path.realpath(folder))
    if output == home:
        raise UsageError(f'these are in the folder --output {output}; name another one')
    if output.is_relative_to(home):
        names = [
            name for name in names if not Path(os.path.realpath(home / name)).is_relative_to(output)
        ]
        if not names:
            raise UsageError(f'no photos but those in --output {output}')
    return names


# ---------------------------------------------------------------------------- the run


def split_output(output, paths):
    """Return the folder of the results, and the result's format if `output` names a file.

    Raises UsageError if it does, and cannot be the result of these photos.
    """
    format = Image.registered_extensions().get(output.suffix.lower())
    if not format or output.is_dir():
        return output, None
    if len(paths) > 1 or os.path.isdir(paths[0]):
        raise UsageError(f'--output {output} is the name of one result; for several, name a folder')
    if format not in FORMATS:
        raise UsageError(
            f'--output {output}: {output.suffix} is not written here; .jpg and .png are'
        )
    if output.exists() and os.path.exists(paths[0]) and output.samefile(paths[0]):
        raise UsageError(f'--output {output} is the photo itself; name another file')
    return output.parent, format


def run(args):
    """Colorize all photos that were asked for; return the exit code. Raises UsageError, Stopped."""
    folder, format = split_output(args.output, args.photos)
    jobs, refused = find_photos(args.photos, folder)
    if not jobs:
        raise UsageError('; '.join(f'{job.path!r}: {job.note}' for job in refused))
    if format:
        jobs[0].target, jobs[0].format = args.output, format
    results, net = Results(folder, [job.path for job in jobs]), load_weights(UNet(), args.weights)
    net.to(choose_device(args.device), memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = False  # hardly two photos have the same shape
    function = partial(
        run_job,
        results=results,
        memory=Memory(free_memory(torch.device('cpu'))),
        draw=partial(
            draw_result,
            compare=args.compare,
            colorize=partial(colorize_anyway, net, size=args.size, saturation=args.saturation),
        ),
        estimate=partial(estimate_memory, net=net, size=args.size),
    )
    start = time.perf_counter()
    try:
        run_in_threads(function, group_by_target(jobs), args.num_workers, 'colorizing')
    except Stopped as stop:
        done = sum(job.is_done for job in jobs)
        print(
            f'predict.py: stopped; {done} of {len(jobs)} photos are done, in {args.output}',
            file=sys.stderr,
        )
        return 128 + stop.signum
    report(refused + jobs, args.output, time.perf_counter() - start)
    return 0 if all(job.is_done for job in refused + jobs) else 1


def group_by_target(jobs):
    """Return lists of the jobs that may have the same result: they are done in their order."""
    groups = defaultdict(list)
    for job in jobs:  # the result's suffix may become .png, and some disks ignore case
        groups[str(job.target.with_suffix('')).casefold()].append(job)
    return list(groups.values())


def report(jobs, output, seconds):
    """Print what is to be said of each photo, and how many are done."""
    for job in jobs:
        if job.note:
            print(f'predict.py: {job.path!r}: {job.note}', file=sys.stderr)
    done = sum(job.is_done for job in jobs)
    if done > 1:
        print(f'{done} photos in {output} ({done / seconds:.1f} photos/s)')
    else:
        print(f'1 photo in {output}' if done else 'no photo was colorized')


def main(argv=None):
    cli.open_streams()
    args = parse_args(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings('ignore', module='PIL')  # of what it reads all the same
    try:
        with stop_signals():
            return run(args)
    except (UsageError, OSError) as error:
        print(f'predict.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Stopped as stop:
        print('predict.py: stopped; no photo is done', file=sys.stderr)
        return 128 + stop.signum


if __name__ == '__main__':
    sys.exit(main())
