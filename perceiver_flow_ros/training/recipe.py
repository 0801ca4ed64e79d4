# SPDX-License-Identifier: Apache-2.0
"""What a training run is told, and what of it changes with the pairs seen."""
from dataclasses import dataclass
import math

from perceiver_flow_ros.training.losses import UNSURE
from perceiver_flow_ros.training.synthesis import Motion


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, for how long. The schedule counts pairs, so it survives pauses."""

    pairs: int = 100_000
    batch: int = 6
    height: int = 128           # crops: this area, at one of several aspect ratios
    width: int = 160
    learning_rate: float = 8e-4
    warmup: int = 2_000         # pairs
    decay_from: float = 0.3     # share of the pairs after which the rate falls, as a cosine
    average: float = 0.998      # of the exponential moving average of the weights
    power: float = 0.8          # loss |error|^power: outliers must not rule
    choice: float = 1.0         # weight of the choice between candidates in the loss
    untaught: float = 0.0       # pairs over which cross entropy fades, for a choice from nothing
    keep_choice: bool = False   # leave that as it is and train all else,
    only_choice: bool = False   # or train that alone, all else as it is: a small part of the work,
    repeats: int = 8            # so it learns from so many remembered batches a new one,
    memory: int = 6_000         # of the last so many pairs, and these have
    shrunk: int = 1             # levels less than what they stand for: the finer ones do not count
    reuse: int = 1              # times a pair is learned from on average, later ones mirrored
    motion: Motion = Motion()
    autocast: bool = False      # bfloat16, where the device is faster with it
    seed: int = 0


def learning_rate(recipe: Recipe, seen: int) -> float:
    """Linear warm-up, a plateau, a cosine to zero."""
    progress = (seen / recipe.pairs - recipe.decay_from) / (1 - recipe.decay_from)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return recipe.learning_rate * min(1.0, (seen + 1) / recipe.warmup) * cosine


def unsure(recipe: Recipe, seen: int) -> float:
    """Weight of the cross entropy in the choice's loss: falls from 1 where it begins untaught."""
    return max(UNSURE, 1 - seen / recipe.untaught) if recipe.untaught else UNSURE
