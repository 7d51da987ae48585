"""What tests of losses share: models, policies, transitions, traces with masks."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.data import Categorical, OneHot, Unbounded
from torchrl.modules import IndependentNormal, OneHotCategorical, ProbabilisticActor, TanhNormal

from torchrl_recall import BacktrackModel

WIDTH, ACTIONS, CLASSES = 3, 2, 4
SPECS = {
    "tanh": ACTIONS,
    "normal": Unbounded((ACTIONS,)),
    "categorical": Categorical(CLASSES),
    "one_hot": OneHot(CLASSES, dtype=torch.float32),
}
KINDS = list(SPECS)


def make_model(action=ACTIONS, observation=WIDTH, **kwargs):
    return BacktrackModel(observation, action, num_cells=(8,), **kwargs)


def make_actor(kind="tanh", keys=("observation",), **kwargs):
    """A policy of one hidden layer."""

    def network(width, *rest):
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, width), *rest)

    if kind in ("tanh", "normal"):
        net = TensorDictModule(
            network(2 * ACTIONS, NormalParamExtractor()), list(keys), ["loc", "scale"]
        )
        cls, names = (TanhNormal if kind == "tanh" else IndependentNormal), ["loc", "scale"]
    else:
        net = TensorDictModule(network(CLASSES), list(keys), ["logits"])
        classes = {"categorical": D.Categorical, "one_hot": OneHotCategorical}
        cls, names = classes.get(kind, D.OneHotCategorical), ["logits"]
    return ProbabilisticActor(net, names, distribution_class=cls, **kwargs)


def make_action(kind, batch):
    if kind in ("tanh", "normal"):
        return torch.rand(*batch, ACTIONS) * 1.9 - 0.95
    index = torch.randint(CLASSES, batch)
    return index if kind == "categorical" else nn.functional.one_hot(index, CLASSES).float()


def transitions(*batch, kind="tanh"):
    observation = torch.randn(*batch, WIDTH) * 2 + 1
    following = observation + torch.randn(*batch, WIDTH) * torch.tensor([0.1, 1.0, 3.0])
    data = {"observation": observation, "action": make_action(kind, batch)}
    return TensorDict({**data, "next": {"observation": following}}, batch)


def recall(*batch, kind="tanh", mask=True):
    """A batch with traces, some of whose steps are masked."""
    trace = transitions(*batch, kind=kind)
    kept = torch.rand(batch) < 0.7 if mask else torch.ones(batch, dtype=torch.bool)
    if batch and mask:
        kept.view(-1)[:2] = torch.tensor([True, False])
    trace["collector", "mask"] = kept
    return TensorDict({"trace": trace}, batch[:-1])


def steps(data):
    """The steps that the mask keeps, as ordinary transitions."""
    trace = data["trace"].reshape(-1)
    return trace[trace["collector", "mask"]].exclude("collector")


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def same(a, b):
    return bool((a == b).all())


def close(a, b, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(a, b, check_dtype=False, rtol=rtol, atol=atol)
