# SPDX-License-Identifier: Apache-2.0
"""Tiles cover every pixel once and no more often than they must, and their seams are invisible."""

from itertools import pairwise

from perceiver_flow_ros.flow.tiling import (
    blend,
    cut,
    pad,
    tile_grid,
    tile_queries,
    tile_starts,
    tile_weight,
)
import pytest
import torch


@pytest.mark.parametrize('tile, overlap', [(368, 20), (496, 20), (96, 16), (7, 3), (4, 0)])
def test_starts_are_fewest_even_and_covering(tile, overlap):
    for size in [*range(1, 40), 367, 368, 369, 496, 497, 720, 1080, 1920, 2160, 3840]:
        starts = tile_starts(size, tile, overlap)
        gaps = [b - a for a, b in pairwise(starts)]
        assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
        assert all(0 < gap <= tile - overlap for gap in gaps)          # no duplicates, no holes
        assert max(gaps, default=0) - min(gaps, default=0) <= 1        # evenly spaced
        fewer = len(starts) - 1                                        # one tile less cannot cover
        assert fewer == 0 or fewer * tile - (fewer - 1) * overlap < size


def test_known_grids():
    assert tile_grid(368, 496) == [(0, 0)]                 # the reference would take four
    assert tile_grid(32, 32) == [(0, 0)]
    assert tile_grid(480, 640) == [(0, 0), (0, 144), (112, 0), (112, 144)]
    assert len(tile_grid(1080, 1920)) == 4 * 4 and len(tile_grid(2160, 3840)) == 7 * 9


def test_bad_arguments():
    with pytest.raises(ValueError, match='overlap < tile'):
        tile_grid(480, 640, tile=(16, 16), overlap=16)
    with pytest.raises(ValueError, match='size >= 1'):
        tile_grid(0, 640)
    with pytest.raises(ValueError, match='nothing to blend'):
        blend([], [], (4, 4), (4, 4))


def test_weight_is_distance_to_border_plus_one():
    weight = tile_weight((5, 8))
    assert weight[0, 0] == weight[4, 7] == weight[2, 0] == 1
    assert weight[2, 3] == weight[2, 4] == 3 and weight[1, 4] == 2


@pytest.mark.parametrize('size', [(20, 30), (37, 53), (9, 70), (5, 6), (1, 1)])
@pytest.mark.parametrize('stride', [1, 2, 4, 8])
def test_known_field_comes_back_without_seams(size, stride):
    """Tiles that agree give the field itself, at every pixel of the strided grid."""
    tile, overlap = (16, 24), 5
    field = torch.randn(*size, 2, generator=torch.Generator().manual_seed(0))
    grid = tile_grid(*size, tile, overlap)
    pieces = cut(pad(field, tile), grid, tile)
    queries = [tile_queries(corner, tile, size, stride) for corner in grid]
    tiles = (piece[rows.start:rows.stop:stride, columns.start:columns.stop:stride]
             for piece, (rows, columns) in zip(pieces, queries))
    torch.testing.assert_close(blend(tiles, grid, tile, size, stride), field[::stride, ::stride])


def test_disagreeing_tiles_change_over_smoothly():
    """Two tiles that say 0 and 1 meet in a ramp without a jump larger than its even share."""
    tile, overlap, size = (32, 32), 16, (32, 48)
    grid = tile_grid(*size, tile, overlap)
    tiles = [torch.full((*tile, 1), float(i)) for i in range(len(grid))]
    row = blend(tiles, grid, tile, size)[16, :, 0]
    assert row[0] == 0 and row[-1] == 1 and (row.diff() >= 0).all()
    assert row.diff().max() < 1.2 / overlap


def test_pad_repeats_the_border_and_leaves_large_images_alone():
    image = torch.arange(6.).view(2, 3, 1)
    padded = pad(image, (4, 5))
    assert padded.shape == (4, 5, 1) and (padded[1:, 2:] == 5).all()
    assert torch.equal(pad(padded, (2, 2)), padded)
