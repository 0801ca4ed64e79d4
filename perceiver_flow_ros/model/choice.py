# SPDX-License-Identifier: Apache-2.0
"""Which of several flows a token follows: the estimate so far, a match, a layer's motion.

Every candidate is described by how well it explains the two frames around the token, by how many
matches around agree with it, and by how it differs from the estimate so far. A small network, the
same for all candidates, weighs that with its neighbours.
"""
from typing import NamedTuple

from perceiver_flow_ros.model.accelerated import accelerated
from perceiver_flow_ros.model.evidence import (
    brighter,
    DARKER,
    leaves,
    length,
    local_contrast,
    TOKEN,
    warp_by_tokens,
    window_mean,
)
from perceiver_flow_ros.model.layers import layer_motions
from perceiver_flow_ros.model.matching import distant_matches, filled
import torch
from torch import nn, Tensor
from torch.nn import functional as F

MEASURES = 22           # that `describe` gives
EXPLAINED = 0.7         # of the local contrast: where less is left, a flow explains a token
HIDDEN = 48


class Candidates(NamedTuple):
    """What tokens may follow instead of the estimate so far, in pixels of their level."""

    match: Tensor       # (B, 2, h, w), NaN where there is none
    flows: Tensor       # (K, B, 2, h, w), NaN where there is none: the matches with holes filled,
                        # then layers' motions
    shares: Tensor      # (K, B) of what a layer's motion was sought in: what follows it


class Options(NamedTuple):
    """The estimate so far and the candidates, and what speaks for each."""

    flows: Tensor       # (K, B, 2, h, w) pixels of their level
    measures: Tensor    # (K, B, MEASURES, h, w)
    logits: Tensor      # (K, B, 1, h, w)

    def chosen(self) -> Tensor:
        """Give every token the flow with the highest logit: (B, 2, h, w)."""
        return self.flows.take_along_dim(self.logits.argmax(0, keepdim=True), 0)[0]


@torch.no_grad()
def find_candidates(previous: Tensor, current: Tensor) -> Candidates:
    """Look for motion over the whole of two normalised frames (B, 3, 4h, 4w)."""
    match = distant_matches(previous, current)
    return with_layers(match, filled(match), match)


def with_layers(match: Tensor, whole: Tensor, field: Tensor) -> Candidates:
    """Candidates: matches, these with holes filled, and motions that much of a field follows."""
    motions, shares = layer_motions(field)
    return Candidates(match, torch.cat([whole[None], motions]),
                      torch.cat([torch.zeros_like(shares[:1]), shares]))


@torch.no_grad()
def renewed(candidates: Candidates, contrast: Tensor, current: Tensor,
            flow: Tensor) -> Candidates:
    """Look for layers' motions again, when the flow so far (B, 2, h, w) explains most tokens.

    They are sought in that flow where it explains the frames, in the matches elsewhere: more of
    an object is known now, and more exactly. ``contrast``: the first frame's local contrast,
    ``current``: the second, normalised (B, 3, 4h, 4w).
    """
    first, second = (x.mean(1, keepdim=True) for x in (contrast, current))
    cost = (first - local_contrast(warp_by_tokens(second, flow))).abs_().clamp_(max=1)
    cost, texture = (window_mean(F.avg_pool2d(x, TOKEN), 3) for x in (cost, first.abs()))
    explained = (cost < EXPLAINED * (texture + 0.02)) & ~leaves(flow)
    whole = candidates.flows[0]
    return with_layers(candidates.match, whole, torch.where(explained, flow, whole))


