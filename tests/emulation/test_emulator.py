"""The emulator of CUDA itself: what it promises of barriers, warps, shared memory, launches and schedules."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulation import build

HERE = Path(__file__).parent
SEEDS = range(1, 7)


class Kernels:
    """The kernels of kernels.cpp: `kernels("name", ...)` launches one and raises what went wrong."""

    def __init__(self, library: Path) -> None:
        self.settings = build.Emulator(library)
        self._library = ctypes.CDLL(str(library))
        self._library.last_message.restype = ctypes.c_char_p

    def __call__(self, name, given=None, out=None, grid=(1, 1, 1), block=(32, 1, 1), shared=0):
        pointers = [ctypes.c_void_p(None if array is None else array.ctypes.data) for array in (given, out)]
        error = self._library.run_kernel(name.encode(), (ctypes.c_int * 6)(*grid, *block), shared, *pointers)
        if error:
            raise RuntimeError(self._library.last_message().decode())
        return out


def built(sanitize=False, flags=()):
    return build.link([HERE / "kernels.cpp"], [], "kernels.so", sanitize, flags)


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def library(request):
    return Kernels(built(flags=["-DCALGUIDE_EMULATION_UCONTEXT"] if request.param == "ucontext" else []))


@pytest.fixture
def kernels(library):
    before = {name: library.settings[name] for name in ("seed", "shared_limit")}
    yield library
    for name, value in before.items():
        library.settings[name] = value


def floats(*shape):
    return np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)


def under_seeds(kernels, *arguments, out, **shape):
    """The distinct results of a kernel under several schedules."""
    results = set()
    for seed in SEEDS:
        kernels.settings["seed"] = seed
        results.add(kernels(*arguments, np.full_like(out, -1), **shape).tobytes())
    return results


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("block", [(32, 1, 1), (1024, 1, 1), (8, 4, 2), (96, 2, 1)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (2, 3, 4)])
def test_reductions_of_every_shape(kernels, grid, block, seed):
    kernels.settings["seed"] = seed
    given = floats(np.prod(grid), np.prod(block))
    result = kernels("block_sum_float", given, np.empty(len(given), np.float32), grid, block)
    assert np.array_equal(result, given.sum(1))
    wide = given.astype(np.int64) << 40
    result = kernels("block_sum_int64", wide, np.empty(len(given), np.int64), grid, block)
    assert np.array_equal(result, wide.sum(1))


def test_shuffles_and_votes(kernels):
    for seed in (0, 1, 2):
        kernels.settings["seed"] = seed
        result = kernels("every_shuffle", None, np.empty((32, 8), np.int32))
        lane = np.arange(32)
        threes = sum(1 << i for i in range(0, 32, 3))
        expected = [
            np.full(32, 5),
            lane // 8 * 8 + (lane + 1) % 8,
            np.where(lane + 3 < 32, lane + 3, lane),
            np.where(lane % 16 >= 3, lane - 3, lane),
            lane ^ 9,
            lane ^ 1,
            np.full(32, np.uint32(threes)).view(np.int32) if threes < 2**31 else np.full(32, threes - 2**32),
            np.full(32, 3),
        ]
        assert np.array_equal(result, np.stack(expected, 1))


def test_parts_of_a_warp_meet_by_themselves(kernels):
    assert len(under_seeds(kernels, "halves", None, out=np.empty(32, np.int32))) == 1
    lane = np.arange(32)
    assert np.array_equal(kernels("halves", None, np.empty(32, np.int32)), lane ^ 15)


def test_barriers_hold_under_every_schedule(kernels):
    given = floats(256)
    shape = {"block": (256, 1, 1), "shared": 1024}
    assert under_seeds(kernels, "reverse_rows", given, out=given, **shape) == {(given + 2).tobytes()}


@pytest.mark.parametrize("missing", ["first", "second"])
def test_a_missing_barrier_shows(kernels, missing):
    given = floats(256)
    shape = {"block": (256, 1, 1), "shared": 1024}
    right = (given + 2).tobytes()
    for seed in SEEDS:
        kernels.settings["seed"] = seed
        assert kernels(f"reverse_rows_without_{missing}_barrier", given, given.copy(), **shape).tobytes() != right


def test_lanes_do_not_move_together(kernels):
    given = np.arange(32, dtype=np.float32)
    right = np.roll(given, -1).tobytes()
    assert under_seeds(kernels, "next_lane", given, out=given) == {right}
    assert right not in under_seeds(kernels, "next_lane_without_wait", given, out=given)


def test_schedules_differ_and_repeat(kernels):
    shape = {"grid": (5, 1, 1), "block": (96, 1, 1)}
    out = np.empty(5 * 96, np.int32)
    kernels.settings["seed"] = 0
    assert np.array_equal(kernels("arrival_order", None, out, **shape), np.arange(5 * 96))
    orders = under_seeds(kernels, "arrival_order", None, out=out, **shape)
    assert len(orders) == len(SEEDS)
    for order in orders:
        order = np.frombuffer(order, np.int32)
        assert np.array_equal(np.sort(order), np.arange(5 * 96))
        # one warp after the other, its lanes in an order of their own
        assert all(len(set(warp // 32)) == 1 for warp in order.reshape(15, 32))
        assert any((np.diff(warp) != 1).any() for warp in order.reshape(15, 32))
        assert len(set(order[::96] // 96)) == 5 and (np.diff(order[::32] // 32) != 1).any()
    kernels.settings["launches"] = 0
    again = under_seeds(kernels, "arrival_order", None, out=out, **shape)
    kernels.settings["launches"] = 0
    assert again == under_seeds(kernels, "arrival_order", None, out=out, **shape)


@pytest.mark.parametrize(
    ("name", "threads", "message"),
    [
        ("barrier_for_some", 96, r"block \(0, 0, 0\): deadlock: threads 0-63 at __syncthreads, threads 64-95 exited"),
        (
            "shuffle_for_some",
            32,
            "deadlock: threads 0-2 at a shuffle of lanes 0xffffffff, thread 3 exited, "
            "threads 4-31 at a shuffle of lanes 0xffffffff",
        ),
        ("shuffle_from_nowhere", 40, "thread 3[2-9] shuffles from lane (1[6-9]|2[0-3]), which takes no part"),
        ("shuffle_from_an_outsider", 32, "thread [0-7] shuffles from lane 9, which takes no part"),
        ("mask_without_itself", 32, "thread 31 is not of the lanes 0x7fffffff that it waits for"),
        ("shuffle_meets_vote", 32, r"threads \d+ and \d+ meet in different operations"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deadlocks_and_misuse_are_launch_errors(kernels, name, threads, message, seed):
    kernels.settings["seed"] = seed
    with pytest.raises(RuntimeError, match=f"kernel {name}, .*{message}"):
        kernels(name, block=(threads, 1, 1))
    # and the next launch is as good as any
    given = floats(1, 64)
    assert kernels("block_sum_float", given, np.empty(1, np.float32), block=(64, 1, 1)) == given.sum()


def test_shared_memory_is_fresh_for_every_block(kernels):
    assert np.isnan(kernels("unwritten_shared", None, np.zeros(10, np.float32), (5, 1, 1), (1, 1, 1), 16)).all()


@pytest.mark.parametrize("name", ["write_beyond", "write_before"])
def test_a_write_beyond_shared_memory_is_a_launch_error(kernels, name):
    with pytest.raises(RuntimeError, match="write beyond the ends of a shared array"):
        kernels(name, shared=128)


def test_a_misaligned_vector_is_a_launch_error(kernels):
    memory = np.zeros(64, np.float32)
    given = memory[(-memory.ctypes.data // 4) % 4 :][:8]
    with pytest.raises(RuntimeError, match=r"misaligned access at .*kernels.cpp:\d+, to an address of 4 modulo 16"):
        kernels("misaligned", given, np.zeros(1, np.float32), block=(1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ({"block": (1024, 1, 1)}, None),
        ({"block": (1025, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (32, 33, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (1, 1, 65)}, "cudaErrorInvalidConfiguration"),
        ({"block": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 65535, 1), "block": (1, 1, 1)}, None),
        ({"grid": (1, 65536, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 1, 65536)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (-1, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"shared": 48 << 10}, None),
        ({"shared": (48 << 10) + 1}, "cudaErrorInvalidValue"),
    ],
)
def test_limits_of_a_launch(kernels, shape, error):
    if error is None:
        kernels("nothing", **shape)
    else:
        with pytest.raises(RuntimeError, match=error):
            kernels("nothing", **shape)


def test_large_shared_memory_is_opted_in_to(kernels):
    kernels("opt_in", shared=100 << 10)
    kernels("nothing", shared=100 << 10)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        kernels("nothing", shared=(100 << 10) + 1)
    kernels.settings["shared_limit"] = 64 << 10
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        kernels("opt_in", shared=(64 << 10) + 1)
    with pytest.raises(RuntimeError, match="50176 bytes of shared memory, the limit is 49152"):
        kernels("much_static_shared", shared=48 << 10)


def test_launches_are_counted_and_settings_have_names(kernels):
    before = kernels.settings["launches"]
    kernels("nothing")
    assert kernels.settings["launches"] == before + 1
    with pytest.raises(KeyError, match="sead"):
        kernels.settings["sead"] = 1


SANITIZED = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from emulation.test_emulator import Kernels, built, floats
kernels = Kernels(built(sanitize=True))
def error_of(*arguments, **shape):
    try:
        kernels(*arguments, **shape)
    except RuntimeError as error:
        return str(error)
for kernels.settings["seed"] in (0, 1):
    given = floats(8, 256)
    assert (kernels("block_sum_float", given, np.empty(8, np.float32), (8, 1, 1), (256, 1, 1)) == given.sum(1)).all()
    assert "deadlock" in error_of("barrier_for_some", block=(96, 1, 1))
    reversed_twice = kernels("reverse_rows", given[0], given[1], block=(256, 1, 1), shared=1024)
    assert (reversed_twice == given[0] + 2).all()
print("well so far")
kernels(sys.argv[2], given[0].copy(), np.zeros(1, np.float32), shared=128)
print("not caught")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "not caught"),
        ("write_beyond", "AddressSanitizer: use-after-poison"),
        ("misaligned", "misaligned address"),
        ("arrival_order", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_under_sanitizers(name, message):
    command = [sys.executable, "-c", SANITIZED, str(HERE.parent), name]
    result = subprocess.run(command, capture_output=True, text=True, env=build.sanitizer_environment())
    assert "well so far" in result.stdout, result.stderr
    assert message in result.stdout + result.stderr
    assert (result.returncode == 0) == (name == "nothing")
