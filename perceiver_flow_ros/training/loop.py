# SPDX-License-Identifier: Apache-2.0
"""Training of the lite variant on synthetic pairs; the same code on CPU and GPU."""
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property
import io
import json
import math
from pathlib import Path
import time

from perceiver_flow_ros.flow.files import write_whole
from perceiver_flow_ros.flow.replay import Replay
from perceiver_flow_ros.model.choice import Options
from perceiver_flow_ros.model.evidence import TOKEN
from perceiver_flow_ros.model.lite import LiteConfig, LitePerceiver, MATCHED
from perceiver_flow_ros.training.losses import averaged_flow, choice_loss, sequence_loss, UNSURE
from perceiver_flow_ros.training.recipe import learning_rate, Recipe, unsure
from perceiver_flow_ros.training.synthesis import make_pairs
from perceiver_flow_ros.training.textures import Textures
from perceiver_flow_ros.training.workers import average_gradients
import torch
from torch import distributed, Tensor

REUSED = 1_600          # pairs, the last ones, out of which those come that are learned again
Batch = tuple[Tensor, Tensor, Tensor]   # previous, current, flow


@torch.no_grad()
def evaluate(network: LitePerceiver, pairs: list[Batch]) -> dict:
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


def mirrored(batch: Batch) -> Batch:
    """Mirror a batch left to right, top to bottom, both or neither, at random."""
    for axis, component in ((-1, 0), (-2, 1)):
        if torch.rand(()) < 0.5:
            first, second, flow = (x.flip(axis) for x in batch)
            flow[:, component] *= -1
            batch = first, second, flow
    return batch


