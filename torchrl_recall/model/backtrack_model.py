"""The backtracking model ``q(stop|s') q(a|s') q(Δ|a,s')``: which step led here, if any.

It stands at the head of the method: `BacktrackLoss` fits it to real transitions,
`sample_traces` walks backwards with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import EnvBase

from torchrl_recall.checks import (
    as_keys,
    check_at_least_one,
    check_choice,
    check_interval,
    check_key,
    check_not_nan,
    usable_device,
)
from torchrl_recall.model.delta_head import build_delta_head
from torchrl_recall.model.environment_specs import model_arguments
from torchrl_recall.model.joint_action import build_action
from torchrl_recall.model.networks import add_networks, choose_dtype, start_heads
from torchrl_recall.model.observation import ObservationCodec, as_mapping
from torchrl_recall.model.step_factors import StepFactors

MemberPer = Literal["step", "trace"]
ReverseAction = Literal["learned", "uniform"]


class BacktrackModel(StepFactors, TensorDictModuleBase):
    """Predicts the step that preceded a state: stop, action, and change of state.

    The three factors are networks of their own: ``q(stop|s')`` (optional) is the probability that
    ``s'`` was an episode's first state, ``q(a|s')`` the action that led to it and ``q(Δ|a,s')`` the
    change ``Δ = s_t - s_{t+1}``, so that ``s_t = s_{t+1} + Δ``. With the stop head the model is the
    posterior over whole trajectories; without it traces have no beginning.

    Called on data, the module writes the log-probability of the real step under ``"backtrack"``.

    Args:
        observation (int, TensorSpec or mapping): size of a continuous observation, its spec, or a
            mapping (or ``Composite``) of several keys, concatenated in that order.
        action (int, TensorSpec or mapping): size of a continuous action bounded to [-1, 1], or its
            spec. Bounded specs get a tanh-squashed Gaussian, unbounded ones a Gaussian, specs of
            classes a categorical distribution, one for each of several choices (``MultiOneHot``,
            ``Binary``, agents). A mapping (or ``Composite``) of several keys: each its own.

    Keyword Args:
        num_cells (sequence of int): width of each hidden layer of each network.
        activation_class (type): activation between layers.
        delta_support (Tensor, optional): ``[M, D]`` displacements ``s_t - s_{t+1}`` that can occur,
            for grids and other lattices. Makes Δ categorical over them.
        stop (bool): whether to learn where episodes begin. Needs ``is_init`` in the training data
            (TorchRL's ``InitTracker``).
        observation_keys (NestedKey or list of NestedKey, optional): order of the keys of a mapping,
            or the name of the single key. Defaults to ``["observation"]`` or the mapping's own
            keys.
        action_key (NestedKey): name of the action; a mapping's are its own keys.
        is_init_key (NestedKey): name of the mark of an episode's first step.
        action_log_scale_range (pair of float): bounds of the log of the action's scale.
        delta_log_scale_range (pair of float): bounds of the log of Δ's scale, where 0 means the
            standard deviation of Δ over the data.
        num_components (int): Gaussians of which Δ is a mixture, continuous observations only. One
            averages over the ways into a state; where there are several (doors, one action that
            leads here from two sides) take 2 to 5. Categorical heads have all modes already.
        num_members (int): sets of networks, each learned by itself from its own initial values;
            the statistics are shared. An ensemble of about 5 shows by its members' disagreement
            (`torchrl_recall.model.disagreement`) where the model has seen no data, and its traces
            are as varied as its members. It costs that many times a single model's training.
        member_per (str): the member that walks is drawn anew for each ``"step"``, so that no error
            of one member adds up, or for each ``"trace"``, which stays consistent.
        reverse_action (str): ``"learned"``, or ``"uniform"`` over the classes or the bounded box:
            without a network for it; explores all that may have led here, where data are few.
        dtype (torch.dtype, optional): dtype of the parameters. Defaults to the continuous
            observation's, else torch's default.
        device (torch.device, optional): device of the parameters.

    Raises:
        TypeError: a spec of a kind that has no head.
        ValueError: specs, support or keys that do not match each other.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel
        >>> model = BacktrackModel(3, 1, num_cells=(32, 32))
        >>> data = TensorDict({"observation": torch.randn(5, 3), "action": torch.zeros(5, 1),
        ...                    "next": {"observation": torch.randn(5, 3)}}, [5])
        >>> model.log_prob(data).shape
        torch.Size([5])
    """

    def __init__(
        self,
        observation: int | TensorSpec | Mapping[NestedKey, int | TensorSpec],
        action: int | TensorSpec | Mapping[NestedKey, int | TensorSpec],
        *,
        num_cells: Sequence[int] = (256, 256),
        activation_class: type[nn.Module] = nn.ReLU,
        delta_support: Tensor | None = None,
        stop: bool = False,
        observation_keys: NestedKey | Sequence[NestedKey] | None = None,
        action_key: NestedKey = "action",
        is_init_key: NestedKey = "is_init",
        action_log_scale_range: tuple[float, float] = (-5.0, 2.0),
        delta_log_scale_range: tuple[float, float] = (-6.0, 2.0),
        num_components: int = 1,
        num_members: int = 1,
        member_per: MemberPer = "step",
        reverse_action: ReverseAction = "learned",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        observations = as_mapping(observation, observation_keys)
        dtype = choose_dtype(observations, dtype)
        action_range = check_interval("action_log_scale_range", action_log_scale_range)
        delta_range = check_interval("delta_log_scale_range", delta_log_scale_range)
        num_components = check_at_least_one("num_components", num_components)
        self.num_members = check_at_least_one("num_members", num_members)
        self.member_per: MemberPer = check_choice("member_per", member_per, MemberPer)
        uniform = check_choice("reverse_action", reverse_action, ReverseAction) == "uniform"
        factory: dict[str, Any] = {"dtype": dtype, "device": usable_device("device", device)}

        self.observation: ObservationCodec = ObservationCodec(observations, **factory)
        self.action, self.action_key = build_action(
            action, action_key, action_range, uniform=uniform, **factory
        )
        self.is_init_key: NestedKey = check_key("is_init_key", is_init_key)
        self.delta_head: Any = build_delta_head(
            self.observation, delta_support, delta_range, factory, num_components
        )
        add_networks(
            self, num_cells=num_cells, activation_class=activation_class, stop=stop, **factory
        )
        self.in_keys: Any = [
            *self.next_observation_keys,
            *self.observation_keys,
            *as_keys(self.action_key),
        ]
        self.out_keys: Any = [("backtrack", "action_log_prob"), ("backtrack", "delta_log_prob")]
        if stop:
            self.out_keys.append(("backtrack", "stop_log_prob"))
        if self.num_members > 1:
            self.member(0)  # builds the views, which `torch.compile` cannot

    @classmethod
    def from_env(
        cls,
        env: EnvBase,
        *,
        num_cells: Sequence[int] = (256, 256),
        observation_keys: NestedKey | Sequence[NestedKey] | None = None,
        delta_support: Tensor | None = None,
        stop: bool | None = None,
        is_init_key: NestedKey = "is_init",
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> BacktrackModel:
        """Build the model from an environment's specs.

        Args:
            env (EnvBase): the environment, with its transforms.

        Keyword Args:
            num_cells (sequence of int): width of each hidden layer.
            observation_keys (NestedKey or list of NestedKey, optional): which observations make up
                the state. Defaults to ``"observation"``, or the only one there is.
            delta_support (Tensor, optional): ``[M, D]`` displacements; defaults to the
                environment's own ``delta_support``, if it has one.
            stop (bool, optional): learn where episodes begin. Defaults to whether the environment
                marks them at ``is_init_key``.
            is_init_key (NestedKey): name of that mark.
            device (torch.device, optional): defaults to the environment's device.
            **kwargs: as for the constructor.

        Returns:
            BacktrackModel: a model for this environment.

        Raises:
            TypeError: not an environment, or a spec of a kind that has no head.
            ValueError: the observation cannot be chosen without being named.
            KeyError: an observation key that the environment does not have.

        Examples:
            >>> from torchrl_recall import BacktrackModel
            >>> from torchrl_recall.envs import FourRoomsEnv
            >>> model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(32,))
            >>> model.delta_head.support.shape
            torch.Size([5, 2])
        """
        arguments = model_arguments(env, observation_keys, delta_support, stop, is_init_key, device)
        return cls(**arguments, num_cells=num_cells, **kwargs)

    @property
    def observation_keys(self) -> list[NestedKey]:
        """Keys of the observation, in the order of concatenation."""
        return list(self.observation.keys)

    @property
    def next_observation_keys(self) -> list[NestedKey]:
        """The same keys under ``"next"``."""
        return [unravel_key(("next", key)) for key in self.observation.keys]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.observation.unit.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.observation.unit.dtype

    def log_prob(self, data: TensorDictBase) -> Tensor:
        """Log-probability of real transitions read backwards, ``log q(s_t, a_t | s_{t+1})``.

        Args:
            data (TensorDictBase): transitions of any batch shape ``*B`` with the model's
                ``in_keys``.

        Returns:
            Tensor: ``[*B]``; with a stop head it includes the probability of not stopping.

        Raises:
            KeyError: a key is missing.
            ValueError: empty data, wrong shapes, dtypes, devices, non-finite or too large values.
        """
        log_prob = torch.stack(list(self.step_log_prob(*self.read(data)).values())).sum(0)
        return check_not_nan("log_prob", log_prob)

    def read(
        self,
        data: TensorDictBase,
        *,
        observation_keys: NestedKey | Sequence[NestedKey] | None = None,
        action_key: NestedKey | list[NestedKey] | None = None,
        require_finite: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read real transitions as flat tensors.

        Args:
            data (TensorDictBase): transitions of any batch shape ``*B``.
            observation_keys (NestedKey or list of NestedKey, optional): instead of the model's own.
            action_key (NestedKey, optional): instead of the model's own.
            require_finite (bool): refuse non-finite values.

        Returns:
            tuple: state, action and next state.
        """
        if not isinstance(data, TensorDictBase):
            raise TypeError(f"data must be a TensorDict, got {type(data).__name__}.")
        if data.shape.numel() == 0:  # TensorDict.numel() is never 0
            raise ValueError(f"data is empty: batch size {tuple(data.shape)}, expected rows.")
        keys = self.observation_keys if observation_keys is None else as_keys(observation_keys)
        next_keys = [unravel_key(("next", key)) for key in keys]
        action_key = self.action_key if action_key is None else action_key
        return (
            self.observation.read(data, keys, require_finite=require_finite),
            self.action.read(data, action_key, self.device, require_finite=require_finite),
            self.observation.read(data, next_keys, require_finite=require_finite),
        )

    @torch.no_grad()
    def update_normalization(
        self, state: Tensor, action: Tensor, next_state: Tensor, mask: Tensor | None = None
    ) -> None:
        """Merge real transitions into the running statistics; `BacktrackLoss` does it in training.

        Args:
            state (Tensor): ``[N, size]``.
            action (Tensor): ``[N, A]`` or ``[N]`` indices.
            next_state (Tensor): ``[N, size]``.
            mask (Tensor, optional): ``[N]`` bool, True = use the row.
        """
        if self.observation.normalizer is not None:
            self.observation.normalizer.update(next_state, mask)
        normalizer: Any = getattr(self.delta_head, "normalizer", None)
        if normalizer is not None:
            normalizer.update(state - next_state, mask)
        self.action.update_normalization(action, mask)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the log-probability of each factor of the real steps under ``"backtrack"``."""
        terms = self.step_log_prob(*self.read(tensordict))
        for name, value in terms.items():
            tensordict.set(("backtrack", f"{name}_log_prob"), value)
        return tensordict

    def reset_parameters_recursive(self) -> None:  # pyright: ignore
        """Draw new parameters for all networks; the running statistics stay."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        start_heads(self)
