"""Damage a file the way a bad disk, a bad line or a cut-off copy does."""


def damaged(data, rng):
    """Return a damaged copy of `data` (bytes, not empty): bits flipped, bytes cut out, or both.

    `rng` is a random.Random: its state decides the damage. The copy always differs from `data`.
    """
    copy = bytearray(data)
    kind = rng.choice(['flips', 'burst', 'truncation', 'hole'])
    if kind == 'flips':
        # sample, not choices: the same bit flipped twice would be no damage
        for bit in rng.sample(range(8 * len(copy)), min(8 * len(copy), rng.randint(1, 8))):
            copy[bit // 8] ^= 1 << bit % 8
    elif kind == 'burst':
        start = rng.randrange(len(copy))
        for i in range(start, min(len(copy), start + rng.randint(1, 64))):
            copy[i] ^= rng.randint(1, 255)
    elif kind == 'truncation':
        del copy[rng.randrange(len(copy)) :]
    else:
        start = rng.randrange(len(copy))
        del copy[start : start + rng.randint(1, 64)]
    return bytes(copy)
