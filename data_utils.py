"""From photo files to batches.

    loader = get_colorized_dataset_loader('data/landscapes', batch_size=32, shuffle=True)
    x, y = next(iter(loader))

A batch is x, gray (B, 1, S, S) in [-1, 1], and y, color (B, 3, S, S) in [0, 1]. The training
program reads the same photos faster: `PhotoFolder` squashes each to a square of bytes,
`load_photos` keeps them in memory for all epochs, and `PhotoLoader` makes the batches.
"""
import contextlib
import hashlib
import math
import os
import random
import sys
import unicodedata
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils import distributed
from utils.cli import UsageError
from utils.color import is_gray, luminance
from utils.device import free_memory, to_device

PHOTO_EXTENSIONS = (*IMG_EXTENSIONS, '.avif', '.gif', '.jfif')
# Pillow warns of photos above 89 megapixels, and refuses those above 179
warnings.simplefilter('ignore', Image.DecompressionBombWarning)
BATCHES_AHEAD = 4  # that threads read ahead while streaming


# ---------------------------------------------------------------------------- photo files

def list_photos(root):
    """Return the paths of all photos below the folder `root`: relative, '/'-separated, sorted.

    Links are followed, and each folder is entered once, so that a link to a folder above ends.
    Hidden files and macOS's `__MACOSX` and `._*` are left out. Raises UsageError if there are none.
    """
    if not os.path.exists(root):
        raise UsageError(f'no such folder: {root}. ./download_landscapes.sh fetches the '
                         'landscapes, --demo draws some, --data_path names your own')
    if not os.path.isdir(root):
        raise UsageError(f'{root} is a file; --data_path takes a folder of photos')
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
            raise UsageError(f'{error.filename} cannot be read: {error.strerror}')
        print(f'passed over {error.filename}: {error.strerror}', file=sys.stderr)
    if not names:
        raise UsageError(f'no photos in {root} ({" ".join(PHOTO_EXTENSIONS)})')
    return sorted(names)


