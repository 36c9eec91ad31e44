"""From photo files to batches: x grey (B, 1, S, S) in [-1, 1], y colour (B, 3, S, S) in [0, 1].

    loader = get_colorized_dataset_loader('data/landscapes', batch_size=32, shuffle=True)
    x, y = next(iter(loader))
"""
import contextlib
import hashlib
import math
import os
import random
import signal
import sys
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from color import luminance

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


def held_out(name, fraction):
    """Whether the photo of this relative path is for validation: decided by the path alone.

    So that other photos, the order of listing and the machine never move it to the other side.
    """
    # macOS may hand out the same name decomposed (NFD), Linux as it was written
    name = unicodedata.normalize('NFC', name).encode('utf-8', 'surrogateescape')
    return int.from_bytes(hashlib.sha256(name).digest()[:8], 'big') < fraction * 2 ** 64


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


# ---------------------------------------------------------------------------- the fast loader

class PhotoFiles(Dataset):
    """Photos squashed to size × size: items (uint8 (size, size, 3), '') or (None, why not)."""

    def __init__(self, root, names, size, num_workers=0):
        self.root, self.names, self.size, self.num_workers = root, names, size, num_workers
        self.skipped = set()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        try:
            photo = load_photo(os.path.join(self.root, self.names[index]), self.size)
        except OSError as error:
            return None, str(error)
        # rows, columns, colours: Pillow's order, and channels-last; a batch made of anything else
        # is not seen as that by torch, and takes half as long again
        photo = pil_to_tensor(photo).permute(1, 2, 0)[None]
        # within one grey level of Pillow's resize, in a quarter of its time
        small = F.interpolate(photo.permute(0, 3, 1, 2), (self.size, self.size), mode='bilinear',
                              antialias=True)
        return small[0].permute(1, 2, 0).contiguous(), ''

    def skip(self, index, reason):
        """Names a photo that cannot be read, once."""
        if index not in self.skipped:
            self.skipped.add(index)
            tqdm.write(f'skipped {self.names[index]!r}: {reason}', file=sys.stderr)

    def batches(self, shares):
        """For each list of indices: its readable photos uint8 (B, S, S, 3), and which they are."""
        with signals_held_back():
            loader = iter(DataLoader(self, batch_sampler=shares, num_workers=self.num_workers,
                                     collate_fn=self.collate))
        for share, (photos, reasons) in zip(shares, loader, strict=True):
            for index, reason in zip(share, reasons, strict=True):
                if reason:
                    self.skip(index, reason)
            yield photos, torch.tensor([not reason for reason in reasons], dtype=torch.bool)

    def collate(self, items):
        photos = [photo for photo, reason in items if not reason]
        empty = torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        return torch.stack(photos) if photos else empty, [reason for _, reason in items]


class PhotosInMemory:
    """All photos of `files`, decoded once, as one uint8 tensor (N, size, size, 3) on `device`.

    Each process of a distributed run decodes every `world`-th photo.
    """

    def __init__(self, files, device, rank=0, world=1):
        self.photos = torch.zeros(len(files), files.size, files.size, 3, dtype=torch.uint8,
                                  device=device)
        self.readable = torch.zeros(len(files), dtype=torch.uint8, device=device)
        mine = range(rank, len(files), world)
        # threads: Pillow decodes and resizes without holding the interpreter's lock
        with ThreadPoolExecutor(max(1, files.num_workers)) as pool:
            for index, (photo, reason) in zip(mine, tqdm(
                    pool.map(files.__getitem__, mine), 'reading photos', len(mine), leave=False,
                    unit=' photos', disable=None if rank == 0 else True), strict=True):
                if reason:
                    files.skip(index, reason)
                else:
                    self.photos[index], self.readable[index] = photo, 1
        if world > 1:  # the others' photos are still zero, so the sum is the union
            dist.all_reduce(self.photos)
            dist.all_reduce(self.readable)
        self.readable, self.skipped = self.readable.bool().cpu(), files.skipped

    def batches(self, shares):
        """As PhotoFiles.batches."""
        for share in shares:
            share = torch.tensor(share, dtype=torch.long)
            readable = self.readable[share]
            yield self.photos[share[readable]], readable


class PhotoLoader:
    """Yields (x, y) on `device` for the photos (PhotoFiles or PhotosInMemory) at `indices`.

    With a seed, each epoch has an order and horizontal flips of its own, both from (seed, epoch)
    alone, the same for every number of processes; without one the order is that of `indices`.
    Of every batch of `batch_size` photos this process gets each `world`-th, from its `rank` on.
    """

    def __init__(self, photos, indices, batch_size, device='cpu', seed=None, rank=0, world=1):
        self.photos, self.indices, self.batch_size = photos, indices, batch_size
        self.device, self.seed, self.rank, self.world = device, seed, rank, world
        self.epoch = self.start = 0  # the next pass: which epoch, and its first batch

    def __len__(self):
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self):
        order, flip = torch.tensor(self.indices), torch.zeros(len(self.indices), dtype=torch.bool)
        if self.seed is not None:
            # torch keeps 32 bits of a seed: mix the two numbers rather than add them
            mixed = random.Random(f'{self.seed} {self.epoch}').getrandbits(32)
            generator = torch.Generator().manual_seed(mixed)
            order = order[torch.randperm(len(order), generator=generator)]
            flip = torch.rand(len(order), generator=generator) < 0.5
        share = [slice(first + self.rank, min(first + self.batch_size, len(order)), self.world)
                 for first in range(self.start * self.batch_size, len(order), self.batch_size)]
        batches = self.photos.batches([order[s].tolist() for s in share])
        for s, (photos, readable) in zip(share, batches, strict=True):
            photos = photos.to(self.device, non_blocking=True)
            flips = flip[s][readable].to(self.device, non_blocking=True)
            yield gray_and_color(torch.where(flips[:, None, None, None], photos.flip(2), photos))


@contextlib.contextmanager
def signals_held_back():
    """Ctrl-C and systemd's SIGTERM go to a loader's workers too. Those started in here inherit
    that they never see them, from their first moment on; the parent ends them when it has saved.
    """
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK,
                                    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def gray_and_color(photos):
    """uint8 (B, S, S, 3) → x (B, 1, S, S) in [-1, 1] and y (B, 3, S, S) in [0, 1]."""
    y = photos.permute(0, 3, 1, 2).float() / 255
    return luminance(y) * 2 - 1, y
