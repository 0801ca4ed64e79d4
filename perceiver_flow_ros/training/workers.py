# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one network, as torchrun starts them."""
import os

import torch
from torch import distributed


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
