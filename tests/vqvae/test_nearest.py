"""The search for the nearest code: exact, and the same in every batch."""

import pytest
import torch

from vqvae.quantizers import nearest


@pytest.mark.parametrize(("num", "num_codes", "dim"), [(300, 50, 8), (5000, 1024, 64), (7, 1, 3), (0, 4, 2)])
def test_nearest_is_the_float64_brute_force(num, num_codes, dim):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(num, dim, generator=generator)
    codebook = torch.randn(num_codes, dim, generator=generator)
    want = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(nearest(vectors, codebook), want)


def test_nearest_gives_ties_to_the_lowest_index():
    codebook = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), codebook).tolist() == [
        1,
        1,
        0,
    ]


def test_nearest_of_a_collapsed_codebook_is_its_first_code():
    codebook = torch.ones(512, 8)
    assert (nearest(torch.randn(5000, 8), codebook) == 0).all()


def test_near_ties_do_not_depend_on_the_batch():
    """Codes a few units in the last place apart: any float32 product alone would waver between them."""
    torch.manual_seed(0)
    base = torch.randn(32, 64)
    codebook = torch.cat([base * (1 + k * 1e-7) for k in range(4)])
    vectors = base.repeat(40, 1) + 1e-4 * torch.randn(1280, 64)
    together = nearest(vectors, codebook)
    alone = torch.cat([nearest(vector[None], codebook) for vector in vectors])
    assert torch.equal(together, alone)
    want = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(together, want)
