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
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets.folder import ImageFolder
from tqdm import tqdm

from utils import distributed
from utils.cli import UsageError
from utils.color import is_gray, luminance
from utils.device import free_memory, to_device
from utils.distributed import print0
from utils.photos import list_photos, load_photo, to_pixels

BATCHES_AHEAD = 4  # that threads read while the network trains: enough for slow disks


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
        return [
            (os.path.join(directory, name), class_to_idx[os.path.dirname(name)])
            for name in self.names
        ]

    def __getitem__(self, index):
        path, _ = self.samples[index]
        photo = self.loader(path)
        return (
            self.transform(photo) if self.transform else photo,
            self.target_transform(photo) if self.target_transform else photo,
        )


def get_colorized_dataset_loader(path, **kwargs):
    """Return a DataLoader of x (B, 1, 224, 224) in [-1, 1] and y (B, 3, 224, 224) in [0, 1].

    `kwargs` go to the DataLoader. Raises UsageError if there are no photos below `path`.
    """
    color = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    gray = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.Grayscale(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    return DataLoader(ImageFolderGrayColor(path, gray, color), **kwargs)


# ---------------------------------------------------------------------------- the photos of a run


class PhotoFolder(ImageFolderGrayColor):
    """The photos below `root`, squashed to bytes: items are uint8 (size, size, 3).

    `skipped` has the reason, by index, for each photo that is left out: it cannot be read, or it is
    gray. `load_photos` fills it.
    """

    def __init__(self, root, size, num_workers=0):
        super().__init__(root)
        self.loader = partial(load_photo, size=size)
        self.size, self.num_workers, self.skipped = size, num_workers, {}
        self.is_stopped = lambda: False  # for a program that can be asked to stop

    def __getitem__(self, index):
        path, _ = self.samples[index]
        return self.squash(self.loader(path))

    def squash(self, photo):
        """Resize a PIL image to uint8 (size, size, 3).

        The result is within one gray level of Pillow's resize, in a quarter of its time.
        """
        # Pillow's bytes are channels-last. Permuted, not copied, torch sees that, and is faster.
        photo = to_pixels(photo)[None].permute(0, 3, 1, 2)
        small = F.interpolate(photo, (self.size, self.size), mode='bilinear', antialias=True)
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
        """Return (photos, flips) of one batch, without those that cannot be read.

        Once the run is stopped, the batch is empty: a dead disk may never answer.
        """
        while wait(futures, timeout=0.2).not_done:
            if self.is_stopped():
                batch, futures = batch[:0], []
        kept, is_kept = [torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)], []
        for index, future in zip(batch.tolist(), futures, strict=True):
            photo, reason = future.result()
            is_kept.append(not reason)
            if not reason:
                kept.append(photo[None])
            elif index not in self.skipped:
                self.skipped[index] = reason
                tqdm.write(f'skipped {self.names[index]!r}: {reason}', file=sys.stderr)
        return torch.cat(kept), flip[: len(is_kept)][torch.tensor(is_kept, dtype=torch.bool)]


class PhotosInMemory:
    """The photos of a PhotoFolder as one tensor, uint8 (N, size, size, 3), on any device."""

    def __init__(self, photos):
        self.photos = photos

    def read(self, batches, flips):
        """Yield what PhotoFolder.read yields, from memory."""
        sizes = [len(batch) for batch in batches]
        # one copy for all batches: each copy to a GPU waits for the work queued there
        batches = torch.cat(batches).to(self.photos.device).split(sizes)
        flips = torch.cat(flips).to(self.photos.device).split(sizes)
        for batch, flip in zip(batches, flips, strict=True):
            yield self.photos[batch], flip


