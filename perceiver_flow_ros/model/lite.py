# SPDX-License-Identifier: Apache-2.0
"""The lite variant: a small Perceiver IO that estimates flow coarse to fine.

One network serves every pyramid level, at 1/4 of the level's resolution. Its preprocessor gathers
what can be measured: the best match of every token's surroundings (a local cost volume, as in
PWC-Net, https://arxiv.org/abs/1709.02371, here of the pixels themselves), then the least-squares
motion of Lucas and Kanade. Convolutional tokens of that evidence are read by latents (encode),
which process the global motion, and every token queries them (decode, with query residual) for
what is still missing. A convex combination of neighbours takes the result from the tokens to
pixels (as in RAFT, https://arxiv.org/abs/2003.12039, section 3.3). At one level the estimate so
far is first put beside what was found over the whole frame (`choice`); after the finest ones flow
spreads up to the edges of what moves (`propagation`).
"""
from dataclasses import dataclass
from functools import cache
import math

from perceiver_flow_ros.model.choice import Choice, find_candidates, Options, renewed
from perceiver_flow_ros.model.evidence import (
    centres,
    local_contrast,
    lucas_kanade,
    match,
    median,
    TOKEN,
    warp_by_tokens,
    window_mean,
)
from perceiver_flow_ros.model.perceiver import Decoder, Encoder, Layer
from perceiver_flow_ros.model.propagation import propagated
from perceiver_flow_ros.model.pyramid import (
    convex_upsample,
    matching_level,
    normaliser,
    pyramid_sizes,
    resize_flow,
    shrink,
)
import torch
from torch import nn, Tensor
from torch.nn import functional as F

PASSES = 2  # at each level but the last, which costs most: what is wrong there is lost after it
MATCHED = 2     # the level at which matches are looked for everywhere
EDGES = 1       # the coarsest level, but the last, whose flow spreads up to the edges


@dataclass(frozen=True)
class LiteConfig:
    """Sizes of the lite network; stored beside its weights."""

    feature_channels: int = 32
    joint_channels: int = 80
    radius: int = 3             # of the cost volume, pixels of the level
    bands: int = 12             # Fourier bands per axis
    token_channels: int = 96
    latents: int = 64
    latent_channels: int = 160
    layers: int = 2
    heads: int = 8
    head_channels: int = 64
    smallest: int = 20          # pixels: the pyramid ends before its shorter side falls below


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size, but for its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU: to the plain one this network lost whole layers."""
    return F.leaky_relu(x, 0.1)


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.conv2(activate(self.conv1(x)))


class Features(nn.Module):
    """What both frames look like around a token, 2 x (B, 3, h, w) -> (B, 2 C, h/4, w/4)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv(6, channels, stride=2)
        self.conv2 = conv(channels, 2 * channels, stride=2)

    def forward(self, previous: Tensor, warped: Tensor) -> Tensor:  # noqa: D102
        both = torch.cat([previous, warped - previous], 1)
        return activate(self.conv2(activate(self.conv1(both))))


def fourier_features(h: int, w: int, bands: int, device: torch.device) -> Tensor:
    """Position of every token in its level, (h*w, 2 + 4 bands): y, x, sines and cosines.

    Positions run over [-1, 1] whatever the size, so that any image can be read.
    """
    rows, columns = (waves(n, bands, device).split((1, bands, bands), 1) for n in (h, w))
    parts = [part for row, column in zip(rows, columns)
             for part in (row[:, None].expand(-1, w, -1), column[None].expand(h, -1, -1))]
    return torch.cat(parts, 2).flatten(0, 1)


@cache      # (a CUDA graph goes on reading it)
def waves(n: int, bands: int, device: torch.device) -> Tensor:
    """Position of ``n`` tokens in a line, its sines and its cosines, (n, 1 + 2 bands)."""
    place = centres(n, device)[:, None]
    angle = math.pi * place * torch.linspace(1, bands, bands, device=device)
    return torch.cat([place, angle.sin(), angle.cos()], 1)


def bilinear_logits() -> Tensor:
    """Logits (9, 16) with which `convex_upsample` interpolates bilinearly."""
    offset = (torch.arange(TOKEN) + 0.5) / TOKEN - 0.5
    line = (1 - (offset - torch.arange(-1, 2)[:, None]).abs()).clamp(min=0.02)  # (3, 4)
    return torch.einsum('ai,bj->abij', line, line).flatten(2).flatten(0, 1).log()


