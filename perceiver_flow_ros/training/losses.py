# SPDX-License-Identifier: Apache-2.0
"""What training makes small: errors of the flow at every level, and wrong choices."""
from perceiver_flow_ros.model.choice import Options
from perceiver_flow_ros.model.evidence import length
import torch
from torch import Tensor
from torch.nn import functional as F

UNSURE = 0.02   # share of the cross entropy in the loss of a choice that has learned something


def sequence_loss(flows: list[Tensor], truth: Tensor, power: float) -> Tensor:
    """Sum over levels of mean |error|^power, in pixels of each level.

    Every level's target is the true flow averaged over its pixels, of those where it is known
    (not NaN); finer levels weigh more.
    """
    total = truth.new_zeros(())
    for k, flow in enumerate(reversed(flows)):
        target, weight = averaged_flow(truth, flow.shape[-2:])
        squared = (flow.float() - target).square().sum(1, keepdim=True)
        total = total + 0.75 ** k * ((squared + 1e-4).pow(power / 2) * weight).mean()
    return total


def averaged_flow(truth: Tensor, size: torch.Size, scale: float = 1.) -> tuple[Tensor, Tensor]:
    """Mean of a flow (B, 2, H, W) over the pixels of a smaller grid where it is known (not NaN).

    In units of which ``scale`` make a cell of that grid; and what share of each cell is known.
    """
    h, w = size
    known = torch.isfinite(truth[:, :1])
    share = F.interpolate(known.to(truth.dtype), (h, w), mode='area')
    mean = F.interpolate(torch.where(known, truth, 0), (h, w), mode='area') / share.clamp(min=1e-6)
    u, v = mean.split(1, 1)     # (no tensor from the host: CUDA graphs)
    x, y = scale * w / truth.shape[-1], scale * h / truth.shape[-2]
    return torch.cat([u * x, v * y], 1), share


def choice_loss(options: Options, target: Tensor, known: Tensor,
                unsure: float | Tensor = UNSURE) -> Tensor:
    """How much worse than the best candidate what is chosen will be, in pixels of the level.

    ``target``: (B, 2, h, w) of the tokens, in pixels of their level, (B, 1, h, w) where it is
    ``known``. The logits' softmax is taken for the probability of choosing; cross entropy with
    the weight ``unsure``, heavier where more is at stake, keeps it from being sure of what is
    wrong. (The expected error alone has no slope where weights that know nothing are sure.)
    """
    error = length(options.flows - target)
    worse = error - error.amin(0)
    likely = options.logits.float().log_softmax(0)
    expected = (likely.exp() * worse).sum(0)
    entropy = -((-error).softmax(0) * likely).sum(0) * worse.amax(0).clamp(max=10)
    return ((expected + unsure * entropy) * known).mean()
