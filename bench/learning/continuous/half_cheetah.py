"""Sparse HalfCheetah: several cheetahs as one TorchRL environment, reward beyond a distance."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from torchrl_recall.envs.seeded import SeededEnv

FRAME_SKIP = 5
RESET_NOISE = 0.1


class SparseHalfCheetahEnv(SeededEnv):
    """``HalfCheetah-v5`` with reward 1 on each step that ends beyond a distance, and 0 elsewhere.

    Gymnasium's own model file, frame skip and starts, stepped by MuJoCo without Gymnasium between:
    four times as quick. ``"observation"`` is Gymnasium's (17 numbers), ``"position"`` the x of the
    torso, which Gymnasium leaves out.

    Args:
        batch_size: number of cheetahs.
        distance: from where on a step is rewarded, metres.
        max_steps: steps after which an episode is truncated.
        seed: of the starts.
    """

    _stream = "SparseHalfCheetahEnv"

    def __init__(
        self,
        batch_size: tuple[int] = (1,),
        *,
        distance: float = 5.0,
        max_steps: int = 200,
        seed: int | None = None,
    ) -> None:
        import gymnasium.envs.mujoco

        mujoco: Any = importlib.import_module("mujoco")  # its stubs lack what is compiled
        super().__init__(device="cpu", batch_size=torch.Size(batch_size))
        self.distance, self.max_steps = distance, max_steps
        folder = Path(gymnasium.envs.mujoco.__file__).parent / "assets"
        self._mujoco = mujoco
        self._model = mujoco.MjModel.from_xml_path(str(folder / "half_cheetah.xml"))
        self._data = [mujoco.MjData(self._model) for _ in range(batch_size[0])]
        self._elapsed = torch.zeros(*batch_size, 1, dtype=torch.int64)
        column = torch.Size([*batch_size, 1])
        flag = Categorical(2, shape=column, dtype=torch.bool)
        self.observation_spec = Composite(
            {
                "observation": Unbounded(shape=torch.Size([*batch_size, 17])),
                "position": Unbounded(shape=column),
                "success": flag,
            },
            shape=self.batch_size,
        )
        self.action_spec = Bounded(-1.0, 1.0, shape=torch.Size([*batch_size, 6]))
        self.reward_spec = Unbounded(shape=column)
        ends = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(ends, shape=self.batch_size)
        self._make_generator(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        anew = None if tensordict is None else tensordict.get("_reset", None)
        rows = range(len(self._data)) if anew is None else anew.view(-1).nonzero().flatten()
        model = self._model
        for row in map(int, rows):
            data = self._data[row]
            self._mujoco.mj_resetData(model, data)
            place = torch.rand(model.nq, dtype=torch.float64, generator=self._generator)
            speed = torch.randn(model.nv, dtype=torch.float64, generator=self._generator)
            data.qpos[:] += RESET_NOISE * (2 * place.numpy() - 1)
            data.qvel[:] += RESET_NOISE * speed.numpy()
            self._mujoco.mj_forward(model, data)
            self._elapsed[row] = 0
        return self._read()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict["action"].clamp(-1, 1).double().numpy()
        for data, action in zip(self._data, actions, strict=True):
            data.ctrl[:] = action
            self._mujoco.mj_step(self._model, data, nstep=FRAME_SKIP)
        self._elapsed += 1
        read = self._read()
        truncated = self._elapsed >= self.max_steps
        read["reward"] = read["success"].float()
        read["terminated"] = torch.zeros_like(truncated)
        read["truncated"], read["done"] = truncated, truncated.clone()
        return read

    def _read(self) -> TensorDict:
        place = torch.from_numpy(np.stack([data.qpos for data in self._data])).float()
        speed = torch.from_numpy(np.stack([data.qvel for data in self._data])).float()
        return TensorDict(
            {
                "observation": torch.cat([place[:, 1:], speed], -1),
                "position": place[:, :1],
                "success": place[:, :1] >= self.distance,
            },
            self.batch_size,
        )
