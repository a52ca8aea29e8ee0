"""The simulator itself: it finds planted faults, blames no clean kernel, and computes as a GPU does."""

import ctypes
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = Path(__file__).with_name("faults.cu")
SEEDS = range(8)
FAULTS = {
    "barrier_after_wait": "race",
    "barrier_in_reduction": "race",
    "barrier_before_refill": "race",
    "divergent_barrier": "deadlock",
    "early_return": "deadlock",
    "missing_lanes": "deadlock",
    "partial_mask": "partial mask",
    "syncwarp": "race",
    "syncwarp_after_reads": "race",
    "syncwarp_before_ldmatrix": "race",
    "weak_wait": "cp.async",
    "copy_out_of_bounds": "out of bounds",
    "copy_misaligned": "misaligned",
    "copy_to_misaligned": "misaligned",
    "copy_beyond_shared": "out of bounds",
    "copy_source_changed": "cp.async",
    "shared_out_of_bounds": "out of bounds",
    "read_out_of_bounds": "out of bounds",
    "write_out_of_bounds": "out of bounds",
    "wide_misaligned": "misaligned",
    "double_misaligned": "misaligned",
    "read_before_wait": "too early",
    "write_to_input": "read-only",
    "unwritten_shared": "unwritten",
    "unwritten_scratch": "unwritten",
    "wide_unwritten": "unwritten",
    "race_between_blocks": "race between blocks",
    "read_between_blocks": "race between blocks",
    "fence_before_ticket": "race between blocks",
}
WORDS = {
    "divergent_barrier": "of 64 threads 32 ended, 32 wait in __syncthreads",
    "early_return": "of 64 threads 1 ended, 63 wait in __syncthreads",
    "missing_lanes": "wait in a shuffle",
    "copy_out_of_bounds": "reads 12 bytes, right past the end of 'input' (996 bytes)",
    "copy_beyond_shared": "right past the end of shared memory (1024 bytes)",
    "read_out_of_bounds": "reads 4 bytes, right past the end of 'input' (996 bytes)",
    "write_out_of_bounds": "writes 4 bytes, right past the end of 'output' (4096 bytes)",
    "wide_misaligned": "accesses 16 bytes",
    "double_misaligned": "4 more than a multiple of 8",
    "write_to_input": "of 'input' (996 bytes)",
    "unwritten_shared": "byte 20 of shared memory",
    "unwritten_scratch": "byte 20 of 'scratch' (4096 bytes)",
    "wide_unwritten": "byte 252 of 'scratch' (4096 bytes)",
}


@pytest.fixture(scope="module")
def library():
    if sys.platform != "linux":
        pytest.skip("the simulator needs Linux")
    if shutil.which("g++") is None:
        pytest.skip("the simulator is compiled with g++, and there is none")
    from simt.build import build_checks

    library = ctypes.CDLL(str(build_checks()))
    for name in ("fault_name", "run_fault", "run_mma", "run_ldmatrix", "run_shuffles"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def run_fault(library, name, planted, seed):
    names = [library.fault_name(i).decode() for i in range(library.fault_count())]
    return library.run_fault(names.index(name), planted, ctypes.c_uint64(seed)).decode()


def test_every_fault_is_tested(library):
    assert {library.fault_name(i).decode() for i in range(library.fault_count())} == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(library, name):
    """A fault is found with any order of threads; the report names the kind, the kernel and the line."""
    lines = SOURCE.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.endswith(f"// FAULT {name}"))
    for seed in SEEDS:
        report = run_fault(library, name, True, seed)
        assert re.search(rf"^  {FAULTS[name]}: ", report, re.MULTILINE), report
        assert f"{name}<true>" in report and f"SIMT_SEED={seed}" in report
        assert WORDS.get(name, "") in report
        if shutil.which("addr2line"):
            assert f"tests/simt/faults.cu:{line}" in report, report


@pytest.mark.parametrize("name", FAULTS)
def test_clean_kernel_is_not_blamed(library, name):
    for seed in SEEDS:
        assert run_fault(library, name, False, seed) == ""


# ---- conversions ----------------------------------------------------------------------------------------------------


def address(array):
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def converted(library, function, values, dtype):
    out = np.empty(len(values), dtype)
    getattr(library, function)(address(values), address(out), ctypes.c_int64(len(values)))
    return out


