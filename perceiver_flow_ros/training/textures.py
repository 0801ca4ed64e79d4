# SPDX-License-Identifier: Apache-2.0
"""Textures to move: photographs from folders or well-kept packages, and procedural noise."""
from copy import copy
from pathlib import Path

import cv2
import numpy as np
from perceiver_flow_ros.model.accelerated import accelerated
import torch
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = {'.jpg', '.jpeg', '.png', '.webp', '.ppm', '.bmp'}
TEST_DATA = 'rubberwhale', 'ambush_', 'aloe'  # in names of pictures that flow is measured on
SMALLEST = 128  # pixels each way, of a photograph
HELD_OUT = 8  # every so many-th photograph is for evaluation only
SIDE = 640  # pixels of the shorter side: downscaling gives a photograph detail at pixel scale


def packaged_photographs() -> list[Path]:
    """Image files that scikit-image and scikit-learn ship, where these are installed."""
    files: list[Path] = []
    for module, folder in (('skimage', 'data'), ('sklearn', 'datasets/images')):
        try:
            root = Path(__import__(module).__path__[0]) / folder
        except ImportError:
            continue
        files += [f for f in sorted(root.rglob('*')) if f.suffix.lower() in SUFFIXES]
    return files


class Textures:
    """A bank of photographs from which patches are cut, none of known test data (`TEST_DATA`).

    Parameters
    ----------
    folders : searched recursively for images of `SMALLEST` pixels and more, beside the packaged
        photographs; ValueError where one has none.
    device : where patches are made.
    """

    def __init__(self, folders: list[Path] | None = None, device: str = 'cpu'):
        self.device = device
        photographs = load(packaged_photographs())
        for folder in folders or []:
            found = [f for f in sorted(Path(folder).rglob('*')) if f.suffix.lower() in SUFFIXES]
            added = load(found)
            if not added:
                raise ValueError(f'no images under {folder}: expected one of {sorted(SUFFIXES)}, '
                                 f'of at least {SMALLEST} pixels each way')
            photographs += added
        # Detailed photographs teach more; the smooth ones stay as the aperture problem does.
        self.weights = torch.tensor([detail for _, detail in photographs])
        # All in one tensor, one after the other: where they begin, and (height, width) of each
        self.sizes = torch.tensor([image.shape[1:] for image, _ in photographs]).view(-1, 2)
        counts = 3 * self.sizes.prod(1)
        self.begins = counts.cumsum(0) - counts
        flat = [torch.from_numpy(image).flatten() for image, _ in photographs]
        self.pixels = torch.cat([torch.empty(0, dtype=torch.uint8), *flat]).to(device)

    def __len__(self) -> int:
        """Count the photographs."""
        return len(self.sizes)

    def split(self, every: int) -> tuple['Textures', 'Textures']:
        """Two banks: all but each ``every``-th photograph, and these, held out."""
        banks = copy(self), copy(self)
        for held_out, bank in enumerate(banks):
            chosen = (torch.arange(len(self)) % every == 0) == bool(held_out)
            bank.weights, bank.sizes, bank.begins = (
                x[chosen] for x in (self.weights, self.sizes, self.begins))
        return banks

    def patches(self, count: int, height: int, width: int, noise: float = 0.2) -> Tensor:
        """(count, 3, height, width) float in 0..1; a share ``noise`` of them procedural."""
        out = torch.empty(count, 3, height, width, device=self.device)
        procedural = torch.rand(count) < (noise if self.weights.any() else 1.1)
        if procedural.any():
            out[put(procedural.nonzero().flatten(), self.device)] = procedural_textures(
                int(procedural.sum()), height, width, self.device)
        cut_out = (~procedural).nonzero().flatten()
        if len(cut_out):
            out[put(cut_out, self.device)] = cut(
                self.pixels, self.crops(len(cut_out), height, width), height, width)
        return out

    def crops(self, count: int, height: int, width: int) -> Tensor:
        """Choose parts of photographs for `cut`, from half to twice a patch in size."""
        which = self.weights.multinomial(count, replacement=True)
        zoom = uniform(-0.9, 0.9, count, 1, device='cpu').exp2()
        size = (zoom * torch.tensor([height, width])).long()
        size = torch.minimum(size, self.sizes[which]).clamp(min=16)
        y, x = (torch.rand(count, 2) * (self.sizes[which] - size + 1)).long().unbind(1)
        rows, columns = self.sizes[which].unbind(1)
        first = self.begins[which] + y * columns + x
        mirrored = torch.rand(count) < 0.5
        return torch.stack([first, columns, rows * columns, *size.unbind(1), mirrored.long()], 1)


