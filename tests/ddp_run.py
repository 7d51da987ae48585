"""Two processes, half of each batch: run by `test_composes_training.py`, prints what it finds.

A script of its own, as processes may be forked only where no gradient has been computed yet.
"""

from __future__ import annotations

import multiprocessing
import socket

import torch
from loss_data import make_actor, make_model, recall, transitions
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from torchrl_recall import BacktrackLoss, RecallTraceLoss

BATCH = 8


def make_losses():
    """Both losses, alone and in one, with a batch each."""
    torch.manual_seed(0)
    trace = recall(BATCH, 4)
    trace["trace", "collector", "mask"].fill_(True)  # as many kept steps in each half
    losses = {
        "backtrack": (BacktrackLoss(make_model()), transitions(BATCH)),
        "recall": (RecallTraceLoss(make_actor()), trace),
        "both": (RecallTraceLoss(make_actor(), make_model()), transitions(BATCH).update(trace)),
    }
    for loss, data in losses.values():
        with torch.no_grad():
            loss(data)  # statistics of the whole batch: while training they are a process's own
        loss.eval()
    return losses


def gradients(loss, called, data):
    out = called(data)
    sum(out[key] for key in loss.out_keys if key.startswith("loss_")).backward()
    return [parameter.grad for parameter in loss.parameters()]


def train(rank, port, queue):
    """One process of two: gradients averaged over both."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for name, (loss, data) in make_losses().items():
        half = data[rank * BATCH // 2 : (rank + 1) * BATCH // 2]
        found = gradients(loss, DistributedDataParallel(loss), half)
        queue.put((rank, name, [gradient.tolist() for gradient in found]))
    distributed.destroy_process_group()


def main():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = {"target": train, "daemon": True}
    workers = [context.Process(args=(rank, port, queue), **options) for rank in range(2)]
    for worker in workers:
        worker.start()
    losses = make_losses()
    expected = {name: gradients(loss, loss, data) for name, (loss, data) in losses.items()}
    for _ in range(2 * len(losses)):
        rank, name, found = queue.get(timeout=60)
        for a, b in zip(found, expected[name], strict=True):
            torch.testing.assert_close(torch.tensor(a), b, rtol=1e-4, atol=1e-5)
        size = max(float(b.abs().max()) for b in expected[name])
        print(f"{name} of process {rank}: {len(found)} gradients, the largest {size:.3f}")
    for worker in workers:
        worker.join(60)


if __name__ == "__main__":
    main()