def load_photo(path, size=None):
    """Return the photo in a file that Pillow reads, as an upright RGB image.

    With `size`, it may be a smaller version, neither side below 2 * `size` pixels: large JPEGs
    are read much faster. Raises OSError, whatever is wrong with the file.
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
    """Convert an image of any mode to RGB: transparent becomes white, 16 and 32 bits become 8."""
    if photo.mode.startswith(('I', 'F')):
        gray = photo.convert('F')
        # whole numbers are 16-bit, floating point counts from 0 to 1, unless the photo has more
        maxima = (1, 255, 65535) if photo.mode == 'F' else (65535,)
        brightest = gray.getextrema()[1]
        white = next((value for value in maxima if brightest <= value), brightest)
        return gray.point(lambda value: value * (255 / white) + 0.5).convert('L').convert('RGB')
    if photo.has_transparency_data:
        photo = photo.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', photo.size, 'white'), photo).convert('RGB')
    return photo if photo.mode == 'RGB' else photo.convert('RGB')


# ---------------------------------------------------------------------------- the course's loader

class ImageFolderGrayColor(ImageFolder):
    """A dataset of items (transform(photo), target_transform(photo)).

    It takes all photos below `root`. The class folders play no part: they may be missing or nested.
    """

    def __init__(self, root, transform=None, target_transform=None):
        super().__init__(root, transform, target_transform, loader=load_photo)

    def find_classes(self, directory):
        self.names = list_photos(directory)
        classes = sorted({os.path.dirname(name) for name in self.names})
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, *_, **__):
        return [(os.path.join(directory, name), class_to_idx[os.path.dirname(name)])
                for name in self.names]

    def __getitem__(self, index):
        path, _ = self.samples[index]
        photo = self.loader(path)
        return (self.transform(photo) if self.transform else photo,
                self.target_transform(photo) if self.target_transform else photo)


def get_colorized_dataset_loader(path, **kwargs):
    """Return a DataLoader of x (B, 1, 224, 224) in [-1, 1] and y (B, 3, 224, 224) in [0, 1].

    `kwargs` go to the DataLoader. Raises UsageError if there are no photos below `path`.
    """
    color = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    gray = transforms.Compose([transforms.Resize((224, 224)), transforms.Grayscale(),
                               transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    return DataLoader(ImageFolderGrayColor(path, gray, color), **kwargs)


# ---------------------------------------------------------------------------- the photos of a run

class PhotoFolder(ImageFolderGrayColor):
    """The photos below `root`, squashed to bytes: items are uint8 (size, size, 3).

    `skipped` has the reason, by index, for each photo that is left out. It is filled by
    `load_photos`, which looks at all of them.
    """

    def __init__(self, root, size, num_workers=0):
        super().__init__(root, target_transform=self.squash)
        self.loader = partial(load_photo, size=size)
        self.size, self.num_workers, self.skipped = size, num_workers, {}

    def __getitem__(self, index):
        return super().__getitem__(index)[1]

    def squash(self, photo):
        """Resize a PIL image to uint8 (size, size, 3).

        The result is within one gray level of Pillow's resize, in a quarter of its time.
        """
        # Pillow's bytes are channels-last. Torch resizes them faster if it sees them so.
        photo = pil_to_tensor(photo).permute(1, 2, 0)[None]
        small = F.interpolate(photo.permute(0, 3, 1, 2), (self.size, self.size), mode='bilinear',
                              antialias=True)
        return small[0].permute(1, 2, 0).contiguous()

    def keep(self, training, validation):
        """Forget all photos but those at these indices, and return their new indices."""
        kept = training + validation
        self.samples = [self.samples[index] for index in kept]
        self.names = [self.names[index] for index in kept]
        return list(range(len(training))), list(range(len(training), len(kept)))

    def fingerprint(self):
        """Return the number of photos, and a hash of their names."""
        names = '\n'.join(self.names).encode('utf-8', 'surrogateescape')
        return f'{len(self)} ({hashlib.sha256(names).hexdigest()[:8]})'

    def usable(self, indices):
        """Return those of the indices whose photos are not skipped."""
        return [index for index in indices if index not in self.skipped]

    def try_item(self, index, refuse_gray=False):
        """Return (photo, ''), or (None, reason) if the photo cannot be read, or is gray."""
        try:
            photo = self[index]
        except OSError as error:
            return None, str(error)
        return (None, 'gray') if refuse_gray and is_gray(photo) else (photo, '')

    def read(self, batches, flips):
        """Stream batches from disk: yield (photos, flips) for each tensor of indices in `batches`.

        `photos` are uint8 (B, size, size, 3); `flips` (bool) belong to them. A photo that can no
        longer be read is left out and reported. Threads read ahead, a few batches at most.
        """
        pool = ThreadPoolExecutor(max(1, self.num_workers))
        ahead = deque()
        try:
            for batch, flip in zip(batches, flips, strict=True):
                ahead.append((batch, flip, [pool.submit(self.try_item, i) for i in batch.tolist()]))
                if len(ahead) > BATCHES_AHEAD:
                    yield self.collate(*ahead.popleft())
            while ahead:
                yield self.collate(*ahead.popleft())
        finally:  # an epoch that was stopped leaves photos unread
            pool.shutdown(wait=False, cancel_futures=True)

    def collate(self, batch, flip, futures):
        """Return (photos, flips) of one batch, without those that cannot be read."""
        photos, reasons = zip(*(future.result() for future in futures), strict=True) \
            if futures else ((), ())
        for index, reason in zip(batch.tolist(), reasons, strict=True):
            if reason and index not in self.skipped:
                self.skipped[index] = reason
                tqdm.write(f'skipped {self.names[index]!r}: {reason}', file=sys.stderr)
        photos = [photo for photo in photos if photo is not None]
        empty = torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        return (torch.stack(photos) if photos else empty,
                flip[[not reason for reason in reasons]])


class PhotosInMemory:
    """The photos of a PhotoFolder as one tensor, uint8 (N, size, size, 3), on any device."""

    def __init__(self, photos):
        self.photos = photos

    def read(self, batches, flips):
        """Yield what PhotoFolder.read yields, from memory."""
        sizes = [len(batch) for batch in batches]
        # one copy for all batches: each copy to a GPU waits for the work queued there
        order, flips = (torch.cat(parts).to(self.photos.device).split(sizes)
                        for parts in (batches, flips))
        for indices, flip in zip(order, flips, strict=True):
            yield self.photos[indices], flip


def load_photos(folder, device, stream=False):
    """Read all photos of a PhotoFolder once, and fill `folder.skipped`.

    Returns a PhotosInMemory on the device, or in the host's memory if the device has no room for
    them. Returns `folder`, which reads them again in every epoch, if neither has room, or with
    `stream`. Each process of a distributed run reads its share.
    """
    home = None if stream else find_room(folder, device)
    photos = None
    if home:
        photos = torch.zeros(len(folder), folder.size, folder.size, 3, dtype=torch.uint8,
                             device=home)
    share = range(distributed.rank, len(folder), distributed.world_size)
    with one_torch_thread(), ThreadPoolExecutor(max(1, folder.num_workers)) as pool:
        items = tqdm(pool.map(partial(folder.try_item, refuse_gray=True), share),
                     'reading photos', len(share), leave=False, unit=' photos',
                     disable=None if distributed.rank == 0 else True)
        for index, (photo, reason) in zip(share, items, strict=True):
            if reason:
                folder.skipped[index] = reason
            elif home:
                photos[index] = photo
    folder.skipped = {index: reason for part in distributed.all_gather(folder.skipped)
                      for index, reason in part.items()}
    if not home:
        return folder
    if distributed.world_size > 1:  # the photos of other shares are zero here
        dist.all_reduce(photos)
    return PhotosInMemory(photos)


def find_room(folder, device):
    """Return the device, or the CPU, if its memory has room for all photos twice; else None."""
    size = 3 * folder.size ** 2 * len(folder)
    for home in device, torch.device('cpu'):
        copies = distributed.local_world_size if home.type == 'cpu' else 1
        fits = size * copies < free_memory(home) / 2
        if distributed.all_reduce_sum(fits)[0] == distributed.world_size:
            return home
    distributed.print0(f'streaming the photos: {size / 2**30:.1f} GB do not fit in memory')
    return None


@contextlib.contextmanager
def one_torch_thread():
    """Give torch one thread in each of the threads that read photos: those are enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- the batches of a run

