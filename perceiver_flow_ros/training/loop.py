# SPDX-License-Identifier: Apache-2.0
"""Training of the lite variant on synthetic pairs; the same code on CPU and GPU."""
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
import json
import math
import os
from pathlib import Path
import time

from perceiver_flow_ros.model.evidence import length, TOKEN
from perceiver_flow_ros.model.lite import LiteConfig, LitePerceiver, MATCHED
from perceiver_flow_ros.training.synthesis import make_pairs, Motion
from perceiver_flow_ros.training.textures import Textures
import torch
from torch import distributed, Tensor
from torch.nn import functional as F


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
    choice: float = 0.2         # weight of the choice between candidates in the loss
    only_choice: bool = False   # train that alone, all else as it is
    motion: Motion = Motion()
    autocast: bool = False      # bfloat16, where the device is faster with it
    seed: int = 0


def sequence_loss(flows: list[Tensor], truth: Tensor, power: float) -> Tensor:
    """Sum over levels of mean |error|^power, in pixels of each level.

    Every level's target is the true flow averaged over its pixels, of those where it is known
    (not NaN); finer levels weigh more.
    """
    total = truth.new_zeros(())
    known = torch.isfinite(truth[:, :1])
    truth, known = torch.where(known, truth, 0), known.to(truth.dtype)
    for k, flow in enumerate(reversed(flows)):
        h, w = flow.shape[-2:]
        scale = truth.new_tensor([w / truth.shape[-1], h / truth.shape[-2]]).view(1, 2, 1, 1)
        weight = F.interpolate(known, (h, w), mode='area')
        target = F.interpolate(truth, (h, w), mode='area') / weight.clamp(min=1e-6) * scale
        squared = (flow.float() - target).square().sum(1, keepdim=True)
        total = total + 0.75 ** k * ((squared + 1e-4).pow(power / 2) * weight).mean()
    return total


def choice_loss(choices: list[tuple[Tensor, Tensor]], truth: Tensor) -> Tensor:
    """Cross entropy of choosing the candidates that are nearest to the true flow.

    ``choices``: flows (K, B, 2, h, w), pixels of their level, and logits (K, B, 1, h, w); tokens
    where more is at stake weigh more.
    """
    total = truth.new_zeros(())
    known = torch.isfinite(truth[:, :1])
    truth, known = torch.where(known, truth, 0), known.to(truth.dtype)
    for flows, logits in choices:
        h, w = flows.shape[-2:]
        weight = F.interpolate(known, (h, w), mode='area')
        target = F.interpolate(truth, (h, w), mode='area') / weight.clamp(min=1e-6)
        target = target * (TOKEN * w / truth.shape[-1])
        error = length(flows - target)
        stake = (error.amax(0) - error.amin(0)).clamp(max=10)
        entropy = -((-error).softmax(0) * logits.float().log_softmax(0)).sum(0)
        total = total + (stake * entropy * (weight > 0.5)).mean()
    return total / max(1, len(choices))


def learning_rate(recipe: Recipe, seen: int) -> float:
    """Linear warm-up, a plateau, a cosine to zero."""
    progress = (seen / recipe.pairs - recipe.decay_from) / (1 - recipe.decay_from)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return recipe.learning_rate * min(1.0, (seen + 1) / recipe.warmup) * cosine


