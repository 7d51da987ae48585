"""Generators that objects own: whoever holds one goes on drawing in a spawned process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from goal_data import make_gan
from transform_data import WIDTH, T, make_model, same, transitions

from torchrl_recall import BacktrackTransform, DataSupport
from torchrl_recall.envs import FourRoomsEnv, PointMazeEnv
from torchrl_recall.generators import RandomSource, follow_device, own_generator


def make_transform(**options):
    """A transform whose support and goals own generators, too."""
    gan = make_gan(WIDTH, starts="sample")
    goals = torch.rand(20, WIDTH, generator=torch.Generator().manual_seed(1))
    gan.update(goals, torch.full((20,), 0.5), num_steps=2)
    support = DataSupport(num_references=20).fit(transitions(50))
    return BacktrackTransform(make_model(), num_steps=T, start=gan, support=support, **options)


def draws(transform, envs):
    """What all of their generators say next."""
    trace = transform(transitions(6))["trace"]
    # New references are drawn by the support, new goals by the GAN.
    threshold = transform.support.fit(transitions(50)).threshold
    goals = transform.start.sample(5)
    resets = [env.reset()["observation"] for env in envs]
    return [x.tolist() for x in (trace["observation"], trace["action"], threshold, goals, *resets)]


def draw_in_child(transform, envs, connection):
    connection.send(draws(transform, envs))


def test_a_spawned_process_goes_on_with_all_of_them():
    transform = make_transform()
    envs = [FourRoomsEnv(5, batch_size=[2], seed=3), PointMazeEnv(batch_size=[2], seed=3)]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=draw_in_child, args=(transform, envs, sender))
    child.start()
    assert receiver.poll(120)
    there = receiver.recv()
    child.join(10)
    assert child.exitcode == 0
    assert there == draws(transform, envs)


HOLDERS = [
    lambda: BacktrackTransform(make_model(), num_steps=T),
    lambda: RandomSource(torch.Generator().manual_seed(3)),
    lambda: make_gan(2),
    lambda: DataSupport(),
]


@pytest.mark.parametrize("make", HOLDERS)
def test_sent_as_bytes(make):
    """What torch makes of one is in shared memory that a spawned process can no longer open."""
    assert b"rebuild_tensor" in bytes(ForkingPickler.dumps(torch.Generator()))
    original = make()
    carried = original.__getstate__()["generator"]
    assert b"rebuild_tensor" not in bytes(ForkingPickler.dumps(carried))
    arrived = pickle.loads(bytes(ForkingPickler.dumps(original)))
    deep = copy.deepcopy(original)
    expected = torch.rand(3, generator=original.generator)
    for other in (arrived, deep):
        assert other.generator is not original.generator
        assert same(torch.rand(3, generator=other.generator), expected)
    assert type(copy.copy(original).generator) is torch.Generator


def test_copies_share_what_the_originals_share():
    shared = torch.Generator().manual_seed(3)
    transform = BacktrackTransform(make_model(), num_steps=T, generator=shared)
    both = copy.deepcopy({"transform": transform, "support": DataSupport(generator=shared)})
    assert both["transform"].generator is both["support"].generator is not shared


def test_own_and_following():
    torch.manual_seed(0)
    one, other = own_generator(None), own_generator(None)
    assert one.initial_seed() != other.initial_seed()
    torch.manual_seed(0)
    assert own_generator(None).initial_seed() == one.initial_seed()
    assert own_generator(one) is one
    assert own_generator(None, "meta").device.type == "cpu"
    assert follow_device(one, torch.device("cpu")) is one
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        own_generator(3)  # pyright: ignore
    with pytest.raises(ValueError, match="generator is on device cpu, expected one on meta"):
        own_generator(one, "meta")