class LitePerceiver(nn.Module):
    """Perceiver IO for residual flow at one pyramid level, and the walk over the levels."""

    def __init__(self, config: LiteConfig = LiteConfig()):
        super().__init__()
        self.config = c = config
        self.features = Features(c.feature_channels)
        evidence = (2 * c.radius + 1) ** 2 + 3 + 8 + 2 + 2
        self.joint = conv(2 * c.feature_channels + evidence, c.joint_channels, kernel=1)
        self.mix = Residual(c.joint_channels)
        self.project = nn.Linear(c.joint_channels + 2 + 4 * c.bands, c.token_channels)
        self.latents = nn.Parameter(torch.randn(c.latents, c.latent_channels) * 0.02)
        self.encoder = Encoder(
            Layer(c.latent_channels, c.token_channels, qk_channels=c.token_channels,
                  v_channels=c.token_channels, heads=c.heads // 2),
            [Layer(c.latent_channels, qk_channels=c.latent_channels,
                   v_channels=c.latent_channels, heads=c.heads) for _ in range(c.layers)])
        self.decoder = Decoder(
            Layer(c.token_channels, c.latent_channels, qk_channels=c.token_channels,
                  v_channels=c.token_channels, heads=c.heads // 2), nn.Identity())
        self.answer = nn.Linear(c.token_channels, c.joint_channels)
        self.norm = nn.LayerNorm(c.joint_channels)
        self.head = conv(c.joint_channels, c.head_channels)
        self.flow = conv(c.head_channels, 4)
        self.mask = conv(c.head_channels, 9 * TOKEN * TOKEN, kernel=1)
        self.choice = Choice()
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
                nn.init.zeros_(module.bias)
        for last in (self.flow, self.mask):  # begin as what the evidence says
            nn.init.zeros_(last.weight)
        assert self.flow.bias is not None and self.mask.bias is not None
        self.flow.bias.data[2:] = 2.
        self.mask.bias.data = bilinear_logits().flatten()

    def residual(self, previous: Tensor, contrast: Tensor, current: Tensor, before: Tensor,
                 chosen: bool = False) -> Tensor:
        """Flow (B, 2, h, w) at one level improved by one pass of the network.

        ``previous``, ``current``: normalised frames (B, 3, h, w) of the level, h and w multiples
        of 4; ``contrast``: the previous one's local contrast; ``before``: the estimate so far, of
        the tokens (B, 2, h/4, w/4), pixels of the level, ``chosen`` between candidates or not.
        """
        # Preprocess: what matching says, then what the gradients say, then what they leave open.
        batch, _, h, w = previous.shape
        coarse, cost = self.measure(contrast, current, before, chosen)
        warped = warp_by_tokens(current, coarse)
        gradient = lucas_kanade(contrast, local_contrast(warped))
        detail = coarse - window_mean(coarse, 5)
        x = torch.cat([self.features(previous, warped), cost, gradient,
                       (coarse - before).clamp(-8, 8) / 2, detail.clamp(-8, 8) / 2], 1)
        x = self.mix(activate(self.joint(x)))
        size = h // TOKEN, w // TOKEN
        position = fourier_features(*size, self.config.bands, x.device).to(x.dtype)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.project(torch.cat([tokens, position.expand(batch, -1, -1)], -1))
        # Encode and process: latents read all tokens. Decode: every token asks the latents.
        latents = self.encoder(self.latents.expand(batch, -1, -1), tokens)
        decoded = self.answer(self.decoder(tokens, latents))
        x = x + decoded.transpose(1, 2).unflatten(2, size)
        # Postprocess: residual at the tokens, trust in the gradients, and the way to the pixels.
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = activate(self.head(x))
        answer = self.flow(hidden)
        near, wide = answer[:, 2:].sigmoid().split(1, 1)
        residual = answer[:, :2].addcmul(near, gradient[:, 0:2]).addcmul(wide, gradient[:, 2:4])
        return convex_upsample(coarse.add(residual, alpha=0.5), self.mask(hidden))

    @torch.no_grad()
    def measure(self, contrast: Tensor, current: Tensor, before: Tensor,
                chosen: bool) -> tuple[Tensor, Tensor]:
        """Flow at the tokens after matching and Lucas-Kanade, and the costs of matching.

        ``contrast``: of the previous frame, (B, 3, h, w); ``chosen``: whether the estimate so far
        was chosen between candidates.
        """
        first, second = (x.mean(1, keepdim=True) for x in (contrast, current))
        warped = local_contrast(warp_by_tokens(second, before))
        coarse, cost = match(first, warped, before, self.config.radius)
        if not chosen:          # (a small object that goes far is no outlier)
            coarse = median(coarse)
        gradient = lucas_kanade(contrast, local_contrast(warp_by_tokens(current, coarse)))
        return median(coarse + (gradient[:, 0:2] + gradient[:, 2:4]) / 2), cost

    def forward(self, previous: Tensor, current: Tensor, finest: int = 0,
                choices: list[Options] | None = None, matched: int = MATCHED) -> list[Tensor]:
        """Coarse-to-fine flow from ``previous`` to ``current``.

        Parameters
        ----------
        previous, current : (B, 3, H, W) float, 0..1, RGB; H and W multiples of 4.
        finest : level to stop at, or the last; level k has 1/2^k of the resolution.
        choices : a list that is given what `Choice` weighed, to train it.
        matched : level whose tokens are looked for everywhere (of large images, a coarser one).

        Returns
        -------
        Flow of every level visited, coarsest first: (B, 2, h_k, w_k), pixels of that level; but
        in training, the last one follows the edges (`propagated`).
        """
        sizes = pyramid_sizes(previous.shape[-2], previous.shape[-1], self.config.smallest)
        normalise = normaliser(previous, current)
        frames = [(previous, current)]
        for size in sizes[1:]:  # each level from the last
            frames.append((shrink(frames[-1][0], size), shrink(frames[-1][1], size)))
        flows: list[Tensor] = []
        flow = previous.new_zeros(len(previous), 2, *sizes[-1])
        last = min(finest, len(sizes) - 1)
        matched = matching_level(sizes, matched)
        for level in range(len(sizes) - 1, last - 1, -1):
            h, w = sizes[level]
            a, b = normalise(*frames[level])    # (late: while it is small)
            contrast = local_contrast(a)
            candidates = find_candidates(a, b) if level == matched else None
            learning = candidates is not None and choices is not None
            for again in range(PASSES if level > last or learning else 1):
                before = F.avg_pool2d(resize_flow(flow.detach(), h, w), TOKEN)
                if candidates is not None:
                    if again:
                        candidates = renewed(candidates, contrast, b, before)
                    options = self.choice(a, contrast, b, before, candidates)
                    before = options.chosen()
                    if choices is not None:
                        choices.append(options)
                flow = self.residual(a, contrast, b, before, chosen=candidates is not None)
            flows.append(flow)
            if last < level <= EDGES:
                flow = propagated(flow, a, b)
        if not self.training:
            flows[-1] = propagated(flow, a, b)
        return flows
