"""The only source of randomness: every draw of the project is a pure function of (seed, purpose, index).

Nothing carries hidden random state from one step to the next, so a resumed run needs no stored state, an
evaluation cannot disturb training, and two arms of a comparison see the same images, t and eps.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """The 32-bit seed of the stream (seed, purpose, index).

    torch's CPU engine (mt19937) reads only the low 32 bits of a seed. Hashing every index into 32 bits would give
    two of 50,000 steps the same stream in one run out of four (birthday bound). So only (seed, purpose) is hashed,
    and the index goes through a bijection of 32 bits (MurmurHash3's finaliser): two indices below 2^32 of one
    purpose never share a stream.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    h = (int.from_bytes(digest, "little") + index) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def generator(seed: int, purpose: str, index: int = 0, device="cpu") -> torch.Generator:
    """A fresh torch.Generator for the stream (seed, purpose, index)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, index))


def seed_global(seed: int, purpose: str, index: int = 0, device="cpu") -> None:
    """Seed torch's global generator, for the two draws that accept no generator: nn.init and dropout masks.

    Not torch.manual_seed: that formats a stack trace for a CUDA context that may never come, at every step.
    """
    torch.default_generator.manual_seed(derive_seed(seed, purpose, index))
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(derive_seed(seed, purpose, index))