def floats_to_round():
    """Random bit patterns, every 16-bit value, the middles between neighbors, and both neighbors of each middle."""
    words = [np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)]
    halves = np.arange(2**16, dtype=np.uint16)
    for exact in (halves.view(np.float16).astype(np.float32).view(np.uint32), halves.astype(np.uint32) << 16):
        for offset in (0, 1, 0x1000, 0xFFF, 0x1001, 0x8000, 0x7FFF, 0x8001):
            words.append(exact + np.uint32(offset))
    tiny = np.arange(0, 2048) * 2.0**-25  # subnormal values of float16 and the middles between them
    words += [
        (sign * np.nextafter(tiny, side)).astype(np.float32).view(np.uint32) for sign in (1, -1) for side in (0, 1)
    ]
    words += [tiny.astype(np.float32).view(np.uint32)]
    return np.concatenate(words).view(np.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact(library, dtype):
    halves = np.arange(2**16, dtype=np.uint16)
    got = converted(library, f"from_{str(dtype)[6:]}", halves, np.float32)
    want = torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(got, want)  # NaN equals NaN
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(library, dtype):
    values = floats_to_round()
    got = converted(library, f"to_{str(dtype)[6:]}", values, np.uint16)
    want = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], want[~nan])
    assert (got[nan] == 0x7FFF).all()


def test_tf32_rounds_ties_away_from_zero(library):
    values = floats_to_round()
    values = values[np.abs(values) >= 2.0**-126]  # the reference works with whole mantissas
    got = converted(library, "round_tf32", values, np.float32)
    finite = np.isfinite(values)
    mantissa, exponent = np.frexp(values[finite].astype(np.float64))
    want = np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5), exponent - 11)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got[finite], want.astype(np.float32))
    np.testing.assert_array_equal(got[~finite], values[~finite])


# ---- warp collectives --- -------------------------------------------------------------------------------------------
# Layouts follow the PTX manual: g = lane // 4 is the group, t = lane % 4 the thread in it.

LANES = [(lane, lane // 4, lane % 4) for lane in range(32)]


def pack(low, high):
    return int(low) | int(high) << 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_of_16_bits(library, dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
        a, b = a.to(dtype), b.to(dtype)
        bits_a, bits_b = (x.view(torch.int16).numpy().view(np.uint16) for x in (a, b))
        fa, fb, fc = np.empty((32, 4), np.uint32), np.empty((32, 2), np.uint32), np.empty((32, 4), np.float32)
        for lane, g, t in LANES:
            places = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
            fa[lane] = [pack(bits_a[row, column], bits_a[row, column + 1]) for row, column in places]
            fb[lane] = [pack(bits_b[row, g], bits_b[row + 1, g]) for row in (2 * t, 2 * t + 8)]
            fc[lane] = [c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]]
        assert (
            library.run_mma(address(fa), address(fb), address(fc), [torch.bfloat16, torch.float16].index(dtype)) == b""
        )
        check_accumulator(fc, c.double() + a.double() @ b.double())


def test_mma_of_tf32(library):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = (torch.randn(shape, generator=generator).numpy() for shape in ((16, 8), (8, 8), (16, 8)))
        a, b = (converted(library, "round_tf32", x.ravel(), np.float32).reshape(x.shape) for x in (a, b))
        fa, fb, fc = np.empty((32, 4), np.float32), np.empty((32, 2), np.float32), np.empty((32, 4), np.float32)
        for lane, g, t in LANES:
            fa[lane] = [a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]]
            fb[lane] = [b[t, g], b[t + 4, g]]
            fc[lane] = [c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]]
        assert library.run_mma(address(fa), address(fb), address(fc), 2) == b""
        check_accumulator(fc, torch.from_numpy(c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)))


def check_accumulator(fragments, want):
    got = np.empty((16, 8))
    for lane, g, t in LANES:
        got[g, 2 * t : 2 * t + 2], got[g + 8, 2 * t : 2 * t + 2] = fragments[lane, :2], fragments[lane, 2:]
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(library, transposed):
    storage = np.empty(128 + 4, np.uint32)  # 4 more, to find an address that is a multiple of 16
    start = -storage.ctypes.data // 4 % 4
    shared = storage[start : start + 128]
    shared.view(np.uint16)[:] = np.arange(256)
    r = np.empty((32, 4), np.uint32)
    assert library.run_ldmatrix(address(shared), address(r), transposed) == b""
    matrices = shared.view(np.uint16).reshape(4, 8, 8)
    for i, matrix in enumerate(matrices):
        matrix = matrix.T if transposed else matrix
        want = [pack(matrix[g, 2 * t], matrix[g, 2 * t + 1]) for _, g, t in LANES]
        np.testing.assert_array_equal(r[:, i], want)


def test_shuffles(library):
    out = np.empty((4, 32), np.uint32)
    assert library.run_shuffles(address(out)) == b""
    lane = np.arange(32)
    np.testing.assert_array_equal(out[0], 100 + (lane + 5) % 32)
    np.testing.assert_array_equal(out[1], 100 + (lane ^ 3))
    np.testing.assert_array_equal(out[2], 100 + np.where(lane < 30, lane + 2, lane))
    np.testing.assert_array_equal(out[3], np.full(32, 0xAAAAAAAA))
