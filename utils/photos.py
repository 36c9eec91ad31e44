"""From a photo file, whoever wrote it, to an upright PIL image and its pixels."""

import contextlib
import os
import sys
import warnings
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.cli import UsageError
from utils.device import free_memory
from utils.distributed import print0

with contextlib.suppress(ImportError):  # optional: Pillow itself reads no HEIC
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()
# documents, drawings, films and data; for EPS, Pillow starts Ghostscript, which runs what is in it
NO_PHOTOS = {'BUFR', 'EPS', 'FLI', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'PALM', 'PDF', 'WMF'}
# tried in this order
PHOTO_FORMATS = ['JPEG', 'PNG', *sorted(set(Image.ID) - NO_PHOTOS - {'JPEG', 'PNG'})]
PHOTO_EXTENSIONS = {
    extension
    for extension, name in Image.registered_extensions().items()
    if name in (*PHOTO_FORMATS, 'MPO')
}
RAW = '3fr arw cr2 cr3 dng erf kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f'
# photos that Pillow does not read, and what to do about them
REMEDIES = {
    **dict.fromkeys(('.heic', '.heif', '.hif'), 'pip install pillow-heif'),
    **dict.fromkeys(('.avif', '.jxl', '.webp'), 'save as JPEG, PNG or TIFF'),
    **{f'.{name}': 'raw: save as JPEG, PNG or TIFF' for name in RAW.split()},
}
# what predict.py needs for each pixel of a photo at its peak: the photo, its gray, the result
BYTES_PER_PIXEL = 32
# Pillow refuses photos of more than twice as many
Image.MAX_IMAGE_PIXELS = max(1, free_memory(torch.device('cpu')) // BYTES_PER_PIXEL // 2)
warnings.simplefilter('ignore', Image.DecompressionBombWarning)
MAX_SIDE = 65535  # pixels, JPEG's own limit: reading the millions of a damaged header takes long


def list_photos(root):
    """Return the paths of all photos below the folder `root`: relative, '/'-separated, sorted.

    Links are followed, and each folder is entered once, so that a link to a folder above ends.
    Hidden files and macOS's `__MACOSX` and `._*` are left out. Photos of formats that Pillow does
    not read are counted in a line on stderr. Raises UsageError if there are no photos.
    """
    if not os.path.exists(root):
        raise UsageError(
            f'no such folder: {root}. ./download_landscapes.sh fetches the '
            'landscapes, --demo draws some, --data_path names your own'
        )
    if not os.path.isdir(root):
        raise UsageError(f'{root} is a file; --data_path takes a folder of photos')
    names, passed_over, folder_errors = [], Counter(), []
    for name in walk(root, folder_errors):
        extension = os.path.splitext(name)[1].lower()
        if extension in PHOTO_EXTENSIONS:
            names.append(name)
        elif extension in REMEDIES:
            passed_over[extension] += 1
    counts = ', '.join(
        f'{count} {extension} ({REMEDIES[extension]})'
        for extension, count in sorted(passed_over.items())
    )
    for error in folder_errors:
        if error.filename == root or not names:
            raise UsageError(f'{error.filename} cannot be read: {error.strerror}')
        print0(f'passed over {error.filename}: {error.strerror}', file=sys.stderr)
    if not names:
        raise UsageError(
            f'no photos in {root}'
            + (f', but {counts}' if counts else ' (such as .jpg, .png, .tif, .webp)')
        )
    if counts:
        print0(f'passed over in {root}: {counts}', file=sys.stderr)
    return sorted(names)


def walk(root, folder_errors):
    """Yield the paths of all files below `root`, relative and '/'-separated.

    Folders that cannot be read are added to `folder_errors`, as OSErrors. (os.walk ends with a
    RecursionError at a depth of 1,000 folders, up to Python 3.11.)
    """
    folders, entered = [''], set()
    while folders:
        folder = folders.pop()
        path = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            folder_errors.append(error)
            continue
        for entry in entries:
            if entry.name.startswith('.') or entry.name == '__MACOSX':
                continue
            name = f'{folder}/{entry.name}' if folder else entry.name
            if entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry):
                folders.append(name)
            else:
                yield name


@contextlib.contextmanager
def open_photo(path):
    """Open the photo in the file `path`, as Image.open does, without decoding it.

    Raises OSError, whatever is wrong with the file, also in what is done with the photo inside.
    """
    if not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise OSError('no regular file' if os.path.exists(path) else 'no such file')
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as photo:
            if max(photo.size) > MAX_SIDE:
                raise OSError(f'{photo.width}×{photo.height} pixels; a side may have {MAX_SIDE}')
            yield photo
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise OSError(f'larger than the {limit:.0f} megapixels that memory allows') from error
    except UnidentifiedImageError as error:
        remedy = REMEDIES.get(os.path.splitext(path)[1].lower())
        remedy = f'; {remedy}' if remedy else ''
        raise OSError(f'no photo that Pillow can read{remedy}') from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise OSError(getattr(error, 'strerror', None) or str(error) or repr(error)) from error


def load_photo(path, size=None):
    """Return the photo in a file that Pillow reads, as an upright RGB image.

    With `size`, it may be a smaller version, neither side below 2 * `size` pixels: large JPEGs
    are read much faster. Raises OSError, whatever is wrong with the file.
    """
    with open_photo(path) as photo:
        if size:
            photo.draft(None, (2 * size, 2 * size))
        turn_upright(photo)
        return to_rgb(photo)


def turn_upright(photo):
    """Decode an open photo, and turn it as its EXIF says."""
    photo.load()
    with contextlib.suppress(Exception):  # a damaged EXIF costs the EXIF, not the photo
        ImageOps.exif_transpose(photo, in_place=True)


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
    finite = values[values.isfinite()]
    brightest = finite.max().item() if len(finite) else 0
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
