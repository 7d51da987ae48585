"""`EncoderTransform`: latents of pixels and of mixed observations, for a model that walks in them.

A backtracking model predicts the change of a state of moderate size and one kind. For images, and
for observations with continuous and discrete keys, an encoder makes such a state; the model, its
traces and the policy's head live in latents:

    buffer = TensorDictReplayBuffer(
        storage=...,
        transform=Compose(EncoderTransform(encoder), BacktrackTransform(model, num_steps=8)))

    batch = buffer.sample()
    BacktrackLoss(model)(batch)         # fits the model to today's latents
    RecallTraceLoss(head)(batch)        # moves the head; a trace holds latents, not images

where ``encoder`` is a ``TensorDictModule`` such as ``["pixels"] -> ["latent"]``, ``model`` a
``BacktrackModel(latent_size, action, observation_keys=["latent"])`` and ``head`` the part of the
policy behind the encoder. The encoder learns from the RL loss, on real images, and from nothing
here: no gradient leaves the transform. (Fitted by the model's likelihood, it would collapse: what
is easiest to predict is a constant.)

As the encoder learns, latents move, and the model and its running statistics run after them. What
helps: latents of bounded size (end with ``Tanh`` or ``LayerNorm``), and an averaged copy of the
encoder for the transform *and* for the head that imitates.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.transforms import Transform

from torchrl_recall.checks import check_network
from torchrl_recall.model.observation import sorted_keys


class EncoderTransform(Transform):
    """Writes latents of the observations and of the next ones into what a buffer samples.

    Put it before `BacktrackTransform`, in a replay buffer or in the ``postproc`` of a collector.
    On an environment it does nothing. The encoder is shared, not owned: it stays out of
    ``parameters()``, ``state_dict()``, ``to()`` and ``eval()`` of the transform, and is used as it
    is at each call, in the mode it is in.

    Args:
        encoder (TensorDictModuleBase): from observation keys to latent keys, both as at the root of
            the data. It sees one batch dimension, the observations and next ones one after the
            other.

    Raises:
        TypeError: not a TensorDict module.

    Returned data have the latents at the encoder's out keys and at the same keys under ``"next"``.
    A batch without the (current) observations gets those of the next ones alone.

    Source: latent-space models after Hafner et al., *Dream to Control*, ICLR 2020,
    https://arxiv.org/abs/1912.01603; here for backward walks.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torch import nn
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform
        >>> from torchrl_recall.encoder import EncoderTransform
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5), nn.Tanh())
        >>> encode = EncoderTransform(TensorDictModule(net, ["pixels"], ["latent"]))
        >>> model = BacktrackModel(5, 2, num_cells=(32,), observation_keys=["latent"])
        >>> recall = BacktrackTransform(model, num_steps=8)
        >>> data = TensorDict({"pixels": torch.rand(7, 3, 8, 8)}, [7])
        >>> data["next", "pixels"] = torch.rand(7, 3, 8, 8)
        >>> recall(encode(data))["trace", "latent"].shape
        torch.Size([7, 8, 5])
    """

    encoder: TensorDictModuleBase

    def __init__(self, encoder: TensorDictModuleBase) -> None:
        check_network("encoder", encoder)
        super().__init__(
            in_keys=[unravel_key(("next", key)) for key in encoder.in_keys],
            out_keys=[unravel_key(("next", key)) for key in encoder.out_keys],
        )
        # In __dict__, or buffers would switch it to eval, move it and save it a second time.
        self.__dict__["encoder"] = encoder

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the latents of every row of ``tensordict``.

        Args:
            tensordict (TensorDictBase): transitions, any batch shape ``*B``.

        Returns:
            TensorDictBase: a shallow copy with the latents.

        Raises:
            KeyError: an observation is missing under ``"next"``, unless ``missing_tolerance`` is
                set, or the encoder does not write its out keys.
        """
        keys = self.encoder.in_keys
        missing = [key for key in self.in_keys if tensordict.get(key, default=None) is None]
        if missing:
            if self.missing_tolerance:
                return tensordict
            raise KeyError(
                f"in_keys {missing} are missing from the data, which has {sorted_keys(tensordict)}."
            )
        following = tensordict.get("next").select(*keys).reshape(-1)
        has_current = all(tensordict.get(key, default=None) is not None for key in keys)
        parts = [following]
        if has_current:
            parts.append(tensordict.select(*keys).reshape(-1))
        # Inside forward: grad mode is thread-local, and prefetch threads start with it on.
        with torch.no_grad():
            encoded: Any = self.encoder(torch.cat(parts) if has_current else following.copy())
        latents = {key: encoded.get(key, default=None) for key in self.encoder.out_keys}
        unwritten = [key for key, value in latents.items() if value is None]
        if unwritten:
            raise KeyError(f"the encoder does not write its out_keys {unwritten}.")
        # A copy: rows of a list-like storage may be handed out themselves.
        tensordict = tensordict.copy()
        count, shape = following.numel(), tensordict.shape
        for key, value in latents.items():
            event = value.shape[1:]
            tensordict.set(("next", key), value[:count].reshape(*shape, *event))
            if has_current:
                tensordict.set(key, value[count:].reshape(*shape, *event))
        return tensordict

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict

    def transform_output_spec(self, output_spec: Any) -> Any:
        """Leave the environment's specs as they are: there the transform does nothing."""
        return output_spec
