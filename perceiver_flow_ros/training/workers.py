# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one network, as torchrun starts them."""
import os

import torch
from torch import distributed


def start_workers(device: str) -> str:
    """Join the other workers when torchrun started this process; give this one's device.

    On GPUs that is the one of its rank; ValueError where there are too few. A CPU worker is one
    thread, since on a machine that does other things two threads wait for each other at every
    operation, two workers only once a step.
    """
    if 'WORLD_SIZE' in os.environ and not distributed.is_initialized():
        if device != 'cpu':
            rank, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
            if rank >= count:
                raise ValueError(f'torchrun started a worker for GPU {rank}, but there are '
                                 f'{count}: give --nproc-per-node {count}')
            torch.cuda.set_device(rank)
            device = f'cuda:{rank}'
        distributed.init_process_group('gloo' if device == 'cpu' else 'nccl')
        if device == 'cpu':
            torch.set_num_threads(1)
    return device


def average_gradients(network: torch.nn.Module, workers: int) -> None:
    """Mean of every gradient over the workers, in one message."""
    learning = [p for p in network.parameters() if p.requires_grad]
    for p in learning:          # (no worker's frames may be too small for what others learn)
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in learning])      # type: ignore[union-attr]
    distributed.all_reduce(flat)
    for p, mean in zip(learning, (flat / workers).split([p.numel() for p in learning])):
        p.grad.copy_(mean.view_as(p))       # type: ignore[union-attr]
