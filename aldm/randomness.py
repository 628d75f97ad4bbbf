"""Stateless randomness: every random choice is a function of the run's seed and of where it is made.

Nothing draws from a stream that has to be carried along, so a resumed training makes the choices that it would have
made without the stop, and several workers make the choices that one would have made.
"""

import zlib

import numpy as np
import torch

_UINT64 = 2**64 - 1


def derived_seed(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed that depends on the run's seed and on every key, in their order."""
    entropy = [zlib.crc32(key.encode()) if isinstance(key, str) else key & _UINT64 for key in (seed, *keys)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_generator(seed: int, *keys: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `derived_seed(seed, *keys)`."""
    return torch.Generator().manual_seed(derived_seed(seed, *keys))


def shuffled(length: int, seed: int, epoch: int) -> list[int]:
    """Return 0 .. length - 1 in the order of one epoch."""
    return torch.randperm(length, generator=derived_generator(seed, "epoch", epoch)).tolist()
