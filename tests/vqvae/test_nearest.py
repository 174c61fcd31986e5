"""The search for the nearest code: exact, and the same in every batch."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from vqvae.quantizers import nearest


def brute_force(vectors: Tensor, codebook: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The first least score in float64; squared, since a square root would make new ties."""
    codebook = codebook.double()
    codes = [vectors.new_empty(0, dtype=torch.int64)]
    for part in vectors.double().split(64):
        pairs = part[:, None] - codebook if offsets is None else part[:, None] * codebook
        scores = pairs.square().sum(2) if offsets is None else offsets.double() - pairs.sum(2)
        codes.append(scores.min(1).indices)
    return torch.cat(codes)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# One code, whole rows (50, 63), blocks (64 on, 1000 no multiple of them), sections (4096 on, 9001 no multiple of them).
SIZES = [(300, 50, 8), (5000, 1024, 64), (7, 1, 3), (0, 4, 2), (1, 63, 5), (200, 64, 1), (500, 1000, 7), (300, 9001, 5)]


def check(vectors: Tensor, codebook: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The codes, which are those of a brute force."""
    codes = nearest(vectors, codebook, offsets)
    assert torch.equal(codes, brute_force(vectors, codebook, offsets))
    return codes


def check_normal(num: int, num_codes: int, dim: int) -> None:
    vectors, codebook = normal(num, dim), normal(num_codes, dim, seed=1)
    check(vectors, codebook)
    for offsets in (torch.zeros(num_codes), 10 * normal(num_codes, seed=2)):
        check(vectors[:1000], codebook, offsets)


@pytest.mark.parametrize(("num", "num_codes", "dim"), SIZES)
def test_nearest_is_the_float64_brute_force(num, num_codes, dim):
    check_normal(num, num_codes, dim)


def test_addmm_finds_what_onednn_finds(monkeypatch):
    """Processors without AVX-512 take the other product."""
    monkeypatch.setattr(sys.modules[nearest.__module__], "_has_onednn", lambda vectors: False)
    check_normal(500, 1000, 7)
    check_normal(300, 9001, 5)


def test_a_lower_matmul_precision_changes_nothing(monkeypatch):
    module, seen = sys.modules[nearest.__module__], []
    scan = module._scan

    def watched(*arguments):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return scan(*arguments)

    monkeypatch.setattr(module, "_scan", watched)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check_normal(1000, 1024, 64)
        assert torch.get_float32_matmul_precision() == "medium"
        assert set(seen) == {"ieee"}  # not every processor has a faster, lower precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), codebook).tolist() == [1, 1, 0]
    assert nearest(torch.tensor([[0.0, 1.0]]), codebook, torch.tensor([0.0, -1.0, -1.0, -1.0])).tolist() == [1]


@pytest.mark.parametrize("num_codes", [40, 200, 5000])
def test_copies_of_a_code_give_their_first(num_codes):
    """The copies lie in one block, in another, and in another section."""
    codebook = normal(num_codes, 4).repeat(2, 1)
    for offsets in (None, codebook.square().sum(1) / 2):
        assert torch.equal(nearest(codebook, codebook, offsets), torch.arange(num_codes).repeat(2))
    less = torch.where(torch.arange(2 * num_codes) < num_codes, 5.0, 5 - 1e-6)
    assert (check(codebook, codebook, less) >= num_codes).all()


def test_an_infinite_offset_forbids_its_code():
    codebook = torch.eye(3)
    vectors = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    assert nearest(vectors, codebook, torch.tensor([torch.inf, 0.0, 0.0])).tolist() == [1, 1]
    assert nearest(vectors, codebook, torch.tensor([torch.inf, torch.inf, 1e30])).tolist() == [2, 2]
    wide = normal(300, 3)
    check(wide, wide, torch.where(torch.arange(300) < 200, torch.inf, 0.0))


def test_copies_of_a_code_are_never_compared_pair_by_pair(monkeypatch):
    """512 pairs for every vector would take a hundred times as long."""
    monkeypatch.delattr(sys.modules[nearest.__module__], "_by_differences")
    assert (nearest(normal(5000, 8), torch.ones(512, 8)) == 0).all()


def near_ties(dtype: torch.dtype, spread: float) -> tuple[Tensor, Tensor]:
    """Codes a few units in the last place apart: any product alone would waver between them."""
    base = normal(32, 64, dtype=dtype)
    codebook = torch.cat([base * (1 + k * spread) for k in range(4)])
    return base.repeat(40, 1) + 1e3 * spread * normal(1280, 64, seed=1, dtype=dtype), codebook


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_near_ties_do_not_depend_on_the_batch(dtype, spread):
    vectors, codebook = near_ties(dtype, spread)
    for offsets in (None, codebook.square().sum(1) / 2):
        together = check(vectors, codebook, offsets)
        alone = torch.cat([nearest(vector[None], codebook, offsets) for vector in vectors[:200]])
        assert torch.equal(together[:200], alone)


def test_near_ties_between_sections_are_decided_in_float64():
    vectors, near = near_ties(torch.float32, 1e-7)
    far = 100 + normal(5000, 64, seed=2)
    codebook = torch.cat([part for one in near.split(32) for part in (one, far)])
    want = brute_force(vectors, near)
    assert torch.equal(nearest(vectors, codebook), want // 32 * 5032 + want % 32)


def test_float64_is_compared_in_float64():
    vectors = normal(200, 6, dtype=torch.float64)
    codebook = vectors[:100] + 1e-10 * normal(100, 6, seed=1, dtype=torch.float64)
    codebook = torch.cat([codebook, codebook + 1e-10])  # one code twice in float32
    assert (check(vectors, codebook)[:100] >= 100).any()
    check(vectors.float(), codebook)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype):
    vectors, codebook = normal(400, 16).to(dtype), normal(200, 16, seed=1)
    for table in (codebook, codebook.to(dtype)):
        with torch.autocast("cpu", torch.bfloat16):
            codes = nearest(vectors, table)
        assert torch.equal(codes, brute_force(vectors, table))


@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e15, 1e20, 1e35])
def test_sizes_at_which_float32_scores_overflow_or_vanish(size):
    vectors, codebook = normal(200, 8), normal(100, 8, seed=1)
    check(size * vectors, size * codebook)
    check(size * vectors, codebook)
    check(vectors, size * codebook)
    check(size * vectors, size * codebook, size * normal(100, seed=2))


def test_one_huge_vector_or_code_does_not_disturb_the_others():
    vectors, codebook = normal(200, 8), normal(100, 8, seed=1)
    vectors[7], codebook[9] = 1e30, 1e30
    assert check(vectors, codebook)[7] == 9


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value):
    vectors, codebook, offsets = normal(70, 3), normal(80, 3), torch.zeros(80)
    broken, spoiled = vectors.clone(), codebook.clone()
    broken[5, 1] = spoiled[5, 1] = value
    offsets[0 if value < 0 else slice(None)] = value
    for table in (codebook, codebook.double(), codebook[:40]):
        with pytest.raises(ValueError, match="vectors to quantize hold NaN"):
            nearest(broken, table)
        with pytest.raises(ValueError, match="codebook holds NaN"):
            nearest(vectors, spoiled[: len(table)].to(table))
    with pytest.raises(ValueError, match="offsets hold NaN or −inf, or forbid every code"):
        nearest(vectors, codebook, offsets)


@pytest.mark.parametrize("offsets", [None, torch.zeros(5)])
def test_nearest_is_a_well_formed_operator(offsets):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vqvae.nearest.default, (normal(4, 2), normal(5, 2), offsets), test_utils=checks)


def run(program: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux")
@pytest.mark.slow
def test_memory_is_bounded_for_any_codebook():
    """The scores of all pairs would be 256 MiB, and the pairs of near ties more."""
    program = """
import resource, torch
from vqvae.quantizers import nearest

torch.manual_seed(0)
codebook = torch.randn(16384, 8)
one = torch.ones(16384, 1) * codebook[0]
nearest(torch.randn(64, 8), codebook)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vectors = torch.randn(4096, 8)
for table in (codebook, one, one + 1e-7 * codebook):
    nearest(vectors, table)
# No vector of size one tells these codes apart: all pairs, of many vectors and of wide ones.
nearest(vectors[:700], one.double())
nearest(torch.randn(50, 64), torch.ones(16384, 64).double())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""
    assert int(run(program)) < 128 * 1024


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's interpreter")
@pytest.mark.slow
def test_the_cuda_kernel_in_triton_s_interpreter():
    """Rows, codes and widths that are no multiples of a tile; near ties and overflow by way of float64."""
    program = """
import sys, torch
import test_nearest as tests
from vqvae.quantizers.nearest_search_cuda import scan

module = sys.modules[tests.nearest.__module__]
on_cpu, calls = module._scan, []

def on_cuda(vectors, table):
    if vectors.dtype == torch.float64:
        return on_cpu(vectors, table)
    calls.append(len(vectors))
    return scan(vectors, table.weight, table.bias)

module._scan = on_cuda
for size in ((0, 5, 3), (1, 1, 1), (1, 300, 7), (130, 300, 70), (70, 128, 513), (65, 1000, 32)):
    tests.check_normal(*size)
tests.check(1e25 * tests.normal(65, 32), 1e25 * tests.normal(300, 32))
tests.check(*tests.near_ties(torch.float32, 1e-7))
print(len(calls))
"""
    folders = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    assert run(program, TRITON_INTERPRET="1", PYTHONPATH=folders).strip() == "20"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cuda_finds_what_the_cpu_finds(dtype):
    for num, num_codes, dim in (*SIZES, (1000, 700, 513)):
        vectors, codebook = normal(num, dim).to(dtype), normal(num_codes, dim, seed=1).to(dtype)
        for offsets in (None, normal(num_codes, seed=2)):
            got = nearest(vectors.cuda(), codebook.cuda(), None if offsets is None else offsets.cuda())
            assert torch.equal(got.cpu(), nearest(vectors, codebook, offsets))
