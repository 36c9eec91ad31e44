"""Draw a small set of landscapes, so that everything runs without a download.

    python demo_landscapes.py              # 40 of each of seven kinds, into data/demo
    python demo_landscapes.py data/more --per_kind 100 --seed 1

The same seed always draws the same pictures. A folder with pictures is left as it is.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils import cli
from utils.stop import Stop

KINDS = 'city', 'road', 'mountain', 'lake', 'ocean', 'field', 'forest'
W, H = 320, 240  # drawn at twice the size and halved at the end: cheap smooth edges
Y, X = np.mgrid[:H, :W].astype(np.float32)
# the sky's top, its foot (which is also the haze), clouds, sun or moon; the light on the land
DAY = (0.08, 0.42, 0.90), (0.54, 0.83, 1), (1, 1, 1), (1, 0.96, 0.76), (1, 1, 1)
DUSK = (0.38, 0.26, 0.48), (1, 0.68, 0.40), (0.98, 0.6, 0.5), (1, 0.92, 0.6), (0.84, 0.66, 0.56)
NIGHT = (0.02, 0.05, 0.22), (0.13, 0.28, 0.54), (0.14, 0.2, 0.4), (1, 0.96, 0.84), (0.3, 0.38, 0.5)
LEAF, PINE = (0.38, 0.62, 0.08), (0.20, 0.52, 0.14)
GRASS, WHEAT = (0.54, 0.74, 0.14), (0.96, 0.78, 0.20)
SAND, SEA, ROCK, WHITE = (0.97, 0.84, 0.52), (0.02, 0.38, 0.70), (0.60, 0.49, 0.34), (0.95, 0.97, 1)
WALLS = (0.72, 0.40, 0.26), (0.90, 0.74, 0.48), (0.80, 0.58, 0.36)  # brick, sandstone, terracotta
# a tree's parts, back to front: brightness, then corners x, y from its root, in tree heights
CONE = [
    (shade, 0, -top, 0, -low, x, -low)
    for low, top, wide in ((0.1, 0.55, 0.24), (0.34, 0.8, 0.19), (0.58, 1, 0.13))
    for shade, x in ((1.25, -wide), (0.75, wide))
]
CROWN = [
    (0.75, -0.28, -0.9, 0.4, -0.22),
    (1, -0.32, -0.96, 0.28, -0.36),
    (1.2, -0.26, -0.92, 0.06, -0.6),
]


def noise(rng, rows, cols, octaves=1):
    """Return value noise, (H, W) in about [-1, 1]: smooth random grids, each finer and fainter."""
    total = np.zeros((H, W), np.float32)
    for scale in (1, 2, 4, 8)[:octaves]:
        grid = Image.fromarray(rng.uniform(-1, 1, (rows * scale, cols * scale)).astype('f'))
        total += np.asarray(grid.resize((W, H), Image.Resampling.BICUBIC)) / scale
    return total


def times(field, color):
    """Return field (h, w) times color (3,), (h, w, 3), as three planes in memory.

    NumPy keeps that order in what it computes from the result, and goes through planes several
    times faster than through pixels of three numbers.
    """
    return np.moveaxis(np.multiply.outer(color, field), 0, -1)


class Scene:
    """A picture in the making: it starts as a sky, and each call lays something before it."""

    def __init__(self, rng, horizon):
        self.rng = rng
        mood = (DAY, DUSK, NIGHT)[rng.choice(3, p=(0.88, 0.08, 0.04))]
        top, self.foot, cloud, self.sun, self.light = (self.vary(color, 0.03) for color in mood)
        self.sun_x = rng.uniform(0.1, 0.9) * W
        far = np.hypot(X - self.sun_x, Y - horizon * rng.uniform(0.2, 0.6))[..., None]
        sky = top + times(np.clip(Y / horizon, 0, 1), self.foot - top)
        disc = np.float32(far < rng.integers(9, 14))
        sky += (self.sun - sky) * (np.exp(far / -40) * 0.6 + disc * 0.4)
        cover = noise(rng, 6, 3, 4)[..., None] - np.float32(rng.uniform(-0.1, 0.8))
        sky += (cloud - sky) * np.clip(cover, 0, 0.9)
        self.image = Image.fromarray(np.uint8(np.clip(sky, 0, 1) * 255))
        self.draw = ImageDraw.Draw(self.image)

    def vary(self, color, amount=0.06):
        """Return the color, a little lighter or darker and of another hue, by chance."""
        jitter = self.rng.normal(1, amount) * self.rng.normal(1, amount / 2, 3)
        return np.float32(color) * np.float32(jitter)

    def lit(self, color, haze=0.0):
        """Return the color (..., 3) in this scene's light, behind so much haze: 0 none, 1 all."""
        color = np.float32(color) * self.light
        return np.uint8(np.clip(color + (self.foot - color) * haze, 0, 1) * 255)

    def lay(self, where, color, texture=0.0, haze=0.0):
        """Paint the pixels where (H, W) is true; texture (H, W) makes them lighter or darker."""
        top = where.any(1).argmax()  # nothing to do above it
        texture = np.broadcast_to(np.float32(1 + texture), (H, W))[top:]
        paint = self.lit(times(texture, self.vary(color)), haze)
        self.image.paste(Image.fromarray(paint), (0, top), Image.fromarray(where[top:]))

    def land(self, y, height, color, haze=0.0):
        """Lay rolling land from about y (pixels from the top) down; return its edge, (W,)."""
        edge = y + height * noise(self.rng, 1, 2, 3)[0]
        self.lay(Y > edge, color, noise(self.rng, 60, 40, 2) * 0.14, haze)
        return edge

    def peaks(self, y, height, haze):
        """Lay bare ridges with snow on top, lit from the left."""
        corners = 5, 11, 23, 47
        edges = (np.interp(X[0], np.linspace(0, W, n), self.rng.uniform(-1, 1, n)) for n in corners)
        edge = y + sum(e * height * 2.6 / n**0.8 for e, n in zip(edges, corners, strict=True))
        rock = noise(self.rng, 4, 9, 4) * 34 + edge
        facets = np.clip((rock - np.roll(rock, -4, 1)) / 20, -0.36, 0.36)
        self.lay(Y > edge, ROCK, facets, haze)
        snow = (Y > edge) & (Y < y - height * 0.2 + noise(self.rng, 6, 20, 2) * 12)
        self.lay(snow, WHITE, facets * 0.4, haze * 0.5)

    def trees(self, line, count, size, pine, haze=0.0, spread=4):
        """Draw cones or round crowns, rooted at the line (W,) or up to spread pixels below it."""
        shapes, draw = (CONE, self.draw.polygon) if pine else (CROWN, self.draw.ellipse)
        bark = tuple(self.lit((0.3, 0.2, 0.1), haze))
        columns = self.rng.integers(0, W, count)
        for y, x in sorted((line[x] + self.rng.uniform(0, spread), x) for x in columns):
            s, tone = size * self.rng.uniform(0.7, 1.2), self.vary(PINE if pine else LEAF)
            self.draw.line((x, y, x, y - s / 2), bark, 3)
            inks = self.lit(np.outer([shape[0] for shape in shapes], tone), haze)
            for ink, (_, *xy) in zip(inks, shapes, strict=True):
                draw([o + s * d for o, d in zip((x, y) * 3, xy, strict=False)], tuple(ink))

    def water(self, y, mirror):
        """Lay rippled water from y down, which mirrors (0 to 1) what lies above it."""
        near = np.clip((Y - y) / (H - y), 0, 1)
        ripple = np.sin(88 * np.sqrt(near) + 5 * noise(self.rng, 24, 5, 2)) * (0.3 + near)
        above = np.clip(2 * y - Y + ripple * 3, 0, y - 1).astype(int)
        sea = np.float32(self.lit(times(1 - 0.2 * near + 0.14 * ripple, self.vary(SEA))))
        sea += (np.asarray(self.image)[above, X[0].astype(int)] - sea) * mirror
        glint = np.exp(-abs(X - self.sun_x) / 16) * np.clip(ripple + 0.2, 0, 1)
        sea += (self.sun * 255 - sea) * np.clip(glint, 0, 0.8)[..., None]
        paint = Image.fromarray(np.uint8(np.clip(sea, 0, 255)))
        self.image.paste(paint, mask=Image.fromarray(Y > y))

    def houses(self, foot, tall, haze):
        """Draw a row of houses with window grids, standing on foot (pixels from the top)."""
        lamps = (255, 224, 120) if self.light.mean() < 0.75 else self.lit((0.34, 0.34, 0.40), haze)
        for x in self.rng.permutation(np.linspace(-10, W - 20, 12)):
            wide, roof = self.rng.integers(24, 44), foot - tall * self.rng.uniform(0.5, 1.2)
            wall = self.vary(WALLS[self.rng.integers(3)])
            front, shade = map(tuple, self.lit((wall, wall * 0.7), haze))
            self.draw.rectangle((x, roof, x + wide, foot), shade)
            self.draw.rectangle((x, roof, x + wide * 0.8, foot), front)
            for v in np.arange(roof + 6, foot - 8, 12):
                for u in np.arange(x + 4, x + wide * 0.8 - 5, 8):
                    ink = tuple(lamps) if self.rng.random() < 0.75 else shade
                    self.draw.rectangle((u, v, u + 4, v + 6), ink)


