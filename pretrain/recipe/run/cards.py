"""Graphics cards: memory, peak and compute capability; what is known about how fast each one trains.

Peaks are those of the makers' data sheets for dense products of 16-bit matrices with float32 sums, without
sparsity. On GeForce cards such products run at half the speed that is advertised, which is that with 16-bit
sums.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from recipe.hardware import BF16_CAPABILITY
from recipe.project import Refused, nearest

# An assumption. The published 98 hours of `mistral-300m` on an RTX 4090 (10.7e9 tokens, a
# vocabulary of 50,000) are 38 %.
ASSUMED_MFU = 0.4


class Card(NamedTuple):
    """A card.

    gigabytes: memory in GiB, as nvidia-smi reports it. flops: peak FLOP/s. capability: CUDA compute
    capability. measured: FLOP/s of a whole training of this project, 0 where there was none. where: that
    training.
    """

    name: str
    gigabytes: float
    flops: float
    capability: tuple[int, int]
    measured: float = 0.0
    where: str = ""

    @property
    def bf16(self) -> bool:
        """Whether it has bf16 units."""
        return self.capability >= BF16_CAPABILITY

    def rate(self) -> tuple[float, str]:
        """The expected FLOP/s of a training on one such card, and in words where they come from."""
        if self.measured:
            return self.measured, f"measured, {self.where}"
        return self.flops * ASSUMED_MFU, f"tabulated {self.flops / 1e12:.0f} TFLOP/s x {ASSUMED_MFU:.0%}"


CARDS = {
    # An earlier `tiny` of 4 layers of 256: 71 % of 167 GFLOP/s. Later ones reached 147 and 328 GFLOP/s on
    # other CPUs with bf16 units, and 86 without.
    "cpu": Card(
        "CPU, 2 cores", 8, 167e9, (0, 0), 0.71 * 167e9, "an earlier `tiny` on 2 cores of a server CPU"
    ),
    "t4": Card("T4", 15, 65e12, (7, 5)),
    "v100": Card("V100", 16, 125e12, (7, 0)),
    "rtx3060": Card("RTX 3060", 12, 25e12, (8, 6)),
    "rtx3090": Card("RTX 3090", 24, 71e12, (8, 6)),
    "rtx4060": Card("RTX 4060", 8, 30e12, (8, 9)),
    "rtx4070": Card("RTX 4070", 12, 58e12, (8, 9)),
    "rtx4080": Card("RTX 4080", 16, 97e12, (8, 9)),
    "rtx4090": Card("RTX 4090", 24, 165e12, (8, 9)),
    "rtx5090": Card("RTX 5090", 32, 209e12, (12, 0)),
    "l4": Card("L4", 22.5, 121e12, (8, 9)),
    "a10": Card("A10", 22.5, 125e12, (8, 6)),
    "rtxa6000": Card("RTX A6000", 48, 155e12, (8, 6)),
    "l40s": Card("L40S", 48, 362e12, (8, 9)),
    "a100-40gb": Card("A100", 40, 312e12, (8, 0)),
    "a100-80gb": Card("A100", 80, 312e12, (8, 0)),
    "h100": Card("H100 SXM", 80, 989e12, (9, 0)),
    # 173,000 tokens/s with blocks of 1,024: 1.6 hours for 1e9 tokens (README.md).
    "h200": Card("H200", 140, 989e12, (9, 0), 341e12, "`mistral-300m` on an H200"),
}


def card(name: str) -> Card:
    """The card that a user names, such as ``rtx4090``, ``RTX 4090`` or ``a100-40gb``. Raises Refused."""
    key = name.lower().replace(" ", "")
    if key not in CARDS:
        raise Refused(
            f"--gpu {name}: not in the table of cards.{nearest(key, CARDS)} Known: {', '.join(CARDS)}"
        )
    return CARDS[key]


def seen_card(name: str, gigabytes: float) -> Card | None:
    """The entry for a GPU that nvidia-smi calls `name`, the one with the nearest memory; None if unknown.

    Every word of the entry's name must be a word of `name`, and a variant of another name (``RTX 4070 Ti``,
    ``Laptop``, ``H100 NVL``) is another card.
    """
    words = set(re.split(r"[\s-]+", name.lower()))
    if words & {"ti", "super", "laptop", "max", "mobile", "nvl", "mig"} or {"h100", "pcie"} <= words:
        return None
    known = [one for one in CARDS.values() if set(one.name.lower().replace(" sxm", "").split()) <= words]
    return min(known, key=lambda one: abs(one.gigabytes - gigabytes), default=None)
