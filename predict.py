"""Colorizes photos with trained weights, at full resolution.

    python predict.py old_photo.jpg                       # → colorized/old_photo.jpg
    python predict.py album/ --output album_colorized     # a folder, with the folders in it
    python predict.py album/ --saturation 1.3 --compare   # livelier colors, beside the gray
"""
import contextlib
import hashlib
import io
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from data_utils import list_photos, to_rgb
from unet import UNet
from utils import cli
from utils.checkpoint import load_weights
from utils.cli import UsageError
from utils.color import luminance, merge_luminance
from utils.device import choose_device

# a little less quality costs more than a gray level; libtiff, which compresses, fails at much EXIF
FORMATS = dict(AVIF=dict(quality=95), BMP={}, JPEG=dict(quality=98), JPEG2000={}, PNG={}, PPM={},
               TIFF=dict(compression='raw'), WEBP=dict(quality=100))  # all others become PNG
OPAQUE = 'BMP', 'JPEG', 'PPM'
# not about the photo but about the pixels as they were stored (nearly all in TIFF), or a copy of
# them; the same for the thumbnail, which Pillow leaves out by itself
STORAGE_TAGS = {*range(254, 269), *range(273, 282), 284, *range(288, 294), 301, *range(317, 348),
                *range(512, 533), 700, 33723, 34377, 34675, 37724}


# ---------------------------------------------------------------------------- arguments

def parse_args(argv):
    parser = cli.ArgumentParser(prog='predict.py', description=__doc__)
    add = parser.add_argument
    add('photos', nargs='+', help='photos, and folders of photos (of several, each goes to a '
        'folder of its own name)')
    add('--weights', default='unet.pth', help='what colorize.py saved [%(default)s]')
    add('--output', type=Path, default='colorized', help='the folder for the results, which have '
        'the names of the photos [%(default)s]')
    add('--size', type=cli.multiple_of_8, default=224,
        help='the shorter side of what the network sees, in pixels [%(default)s]')
    add('--saturation', type=cli.nonnegative_float,
        default=1.0, help='times the predicted color: 0 is gray [%(default)s]')
    add('--compare', action='store_true', help='results show gray and color side by side')
    add('--device', choices=('auto', 'cuda', 'mps', 'cpu'), default='auto', help='[%(default)s]')
    return parser.parse_intermixed_args(argv)


# ---------------------------------------------------------------------------- one photo

@torch.inference_mode()
def colorize(net, photo, size=224, saturation=1.0):
    """A PIL image of any mode and size → RGB of the same size and luminance, on any device.

    The network sees a reduced gray copy, its shorter side about `size`, its longer at most
    4 * `size`. What it predicts is the color; times `saturation`, that is laid over the photo.
    """
    gray = to_rgb(photo).convert('L')
    scale = min(size / min(gray.size), 4 * size / max(gray.size))
    small = gray.resize([max(8, 8 * round(side * scale / 8)) for side in gray.size],
                        Image.Resampling.BILINEAR)
    x = pil_to_tensor(small)[None].to(next(net.parameters()).device) / 127.5 - 1
    color = merge_luminance(net(x).float(), (x + 1) / 2)
    red, _, blue = (color - luminance(color))[0] * saturation
    chroma = torch.stack([blue / 1.772, red / 1.402])  # JFIF's Cb and Cr, as in Pillow's YCbCr
    chroma = (128 + 255 * chroma).round().clamp(0, 255).byte().cpu()
    cb, cr = (to_pil_image(c).resize(gray.size, Image.Resampling.BILINEAR) for c in chroma)
    return Image.merge('YCbCr', (gray, cb, cr)).convert('RGB')