def is_held_out(name, fraction):
    """Tell whether the photo of this relative path is for validation, from the path alone.

    Other photos, the order of listing and the machine never move it to the other side.
    """
    # macOS may list the same name decomposed (NFD), Linux lists it as it was written
    name = unicodedata.normalize('NFC', name).encode('utf-8', 'surrogateescape')
    return int.from_bytes(hashlib.sha256(name).digest()[:8], 'big') < fraction * 2 ** 64


def split(names, fraction):
    """Return the indices of the training photos, and of the validation photos.

    Raises UsageError if either side is left without a photo (validation: unless `fraction` is 0).
    """
    training, validation = [], []
    for index, name in enumerate(names):
        (validation if is_held_out(name, fraction) else training).append(index)
    if not training or fraction and not validation:
        raise UsageError(f'--val_fraction {fraction:g} holds out {len(validation)} of the '
                         f'{len(names)} photos; give another fraction, more photos, or 0 to train '
                         'on all')
    return training, validation


def open_photos(root, size, num_workers, val_fraction):
    """Return the PhotoFolder, and the indices of its training and of its validation photos.

    Raises UsageError if there are none, or if the ranks see different ones.
    """
    folder = PhotoFolder(root, size, num_workers)
    if distributed.broadcast(folder.names) != folder.names:
        raise UsageError(f'{root} holds other photos here than where rank 0 runs; copy the same to '
                         'every machine')
    return folder, *split(folder.names, val_fraction)


