"""Images of any size as units and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.codec.units import MAX_SIDE, Cut

SIZE = 8
SIDES = [1, 2, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 3, 5 * SIZE + 1]
KINDS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 3), (3, 3)]


def cut_of(channels: int, height: int, width: int, num_channels: int, size: int = SIZE) -> Cut:
    return Cut(shape=(channels, height, width), num_channels=num_channels, size=size)


def some_image(cut: Cut, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, cut.shape, dtype=torch.uint8, generator=draw)


def assert_comes_back(cut: Cut) -> None:
    image = some_image(cut)
    units = cut.split(image)
    assert units.shape == (cut.num_units, cut.num_channels, cut.size, cut.size)
    assert units.is_contiguous()
    assert torch.equal(cut.join(units), image)


@pytest.mark.parametrize(("channels", "num_channels"), KINDS)
@pytest.mark.parametrize("height", SIDES)
def test_images_come_back(channels, num_channels, height):
    for width in SIDES:
        assert_comes_back(cut_of(channels, height, width, num_channels))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 70), st.integers(1, 33))
def test_any_size_comes_back(kind, height, width, size):
    assert_comes_back(cut_of(kind[0], height, width, kind[1], size))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(1, 20), st.integers(1, 17))
def test_what_is_inside_is_each_pixel_once(kind, height, width, size):
    cut = cut_of(kind[0], height, width, kind[1], size)
    image = some_image(cut)
    assert sum(cut.inside_bytes(unit) for unit in range(cut.num_units)) == image.numel()
    # Numbers that tell all pixels apart, cut by hand: each is inside of one unit.
    places = torch.arange(image.numel()).view(image.shape)
    units, seen = cut.split(image), []
    for unit in range(cut.num_units):
        plane, tile = divmod(unit, cut.num_units // cut.planes)
        row, column = divmod(tile, cut.tiles[1])
        channels, rows, columns = cut.inside(unit)
        assert (channels.start, rows.start, columns.start) == (0, 0, 0)
        group = places[plane : plane + 1] if kind[1] == 1 else places
        part = group[channels, row * size :, column * size :][:, rows, columns]
        seen.append(part.flatten())
        assert part.numel() == cut.inside_bytes(unit)
        levels = units[unit][cut.inside(unit)].flatten()
        assert torch.equal(levels, image.flatten()[part.flatten()])
    assert torch.equal(torch.cat(seen).sort().values, places.flatten())


def test_units_come_row_by_row():
    cut = cut_of(1, 2 * SIZE, 3 * SIZE, 1)
    image = torch.arange(6, dtype=torch.uint8).view(2, 3).repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)[None]
    units = cut.split(image)
    assert (cut.tiles, cut.planes, cut.num_units) == ((2, 3), 1, 6)
    assert torch.equal(units, torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand_as(units))


def test_channels_come_one_after_another():
    cut = cut_of(3, SIZE, 2 * SIZE, 1)
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, SIZE, 2 * SIZE)
    assert cut.split(image)[:, 0, 0, 0].tolist() == [10, 10, 20, 20, 30, 30]
    assert cut.planes == 3


def test_borders_are_repeated():
    cut = cut_of(1, 2, 3, 1, size=4)
    image = torch.tensor([[[1, 2, 3], [4, 5, 250]]], dtype=torch.uint8)
    expected = [[1, 2, 3, 3], [4, 5, 250, 250], [4, 5, 250, 250], [4, 5, 250, 250]]
    assert cut.split(image)[0, 0].tolist() == expected


def test_grey_images_for_a_model_of_colour():
    cut = cut_of(1, SIZE, SIZE + 1, 3)
    image = some_image(cut)
    units = cut.split(image)
    assert units.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(units[:, 0], units[:, 1])
    assert torch.equal(units[:, 0], units[:, 2])
    assert cut.inside_bytes(0) + cut.inside_bytes(1) == SIZE * (SIZE + 1)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_a_model_of_colour_cannot_take(channels):
    with pytest.raises(ValueError, match=rf"got an image of {channels} channels for a model of 3, expected 3 or 1; "):
        cut_of(channels, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    "shape",
    [(0, 1, 1), (5, 1, 1), (1, 0, 1), (1, 1, 0), (1, MAX_SIDE + 1, 1), (1, 1, MAX_SIDE + 1), (1, -3, 1), (-1, 1, 1)],
)
def test_shapes_of_no_image(shape):
    for num_channels in (1, 3):
        with pytest.raises(ValueError, match="expected 1 to 4 channels and sides from 1 to 65535"):
            cut_of(*shape, num_channels)


def test_the_longest_sides():
    for shape in ((1, MAX_SIDE, 1), (1, 1, MAX_SIDE)):
        cut = Cut(shape=shape, num_channels=1, size=SIZE)
        assert cut.num_units == 8192
        assert_comes_back(cut)