class Trainer:
    """Training state that can be saved, resumed and run in pieces.

    (But for what `Recipe.reuse` and ``only_choice`` keep of the last pairs, which is made anew.)

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
        self.network.choice.requires_grad_(not recipe.keep_choice)
        self.network.to(  # type: ignore[call-overload]  # (its stub lacks the format)
            self.device, memory_format=torch.channels_last)
        self.averaged = deepcopy(self.network).eval().requires_grad_(False)
        # What a CUDA graph reads lies on the device.
        self.rate, self.decay, self.unsure = torch.tensor([recipe.learning_rate, 0., UNSURE],
                                                          device=self.device)
        cuda = self.rate.is_cuda
        self.optimiser = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad],
            self.rate if cuda else recipe.learning_rate, weight_decay=1e-4, capturable=cuda)
        self.replay = Replay(self.device, shared=True)
        self.inputs: dict[torch.Size, list[Tensor]] = {}
        self.seen, self.seconds, self.best = 0, 0.0, math.inf
        self.rank, self.workers = 0, 1
        if distributed.is_initialized():
            self.rank, self.workers = distributed.get_rank(), distributed.get_world_size()
        self.held_out = held_out
        self.made: deque[Batch] = deque(maxlen=max(1, REUSED // recipe.batch))
        self.memory: deque[list[tuple[Tensor, ...]]] = deque(
            maxlen=max(1, recipe.memory // recipe.batch))

    @cached_property
    def validation(self) -> list[Batch]:
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
        state = io.BytesIO()
        torch.save({'network': self.network.state_dict(), 'averaged': self.averaged.state_dict(),
                    'optimiser': self.optimiser.state_dict(), 'seen': self.seen,
                    'seconds': self.seconds, 'best': self.best,
                    'config': asdict(self.network.config)}, state)
        write_whole(self.state_file, state.getvalue())

    def resume(self) -> bool:
        """Continue from ``state.pt`` if there is one."""
        if not self.state_file.exists():
            return False
        try:
            state = torch.load(self.state_file, map_location=self.device, weights_only=True)
            config = state['config']
        except Exception as error:      # whatever torch.load raises, or it is of something else
            raise ValueError(f'{self.state_file} is no state of a training: {error!r}; choose '
                             'another folder or remove it') from None
        if config != asdict(self.network.config):
            raise ValueError(f'{self.state_file} holds another network: {config}; '
                             f'choose another folder or remove it')
        self.network.load_state_dict(state['network'])
        self.averaged.load_state_dict(state['averaged'])
        try:
            self.optimiser.load_state_dict(state['optimiser'])
        except ValueError:
            raise ValueError(f'{self.state_file} holds the optimiser of other parameters: go on '
                             'with or without --only-choice and --keep-choice as it was begun, '
                             'or choose another folder') from None
        for group in self.optimiser.param_groups:       # of the device that it was saved on
            group['capturable'] = self.rate.is_cuda
        for kept in self.optimiser.state.values():
            kept['step'] = kept['step'].to(self.rate.device if self.rate.is_cuda else 'cpu')
        self.seen, self.seconds, self.best = state['seen'], state['seconds'], state['best']
        return True

    def step(self) -> float:
        """One batch, one update (of the choice alone: several); returns the loss."""
        return self.learn(self.make_batch())()

    def make_batch(self) -> Batch:
        """Make what is learned from next, or mirror what was."""
        r = self.recipe
        # Resuming repeats no batch; every worker has batches of its own.
        torch.manual_seed((r.seed * 1_000_003 + self.seen) * 64 + self.rank)
        if r.reuse > 1 and self.made and self.seen // (r.batch * self.workers) % r.reuse:
            return mirrored(self.made[int(torch.randint(len(self.made), ()))])
        stretch = math.exp(0.2 * math.floor(float(torch.empty(1).uniform_(-2, 2))) + 0.1)
        shrunk = 0.5 ** r.shrunk if r.only_choice else 1.
        height = max(64, round(r.height * shrunk * stretch / 16) * 16)
        width = max(64, round(r.width * shrunk / stretch / 16) * 16)
        motion = replace(r.motion, smallest=r.motion.smallest * shrunk,
                         largest=r.motion.largest * shrunk)
        batch = make_pairs(r.batch, height, width, self.textures, motion)
        if r.reuse > 1:
            self.made.append(batch)
        return batch

    def learn(self, batch: Batch) -> Callable[[], float]:
        """Begin to learn from a batch; give what waits for the end and gives the loss.

        On CUDA the next batch can be made in between, nothing else.
        """
        r = self.recipe
        rate = learning_rate(r, self.seen)
        self.rate.fill_(rate)
        self.unsure.fill_(unsure(r, self.seen))
        for group in self.optimiser.param_groups:
            group['lr'] = self.rate if self.rate.is_cuda else rate
        self.seen += r.batch * self.workers
        self.decay.fill_(min(r.average, self.seen / (self.seen + 20 * r.batch * self.workers)))
        if r.only_choice:
            self.remember(*batch)
            losses = [self.update(self.remembered_loss()) for _ in range(r.repeats)]
            return lambda: float(sum(losses)) / len(losses)
        if self.workers > 1:
            loss = self.update(self.loss(*batch))
            return lambda: float(loss)
        return self.replayed(batch)

    def replayed(self, batch: Batch) -> Callable[[], float]:
        """Learn from a batch: on CUDA as one graph a size, whose first batch is seen thrice."""
        size = batch[0].shape
        if size not in self.inputs:
            self.inputs[size] = [torch.empty_like(x) for x in batch]
        inputs = self.inputs[size]
        for mine, new in zip(inputs, batch):
            mine.copy_(new)
        if self.replay.stream is not None:
            self.replay.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.replay.context():
            loss = self.replay(size, lambda: self.update(self.loss(*inputs)))

        def finish() -> float:
            if self.replay.stream is not None:
                self.replay.stream.synchronize()
            return float(loss)
        return finish

    def loss(self, previous: Tensor, current: Tensor, truth: Tensor) -> Tensor:
        """Of all of the network on a batch."""
        with self.autocast():
            choices: list[Options] = []
            flows = self.network(previous, current,
                                 choices=None if self.recipe.keep_choice else choices)
            loss = sequence_loss(flows, truth, self.recipe.power)
            for options in choices:
                target, share = averaged_flow(truth, options.flows.shape[-2:], TOKEN)
                loss = loss + self.recipe.choice / len(choices) * choice_loss(
                    options, target, share > 0.5, self.unsure)
        return loss

    @torch.no_grad()
    def remember(self, previous: Tensor, current: Tensor, truth: Tensor) -> None:
        """Keep what the choice sees of a batch, and the true flow."""
        with self.autocast():
            choices: list[Options] = []
            level = MATCHED - self.recipe.shrunk
            self.network(previous, current, level, choices, level)
        target, share = averaged_flow(truth, choices[0].flows.shape[-2:], TOKEN)
        self.memory.append([(options.flows.half(), options.measures.half(), target.half(),
                             share > 0.5) for options in choices])

    def remembered_loss(self) -> Tensor:
        """Of the choice on a batch out of the memory, mirrored at random.

        (No measure has a direction, and flows are only compared with their target.)
        """
        passes = self.memory[int(torch.randint(len(self.memory), ()))]
        seen = passes[int(torch.randint(len(passes), ()))]
        for axis in (-2, -1):
            if torch.rand(()) < 0.5:
                seen = tuple(x.flip(axis) for x in seen)
        flows, measures, target, known = seen
        with self.autocast():
            logits = self.network.choice.weigh(measures.float())
        return choice_loss(Options(flows.float(), measures, logits), target.float(), known,
                           self.unsure)

    def autocast(self) -> torch.autocast:
        """Give the context of the network's precision."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16,
                              enabled=self.recipe.autocast, cache_enabled=False)

    def update(self, loss: Tensor) -> Tensor:
        """Follow the gradient of a loss, and return it."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.workers > 1:
            average_gradients(self.network, self.workers)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for parameter in self.network.parameters():
            if parameter.grad is not None:  # a batch that overflows must not spoil the weights
                parameter.grad.nan_to_num_(0., 0., 0.)
        self.optimiser.step()
        with torch.no_grad():
            for mean, new in zip(self.averaged.parameters(), self.network.parameters()):
                mean.lerp_(new, 1 - self.decay)
        return loss.detach()

    def log(self, record: dict) -> None:
        """Append a record to the log."""
        with open(self.folder / 'log.jsonl', 'a') as file:
            file.write(json.dumps({k: round(v, 5) if isinstance(v, float) else v
                                   for k, v in record.items()}) + '\n')

    def run(self, evaluate_every: int = 3_000, seconds: float | None = None,
            on_step: Callable[[int, float], None] = lambda seen, loss: None,
            on_evaluation: Callable[[dict], None] = lambda record: None) -> None:
        """Train until the recipe's pairs are seen, or ``seconds`` are over; state is saved.

        ``on_evaluation`` is called with every record, before it is logged and the state saved; its
        ``best`` tells whether the averaged weights have never evaluated better.
        """
        validation = self.validation if self.rank == 0 else []      # (draws random numbers)
        begin = last = time.monotonic()
        losses: list[float] = []
        made = self.recipe.batch * self.workers  # pairs a step
        batch = self.make_batch() if self.seen < self.recipe.pairs else None
        while batch is not None:
            finish = self.learn(batch)
            over = self.agree(seconds is not None and time.monotonic() - begin > seconds)
            ends = over or self.seen >= self.recipe.pairs
            batch = None if ends else self.make_batch()
            losses.append(finish())
            on_step(self.seen, losses[-1])
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            due = self.seen // evaluate_every != (self.seen - made) // evaluate_every
            if (due or ends) and self.rank == 0:
                errors = evaluate(self.averaged, validation)
                record = {'pairs': self.seen, 'seconds': self.seconds,
                          'loss': sum(losses) / len(losses),
                          'lr': self.rate.item(),
                          'best': errors['epe'] < self.best, **errors}
                self.best = min(self.best, errors['epe'])
                losses = []
                on_evaluation(record)       # (which keeps the weights: before their error is)
                self.save()
                self.log(record)

    def agree(self, over: bool) -> bool:
        """All workers stop at the same step: when the first one says so."""
        if self.workers == 1:
            return over
        flag = torch.tensor([float(over)], device=self.device)
        distributed.broadcast(flag, 0)
        return bool(flag.item())
