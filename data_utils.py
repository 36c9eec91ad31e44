"""From photo files to batches.

    loader = get_colorized_dataset_loader('data/landscapes', batch_size=32, shuffle=True)
    x, y = next(iter(loader))

A batch is x, gray (B, 1, S, S) in [-1, 1], and y, color (B, 3, S, S) in [0, 1]. The training
program reads the same photos faster: `read_photos` squashes each to a square of bytes, once, and
`batches` makes the batches of an epoch from these.
"""

import contextlib
import hashlib
import math
import os
import random
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch.utils.data import DataLoader
from torchvision.datasets.folder import ImageFolder
from torchvision.transforms import Compose, Grayscale, Normalize, Resize, ToTensor
from tqdm import tqdm

from utils import distributed
from utils.cli import UsageError
from utils.color import is_gray, luminance
from utils.device import available_cpus, free_memory, to_device
from utils.distributed import print0
from utils.photos import list_photos, load_photo, to_pixels


class ImageFolderGrayColor(ImageFolder):
    """A dataset of items (transform(photo), target_transform(photo)).

    It takes all photos below `root`. The class folders play no part: they may be missing or nested.
    """

    def __init__(self, root, transform=None, target_transform=None):
        super().__init__(root, transform, target_transform, loader=load_photo)

    def find_classes(self, directory):
        return ['.'], {'.': 0}

    def make_dataset(self, directory, *_, **__):
        return [(os.path.join(directory, name), 0) for name in list_photos(directory)]

    def __getitem__(self, index):
        path, _ = self.samples[index]
        photo = self.loader(path)
        x = self.transform(photo) if self.transform else photo
        return x, self.target_transform(photo) if self.target_transform else photo


def get_colorized_dataset_loader(path, **kwargs):
    """Return a DataLoader of x (B, 1, 224, 224) in [-1, 1] and y (B, 3, 224, 224) in [0, 1].

    `kwargs` go to the DataLoader. Raises UsageError if there are no photos below `path`.
    """
    color = Compose([Resize((224, 224)), ToTensor()])
    gray = Compose([Resize((224, 224)), Grayscale(), ToTensor(), Normalize([0.5], [0.5])])
    return DataLoader(ImageFolderGrayColor(path, gray, color), **kwargs)


