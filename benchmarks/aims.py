"""What was aimed at on a CPU, and why kept runs fall short where they do: written down here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Aim(NamedTuple):
    """The ratios that the rows of some groups should reach: how many times as long as ours each peer takes."""

    groups: str  # a pattern of whole group names
    floors: Mapping[str, float]  # of each peer


# the first that fits a row counts
AIMS = (
    Aim(r"guidance \w+ 8x10", {"eager closed form": 15, "eager autograd": 50, "torch.compile": 5}),
    Aim(r"guidance \w+ 64x21843", {"eager closed form": 12, "eager autograd": 20, "torch.compile": 4}),
    Aim(r"guidance js \d+x1000", {"eager closed form": 12, "eager autograd": 25, "torch.compile": 4}),
    Aim(
        r"guidance (reverse|forward)_kl (64|256)x1000",
        {"eager closed form": 15, "eager autograd": 25, "torch.compile": 6, "torch.softmax": 1},
    ),
    Aim(r"guidance (reverse|forward)_kl \d+x1000", {"eager closed form": 15, "eager autograd": 25, "torch.compile": 6}),
    Aim(r"guided_step 64x1x16x16, noise given, out=", {"eager": 40, "torch.compile": 8}),
    Aim(r"guided_step 64x1x16x16, noise drawn, out=", {"eager": 10}),
    Aim(r"guided_step 16x3x128x128, noise given, out=", {"eager": 12, "torch.compile": 3.5}),
    Aim(r"guided_step 16x3x128x128, noise drawn, out=", {"eager": 5}),
    Aim(r"smooth_ece 1000", {"relplot": 100}),
    Aim(r"smooth_ece 50000", {"relplot": 45}),
    Aim(r"smooth_ece 1000000", {"relplot": 180}),
    # at most 1.2 times as long as the guidance, which takes as many exponentials and writes a gradient, too
    Aim(r"top_label \d+x\d+", {"guidance": 1 / 1.2}),
)


def floor_of(group: str, peer: str) -> float | None:
    """The least that the ratio should be; None where nothing was aimed at."""
    return next((aim.floors.get(peer) for aim in AIMS if re.fullmatch(aim.groups, group)), None)


class Cause(NamedTuple):
    """Why rows fall short of what was aimed at."""

    groups: str  # a pattern of whole group names
    peers: str  # and of peers
    name: str
    text: str


_CALL = (
    "cost of a call",
    "for 16,384 pixels the kernel alone takes 6.5 µs, near the 20 cycles for 16 pixels that its instructions need, and "
    "Python, checks and a result some 3 µs more; PyTorch's own calls cost less on this machine, relative to ours, than "
    "on the one that the aim comes from. Arguments are read in C++, where the tensors are plain ones: 18 µs before.",
)
_DRAWN = (
    "cost of noise",
    "a normal takes 1 ns. Its polynomials may use no fused multiply-add, so that every backend draws the same bits, "
    "and this processor splits 512-bit operations in two.",
)
_HALVES = (
    "512 bits in two",
    "this processor splits 512-bit operations in two and so multiplies and adds 16 floats a cycle, half as many as the "
    "aim supposes. For 16 classes, loading takes 2.2 cycles, exponentials 9.5 and the gradient 3.5; the instructions "
    "alone would need 2, 7.5 and 2. What is done once a row, logarithms in double above all, takes 75 ns more, though "
    "the next row is loaded meanwhile. Tried without a gain: Estrin's scheme, clamping in place of masks, vectors of "
    "256 bits, stores past the caches, a table of 16 powers of two, their exponents by integers, several vectors side "
    "by side, a row loaded among the exponentials of the one before.",
)
_BANDWIDTH = (
    "bandwidth",
    "ours moves as many bytes a second as a copy does here, or more; the compiled loop is nearer to that, too, than on "
    "the machine that the aim comes from.",
)
_RELPLOT = (
    "relplot's own time",
    "it is quicker here than on the machine that the aim comes from, and varies by a fifth from run to run.",
)
_GRADIENT = (
    "cost of autograd",
    "a bare `autograd.Function` with its backward takes 30 µs here, more than the value of a thousand samples; the ops "
    "by themselves keep to the aim.",
)

# the first that fits a row counts
CAUSES = (
    Cause(r"guidance \w+ 8x10", ".*", *_CALL),
    Cause(r"guidance \w+ \d+x\d+", ".*", *_HALVES),
    Cause(r"guided_step 64x1x16x16, noise drawn, .*", ".*", *_DRAWN),
    Cause(r"guided_step 64x1x16x16, .*", ".*", *_CALL),
    Cause(r"guided_step 16x3x128x128, .*", "torch.compile", *_BANDWIDTH),
    Cause(r"smooth_ece \d+", "relplot", *_RELPLOT),
    Cause(r"smooth_ece \d+, value", "with its gradient", *_GRADIENT),
)


def cause_of(group: str, peer: str) -> Cause | None:
    """Why a row falls short; None where nobody has written it down."""
    fits = (cause for cause in CAUSES if re.fullmatch(cause.groups, group) and re.fullmatch(cause.peers, peer))
    return next(fits, None)