class Choice(nn.Module):
    """A small network that weighs what `describe` says of each candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(MEASURES, HIDDEN, 1)
        self.others = nn.Conv2d(HIDDEN, HIDDEN, 1)
        self.near = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1)
        self.far = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=2, dilation=2)
        self.leave = nn.Conv2d(HIDDEN, 1, 3, padding=1)

    def forward(self, previous: Tensor, contrast: Tensor, current: Tensor, flow: Tensor,
                candidates: Candidates) -> Options:
        """Put the flow so far before the candidates, and tell how much speaks for each.

        ``previous``, ``current``: normalised frames, ``contrast``: the first one's local
        contrast, all (B, 3, 4h, 4w); ``flow``: (B, 2, h, w) pixels.
        """
        others = torch.where(candidates.flows.isnan(), flow, candidates.flows)
        flows = torch.cat([flow[None], others])
        a, c, b = (x.mean(1, keepdim=True) for x in (previous, contrast, current))
        measures = describe(a, c, b, flows, candidates)
        return Options(flows, measures, self.weigh(measures))

    def weigh(self, measures: Tensor) -> Tensor:
        """(K, B, `MEASURES`, h, w) -> (K, B, 1, h, w) logits."""
        k = len(measures)
        x = F.leaky_relu(self.enter(measures.flatten(0, 1)), 0.1)
        best = x.unflatten(0, (k, -1)).amax(0)
        x = F.leaky_relu(x + self.others(best).repeat(k, 1, 1, 1), 0.1)
        x = x + F.leaky_relu(self.near(x), 0.1)
        x = x + F.leaky_relu(self.far(x), 0.1)
        return self.leave(x).unflatten(0, (k, -1))


@accelerated
@torch.no_grad()
def describe(previous: Tensor, contrast: Tensor, current: Tensor, flows: Tensor,
             candidates: Candidates) -> Tensor:
    """Say what speaks for each of K flows, (K, B, `MEASURES`, h/4, w/4).

    ``previous``, ``current``: grey, ``contrast``: the first one's local contrast, (B, 1, h, w);
    ``flows``: (K, B, 2, h/4, w/4) pixels of the level: the estimate so far, then the candidates.
    """
    k, batch = flows.shape[:2]
    match = candidates.match
    shares = torch.cat([torch.zeros_like(candidates.shares[:1]), candidates.shares])
    every = flows.flatten(0, 1)

    def mean(x: Tensor, size: int) -> Tensor:
        return window_mean(x.flatten(0, 1), size).view_as(x)

    warped = warp_by_tokens(current, every)

    def unlike(first: Tensor, second: Tensor, most: float) -> Tensor:
        difference = (first.repeat(k, 1, 1, 1) - second).abs_().clamp_(max=most)
        return F.avg_pool2d(difference, TOKEN).unflatten(0, (k, batch))

    cost = unlike(contrast, local_contrast(warped), 1.)
    texture = F.avg_pool2d(contrast.abs(), TOKEN)[None]
    measures = []
    for size in (1, 3, 7):
        local = mean(cost, size)
        measures.append((local / (mean(texture, size) + 0.02)).clamp(max=2))
        if size == 3:
            measures += [10 * (local - local[:1]).clamp(-0.2, 0.2),
                         (10 * (local - local.amin(0, keepdim=True))).clamp(max=2)]
    measures.append((texture + 0.01).log().expand_as(cost) / 2)
    outside = leaves(every).to(flows.dtype).unflatten(0, (k, batch))
    measures += [outside, mean(outside, 5)]
    known = torch.isfinite(match[:, :1]).to(flows.dtype)[None]
    follows = (length(flows - match.nan_to_num(1e4)) < 2).to(flows.dtype)
    measures += [mean(follows, 3), mean(follows, 9),
                 mean(known, 5).expand_as(cost)]
    measures.append((length(flows - flows[:1]) / 2).log1p() / 2)
    measures.append((length(flows - mean(flows[:1], 7)) / 2).log1p() / 2)
    measures.append((length(flows - mean(flows, 5)) / 2).log1p())
    measures.append(shares.to(flows.dtype).view(k, batch, 1, 1, 1).expand_as(cost))
    kind = torch.zeros_like(cost)
    kind[0], kind[1] = 1, -1
    measures.append(kind)
    # Local contrast mixes both sides of an edge. Brightness does not, but light may change.
    light = brighter(previous, warped[:batch])
    cost = unlike(previous - light, warped, DARKER) / DARKER
    near, wide = mean(cost, 3), mean(cost, 7)
    measures += [cost, near, wide, (4 * (near - near[:1])).clamp(-1, 1)]
    for local in (near, wide):
        measures.append((4 * (local - local.amin(0, keepdim=True))).clamp(max=2))
    return torch.cat(measures, 2)
