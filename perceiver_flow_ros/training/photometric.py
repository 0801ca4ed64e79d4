# SPDX-License-Identifier: Apache-2.0
"""What light, weather and the camera do to two frames: fog, exposure, colour, blur, noise."""
from perceiver_flow_ros.training.textures import smooth_field, uniform
import torch
from torch import Tensor
from torch.nn import functional as F


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (n, 3, h, w), one ``sigma`` (n,) in pixels per image, up to about 2."""
    offsets = torch.arange(-4, 5, device=image.device)
    kernel = torch.exp(-offsets ** 2 / (2 * sigma[:, None] ** 2 + 1e-4))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    n, _, h, w = image.shape
    x = F.pad(image.reshape(1, n * 3, h, w), (4, 4, 4, 4), mode='replicate')
    x = F.conv2d(x, kernel.view(n * 3, 1, 1, 9), groups=n * 3)
    return F.conv2d(x, kernel.view(n * 3, 1, 9, 1), groups=n * 3).view(n, 3, h, w)


def shake(image: Tensor, angle: Tensor, length: Tensor) -> Tensor:
    """Motion blur of (n, 3, h, w): a line of ``length`` pixels (n,), up to 9, in a direction."""
    n, _, h, w = image.shape
    line = torch.arange(-4, 5, device=image.device)
    along = line * angle.cos().view(-1, 1, 1) + line[:, None] * angle.sin().view(-1, 1, 1)
    across = line[:, None] * angle.cos().view(-1, 1, 1) - line * angle.sin().view(-1, 1, 1)
    kernel = (length.view(-1, 1, 1) / 2 + 0.5 - along.abs()).clamp(0, 1) * (
        1 - across.abs()).clamp(min=0)
    kernel = (kernel / kernel.sum((1, 2), keepdim=True)).repeat_interleave(3, 0)[:, None]
    x = F.pad(image.reshape(1, n * 3, h, w), (4, 4, 4, 4), mode='replicate')
    return F.conv2d(x, kernel, groups=n * 3).view(n, 3, h, w)


def fog(both: Tensor) -> Tensor:
    """Hide (2, n, 3, h, w) behind a veil that thickens and thins, and stays where it is."""
    _, n, _, h, w = both.shape
    device = str(both.device)
    dense = 0.7 * torch.rand(n, 1, 1, 1, device=device)
    veil = dense * (0.5 + 0.4 * smooth_field(n, 1, h, w, 3, device)).clamp(0, 1)
    return both * (1 - veil) + uniform(0.4, 1, n, 3, 1, 1, device=device) * veil


def photometric(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Fog, exposure, white balance, gamma, blur, noise: much in common, a little of each one's."""
    n, device = len(first), str(first.device)
    both = torch.stack([first, second])

    def vary(common: float, own: float, channels: int) -> Tensor:
        shared = torch.randn(1, n, channels, 1, 1, device=device) * common
        each = torch.randn(2, n, channels, 1, 1, device=device) * own
        return shared + each * torch.rand(1, n, 1, 1, 1, device=device) ** 3

    if torch.rand(1) < 0.2:         # (of the batches: they cost time)
        both = fog(both)
    if torch.rand(1) < 0.2:
        angle = uniform(0, torch.pi, n, device=device).repeat(2)
        length = 8 * torch.rand(2 * n, device=device) ** 2
        both = shake(both.flatten(0, 1), angle, length).view_as(both)
    grey = (torch.rand(1, n, 1, 1, 1, device=device) < 0.15).float()
    both = both * (1 - grey) + both.mean(2, keepdim=True) * grey
    both = both.clamp(1e-3, 1) ** vary(0.25, 0.12, 1).exp()
    both = both * (vary(0.25, 0.15, 1) + vary(0.08, 0.04, 3)).exp() + vary(0.05, 0.04, 1)
    sigma = 1.4 * torch.rand(n, device=device) ** 2 * (torch.rand(n, device=device) < 0.4)
    both = blur(both.flatten(0, 1), torch.cat([sigma, sigma])).view_as(both)
    noise = 0.04 * torch.rand(1, n, 1, 1, 1, device=device) ** 3
    both = (both + noise * torch.randn_like(both)).clamp(0, 1)
    return both[0], both[1]
