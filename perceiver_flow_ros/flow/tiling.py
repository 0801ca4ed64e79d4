# SPDX-License-Identifier: Apache-2.0
"""Windows of one fixed size over an image of any size, and the seamless mean of what they say."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]       # (height, width)
Corner = tuple[int, int]     # (y, x) of a tile's first pixel


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover `size` pixels, evenly spaced, along one axis.

    Neighbours share at least `overlap` pixels; the last tile ends flush with the image. An image
    no larger than a tile gets the single start 0 (the caller pads it, see `pad`).
    """
    if size < 1 or not 0 <= overlap < tile:
        raise ValueError(f'cannot tile {size} pixels with tiles of {tile} that overlap by '
                         f'{overlap}: need size >= 1 and 0 <= overlap < tile')
    excess = max(size - tile, 0)
    steps = -(-excess // (tile - overlap))                     # ceil
    return [i * excess // steps for i in range(steps)] + [excess] if steps else [0]


def tile_grid(height: int, width: int, tile: Size = (368, 496), overlap: int = 20) -> list[Corner]:
    """Corners (y, x) of the fewest evenly spaced tiles that cover an image, row by row."""
    return [(y, x) for y in tile_starts(height, tile[0], overlap)
            for x in tile_starts(width, tile[1], overlap)]


def pad(image: Tensor, tile: Size) -> Tensor:
    """Repeat the last row and column until a tile fits: (..., H, W, C) -> (..., >=h, >=w, C)."""
    rows = torch.arange(max(image.shape[-3], tile[0]), device=image.device)
    columns = torch.arange(max(image.shape[-2], tile[1]), device=image.device)
    return image[..., rows.clamp(max=image.shape[-3] - 1)[:, None],
                 columns.clamp(max=image.shape[-2] - 1), :]


def cut(image: Tensor, grid: Sequence[Corner], tile: Size) -> Tensor:
    """Tiles of an image that is at least one tile large: (..., H, W, C) -> (T, ..., h, w, C)."""
    return torch.stack([image[..., y:y + tile[0], x:x + tile[1], :] for y, x in grid])


def tile_weight(tile: Size, device: torch.device | str = 'cpu') -> Tensor:
    """Weight of each pixel of a tile: its distance to the tile's border, plus one. (h, w)."""
    def ramp(n: int) -> Tensor:
        i = torch.arange(n, dtype=torch.float32, device=device)
        return torch.minimum(i + 1, n - i)
    return torch.minimum(ramp(tile[0])[:, None], ramp(tile[1]))


def tile_queries(corner: Corner, tile: Size, size: Size, stride: int = 1) -> tuple[range, range]:
    """Rows and columns of a tile, counted in it, on the image's grid [::stride, ::stride].

    None lies outside the image, where a small image was padded. A tile need not start on a
    multiple of the stride: each has its own offset to the grid.
    """
    rows, columns = (range(-start % stride, min(n, total - start), stride)
                     for start, n, total in zip(corner, tile, size))
    return rows, columns


def blend(tiles: Iterable[Tensor], grid: Sequence[Corner], tile: Size, size: Size,
          stride: int = 1) -> Tensor:
    """Weighted mean of overlapping tiles.

    Parameters
    ----------
    tiles : iterable of (len(rows), len(columns), C)
        One value per pixel of `tile_queries` of each corner, in the order of `grid`; consumed one
        by one, so a generator keeps memory small. Whole (h, w, C) tiles when the image is at
        least a tile large and the stride is 1.
    grid, tile, size, stride
        What `tile_grid` returned, the tile's size, the image's size, the grid's stride in pixels.

    Returns
    -------
    (ceil(H / stride), ceil(W / stride), C) of the tiles' dtype
    """
    total: Tensor | None = None                                # of weighted values and weights
    for corner, values in zip(grid, tiles, strict=True):
        rows, columns = tile_queries(corner, tile, size, stride)
        if total is None:
            weight = tile_weight(tile, values.device)[..., None].to(values.dtype)
            total = values.new_zeros(*(-(-n // stride) for n in size), values.shape[-1] + 1)
        y, x = -(-corner[0] // stride), -(-corner[1] // stride)
        share = weight[rows.start:rows.stop:stride, columns.start:columns.stop:stride]
        total[y:y + len(rows), x:x + len(columns)] += share * F.pad(values, (0, 1), value=1.)
    if total is None:
        raise ValueError('nothing to blend: the grid has no tiles')
    return total[..., :-1] / total[..., -1:]
