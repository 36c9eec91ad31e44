"""From a photo file, whoever wrote it, to an upright PIL image and its pixels."""

import contextlib
import os
import sys
from collections import Counter
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.cli import UsageError
from utils.device import free_memory
from utils.distributed import print0

with contextlib.suppress(ImportError):  # optional: Pillow itself reads no HEIC
    import pillow_heif

    pillow_heif.register_heif_opener()
# documents, drawings, films and data; for EPS, Pillow starts Ghostscript, which runs what is in it
OTHERS = {'BUFR', 'EPS', 'FLI', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PALM', 'PDF', 'WMF'}
# registered_extensions loads Pillow's plugins: it must come before Image.ID
EXTENSIONS = tuple(end for end, kind in Image.registered_extensions().items() if kind not in OTHERS)
FORMATS = ['JPEG', 'PNG', *sorted(set(Image.ID) - OTHERS - {'JPEG', 'PNG'})]
LONGEST_SIDE = 65535  # pixels, as in JPEG: decoding the millions of a damaged header takes long
MOST_PIXELS = free_memory(torch.device('cpu')) // 32  # bytes for each, at most, in predict.py
Image.MAX_IMAGE_PIXELS = None  # the limits here are for this machine


def list_photos(root):
    """Return the paths of all photos below the folder `root`: relative, '/'-separated, sorted.

    Those that Pillow does not read are counted on stderr. Raises UsageError if no other is there.
    """
    if not os.path.exists(root):
        raise UsageError(f'no such folder: {root}; ./download_landscapes.sh or --demo makes one')
    if not os.path.isdir(root):
        raise UsageError(f'{root} is a file; --data_path takes a folder of photos')
    photos, others = [], Counter()
    for name in walk(root):
        if name.lower().endswith(EXTENSIONS):
            photos.append(name)
        else:
            others[os.path.splitext(name)[1].lower() or 'without a suffix'] += 1
    rest = ', '.join(f'{count} {kind}' for kind, count in sorted(others.items()))
    if '.heic' in others:
        rest += ' (to read .heic: pip install pillow-heif)'
    if not photos:
        raise UsageError(f'no photos (.jpg, .png, .tif, …) in {root}, only {rest or "nothing"}')
    if rest:
        print0(f'passed over in {root}: {rest}', file=sys.stderr)
    return sorted(photos)


def walk(root):
    """Yield the paths of all files below `root`, relative and '/'-separated.

    Hidden ones and macOS's `__MACOSX` are left out. Links are followed, and each folder is entered
    once, so that loops end. Folders that cannot be read are named on stderr.
    """
    pass_over = partial(print0, 'passed over:', file=sys.stderr)
    root, entered = os.path.join(root, ''), set()
    for path, folders, files in os.walk(root, onerror=pass_over, followlinks=True):
        if (folder := os.path.realpath(path)) in entered:
            folders.clear()
            continue
        entered.add(folder)
        # sorted: of two ways to a folder, every machine takes the same one
        folders[:] = sorted(name for name in folders if name[0] != '.' and name != '__MACOSX')
        for name in files:
            if name[0] != '.':
                yield os.path.join(path, name)[len(root) :].replace(os.sep, '/')


@contextlib.contextmanager
def open_photo(path, size=None):
    """Give the photo in the file `path`, decoded and turned as its EXIF says.

    With `size`, large JPEGs are read much faster, as smaller versions: no side is below 2 * `size`
    pixels. Raises OSError, whatever is wrong with the file, also where the `with` block uses it.
    """
    try:
        with Image.open(path, formats=FORMATS) as photo:
            if photo.width * photo.height > MOST_PIXELS or max(photo.size) > LONGEST_SIDE:
                raise OSError(f'{photo.width}×{photo.height} pixels are too many for this machine')
            if size:
                photo.draft(None, (2 * size, 2 * size))
            photo.load()
            with contextlib.suppress(Exception):  # a damaged EXIF costs the EXIF, not the photo
                ImageOps.exif_transpose(photo, in_place=True)
            yield photo
    except UnidentifiedImageError as error:
        raise OSError('no photo that Pillow can read') from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise OSError(getattr(error, 'strerror', None) or str(error) or repr(error)) from error


def load_photo(path, size=None):
    """Return the photo in a file as an upright RGB image; see open_photo."""
    with open_photo(path, size) as photo:
        return to_rgb(photo)


def to_rgb(photo):
    """Convert an image of any mode to RGB: transparent becomes white, 16 and 32 bits become 8."""
    if photo.mode.startswith(('I', 'F')):
        return to_gray_bytes(photo).convert('RGB')
    if photo.has_transparency_data:
        photo = photo.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', photo.size, 'white'), photo).convert('RGB')
    return photo if photo.mode == 'RGB' else photo.convert('RGB')


def to_gray_bytes(photo):
    """Convert an image of 16 or 32 bits, whole numbers or floating point, to mode L.

    Infinite values become black or white, NaN becomes black.
    """
    values = to_pixels(photo.convert('F'))
    brightest = values.nan_to_num(0, posinf=0, neginf=0).max().item()
    # Whole numbers are 16-bit. Floating point counts from 0 to 1, or up to 255 or 65535 where the
    # photo has more: a quarter more may come from sharpening or resizing.
    whites = [(1.25, 1), (319, 255), (81919, 65535)] if photo.mode == 'F' else [(65535, 65535)]
    white = next((white for most, white in whites if brightest <= most), brightest)
    values = values.nan_to_num(0, posinf=white, neginf=0).mul_(255 / white).add_(0.5)
    return Image.fromarray(values.clamp_(0, 255).byte().numpy())


def to_pixels(photo):
    """Return the pixels of a PIL image: uint8 (H, W, 3) of RGB, (H, W) of L, float (H, W) of F."""
    # not torchvision's pil_to_tensor: importing torchvision takes as long as importing torch
    return torch.from_numpy(np.array(photo))