def load(files: list[Path]) -> list[tuple[np.ndarray, float]]:
    """Give photographs (3, h, w) uint8 and how much detail each has, 0 where it is not used."""
    photographs = []
    for file in files:
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None or min(image.shape[:2]) < SMALLEST:
            continue
        scale = min(1.0, SIDE / min(image.shape[:2]))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        used = not any(name in file.name.lower() for name in TEST_DATA)
        detail = used * min(40.0, 2 + cv2.Laplacian(grey, cv2.CV_32F).std())
        photographs.append((np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)), detail))
    return photographs


@accelerated
def cut(pixels: Tensor, crops: Tensor, height: int, width: int) -> Tensor:
    """Cut patches (n, 3, height, width) float in 0..1 out of photographs.

    ``pixels``: of all photographs, flat uint8, three planes each; ``crops``: (n, 6) int64, on the
    CPU: the first pixel, how far the next row and the next plane are, rows, columns, mirrored.
    """
    patches = []
    for first, row, plane, h, w, mirrored in crops.tolist():
        patch = pixels.as_strided((1, 3, h, w), (0, plane, row, 1), first).float() / 255
        patch = F.interpolate(patch, (height, width), mode='bilinear',
                              antialias=h > height or w > width)
        patches.append(patch.flip(-1) if mirrored else patch)
    return torch.cat(patches)


def uniform(low: float, high: float, *shape: int, device: torch.device | str) -> Tensor:
    """Uniform random numbers in [low, high)."""
    return torch.empty(*shape, device=device).uniform_(low, high)


def put(values: Tensor | list, device: torch.device | str) -> Tensor:
    """Send a few values to a device, without waiting for what it does."""
    values = values if isinstance(values, Tensor) else torch.tensor(values)
    return values.to(device, non_blocking=True)


def smooth_field(count: int, channels: int, height: int, width: int, cells: int,
                 device: str) -> Tensor:
    """Smooth random field of about unit size, (count, channels, height, width)."""
    noise = torch.randn(count, channels, cells, cells + 1, device=device)
    return F.interpolate(noise, (height, width), mode='bicubic', align_corners=True)


def procedural_textures(count: int, height: int, width: int, device: str = 'cpu',
                        faint: float = 0.25) -> Tensor:
    """Coloured noise over octaves with a random spectrum: some posterised or periodic.

    A share ``faint`` of them has next to no texture.
    """
    total = torch.zeros(count, 3, height, width, device=device)
    slope = uniform(0.4, 1.3, count, 1, 1, 1, device=device)
    cell = 2
    while cell < max(height, width):
        noise = torch.randn(count, 3, height // cell + 2, width // cell + 2, device=device)
        total += F.interpolate(noise, (height, width), mode='bilinear') * cell ** slope
        cell *= 2
    total = (total - total.mean((2, 3), keepdim=True)) / (total.std((2, 3), keepdim=True) + 1e-6)
    kind = torch.rand(count, 1, 1, 1, device=device)
    period = uniform(4, 24, count, 1, 1, 1, device=device)
    angle = torch.rand(count, 1, 1, 1, device=device) * torch.pi
    y = torch.arange(height, device=device).view(1, 1, -1, 1)
    x = torch.arange(width, device=device).view(1, 1, 1, -1)
    stripes = torch.sin((x * angle.cos() + y * angle.sin()) * 2 * torch.pi / period)
    total = torch.where(kind < 0.25, total.div(0.8).round().mul(0.8), total)
    total = torch.where(kind > 0.85, total * 0.4 + stripes, total)
    flat = torch.rand(count, 1, 1, 1, device=device) < faint
    contrast = torch.where(flat, 0.02 * torch.rand(count, 1, 1, 1, device=device), 0.2)
    colour = 0.5 + 0.2 * torch.randn(count, 3, 1, 1, device=device)
    return (torch.where(flat, colour, 0.5) + contrast * total).clamp(0, 1)