@dataclass(frozen=True)
class Photos:
    """The photos of a run at one size, as one tensor.

    `pixels` are uint8 (N, S, S, 3), on any device; they may lie in a memory-mapped file. `names`
    are their N paths below the folder `root`; `skipped` has, by index, why a photo is left out.
    `training` and `validation` are the indices of the others.
    """

    root: str
    names: list
    pixels: torch.Tensor
    skipped: dict
    training: list
    validation: list

    def get_shown(self, most=16):
        """Return the indices of up to `most` photos to look at, held-out ones if possible."""
        shown = self.validation or self.training
        number = min(most, len(shown))
        return [shown[i * len(shown) // number] for i in range(number)]


def read_photos(root, names, val_fraction, size, device):
    """Read the photos `names` below `root` once, squashed to `size`: return Photos.

    Left out are photos that cannot be read and, because they teach gray, gray ones. The pixels are
    on the device if half of its free memory has room for them, else in memory, else in a file. Each
    process reads its share of what its machine needs. Raises UsageError if the ranks see different
    photos, or if none is left to train or to validate on.
    """
    if distributed.broadcast(names) != names:
        raise UsageError(f"{root} is not what it is on rank 0's machine; copy the same to all")
    pixels, skipped = allocate((len(names), size, size, 3)), {}

    def read(indices):
        """Read a few photos; return why some of them are left out."""
        reasons = {}
        for index in indices:
            try:
                pixels[index] = squash(load_photo(os.path.join(root, names[index]), size), size)
                if is_gray(pixels[index]):
                    reasons[index] = 'gray'
            except OSError as error:
                reasons[index] = str(error)
        return reasons

    share = range(distributed.local_rank, len(names), distributed.local_world_size)
    parts = [share[start : start + 16] for start in range(0, len(share), 16)]
    options = dict(unit='photo', leave=False, disable=distributed.no_bar)
    bar, threads = tqdm(desc='reading photos', total=len(share), **options), torch.get_num_threads()
    with bar, ThreadPoolExecutor(available_cpus(), '', torch.set_num_threads, [1]) as pool:
        for part, reasons in zip(parts, pool.map(read, parts), strict=True):
            skipped |= reasons
            bar.update(len(part))
    torch.set_num_threads(threads)  # else threads that begin later have one, too
    for others in distributed.all_gather(skipped):
        skipped |= others
    if device.type != 'cpu' and pixels.nbytes < free_memory(device) / 2:
        pixels = pixels.to(device)
    sides = split(names, val_fraction)
    training, validation = ([index for index in side if index not in skipped] for side in sides)
    if not training or val_fraction and not validation:
        first = ''.join(f'; {names[index]!r}: {why}' for index, why in sorted(skipped.items())[:1])
        raise UsageError(
            f'{root}: of {len(names)} photos, {len(training)} are left to train on and '
            f'{len(validation)} to validate on; give more, or another --val_fraction (0 trains on '
            f'all){first}'
        )
    return Photos(root, names, pixels, skipped, training, validation)


def squash(photo, size):
    """Resize a PIL image to uint8 (size, size, 3), in a quarter of the time that Pillow takes."""
    # Pillow's bytes are channels-last. Permuted, not copied, torch sees that, and is faster.
    photo = to_pixels(photo)[None].permute(0, 3, 1, 2)
    small = F.interpolate(photo, (size, size), mode='bilinear', antialias=True)
    return small[0].permute(1, 2, 0).contiguous()


def allocate(shape):
    """Return a tensor of bytes of this shape: in memory or, if it is large, in a file.

    Several processes of one machine share one file. It is in the folder for temporary files, has no
    name any more, and ends with the processes. Raises UsageError if there is no room for it.
    """
    size, path = math.prod(shape), None
    fits = size < free_memory(torch.device('cpu')) / 2
    if fits and distributed.local_world_size == 1:
        return torch.zeros(shape, dtype=torch.uint8)
    where = f'{size / 2**30:.1f} GB of photos go to a file in {tempfile.gettempdir()}'
    if not fits:
        print0(f'too large for memory: {where}')
    if distributed.local_rank == 0:
        file, path = tempfile.mkstemp(prefix='photos_')
        try:
            # reserved now: on a disk that fills up later, the kernel would end the process
            getattr(os, 'posix_fallocate', lambda *_: None)(file, 0, size)  # macOS has none
        except OSError as error:
            os.unlink(path)
            raise UsageError(
                f'{where}: {error.strerror}; name another folder in the environment as TMPDIR, or '
                'give a smaller --image_size'
            ) from error
        os.close(file)
    # ranks of one machine follow each other
    path = distributed.all_gather(path)[distributed.rank - distributed.local_rank]
    pixels = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    distributed.barrier()
    if distributed.local_rank == 0:
        with contextlib.suppress(OSError):  # Windows keeps the names of open files
            os.unlink(path)
    return pixels.view(shape)


def fingerprint(names):
    """Return the number of photos, and a hash of their names."""
    digest = hashlib.sha256('\n'.join(names).encode('utf-8', 'surrogateescape'))
    return f'of {len(names)} photos ({digest.hexdigest()[:8]})'


def is_held_out(name, fraction):
    """Tell whether the photo of this relative path is for validation, from the path alone.

    Other photos, the order of listing and the machine never move it to the other side.
    """
    # macOS may list the same name decomposed (NFD), Linux lists it as it was written
    name = unicodedata.normalize('NFC', name).encode('utf-8', 'surrogateescape')
    return int.from_bytes(hashlib.sha256(name).digest()[:8], 'big') < fraction * 2**64


def split(names, fraction):
    """Return the indices of the photos to train on, and of those to validate on."""
    sides = [], []
    for index, name in enumerate(names):
        sides[is_held_out(name, fraction)].append(index)
    return sides


def batches(photos, indices, batch_size, device, seed=None, epoch=0, first_step=0):
    """Yield (x, y) on `device`: the photos at `indices`, in batches, from `first_step` on.

    With a seed, the order and the horizontal flips come from (seed, epoch) alone; without one, the
    order is that of `indices`, and nothing is flipped. Of every batch, each process of several gets
    its share, which may be empty.
    """
    # one copy for all batches: each copy to a GPU waits for the work queued there
    drawn = order_and_flips(indices, seed, epoch)
    order, flips = (values.to(photos.pixels.device) for values in drawn)
    for start in range(first_step * batch_size, len(order), batch_size):
        share = slice(start + distributed.rank, start + batch_size, distributed.world_size)
        pixels = to_device(photos.pixels[order[share]], device)
        is_flipped = to_device(flips[share], device)[:, None, None, None]
        yield gray_and_color(torch.where(is_flipped, pixels.flip(2), pixels))


def order_and_flips(indices, seed, epoch):
    """Return the order of an epoch, and whether each photo in it is flipped, as tensors (N,)."""
    order = torch.tensor(indices)
    if seed is None:
        return order, torch.zeros(len(order), dtype=torch.bool)
    # torch keeps 32 bits of a seed: mix the two numbers rather than add them
    generator = torch.Generator().manual_seed(random.Random(f'{seed} {epoch}').getrandbits(32))
    order = order[torch.randperm(len(order), generator=generator)]
    return order, torch.rand(len(order), generator=generator) < 0.5


def gray_and_color(photos):
    """Return x (B, 1, S, S) in [-1, 1] and y (B, 3, S, S) in [0, 1] of uint8 (B, S, S, 3)."""
    y = photos.permute(0, 3, 1, 2).float() / 255
    return luminance(y) * 2 - 1, y


def augment(x, y, side, epoch, epochs, step):
    """Return photos (B, C, S, S) as (B, C, side, side): as `step` of the run sees them, in `epoch`.

    What it sees often, a network learns by heart. So from the fifth epoch on (4; the first is 0),
    small steps see parts; in runs of 40 epochs or more, from the 21st on, all steps do, in another
    light. It follows from these numbers: a resumed run and each process of several see the same.
    """
    if epoch >= 20 and epochs >= 40:  # in shorter runs, too few steps are left to gain by it
        return relight(crop(y, side, step, smallest=0.3), step)
    if side < x.shape[-1]:
        x, y = (crop(z, side, step, smallest=0.5 if epoch >= 4 else 1.0) for z in (x, y))
    return x, y


def crop(photos, side, step, smallest):
    """Return a square of photos (B, C, S, S), of `smallest` * S to S pixels, at side × side."""
    size, draw = photos.shape[-1], random.Random(step)
    part = draw.randint(int(smallest * size), size)
    top, left = (draw.randint(0, size - part) for _ in range(2))
    square = TF.resized_crop(photos, top, left, part, part, [side, side], antialias=False)
    return square.contiguous()  # else one that fits already is a view, for which Dynamo compiles


def relight(y, step):
    """Return x and y of the photos y with the gamma, contrast and brightness of the step."""
    draw = random.Random(f'light {step}')
    y = TF.adjust_gamma(y, 2 ** draw.uniform(-0.5, 0.5))
    y = TF.adjust_contrast(y, draw.uniform(0.75, 1.25))
    y = TF.adjust_brightness(y, draw.uniform(0.75, 1.25))
    return luminance(y) * 2 - 1, y