def draw_landscape(kind, rng):
    """Return a picture of a kind of KINDS, 160x120 RGB, drawn from a numpy.random.Generator."""
    y, pine = H * rng.uniform(0.42, 0.6), rng.random() < 0.5
    scene, flat, near = Scene(rng, y), np.full(W, y), np.clip((Y - y) / (H - y), 0, 1)
    if kind == 'city':
        quay = H * rng.uniform(0.72, 0.84)
        for row, haze in enumerate((0.6, 0.3, 0)):
            scene.houses(quay, H * (0.54 - 0.12 * row), haze)
        scene.trees(np.full(W, quay), 9, 24, False)
        scene.water(quay + 3, 0.35)
    elif kind == 'road':
        scene.land(y - 14, 14, PINE, 0.4)
        scene.trees(scene.land(y, 3, GRASS), 22, 24, pine, 0.15)
        bend = rng.normal(0, 50) * (1 - near) ** 2
        side = (X - W * rng.uniform(0.35, 0.65) - bend) / (4 + W * 0.4 * near)  # edges at -1 and 1
        scene.lay((Y > y) & (abs(side) < 1), (0.46, 0.46, 0.5), noise(rng, 80, 80) * 0.1)
        dash = (abs(side) < 0.04) & (np.sin(9 / (near + 0.12)) > 0)
        scene.lay((Y > y) & (dash | (abs(abs(side) - 0.88) < 0.04)), WHITE)
    elif kind == 'mountain':
        scene.peaks(y - 30, 44, 0.4)
        scene.peaks(y, 34, 0.1)
        scene.trees(scene.land(y + 50, 10, PINE, 0.1), 40, 26, True, 0.1)
        scene.trees(scene.land(H - 36, 8, GRASS), 9, 44, True, spread=30)
    elif kind == 'lake':
        scene.peaks(y - 36, 30, 0.4)
        scene.trees(scene.land(y - 10, 8, PINE, 0.2), 40, 22, True, 0.15, spread=10)
        scene.water(y, 0.3)
        scene.trees(scene.land(H - 8, 12, GRASS), 6, 70, pine)
    elif kind == 'ocean':
        scene.water(y, 0.1)
        x, mast = W * rng.uniform(0.2, 0.8), rng.uniform(16, 36)
        sail = (x, y + 4, x + mast * 0.35, y - mast, x + mast * 0.8, y + 6)
        scene.draw.polygon(sail, tuple(scene.lit(WHITE)))
        shore = H * rng.uniform(0.8, 0.92) + 9 * noise(rng, 1, 3, 2)[0]
        scene.lay(Y > shore - 5 + 3 * noise(rng, 8, 30), WHITE)
        scene.lay(Y > shore + 3, SAND, noise(rng, 80, 80) * 0.08)
    elif kind == 'field':
        scene.land(y - 14, 12, LEAF, 0.4)
        scene.trees(flat, 22, 20, False, 0.2)
        rows = np.sin((X - W * rng.uniform(0.2, 0.8)) / (6 + Y - y) * 24) * np.sqrt(near)
        scene.lay(Y > y, WHEAT, rows * 0.16 + noise(rng, 50, 70) * 0.08)
        scene.trees(flat + 12, 2, 60, False, spread=30)
    else:  # a forest
        for row, haze in enumerate((0.5, 0.38, 0.25, 0.12, 0)):
            edge = scene.land(y * 0.7 + 24 * row, 6, PINE if pine else LEAF, haze)
            scene.trees(edge, 40 - 5 * row, 40 + 12 * row, pine, haze, spread=20)
        scene.land(H - 18, 5, GRASS)
    return scene.image.resize((W // 2, H // 2), Image.Resampling.BOX)


def is_empty(folder):
    """Return whether there is nothing at the path, or a folder without files."""
    return not folder.exists() or folder.is_dir() and not any(folder.iterdir())


def draw_landscapes(folder='data/demo', per_kind=40, seed=0):
    """Draw per_kind pictures of each kind into folder/kind/kind_001.jpg and so on.

    A folder that has files is left as it is. The pictures appear all at once: whether the drawing
    is interrupted, or drawn twice at the same time, there is never a part of them in the folder.

    Returns the number of pictures in the folder. Raises OSError if it cannot be written.
    """
    folder = Path(folder).resolve()  # a link stays a link: its target is filled
    if is_empty(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.tmp', dir=folder.parent) as tmp:
            whole = Path(tmp, 'whole')
            for index, kind in enumerate(KINDS):
                (whole / kind).mkdir(parents=True)
                for number in range(1, per_kind + 1):
                    picture = draw_landscape(kind, np.random.default_rng((seed, index, number)))
                    picture.save(whole / kind / f'{kind}_{number:03}.jpg', quality=90)
            try:
                os.replace(whole, folder)
            except OSError:
                if is_empty(folder):
                    raise
                # otherwise another process was first, and its pictures stay
    return len(list(folder.rglob('*.jpg')))


def main(argv=None):
    cli.print_any_name()
    parser = cli.ArgumentParser('demo_landscapes.py', __doc__)
    add = parser.add_argument
    add('folder', nargs='?', default='data/demo', help='where the pictures go')
    add('--per_kind', type=cli.positive_int, default=40, help='pictures of each of seven kinds')
    add('--seed', type=cli.nonnegative_int, default=0, help='another seed draws other pictures')
    args = parser.parse_args(argv)
    Stop()  # a signal now removes the temporary folder
    try:
        already = '' if is_empty(Path(args.folder)) else 'already '
        number = draw_landscapes(args.folder, args.per_kind, args.seed)
        if not number:
            raise cli.UsageError(f'{args.folder} has no pictures and is not empty: name another')
        print(f'{number:,} pictures {already}in {args.folder}')
    except (OSError, cli.UsageError) as error:
        return cli.exit_code(error, 'demo_landscapes.py')
    return 0


if __name__ == '__main__':
    sys.exit(main())