@torch.no_grad()
def evaluate(network: LitePerceiver, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> dict:
    """Mean end-point error on held-out pairs, in all and by motion: (px) <2, 2-8, 8-20, >20."""
    errors, sizes = [], []
    for previous, current, truth in pairs:
        flow = network(previous, current)[-1]
        errors.append(torch.hypot(*(flow - truth).unbind(1)).flatten())
        sizes.append(torch.hypot(*truth.unbind(1)).flatten())
    error, size = torch.cat(errors), torch.cat(sizes)
    result = {'epe': error.mean().item()}
    for low, high in ((0, 2), (2, 8), (8, 20), (20, 1e9)):
        chosen = error[(size >= low) & (size < high)]
        if len(chosen):
            result[f'epe_{low}'] = chosen.mean().item()
    return result


def start_workers(device: str) -> None:
    """Join the other workers when torchrun started this process; a CPU worker is one thread.

    One thread each, since on a machine that does other things two threads wait for each other at
    every operation, two workers only once a step.
    """
    if 'WORLD_SIZE' in os.environ and not distributed.is_initialized():
        distributed.init_process_group('gloo' if device == 'cpu' else 'nccl')
        if device == 'cpu':
            torch.set_num_threads(1)


def average_gradients(network: torch.nn.Module, workers: int) -> None:
    """Mean of every gradient over the workers, in one message."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for g, mean in zip(gradients, (flat / workers).split([g.numel() for g in gradients])):
        g.copy_(mean.view_as(g))


class Trainer:
    """Training state that can be saved, resumed and run in pieces.

    Where ``torch.distributed`` is initialised (torchrun), each worker makes its own batches and
    the gradients are averaged; the first one evaluates, saves and logs.

    Parameters
    ----------
    folder : where ``state.pt`` (weights, optimiser, progress) and ``log.jsonl`` live.
    textures, held_out : what pairs are made of; the second is only for evaluation.
    """

    def __init__(self, folder: Path, recipe: Recipe, textures: Textures, held_out: Textures,
                 config: LiteConfig | None = None, start: LitePerceiver | None = None):
        self.folder, self.recipe, self.textures = Path(folder), recipe, textures
        self.device = textures.device
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.network = LitePerceiver(config or LiteConfig()) if start is None else start
        self.network.requires_grad_(not recipe.only_choice).train()
        self.network.choice.requires_grad_()
        self.network.to(  # type: ignore[call-overload]  # (its stub lacks the format)
            self.device, memory_format=torch.channels_last)
        self.averaged = deepcopy(self.network).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad], recipe.learning_rate,
            weight_decay=1e-4)
        self.seen, self.seconds, self.best = 0, 0.0, math.inf
        self.rank, self.workers = 0, 1
        if distributed.is_initialized():
            self.rank, self.workers = distributed.get_rank(), distributed.get_world_size()
        self.held_out = held_out

    @cached_property
    def validation(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """48 pairs of textures that are never trained on, always the same."""
        torch.manual_seed(12345)
        motion = replace(self.recipe.motion, both_ways=False)
        return [make_pairs(4, 192, 256, self.held_out, motion) for _ in range(12)]

    @property
    def state_file(self) -> Path:
        """Where the state is saved."""
        return self.folder / 'state.pt'

    def save(self) -> None:
        """Write the state atomically: a crash leaves the last one."""
        temporary = self.state_file.with_suffix('.tmp')
        torch.save({'network': self.network.state_dict(), 'averaged': self.averaged.state_dict(),
                    'optimiser': self.optimiser.state_dict(), 'seen': self.seen,
                    'seconds': self.seconds, 'best': self.best,
                    'config': asdict(self.network.config)}, temporary)
        temporary.replace(self.state_file)

    def resume(self) -> bool:
        """Continue from ``state.pt`` if there is one."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        if state['config'] != asdict(self.network.config):
            raise ValueError(f'{self.state_file} holds another network: {state["config"]}; '
                             f'choose another folder or remove it')
        self.network.load_state_dict(state['network'])
        self.averaged.load_state_dict(state['averaged'])
        try:
            self.optimiser.load_state_dict(state['optimiser'])
        except ValueError:
            raise ValueError(f'{self.state_file} holds the optimiser of other parameters: go on '
                             'with or without --only-choice as it was begun, or choose another '
                             'folder') from None
        self.seen, self.seconds, self.best = state['seen'], state['seconds'], state['best']
        return True

    def step(self) -> float:
        """One batch, one update; returns the loss."""
        r = self.recipe
        # Resuming repeats no batch; every worker has batches of its own.
        torch.manual_seed((r.seed * 1_000_003 + self.seen) * 64 + self.rank)
        stretch = float(torch.empty(1).uniform_(-0.3, 0.3).exp())
        height = max(64, round(r.height * stretch / 16) * 16)
        width = max(64, round(r.width / stretch / 16) * 16)
        previous, current, truth = make_pairs(r.batch, height, width, self.textures, r.motion)
        for group in self.optimiser.param_groups:
            group['lr'] = learning_rate(r, self.seen)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=r.autocast):
            choices: list[tuple[Tensor, Tensor]] = []
            flows = self.network(previous, current, MATCHED if r.only_choice else 0, choices)
            loss = r.choice * choice_loss(choices, truth)
            if not r.only_choice:
                loss = loss + sequence_loss(flows, truth, r.power)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.workers > 1:
            average_gradients(self.network, self.workers)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        if torch.isfinite(norm):  # a batch that overflows must not spoil the weights
            self.optimiser.step()
        self.seen += r.batch * self.workers
        decay = min(r.average, self.seen / (self.seen + 20 * r.batch * self.workers))
        for mean, new in zip(self.averaged.parameters(), self.network.parameters()):
            mean.lerp_(new, 1 - decay)
        return loss.item()

    def log(self, record: dict) -> None:
        """Append a record to the log."""
        with open(self.folder / 'log.jsonl', 'a') as file:
            file.write(json.dumps({k: round(v, 5) if isinstance(v, float) else v
                                   for k, v in record.items()}) + '\n')

    def run(self, evaluate_every: int = 3_000, seconds: float | None = None,
            on_step: Callable[[int, float], None] = lambda seen, loss: None,
            on_evaluation: Callable[[dict], None] = lambda record: None) -> None:
        """Train until the recipe's pairs are seen, or ``seconds`` are over; state is saved.

        ``on_evaluation`` is called with every logged record, after the state was saved; its
        ``best`` tells whether the averaged weights have never evaluated better.
        """
        begin = last = time.monotonic()
        losses: list[float] = []
        made = self.recipe.batch * self.workers  # pairs a step
        while self.seen < self.recipe.pairs:
            losses.append(self.step())
            on_step(self.seen, losses[-1])
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            over = self.agree(seconds is not None and now - begin > seconds)
            due = self.seen // evaluate_every != (self.seen - made) // evaluate_every
            if (due or over or self.seen >= self.recipe.pairs) and self.rank == 0:
                errors = evaluate(self.averaged, self.validation)
                record = {'pairs': self.seen, 'seconds': self.seconds,
                          'loss': sum(losses) / len(losses),
                          'lr': self.optimiser.param_groups[0]['lr'],
                          'best': errors['epe'] < self.best, **errors}
                self.best = min(self.best, errors['epe'])
                losses = []
                self.save()
                self.log(record)
                on_evaluation(record)
            if over:
                break

    def agree(self, over: bool) -> bool:
        """All workers stop at the same step: when the first one says so."""
        if self.workers == 1:
            return over
        flag = torch.tensor([float(over)], device=self.device)
        distributed.broadcast(flag, 0)
        return bool(flag.item())
