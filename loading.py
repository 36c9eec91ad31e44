"""The photos of a run: which are held out, where they are kept, in which order they come.

Batches are x grey (B, 1, S, S) in [-1, 1] and y colour (B, 3, S, S) in [0, 1], on the device.
"""
import contextlib
import hashlib
import math
import os
import random
import signal
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import distributed
from color import luminance
from data_utils import RequestError, list_photos, load_photo
from device import free_memory
from report import say

# ---------------------------------------------------------------------------- which

def held_out(name, fraction):
    """Whether the photo of this relative path is for validation: decided by the path alone.

    So that other photos, the order of listing and the machine never move it to the other side.
    """
    # macOS may hand out the same name decomposed (NFD), Linux as it was written
    name = unicodedata.normalize('NFC', name).encode('utf-8', 'surrogateescape')
    return int.from_bytes(hashlib.sha256(name).digest()[:8], 'big') < fraction * 2 ** 64


def split(args):
    """The photos' names, indices for training and for validation, what a resumed run must share.

    Raises RequestError where either side is left without a photo.
    """
    names = list_photos(args.data_path)
    listing = hashlib.sha256('\n'.join(names).encode('utf-8', 'surrogateescape')).hexdigest()
    settings = dict(batch_size=args.batch_size, image_size=args.image_size, seed=args.seed,
                    val_fraction=args.val_fraction, photos=f'{len(names)} ({listing[:8]})')
    if distributed.from_first(settings) != settings:
        raise RequestError(f'{args.data_path} holds {settings["photos"]} here, other photos than '
                           'where the first process runs; copy the same to every machine')
    training, validation = [], []
    for index, name in enumerate(names):
        (validation if held_out(name, args.val_fraction) else training).append(index)
    if not training or args.val_fraction and not validation:
        raise RequestError(f'--val_fraction {args.val_fraction:g} holds out {len(validation)} of '
                           f'the {len(names)} photos in {args.data_path}; give another fraction, '
                           'more photos, or 0 to train on all')
    if args.dry_run:
        kept = training[:8] + validation[:8]
        names, training = [names[i] for i in kept], list(range(len(training[:8])))
        validation = list(range(len(training), len(kept)))
    return names, training, validation, settings


# ---------------------------------------------------------------------------- where

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

    def batches(self, order, flips, sizes):
        """The photos of the indices `order`, in batches of `sizes`: uint8 (B, S, S, 3), mirrored
        where `flips` says so; those that cannot be read are missing."""
        order, flips = order.split(sizes), flips.split(sizes)
        with signals_held_back():
            loader = iter(DataLoader(self, batch_sampler=[part.tolist() for part in order],
                                     num_workers=self.num_workers, collate_fn=self.collate))
        for indices, flip, (photos, reasons) in zip(order, flips, loader, strict=True):
            for index, reason in zip(indices.tolist(), reasons, strict=True):
                if reason:
                    self.skip(index, reason)
            yield mirrored(photos, flip[[not reason for reason in reasons]])

    def collate(self, items):
        photos = [photo for photo, reason in items if not reason]
        empty = torch.empty(0, self.size, self.size, 3, dtype=torch.uint8)
        return torch.stack(photos) if photos else empty, [reason for _, reason in items]


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


class PhotosInMemory:
    """All photos of `files`, decoded once, as one uint8 tensor (N, size, size, 3) on `device`.

    Each process of a distributed run decodes every `world`-th photo.
    """

    def __init__(self, files, device, rank=0, world=1):
        self.photos = torch.zeros(len(files), files.size, files.size, 3, dtype=torch.uint8,
                                  device=device)
        self.readable = torch.zeros(len(files), dtype=torch.uint8, device=device)
        mine = range(rank, len(files), world)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # in each of those that follow, of which there are enough
        # threads: Pillow and torch decode and resize without holding the interpreter's lock
        with ThreadPoolExecutor(max(1, files.num_workers)) as pool:
            for index, (photo, reason) in zip(mine, tqdm(
                    pool.map(files.__getitem__, mine), 'reading photos', len(mine), leave=False,
                    unit=' photos', disable=None if rank == 0 else True), strict=True):
                if reason:
                    files.skip(index, reason)
                else:
                    self.photos[index], self.readable[index] = photo, 1
        torch.set_num_threads(threads)
        if world > 1:  # the others' photos are still zero, so the sum is the union
            dist.all_reduce(self.photos)
            dist.all_reduce(self.readable)
        self.readable, self.skipped = self.readable.bool().cpu(), files.skipped

    def batches(self, order, flips, sizes):
        """As PhotoFiles.batches."""
        readable = self.readable[order]
        sizes = [int(part.sum()) for part in readable.split(sizes)]
        # an epoch's in one go: each copy to the device waits until all work there is done
        order, flips = (part[readable].to(self.photos.device) for part in (order, flips))
        for indices, flip in zip(order.split(sizes), flips.split(sizes), strict=True):
            yield mirrored(self.photos[indices], flip)


def load_photos(args, names, device):
    """The photos in the device's memory, else in the host's, else as files to be streamed."""
    files = PhotoFiles(args.data_path, names, args.image_size, args.num_workers)
    size = 3 * args.image_size ** 2 * len(names)
    for home in device, torch.device('cpu'):
        copies = distributed.local_world if home.type == 'cpu' else 1
        fits = not args.stream and size * copies < free_memory(home) / 2
        if distributed.total(fits)[0] == distributed.world:
            return PhotosInMemory(files, home, distributed.rank, distributed.world)
    say(f'streaming the photos: {size / 2**30:.1f} GB of them stay on disk')
    return files


# ---------------------------------------------------------------------------- in which order

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
        order, flips = torch.tensor(self.indices), torch.zeros(len(self.indices), dtype=torch.bool)
        if self.seed is not None:
            # torch keeps 32 bits of a seed: mix the two numbers rather than add them
            mixed = random.Random(f'{self.seed} {self.epoch}').getrandbits(32)
            generator = torch.Generator().manual_seed(mixed)
            order = order[torch.randperm(len(order), generator=generator)]
            flips = torch.rand(len(order), generator=generator) < 0.5
        place = torch.arange(len(order))[self.start * self.batch_size:]
        place = place[place % self.batch_size % self.world == self.rank]
        sizes = torch.bincount(place // self.batch_size - self.start,
                               minlength=len(self) - self.start).tolist()
        for photos in self.photos.batches(order[place], flips[place], sizes):
            yield gray_and_color(photos.to(self.device))


def mirrored(photos, flips):
    """Photos (B, S, S, 3), mirrored left to right where `flips` (B,) says so."""
    return torch.where(flips[:, None, None, None], photos.flip(2), photos)


def gray_and_color(photos):
    """uint8 (B, S, S, 3) → x (B, 1, S, S) in [-1, 1] and y (B, 3, S, S) in [0, 1]."""
    y = photos.permute(0, 3, 1, 2).float() / 255
    return luminance(y) * 2 - 1, y


def make_loaders(args, names, training, validation, device):
    """Loaders of the two sides (None where nothing is held out), and 16 photos to look at."""
    photos = load_photos(args, names, device)
    shown = validation or training
    number = min(16, len(shown))
    shown = [shown[place * len(shown) // number] for place in range(number)]
    share = dict(device=device, rank=distributed.rank, world=distributed.world)
    return (PhotoLoader(photos, training, args.batch_size, seed=args.seed, **share),
            PhotoLoader(photos, validation, args.batch_size, **share) if validation else None,
            next(iter(PhotoLoader(photos, shown, 16, device))) if distributed.rank == 0 else None)
