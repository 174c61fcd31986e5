"""Images of any size as tiles and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.codec.tiles import MAX_SIDE, Tiling

SIZE = 8
SIDES = [1, 2, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 3, 5 * SIZE + 1]
KINDS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 3), (3, 3)]


def tiling_of(channels: int, height: int, width: int, num_channels: int, size: int = SIZE) -> Tiling:
    return Tiling(shape=(channels, height, width), num_channels=num_channels, size=size)


def some_image(tiling: Tiling, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, tiling.shape, dtype=torch.uint8, generator=draw)


def assert_comes_back(tiling: Tiling) -> None:
    image = some_image(tiling)
    tiles = tiling.split(image)
    assert tiles.shape == (tiling.num_tiles, tiling.num_channels, tiling.size, tiling.size)
    assert tiles.is_contiguous()
    assert torch.equal(tiling.join(tiles), image)


@pytest.mark.parametrize(("channels", "num_channels"), KINDS)
@pytest.mark.parametrize("height", SIDES)
def test_images_come_back(channels, num_channels, height):
    for width in SIDES:
        assert_comes_back(tiling_of(channels, height, width, num_channels))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 70), st.integers(1, 33))
def test_any_size_comes_back(kind, height, width, size):
    assert_comes_back(tiling_of(kind[0], height, width, kind[1], size))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(1, 20), st.integers(1, 17))
def test_what_is_inside_is_each_pixel_once(kind, height, width, size):
    tiling = tiling_of(kind[0], height, width, kind[1], size)
    image = some_image(tiling)
    assert sum(tiling.inside_bytes(tile) for tile in range(tiling.num_tiles)) == image.numel()
    # Numbers that tell all pixels apart, cut by hand: each is inside of one tile.
    places = torch.arange(image.numel()).view(image.shape)
    tiles, seen = tiling.split(image), []
    for tile in range(tiling.num_tiles):
        plane, within = divmod(tile, tiling.num_tiles // tiling.planes)
        row, column = divmod(within, tiling.rows_and_columns[1])
        channels, rows, columns = tiling.inside(tile)
        assert (channels.start, rows.start, columns.start) == (0, 0, 0)
        group = places[plane : plane + 1] if kind[1] == 1 else places
        part = group[channels, row * size :, column * size :][:, rows, columns]
        seen.append(part.flatten())
        assert part.numel() == tiling.inside_bytes(tile)
        levels = tiles[tile][tiling.inside(tile)].flatten()
        assert torch.equal(levels, image.flatten()[part.flatten()])
    assert torch.equal(torch.cat(seen).sort().values, places.flatten())


def test_tiles_come_row_by_row():
    tiling = tiling_of(1, 2 * SIZE, 3 * SIZE, 1)
    image = torch.arange(6, dtype=torch.uint8).view(2, 3).repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)[None]
    tiles = tiling.split(image)
    assert (tiling.rows_and_columns, tiling.planes, tiling.num_tiles) == ((2, 3), 1, 6)
    assert torch.equal(tiles, torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand_as(tiles))


def test_channels_come_one_after_another():
    tiling = tiling_of(3, SIZE, 2 * SIZE, 1)
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, SIZE, 2 * SIZE)
    assert tiling.split(image)[:, 0, 0, 0].tolist() == [10, 10, 20, 20, 30, 30]
    assert tiling.planes == 3


def test_borders_are_repeated():
    tiling = tiling_of(1, 2, 3, 1, size=4)
    image = torch.tensor([[[1, 2, 3], [4, 5, 250]]], dtype=torch.uint8)
    expected = [[1, 2, 3, 3], [4, 5, 250, 250], [4, 5, 250, 250], [4, 5, 250, 250]]
    assert tiling.split(image)[0, 0].tolist() == expected


def test_grey_images_for_a_model_of_colour():
    tiling = tiling_of(1, SIZE, SIZE + 1, 3)
    image = some_image(tiling)
    tiles = tiling.split(image)
    assert tiles.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(tiles[:, 0], tiles[:, 1])
    assert torch.equal(tiles[:, 0], tiles[:, 2])
    assert tiling.inside_bytes(0) + tiling.inside_bytes(1) == SIZE * (SIZE + 1)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_a_model_of_colour_cannot_take(channels):
    with pytest.raises(ValueError, match=rf"got an image of {channels} channels for a model of 3, expected 3 or 1; "):
        tiling_of(channels, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    "shape",
    [(0, 1, 1), (5, 1, 1), (1, 0, 1), (1, 1, 0), (1, MAX_SIDE + 1, 1), (1, 1, MAX_SIDE + 1), (1, -3, 1), (-1, 1, 1)],
)
def test_shapes_of_no_image(shape):
    for num_channels in (1, 3):
        with pytest.raises(ValueError, match="expected 1 to 4 channels and sides from 1 to 65535"):
            tiling_of(*shape, num_channels)


def test_the_longest_sides():
    for shape in ((1, MAX_SIDE, 1), (1, 1, MAX_SIDE)):
        tiling = Tiling(shape=shape, num_channels=1, size=SIZE)
        assert tiling.num_tiles == 8192
        assert_comes_back(tiling)
