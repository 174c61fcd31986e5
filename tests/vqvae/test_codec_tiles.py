"""Images of any size as tiles and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.codec.tiles import MAX_SIDE, Tiling

SIZE = 8
KINDS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 3), (3, 3)]


def tiling_of(
    channels: int, height: int, width: int, num_channels: int, size: tuple[int, int] = (SIZE, SIZE)
) -> Tiling:
    return Tiling(shape=(channels, height, width), num_channels=num_channels, size=size)


def some_image(tiling: Tiling) -> Tensor:
    return torch.randint(0, 256, tiling.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def assert_comes_back(tiling: Tiling) -> None:
    image = some_image(tiling)
    tiles = tiling.split(image)
    assert tiles.shape == (tiling.num_tiles, tiling.num_channels, *tiling.size)
    assert tiles.is_contiguous()
    assert torch.equal(tiling.join(tiles), image)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(1, 20), st.tuples(*[st.integers(1, 17)] * 2))
def test_what_is_inside_is_each_pixel_once(kind, height, width, size):
    tiling = tiling_of(kind[0], height, width, kind[1], size)
    assert_comes_back(tiling)
    image, seen = some_image(tiling), torch.zeros(tiling.shape, dtype=torch.int64)
    for number, tile in enumerate(tiling.split(image)):
        place = tiling.place(number)
        assert torch.equal(tile[tiling.inside(number)], image[place])
        assert image[place].numel() == tiling.inside_bytes(number)
        seen[place] += 1
    assert (seen == 1).all()


def test_tiles_come_row_by_row_and_channels_one_after_another():
    tiling = tiling_of(2, 2 * SIZE, 3 * SIZE, 1)
    numbers = torch.arange(12, dtype=torch.uint8)
    image = numbers.view(2, 2, 3).repeat_interleave(SIZE, 1).repeat_interleave(SIZE, 2)
    assert (tiling.rows_and_columns, tiling.planes, tiling.num_tiles) == ((2, 3), 2, 12)
    assert torch.equal(tiling.split(image), numbers[:, None, None, None].expand(12, 1, SIZE, SIZE))


def test_borders_are_repeated():
    tiling = tiling_of(1, 2, 3, 1, size=(4, 4))
    image = torch.tensor([[[1, 2, 3], [4, 5, 250]]], dtype=torch.uint8)
    expected = [[1, 2, 3, 3], [4, 5, 250, 250], [4, 5, 250, 250], [4, 5, 250, 250]]
    assert tiling.split(image)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    "shape", [(0, 1, 1), (5, 1, 1), (1, 0, 1), (1, 1, 0), (1, MAX_SIDE + 1, 1), (1, 1, MAX_SIDE + 1), (1, -3, 1)]
)
def test_shapes_of_no_image(shape):
    for num_channels in (1, 3):
        with pytest.raises(ValueError, match="expected 1 to 4 channels and sides from 1 to 65535"):
            tiling_of(*shape, num_channels)
    with pytest.raises(ValueError, match="2 channels for a model of 3, expected 3 or 1"):
        tiling_of(2, SIZE, SIZE, 3)


def test_the_longest_sides():
    for shape in ((1, MAX_SIDE, 1), (1, 1, MAX_SIDE)):
        tiling = Tiling(shape=shape, num_channels=1, size=(SIZE, SIZE))
        assert tiling.num_tiles == 8192
        assert_comes_back(tiling)