class PhotoLoader:
    """Yield (x, y) on `device`, of the photos (what load_photos returns) at `indices`.

    With a seed, each epoch has an order and horizontal flips that come from (seed, epoch) alone.
    Without one, the order is that of `indices`, and nothing is flipped. Of every batch of
    `batch_size` photos, each process of a distributed run gets its share.
    """

    def __init__(self, photos, indices, batch_size, device='cpu', seed=None):
        self.photos, self.indices, self.batch_size = photos, indices, batch_size
        self.device, self.seed = device, seed
        self.epoch = self.first_step = 0  # of the next pass
        self.rank, self.world_size = distributed.rank, distributed.world_size

    def __len__(self):
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self):
        batches, flips = map(self.share, self.order_and_flips())
        if not batches:  # the run was stopped after an epoch's last step, before its validation
            return
        for photos, flip in self.photos.read(batches, flips):
            yield gray_and_color(mirror(to_device(photos, self.device),
                                        to_device(flip, self.device)))

    def order_and_flips(self):
        order = torch.tensor(self.indices)
        if self.seed is None:
            return order, torch.zeros(len(order), dtype=torch.bool)
        # torch keeps 32 bits of a seed: mix the two numbers rather than add them
        mixed = random.Random(f'{self.seed} {self.epoch}').getrandbits(32)
        generator = torch.Generator().manual_seed(mixed)
        order = order[torch.randperm(len(order), generator=generator)]
        return order, torch.rand(len(order), generator=generator) < 0.5

    def share(self, values):
        """Return this process's share of each batch from `first_step` on."""
        return [batch[self.rank::self.world_size]
                for batch in values.split(self.batch_size)[self.first_step:]]


def mirror(photos, flips):
    """Flip the photos (B, S, S, 3) left to right where `flips` (B,) says so."""
    return torch.where(flips[:, None, None, None], photos.flip(2), photos)


def gray_and_color(photos):
    """Return x (B, 1, S, S) in [-1, 1] and y (B, 3, S, S) in [0, 1] of uint8 (B, S, S, 3)."""
    y = photos.permute(0, 3, 1, 2).float() / 255
    return luminance(y) * 2 - 1, y


@dataclass
class Data:
    """The batches of a run, and up to 16 photos (x, y) to look at, held-out ones if possible."""
    train_loader: PhotoLoader
    val_loader: PhotoLoader | None
    samples: tuple
    sample_paths: list
    sample_names: list

    @classmethod
    def load(cls, folder, indices, batch_size, device, seed, stream=False):
        """Load the photos at `indices`, a pair: of training, of validation.

        Raises UsageError if all photos of one kind are skipped.
        """
        photos = load_photos(folder, device, stream)
        training, validation = map(folder.usable, indices)
        for kind, given, usable in zip(('training', 'validation'), indices,
                                       (training, validation), strict=True):
            if given and not usable:
                reasons = Counter(folder.skipped[index] for index in given).most_common(1)
                raise UsageError(f'none of the {len(given)} {kind} photos in {folder.root} can be '
                                 f'used: they are {reasons[0][0]}' if reasons[0][0] == 'gray' else
                                 f'none of the {kind} photos could be read: {reasons[0][0]}')
        shown = validation or training
        number = min(16, len(shown))
        shown = [shown[place * len(shown) // number] for place in range(number)]
        samples = PhotoLoader(photos, shown, number, device)
        samples.rank, samples.world_size = 0, 1
        return cls(PhotoLoader(photos, training, batch_size, device, seed),
                   PhotoLoader(photos, validation, batch_size, device) if validation else None,
                   next(iter(samples)),
                   [folder.samples[index][0] for index in shown],
                   [os.path.dirname(folder.names[index]) or '.' for index in shown])