def open_photo(path):
    """The photo at `path`, upright, and its EXIF as bytes (empty where there is none).

    Raises nearly anything on a damaged file.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise OSError('no such file')
    with Image.open(path) as photo:
        photo.load()
        try:
            ImageOps.exif_transpose(photo, in_place=True)
            exif = photo.getexif()
            for tag in STORAGE_TAGS.intersection(exif):
                del exif[tag]
            return photo, exif.tobytes() if len(exif) else b''
        except Exception:  # a damaged EXIF costs the EXIF, not the photo
            return photo, b''


def draw_result(photo, format, net, args):
    """The colorized photo, with --compare to the right of the gray one; RGB or RGBA."""
    alpha = None
    if format not in OPAQUE and photo.has_transparency_data and photo.mode[0] not in 'IF':
        photo = photo.convert('RGBA')
        alpha, photo = photo.getchannel('A'), photo.convert('RGB')
    parts = [colorize(net, photo, args.size, args.saturation)]
    if args.compare:
        parts.insert(0, to_rgb(photo).convert('L').convert('RGB'))
    result = Image.new('RGBA' if alpha else 'RGB', (len(parts) * photo.width, photo.height))
    for place, part in enumerate(parts):
        if alpha:
            part.putalpha(alpha)
        result.paste(part, (place * photo.width, 0))
    return result


def encode(result, photo, format, exif):
    """The result as the content of a file, with what of the photo still applies to it."""
    options, profile = dict(FORMATS[format]), photo.info.get('icc_profile')
    if exif:
        options['exif'] = exif
    if profile and profile[16:20] == b'RGB ':
        options['icc_profile'] = profile
    content = io.BytesIO()
    result.save(content, format, **options)
    return content.getbuffer()


def colorize_file(path, target, results, net, args):
    """Colorizes the photo at `path` into the file `target`.

    Raises nearly anything on a damaged photo, OSError where the result cannot be written.
    """
    photo, exif = open_photo(path)
    format = 'JPEG' if photo.format == 'MPO' else photo.format
    if format not in FORMATS:
        format, target = 'PNG', target.with_suffix('.png')
    results.check(path, target)
    results.write(path, target, encode(draw_result(photo, format, net, args), photo, format, exif))


# ---------------------------------------------------------------------------- the files

def find_photos(paths, output):
    """Of all photos (path, name below `output`), of what cannot be taken (path, reason)."""
    photos, bad = [], []
    for path in paths:
        try:
            if os.path.isdir(path):
                home = os.path.basename(os.path.abspath(path)) if len(paths) > 1 else ''
                photos += [(os.path.join(path, name), os.path.join(home, name))
                           for name in list_photos_outside(output, path)]
            elif os.path.exists(path):
                photos.append((path, os.path.basename(path)))
            else:
                bad.append((path, 'no such file or folder'))
        except UsageError as error:
            bad.append((path, str(error)))
    return photos, bad


def list_photos_outside(output, folder):
    """As list_photos, without those in the folder `output`, which may lie in `folder`."""
    names = list_photos(folder)
    output, home = Path(os.path.realpath(output)), Path(os.path.realpath(folder))
    if output == home:
        raise UsageError(f'these are in the folder --output {output}; name another one')
    if output.is_relative_to(home):
        names = [name for name in names
                 if not Path(os.path.realpath(home / name)).is_relative_to(output)]
        if not names:
            raise UsageError(f'no photos but those in --output {output}')
    return names


class Results:
    """The folder of results, where nothing is overwritten but an earlier result of the same photo.

    A hidden file in it has a mark of each result; one that was changed since is the user's own.
    """

    def __init__(self, folder, photos):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(f'--output {folder} is a file; name a folder')
        self.log = folder / '.colorized'
        self.marks = set(self.log.read_bytes().split()) if self.log.exists() else set()
        self.photos = {identity(path) for path, _ in photos if os.path.exists(path)}

    def check(self, path, target):
        """Raises FileExistsError where `target` must not become the result of the photo `path`."""
        if target.exists() and identity(target) in self.photos:
            raise FileExistsError(f'{target} is one of the photos; give another --output')
        if os.path.lexists(target) and not (
                target.is_file() and mark(path, target.read_bytes()) in self.marks):
            raise FileExistsError(f'{target} exists and is no earlier result of this photo; move '
                                  'it away or give another --output')

    def write(self, path, target, content):
        """Writes a result whole or not at all. Raises OSError."""
        temporary = target.with_name(f'.colorized.{os.getpid()}.tmp')
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            if (new := mark(path, content)) not in self.marks:
                # first the mark: one without its result does no harm
                with open(self.log, 'ab') as log:
                    log.write(b'\n' + new)
                self.marks.add(new)
            os.replace(temporary, target)
        except OSError as error:
            raise OSError(f'{target} was not written: {error.strerror}') from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def identity(path):
    """The same for all names that a file has."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def mark(path, content):
    """Tells that `content` was made from the photo at `path`."""
    photo = os.fsencode(os.path.realpath(path)) + b'\0'
    return hashlib.sha256(photo + content).hexdigest().encode()


# ---------------------------------------------------------------------------- the run

def run(args):
    """Colorizes all photos that were asked for; returns the exit code. Raises UsageError."""
    photos, bad = find_photos(args.photos, args.output)
    if not photos:
        raise UsageError('; '.join(f'{path!r}: {why}' for path, why in bad))
    results, net = Results(args.output, photos), load_weights(UNet(), args.weights)
    net.to(choose_device(args.device), memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = False  # hardly two photos have the same shape
    done, start = 0, time.perf_counter()
    for path, name in tqdm(photos, 'colorizing', unit=' photos', leave=False, disable=None):
        try:
            colorize_file(path, args.output / name, results, net, args)
            done += 1
        except Exception as error:  # decoders, encoders and devices raise nearly anything
            why = getattr(error, 'strerror', None) or str(error) or repr(error)
            bad.append((path, why.splitlines()[0]))
    speed = done / (time.perf_counter() - start)
    for path, why in bad:
        print(f'predict.py: {path!r}: {why}', file=sys.stderr)
    print(f'{done} photo{"s"[done == 1:]} in {args.output} ({speed:.1f} photos/s)')
    return 1 if bad else 0


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')  # names need not be printable
    warnings.filterwarnings('ignore', module='PIL')  # of what it reads all the same
    try:
        return run(args)
    except (UsageError, OSError) as error:
        print(f'predict.py: {error}', file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f'predict.py: stopped; what is done is in {args.output}', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
