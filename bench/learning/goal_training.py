"""One run of `goal_coverage`: PPO with goals in a maze, goals from a source, traces from goals."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from bench.learning.ppo_parts import PPONumbers, make_ppo
from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    GoalGAN,
    RecallTraceLoss,
)
from torchrl_recall.goals.success import success_rates
from torchrl_recall.starts import GoalStarts
from torchrl_recall.support.data_support import DataSupport
from torchrl_recall.trace_masks import LastVisitRadius

if TYPE_CHECKING:
    from bench.learning.goal_mazes import GoalMaze

# Name: (goals from GoalGAN, what is imitated: traces of the model, the real past, or nothing).
VARIANTS = {
    "uniform": (False, None),
    "uniform + traces": (False, "model"),
    "uniform + real past": (False, "past"),
    "GoalGAN": (True, None),
    "GoalGAN + traces": (True, "model"),
    "GoalGAN + real past": (True, "past"),
}
# Far from every training seed, so that evaluation shares no draws with any of them.
EVALUATION_SEED = 1_000_003


@dataclass(frozen=True)
class Settings(PPONumbers):
    """Numbers of a run in any maze; frozen before the seeds that are reported."""

    max_steps: int = 100
    iterations: int = 28
    # GoalGAN
    round_iterations: int = 4  # from one set of goals to the next
    goals_per_round: int = 60
    uniform_share: float = 0.1
    min_episodes: int = 2  # of a goal, to know its success rate
    gan_steps: int = 60
    # Recall traces
    num_traces: int = 32
    trace_steps: int = 30
    model_steps: int = 10
    model_batch: int = 256
    model_cells: int = 64
    imitation_coeff: float = 0.3
    radius: float = 0.25  # of last visit, in standard deviations
    # Evaluation
    grid_spacing: float = 0.25  # cells
    rollouts_per_goal: int = 2
    evaluation_iterations: int = 4  # from one evaluation to the next

    def make(self, seed: int) -> GoalMaze:
        """Make the maze."""
        raise NotImplementedError


class Run:
    """One seed of one variant."""

    def __init__(self, variant: str, seed: int, settings: Settings) -> None:
        self.settings = s = settings
        self.uses_gan, self.imitates = VARIANTS[variant]
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.maze = s.make(seed)
        self.env, self.grid = self.maze.env, self.maze.grid
        self.low, self.high = self.maze.low, self.maze.high
        self.gan = GoalGAN(
            Bounded(self.low, self.high),
            uniform_share=s.uniform_share,
            goal_to_state=self.nearest_state,
            generator=torch.Generator().manual_seed(seed + 1),
        )
        self.goals: Tensor | None = None  # of the round; None: uniform over the box
        self.outcomes: list[Any] = []
        self.start = self.env.reset()["observation"]
        self._make_learner()
        self._make_recall(seed)

    def _make_learner(self) -> None:
        s = self.settings

        def network(outputs: int) -> nn.Sequential:
            layers = (
                nn.Linear(self.maze.num_inputs, s.num_cells),
                nn.Linear(s.num_cells, s.num_cells),
            )
            head = nn.Linear(s.num_cells, outputs)
            return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), head)

        def module(*tail: nn.Module, out: list[Any]) -> TensorDictModule:
            class Net(nn.Module):
                def __init__(self, inputs: nn.Module) -> None:
                    super().__init__()
                    self.inputs, self.tail = inputs, nn.Sequential(*tail)

                def forward(self, state: Tensor, goal: Tensor) -> Any:
                    return self.tail(self.inputs(state, goal))

            return TensorDictModule(Net(self.maze.inputs()), ["observation", "desired_goal"], out)

        policy = network(2 * self.env.action_spec.shape[-1])
        head: Any = policy[-1]
        with torch.no_grad():
            head.weight *= 0.01  # the first policy is the same everywhere
            head.bias.zero_()
        parameters = module(policy, NormalParamExtractor(), out=["loc", "scale"])
        self.policy = parameters.module
        self.critic = module(network(1), out=["state_value"])
        self.actor, self.advantage, self.loss, self.optimizer = make_ppo(
            parameters, self.critic, s, normalize_advantage=True
        )

    def _make_recall(self, seed: int) -> None:
        s = self.settings
        self.states = TensorDictReplayBuffer(
            storage=LazyTensorStorage(s.num_envs * s.rollout_steps * s.iterations),
            batch_size=s.model_batch,
            generator=torch.Generator().manual_seed(seed + 2),
        )
        if self.imitates is None:
            return
        self.imitation = RecallTraceLoss(self.actor, imitation_coeff=s.imitation_coeff)
        self.starts: Any = self.gan if self.uses_gan else GoalStarts(self.uniform_states)
        self.trace_generator = torch.Generator().manual_seed(seed + 4)
        if self.imitates == "past":
            return
        cells = (s.model_cells, s.model_cells)
        self.model = BacktrackModel.from_env(self.env, num_cells=cells, stop=False)
        self.model_loss = BacktrackLoss(self.model)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.support = DataSupport(
            self.model, num_references=1024, generator=torch.Generator().manual_seed(seed + 3)
        )
        self.traces = BacktrackTransform(
            self.model,
            num_steps=s.trace_steps,
            last_visit=False,
            start=self.starts,
            masks=[LastVisitRadius(s.radius, scale=self.model)],
            support=self.support,
            generator=self.trace_generator,
        )

    def nearest_state(self, goals: Tensor) -> Tensor:
        """Return the state seen nearest to each goal; none within the goal's radius: NaN."""
        seen = self.states.storage[:]["next", "observation"]
        rows = torch.randint(len(seen), (2048,), generator=self.generator)
        distance, nearest = torch.cdist(goals, seen[rows, :2]).min(1)
        far = distance > self.env.goal_radius
        return seen[rows[nearest]].masked_fill(far.unsqueeze(-1), torch.nan)

    def uniform_states(self, count: int, generator: torch.Generator) -> Tensor:
        """Starts of the control: as GoalGAN's, but from uniform goals."""
        return self.nearest_state(self.box_sample(count, generator))

    def box_sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform goals, whether they are in a wall or not."""
        return self.low + (self.high - self.low) * torch.rand(count, 2, generator=generator)

    def draw_goals(self, count: int) -> Tensor:
        """The goals of new episodes."""
        if self.goals is None:
            return self.box_sample(count, self.generator)
        return self.goals[torch.randint(len(self.goals), (count,), generator=self.generator)]

    def run(self) -> dict[str, Any]:
        """Train; return coverage by environment steps, and what was logged."""
        s, started = self.settings, time.perf_counter()
        frames = s.num_envs * s.rollout_steps
        steps, coverage = [0], [self.coverage()]
        log: dict[str, list[float]] = {}
        state = self.env.reset().select("observation", "desired_goal", "elapsed")
        state["desired_goal"] = self.draw_goals(len(state))
        for iteration in range(s.iterations):
            data, state = self._act(state)
            kept = ("observation", "action", ("next", "observation"), ("next", "done"))
            self.states.extend(data.select(*kept).reshape(-1))
            if self.uses_gan:
                self._new_goals(iteration, data, log)
            traces = None if self.imitates is None else self._recall(log)
            self._learn(data, traces)
            if (iteration + 1) % s.evaluation_iterations == 0:
                steps.append((iteration + 1) * frames)
                coverage.append(self.coverage())
        seconds = time.perf_counter() - started
        return {"steps": steps, "coverage": coverage, "log": log, "seconds": seconds}

    @torch.no_grad()
    def _act(self, state: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Take the steps of one iteration; new episodes begin at the start, with new goals."""
        steps = []
        for _ in range(self.settings.rollout_steps):
            with set_exploration_type(ExplorationType.RANDOM):
                step = self.env.step(self.actor(state))
            steps.append(step)
            after, done = step["next"], step["next", "done"]
            self.maze.restart(done)
            state = TensorDict(
                {
                    "observation": torch.where(done, self.start, after["observation"]),
                    "desired_goal": torch.where(
                        done, self.draw_goals(len(done)), after["desired_goal"]
                    ),
                    "elapsed": torch.where(done, 0, after["elapsed"]),
                },
                state.shape,
            )
        data: Any = torch.stack(steps, 1)
        return data, state

    def _new_goals(self, iteration: int, data: TensorDictBase, log: dict) -> None:
        s = self.settings
        if iteration == 0:
            # As the paper: begin with the states that the first policy reaches.
            seen = data["next", "observation"].flatten(0, 1)[:, :2]
            rows = torch.randint(len(seen), (s.goals_per_round,), generator=self.generator)
            goals = seen[rows].clamp(self.low, self.high)
            self.gan.update(
                goals, labels=torch.ones(len(goals), dtype=torch.bool), num_steps=3 * s.gan_steps
            )
        else:
            self.outcomes.append(
                data.select("desired_goal", ("next", "success"), ("next", "done")).reshape(-1)
            )
            if iteration % s.round_iterations:
                return
            outcomes: Any = torch.cat(self.outcomes)
            rates: Any = success_rates(outcomes, goal_key="desired_goal")
            rates = rates[rates["count"] >= s.min_episodes]
            self.outcomes = []
            if len(rates):
                made = self.gan.update(rates["goal"], rates["success_rate"], num_steps=s.gan_steps)
                log.setdefault("share_good", []).append(float(made["share_good"]))
        self.goals = self.gan.sample(s.goals_per_round)
        log.setdefault("goals_in_walls", []).append(
            float((~self.env.free(self.goals)).float().mean())
        )

    def _recall(self, log: dict) -> TensorDictBase:
        trace = self._real_past() if self.imitates == "past" else self._traces(log)
        # Wherever a trace ends, that was its goal.
        end = trace["next", "observation"][..., -1:, :2]
        trace["desired_goal"] = end.expand(*trace.shape, 2)
        kept = trace["collector", "mask"].float().mean()
        log.setdefault("trace_kept", []).append(float(kept))
        return TensorDict({"trace": trace}, trace.shape[:1])

    def _traces(self, log: dict) -> TensorDictBase:
        """Fit the model, and walk back with it."""
        self.support.fit(self.states)
        loss = torch.zeros(())
        for _ in range(self.settings.model_steps):
            loss = self.model_loss(self.states.sample())["loss_backtrack"]
            self.model_optimizer.zero_grad()
            loss.backward()
            self.model_optimizer.step()
        log.setdefault("loss_backtrack", []).append(float(loss.detach()))
        return self.traces(TensorDict({}, [self.settings.num_traces]))["trace"]

    def _real_past(self) -> TensorDictBase:
        """Return what really came before states that traces would start from, without a model."""
        s = self.settings
        data = self.states.storage[:]
        seen = data["next", "observation"]
        start = self.starts(TensorDict({}, [s.num_traces]), self.trace_generator)
        state = start["observation"]
        found = start.get(("collector", "mask"), torch.ones(s.num_traces, dtype=torch.bool))
        found = found & state.isfinite().all(-1)
        # A start is one of the seen states: this finds its row, at distance 0.
        row = torch.cdist(state.nan_to_num(), seen).argmin(1)
        rows, kept = [row], [found]
        for _ in range(s.trace_steps - 1):
            before, exists = self._row_before(rows[0])
            exists = exists & ~data["next", "done"][before, 0]
            rows.insert(0, before)
            kept.insert(0, kept[0] & exists)
        trace = data[torch.stack(rows, 1)]
        mask = LastVisitRadius(s.radius, scale=seen.std(0).clamp_min(1e-4))(trace)
        trace["collector"] = TensorDict({"mask": mask & torch.stack(kept, 1)}, trace.shape)
        return trace

    def _row_before(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of the step before, of the same maze, and whether there is one."""
        length = self.settings.rollout_steps
        whole = length * self.settings.num_envs
        first_of_rollout = row % length == 0
        before = torch.where(first_of_rollout, row - whole + length - 1, row - 1)
        return before.clamp_min(0), before >= 0

    def _learn(self, data: TensorDictBase, traces: TensorDictBase | None) -> None:
        s = self.settings
        with torch.no_grad():
            self.advantage(data)
        data = data.reshape(-1)
        for _ in range(s.epochs):
            order = torch.randperm(len(data), generator=self.generator)
            for rows in order.split(s.minibatch):
                losses = self.loss(data[rows])
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                if traces is not None:
                    total = total + self.imitation(traces)["loss_imitation"]
                self.optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(self.loss.parameters(), s.max_grad_norm)
                self.optimizer.step()

    @torch.no_grad()
    def coverage(self) -> float:
        """Share of the grid's goals that the policy reaches, from the start, in its own noise."""
        goals = self.grid.repeat(self.settings.rollouts_per_goal, 1)
        # The learner's random numbers are not touched.
        with torch.random.fork_rng():
            torch.manual_seed(EVALUATION_SEED)
            reached = self.maze.reached(self.policy, goals)
        return float(reached.float().mean())
