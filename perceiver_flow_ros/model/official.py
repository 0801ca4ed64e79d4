# SPDX-License-Identifier: Apache-2.0
"""DeepMind's optical-flow Perceiver IO: its configuration and the network, written to be read.

The network of the checkpoint ``deepmind/optical-flow-perceiver`` (41,057,134 parameters): one
token a pixel, read by 2048 latents, which answer one query a pixel. `folded.FoldedNetwork`
computes the same function several times faster; this one is what it is checked against.

Source: https://github.com/google-deepmind/deepmind-research/tree/master/perceiver
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from perceiver_flow_ros.model.perceiver import Decoder, Encoder, Layer
import torch
from torch import nn, Tensor
from torch.nn import functional as F

CONTENT = 64                        # channels of a token that depend on the frames
BANDS = 64                          # Fourier frequencies of an axis
TOKEN = CONTENT + 2 * (1 + 2 * BANDS)       # 322: content and the position on both axes
PATCH = 2 * 3 * 3 * 3               # frames x 3 rows x 3 columns x RGB
PIXELS = 20 / 100                   # last layer -> pixels: it was trained on flow / 20, times 100


@dataclass(frozen=True)
class OfficialConfig:
    """What may differ between checkpoints; names as in transformers' config.json."""

    train_size: tuple[int, int] = (368, 496)
    num_latents: int = 2048
    d_latents: int = 512
    num_self_attends_per_block: int = 24
    num_self_attention_heads: int = 16
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1

    # What this network has built in; a checkpoint that says otherwise is of another network.
    FIXED = {'model_type': 'perceiver', 'num_blocks': 1, 'num_cross_attention_heads': 1,
             'qk_channels': None, 'v_channels': None, 'hidden_act': 'gelu',
             'cross_attention_shape_for_attention': 'kv', 'use_query_residual': True}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OfficialConfig:
        """From the contents of a config.json. ValueError for what this network cannot be."""
        for name, expected in cls.FIXED.items():
            if values.get(name, expected) != expected:
                raise ValueError(f'{name} is {values[name]!r}, expected {expected!r}')
        return cls(**{field.name: values[field.name]
                      for field in fields(cls) if field.name in values})

    def __post_init__(self) -> None:
        """Refuse values that no network can have."""
        size = self.train_size
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(map(positive, size))):
            raise ValueError(f'train_size is {size!r}, expected [height, width]')
        object.__setattr__(self, 'train_size', tuple(size))
        for field in fields(self)[1:]:
            if not positive(getattr(self, field.name)):
                raise ValueError(f'{field.name} is {getattr(self, field.name)!r}, '
                                 'expected a positive integer')
        if self.d_latents % self.num_self_attention_heads:
            raise ValueError(f'd_latents ({self.d_latents}) is not a multiple of '
                             f'num_self_attention_heads ({self.num_self_attention_heads})')


def positive(value: Any) -> bool:
    """Tell whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def patches(frames: Tensor) -> Tensor:
    """Normalise, then give each pixel its 3x3 neighbourhood in both frames.

    ``frames``: (B, 2, H, W, 3) RGB, 0 to 255 -> (B, H, W, 54), values -1 to 1 in the order (frame,
    ky, kx, channel); beyond the border they are 0.
    """
    x = frames.float() / 255 * 2 - 1
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    x = x.unfold(2, 3, 1).unfold(3, 3, 1)                      # (B, 2, H, W, channel, ky, kx)
    return x.permute(0, 2, 3, 1, 5, 6, 4).flatten(3)


def axis_features(size: int) -> Tensor:
    """Fourier features of one axis: (size, 129) = [pos, sin(pi f pos) x64, cos(pi f pos) x64]."""
    position = torch.linspace(-1, 1, size)[:, None]
    frequency = torch.linspace(1, size / 2, BANDS)             # up to Nyquist's
    phase = torch.pi * (position * frequency)
    return torch.cat([position, phase.sin(), phase.cos()], dim=-1)


def axis_channels() -> tuple[Tensor, Tensor]:
    """Channels of a token that hold the `axis_features` of y and of x, (129,) each.

    A token is [content x64, y, x, sin y x64, sin x x64, cos y x64, cos x x64].
    """
    bands = torch.arange(BANDS)
    sines, cosines = CONTENT + 2, CONTENT + 2 + 2 * BANDS
    y, x = (torch.cat([torch.tensor([CONTENT + axis]), sines + axis * BANDS + bands,
                       cosines + axis * BANDS + bands]) for axis in (0, 1))
    return y, x


class Positions(nn.Module):
    """Fourier features of rows (H, 129) and columns (W, 129), and their channels in a token."""

    rows: Tensor
    columns: Tensor
    row_channels: Tensor
    column_channels: Tensor

    def __init__(self, height: int, width: int):
        super().__init__()
        row_channels, column_channels = axis_channels()
        for name, value in (('rows', axis_features(height)), ('row_channels', row_channels),
                            ('columns', axis_features(width)),
                            ('column_channels', column_channels)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, content: Tensor) -> Tensor:
        """Complete the content of all pixels (B, H, W, 64) to tokens (B, H, W, 322)."""
        tokens = content.new_empty(*content.shape[:-1], TOKEN)
        tokens[..., :CONTENT] = content
        tokens[..., self.row_channels] = self.rows[:, None]
        tokens[..., self.column_channels] = self.columns
        return tokens


class OfficialNetwork(nn.Module):
    """Two frames -> dense flow: preprocess, encode, process, decode."""

    def __init__(self, config: OfficialConfig | None = None):
        super().__init__()
        self.config = config = config or OfficialConfig()
        d = config.d_latents
        self.content = nn.Linear(PATCH, CONTENT)
        self.positions = Positions(*config.train_size)
        self.latents = nn.Parameter(torch.randn(config.num_latents, d) * 0.02)
        self.encoder = Encoder(
            Layer(d, TOKEN, qk_channels=TOKEN, v_channels=TOKEN, heads=1,
                  widening=config.cross_attention_widening_factor),
            [Layer(d, qk_channels=d, v_channels=d, heads=config.num_self_attention_heads,
                   widening=config.self_attention_widening_factor)
             for _ in range(config.num_self_attends_per_block)])
        self.decoder = Decoder(
            Layer(TOKEN, d, qk_channels=d, v_channels=d, heads=1, query_residual=False),
            nn.Linear(TOKEN, 2))

    def forward(self, frames: Tensor) -> Tensor:
        """Flow of every pixel.

        Parameters
        ----------
        frames : (B, 2, H, W, 3)
            Previous and current frame, RGB, 0 to 255, of the training size.

        Returns
        -------
        (B, H, W, 2) float32
            Flow from the previous frame to the current one, pixels, (u right, v down).
        """
        tokens = self.positions(self.content(patches(frames)))
        inputs = tokens.flatten(1, 2)
        latents = self.encoder(self.latents.expand(len(frames), -1, -1), inputs)
        flow = PIXELS * self.decoder(inputs, latents)          # a query is the pixel's own token
        return flow.unflatten(1, tokens.shape[1:3])
