"""A linear-Gaussian world whose backward posterior is known, and a model that holds it exactly."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict
from torchrl.data import Unbounded

from torchrl_recall import BacktrackModel

F64 = torch.float64


class LinearGaussianWorld:
    """``D`` copies of ``x' = a x + b u + s_n e``; ``u ~ N(k x, s_u²)`` and ``x ~ N(0, s_x²)``."""

    a, b, k, s_x, s_u, s_n = 0.9, 0.5, -0.6, 1.5, 0.8, 0.3

    def __init__(self, size=2):
        self.size = size

    def transitions(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(3, n, self.size, generator=generator, dtype=F64)
        x = self.s_x * noise[0]
        u = self.k * x + self.s_u * noise[1]
        after = self.a * x + self.b * u + self.s_n * noise[2]
        return TensorDict({"observation": x, "action": u, "next": {"observation": after}}, [n])

    def covariance(self):
        """Of (x, u, x') of one copy, linear in its three noises."""
        x = torch.tensor([self.s_x, 0.0, 0.0], dtype=F64)
        u = self.k * x + torch.tensor([0.0, self.s_u, 0.0], dtype=F64)
        after = self.a * x + self.b * u + torch.tensor([0.0, 0.0, self.s_n], dtype=F64)
        rows = torch.stack([x, u, after])
        return rows @ rows.T

    def condition(self, target, given):
        """Gain and standard deviation of a variable given others."""
        c = self.covariance()
        gain = torch.linalg.solve(c[given][:, given], c[given, target])
        return gain, (c[target, target] - gain @ c[given, target]).sqrt()

    def exact_model(self, scale_factor=1.0, **options):
        """A model whose networks hold the posterior; the scale of Δ is off by ``scale_factor``.

        Two ReLU units an input, ``relu(x) - relu(-x)``, make a network linear.
        """
        n = self.size
        space = Unbounded((n,), dtype=F64)
        model = BacktrackModel(space, space, num_cells=(4 * n,), dtype=F64, **options)
        gain_u, std_u = self.condition(1, [2])
        gain_x, std_x = self.condition(0, [1, 2])
        eye = torch.eye(n, dtype=F64)
        # u = gain x'; Δ = x - x' = gain_0 u + (gain_1 - 1) x'; the network sees (x', u).
        delta_rows = torch.cat([(gain_x[1] - 1) * eye, gain_x[0] * eye], -1)
        for member in range(model.num_members):
            one = model.member(member)
            _linear(one.action_network, gain_u * eye, one.action.head, std_u)
            _linear(one.delta_network, delta_rows, one.delta_head, scale_factor * std_x)
        return model


@torch.no_grad()
def _linear(network, rows, head, std):
    for parameter in network.parameters():
        parameter.zero_()
    out, width = rows.shape
    network[0].weight[:width] = torch.eye(width, dtype=F64)
    network[0].weight[width : 2 * width] = -torch.eye(width, dtype=F64)
    components = getattr(head, "num_components", 1)
    for i in range(components):
        network[2].weight[i * out : (i + 1) * out, :width] = rows
        network[2].weight[i * out : (i + 1) * out, width : 2 * width] = -rows
    low, high = head.log_scale_range
    share = (math.log(std) - low) / (high - low)
    part = components * out
    network[2].bias[part : 2 * part] = math.log(share / (1 - share))