def load_photos(folder, device, stream=False):
    """Read all photos of a PhotoFolder once, to find those to skip, and keep them in memory.

    Returns a PhotosInMemory on the device, or in the host's memory if the device has no room for
    them. If neither has room, or with `stream`, nothing is kept, and `folder` is returned: it reads
    the photos again in every epoch. Each process of a distributed run reads its share.
    """
    home = None if stream else find_room(folder, device)
    photos = None
    if home:
        photos = torch.zeros(
            len(folder), folder.size, folder.size, 3, dtype=torch.uint8, device=home
        )
    share = range(distributed.rank, len(folder), distributed.world_size)
    with one_torch_thread(), ThreadPoolExecutor(max(1, folder.num_workers)) as pool:
        items = tqdm(
            pool.map(partial(folder.try_item, refuse_gray=True), share),
            'reading photos',
            len(share),
            leave=False,
            unit='photo',
            disable=distributed.no_bar,
        )
        for index, (photo, reason) in zip(share, items, strict=True):
            if reason:
                folder.skipped[index] = reason
            elif home:
                photos[index] = photo
    folder.skipped = {
        index: reason
        for part in distributed.all_gather(folder.skipped)
        for index, reason in part.items()
    }
    if not home:
        return folder
    if distributed.world_size > 1:  # the photos of other shares are zero here
        dist.all_reduce(photos)
    return PhotosInMemory(photos)


def find_room(folder, device):
    """Return the device, or the CPU, if half of its memory has room for all photos; else None."""
    size = 3 * folder.size**2 * len(folder)
    for home in device, torch.device('cpu'):
        copies = distributed.local_world_size if home.type == 'cpu' else 1
        fits = size * copies < free_memory(home) / 2
        if distributed.all_reduce_sum(fits)[0] == distributed.world_size:
            return home
    print0(f'streaming the photos: {size / 2**30:.1f} GB do not fit in memory')
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
    return int.from_bytes(hashlib.sha256(name).digest()[:8], 'big') < fraction * 2**64


def split(folder, fraction):
    """Return the indices of a PhotoFolder's training photos, and of its validation photos.

    Raises UsageError if either side is left without a photo (validation: unless `fraction` is 0),
    or if the ranks see different photos.
    """
    if distributed.broadcast(folder.names) != folder.names:
        raise UsageError(
            f'{folder.root} holds other photos here than where rank 0 runs; copy the '
            'same to every machine'
        )
    training, validation = [], []
    for index, name in enumerate(folder.names):
        (validation if is_held_out(name, fraction) else training).append(index)
    if not training or fraction and not validation:
        raise UsageError(
            f'--val_fraction {fraction:g} holds out {len(validation)} of the '
            f'{len(folder)} photos; give another fraction, more photos, or 0 to train '
            'on all'
        )
    return training, validation


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
        if not batches:  # a resumed epoch that has no step left, only its validation
            return
        for photos, flip in self.photos.read(batches, flips):
            yield gray_and_color(
                mirror(to_device(photos, self.device), to_device(flip, self.device))
            )

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
        return [
            batch[self.rank :: self.world_size]
            for batch in values.split(self.batch_size)[self.first_step :]
        ]


def mirror(photos, flips):
    """Flip the photos (B, S, S, 3) left to right where `flips` (B,) says so."""
    return torch.where(flips[:, None, None, None], photos.flip(2), photos)


def gray_and_color(photos):
    """Return x (B, 1, S, S) in [-1, 1] and y (B, 3, S, S) in [0, 1] of uint8 (B, S, S, 3)."""
    y = photos.permute(0, 3, 1, 2).float() / 255
    return luminance(y) * 2 - 1, y


class Data:
    """The batches of a run, and up to 16 photos to look at, held-out ones if possible.

    `source` is what load_photos returned for the `folder`; `indices` are a pair, of training and of
    validation photos. Raises UsageError if all of one kind are skipped.
    """

    def __init__(self, source, indices, folder, batch_size, device, seed):
        training, validation = map(folder.usable, indices)
        for kind, given, usable in zip(
            ('training', 'validation'), indices, (training, validation), strict=True
        ):
            if given and not usable:
                raise UsageError(
                    f'no {kind} photo in {folder.root} can be used; the first: '
                    f'{folder.skipped[given[0]]}'
                )
        self.train_loader = PhotoLoader(source, training, batch_size, device, seed)
        self.val_loader = None
        if validation:
            self.val_loader = PhotoLoader(source, validation, batch_size, device)
        shown = validation or training
        number = min(16, len(shown))
        shown = [shown[i * len(shown) // number] for i in range(number)]
        loader = PhotoLoader(source, shown, number, device)
        loader.rank, loader.world_size = 0, 1  # every rank reads them all
        self.samples = next(iter(loader))  # (x, y)
        self.sample_paths = [folder.samples[index][0] for index in shown]
        self.sample_folders = [os.path.dirname(folder.names[index]) or '.' for index in shown]
