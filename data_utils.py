"""From a photo file to an upright RGB image, and to batches for training code of one's own.

    loader = get_colorized_dataset_loader('data/landscapes', batch_size=32, shuffle=True)
    x, y = next(iter(loader))
"""
import os
import sys
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

PHOTO_EXTENSIONS = (*IMG_EXTENSIONS, '.avif', '.gif', '.jfif')
# Pillow warns of photos above 89 megapixels, and refuses those above 179
warnings.simplefilter('ignore', Image.DecompressionBombWarning)


class RequestError(Exception):
    """What was asked for cannot be done; the message is one line that says why and what to do."""


# ---------------------------------------------------------------------------- photo files

def list_photos(root):
    """Paths below `root`, relative to it, '/'-separated and sorted, of all files named as photos.

    Links are followed, each folder is entered once (so a link to a folder above ends), hidden files
    and macOS's `__MACOSX` and `._*` are passed over. Raises RequestError where there are none.
    """
    if not os.path.exists(root):
        raise RequestError(f'no such folder: {root}. ./download_landscapes.sh fetches the '
                           'landscapes, --demo draws some, --data_path names your own')
    if not os.path.isdir(root):
        raise RequestError(f'{root} is a file; --data_path takes a folder of photos')
    names, entered, unreadable = [], set(), []
    for folder, folders, files in os.walk(root, onerror=unreadable.append, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith('.') and f != '__MACOSX')
        names += [os.path.relpath(os.path.join(folder, file), root).replace(os.sep, '/')
                  for file in files
                  if not file.startswith('.') and file.lower().endswith(PHOTO_EXTENSIONS)]
    for error in unreadable:
        if error.filename == root or not names:
            raise RequestError(f'{error.filename} cannot be read: {error.strerror}')
        print(f'passed over {error.filename}: {error.strerror}', file=sys.stderr)
    if not names:
        raise RequestError(f'no photos in {root} ({" ".join(PHOTO_EXTENSIONS)})')
    return sorted(names)


def load_photo(path, size=None):
    """A file that Pillow reads → an upright RGB image; `size` allows one that is smaller, not
    below twice `size` in either direction (much faster for large JPEGs).

    Raises OSError, whatever is wrong with the file.
    """
    try:
        with Image.open(path) as photo:
            if size:
                photo.draft(None, (2 * size, 2 * size))
            photo.load()
            ImageOps.exif_transpose(photo, in_place=True)
            return to_rgb(photo)
    except UnidentifiedImageError as error:
        raise OSError('no photo that Pillow can read') from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise OSError(getattr(error, 'strerror', None) or str(error) or repr(error)) from error


def to_rgb(photo):
    """Any mode → RGB: transparent is white, 16 and 32-bit grey is scaled down, not clipped."""
    if photo.mode.startswith(('I', 'F')):
        gray = photo.convert('F')
        # whole numbers are 16-bit, floating point counts from 0 to 1, unless the photo has more
        tops = (1, 255) if photo.mode == 'F' else ()
        brightest = gray.getextrema()[1]
        top = next((top for top in (*tops, 65535) if brightest <= top), brightest)
        return gray.point(lambda value: value * (255 / top) + 0.5).convert('L').convert('RGB')
    if photo.has_transparency_data:
        photo = photo.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', photo.size, 'white'), photo).convert('RGB')
    return photo if photo.mode == 'RGB' else photo.convert('RGB')


# ---------------------------------------------------------------------------- the course's loader

class ImageFolderGrayColor(ImageFolder):
    """Items (transform(photo), target_transform(photo)); the class folders play no part.

    They may be missing, or nested.
    """

    def __init__(self, root, transform=None, target_transform=None):
        super().__init__(root, transform, target_transform, loader=load_photo)

    def find_classes(self, directory):
        classes = sorted({name.rpartition('/')[0] for name in list_photos(directory)})
        return classes, {name: number for number, name in enumerate(classes)}

    @staticmethod
    def make_dataset(directory, class_to_idx, *_, **__):
        return [(os.path.join(directory, name), class_to_idx[name.rpartition('/')[0]])
                for name in list_photos(directory)]

    def __getitem__(self, index):
        path, _ = self.samples[index]
        photo = self.loader(path)
        return (self.transform(photo) if self.transform else photo,
                self.target_transform(photo) if self.target_transform else photo)


def get_colorized_dataset_loader(path, **kwargs):
    """A DataLoader of x (B, 1, 224, 224) in [-1, 1] and y (B, 3, 224, 224) in [0, 1].

    `kwargs` go to the DataLoader. Raises RequestError where there are no photos.
    """
    color = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    gray = transforms.Compose([transforms.Resize((224, 224)), transforms.Grayscale(),
                               transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    return DataLoader(ImageFolderGrayColor(path, gray, color), **kwargs)
