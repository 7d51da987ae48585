"""A small training run with every kind of part that a checkpoint has to save."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss
from torchrl.objectives.value import GAE

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
)
from torchrl_recall.checkpoint import RecallCheckpoint
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.model.observation import ObservationCodec


class Carried:
    """Where the environment stands: what a training loop carries from step to step."""

    def __init__(self, env):
        self.now = env.reset()
        self.keys = list(self.now.keys(True, True))

    def keep(self, now):
        """Keep what the environment gave, not what the policy wrote beside it."""
        self.now = now.select(*self.keys)

    def state_dict(self):
        return self.now.to_dict()

    def load_state_dict(self, state):
        self.now = TensorDict(state, self.now.shape)


class Run:
    """A2C with recall traces on a small maze; the recall buffer views the model's storage."""

    def __init__(self, directory, seed=0, keep_last=2):
        torch.manual_seed(seed)
        self.env = FourRoomsEnv(5, batch_size=(4,), slip=0.2, seed=seed)
        spec = self.env.observation_spec_unbatched["observation"]

        def network(outputs):
            codec = ObservationCodec({"observation": spec}, dtype=torch.float32)
            layers = MLP(in_features=codec.feature_size, out_features=outputs, num_cells=[16])
            return nn.Sequential(codec, layers)

        logits = TensorDictModule(network(4), ["observation"], ["logits"])
        self.actor = ProbabilisticActor(
            logits, ["logits"], distribution_class=torch.distributions.Categorical
        )
        critic = ValueOperator(network(1), in_keys=["observation"])
        self.advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
        self.a2c = A2CLoss(self.actor, critic)
        self.model = BacktrackModel.from_env(self.env, num_cells=(16,))
        generator = torch.Generator().manual_seed(seed)
        self.replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(256),
            sampler=RandomSampler(),
            generator=generator,
            batch_size=16,
        )
        self.recall = TensorDictReplayBuffer(
            storage=self.replay.storage,
            writer=self.replay.writer,
            generator=generator,
            sampler=ValuePrioritizedSampler(256, top=0.2),
            transform=BacktrackTransform(self.model, num_steps=6),
            batch_size=8,
        )
        self.model_loss, self.recall_loss = BacktrackLoss(self.model), RecallTraceLoss(self.actor)
        self.optimizer = torch.optim.Adam(
            [*self.a2c.parameters(), *self.model.parameters()], lr=1e-2
        )
        self.carried = Carried(self.env)
        self.progress = {"iterations": 0}
        self.checkpoint = RecallCheckpoint(
            directory,
            keep_last=keep_last,
            env=self.env,
            a2c=self.a2c,
            model=self.model,
            replay=self.replay,
            recall=self.recall,
            optimizer=self.optimizer,
            carried=self.carried,
            progress=self.progress,
        )

    def iterate(self):
        """Collect 8 steps of 4 mazes, and learn from them."""
        steps, now = [], self.carried.now
        for _ in range(8):
            with torch.no_grad():
                now = self.actor(now)
            step, now = self.env.step_and_maybe_reset(now)
            steps.append(step.clone())
        self.carried.keep(now)
        data = torch.stack(steps, 1)
        with torch.no_grad():
            self.advantage(data)
        self.replay.extend(data.reshape(-1))
        self.recall.sampler.refresh(self.replay[:]["value_target"].flatten())
        losses = self.a2c(data.reshape(-1))
        losses.update(self.model_loss(self.replay.sample()))
        losses.update(self.recall_loss(self.recall.sample()))
        total = sum(value for key, value in losses.items() if key.startswith("loss_"))
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.progress["iterations"] += 1
        return total.item()

    def parameters(self):
        """Return all that has been learnt, as one vector."""
        parts = [*self.a2c.state_dict().values(), *self.model.state_dict().values()]
        parts = [x for x in parts if isinstance(x, torch.Tensor)]
        return torch.cat([x.double().flatten() for x in parts])


def train_until_killed(directory, pipe):
    """Resume, and save after each iteration; tell the first one."""
    run = Run(directory)
    run.checkpoint.load_latest()
    while True:
        run.iterate()
        run.checkpoint.save(run.progress["iterations"])
        os.write(pipe, b".")


def kill_learners(directory, kills):
    """Kill ``kills`` learners at random moments; print what each left behind."""
    torch.set_num_threads(1)
    reader, dice = Run(directory), random.Random(0)
    for _ in range(kills):
        out, into = os.pipe()
        learner = os.fork()
        if learner == 0:
            try:
                train_until_killed(directory, into)
            finally:
                os._exit(1)
        assert os.read(out, 1) == b"."
        time.sleep(dice.uniform(0, 0.15))
        os.kill(learner, signal.SIGKILL)
        os.waitpid(learner, 0)
        os.close(out)
        os.close(into)
        left = any(".stage-" in path.name for path in Path(directory).iterdir())
        step = reader.checkpoint.load_latest()
        kept = len(reader.checkpoint.rotation.checkpoints())
        print(step, reader.progress["iterations"], left, kept, flush=True)


if __name__ == "__main__":
    kill_learners(sys.argv[1], int(sys.argv[2]))
