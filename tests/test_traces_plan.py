"""The packed form of a model is never stale, however the model has changed."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from trace_data import F32, F64, assert_same, walk

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface

pytestmark = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)


def optimizer_step(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.action_parameters(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def fused_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()


def numpy_write(model):
    next(iter(model.delta_network)).weight.detach().numpy()[0, 0] += 1


def shifted(module, name):
    module = copy.deepcopy(module)
    getattr(module, name).add_(1)
    return module


def wider(model):
    first, _, second, *_ = model.delta_network
    first.weight, first.bias = (nn.Parameter(torch.randn(24, *x)) for x in ((5,), ()))
    second.weight = nn.Parameter(torch.randn(16, 24))


def last_to_the_end(model):
    modules = model.delta_network._modules
    modules["3"] = modules.pop("3")


def expanded(model):
    bias = model.delta_network[0].bias
    bias.data = bias.data[:1].expand(16)


CHANGES = {
    "optimizer": optimizer_step,
    "foreach optimizer": fused_step,
    "data": lambda model: next(iter(model.action_network)).bias.data.add_(0.5),
    "numpy": numpy_write,
    "set": lambda model: setattr(
        next(iter(model.action_network)), "weight", nn.Parameter(torch.randn(16, 3))
    ),
    "data set": lambda model: setattr(
        next(iter(model.action_network)).weight, "data", torch.randn(16, 3)
    ),
    "layer": lambda model: model.delta_network.__setitem__(4, nn.Linear(16, 6)),
    "activation": lambda model: [model.delta_network.__setitem__(i, nn.Tanh()) for i in (1, 3)],
    "network": lambda model: setattr(
        model, "action_network", nn.Sequential(nn.Linear(3, 20), nn.SiLU(), nn.Linear(20, 4))
    ),
    "load": lambda model: model.load_state_dict(
        {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    ),
    "load assign": lambda model: model.load_state_dict(
        {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()},
        assign=True,
    ),
    "statistics": lambda model: model.update_normalization(
        torch.randn(8, 3), torch.rand(8, 2), torch.randn(8, 3) + 2
    ),
    "reset": lambda model: model.reset_parameters_recursive(),
    "scale range": lambda model: setattr(model.delta_head, "log_scale_range", (-3.0, 1.0)),
    "floor": lambda model: setattr(model.observation.normalizer, "floor", 3.0),
    "transposed": lambda model: setattr(
        list(model.delta_network)[2].weight, "data", list(model.delta_network)[2].weight.data.t()
    ),
    "expanded": expanded,
    "order": last_to_the_end,
    "statistics set": lambda model: setattr(
        model.delta_head, "normalizer", shifted(model.delta_head.normalizer, "mean")
    ),
    "observation statistics set": lambda model: setattr(
        model.observation, "normalizer", shifted(model.observation.normalizer, "mean")
    ),
    "head set": lambda model: setattr(model.action, "head", shifted(model.action.head, "middle")),
    "widths": wider,
    "forward": lambda model: setattr(
        model.delta_network, "forward", lambda x: nn.Sequential.forward(model.delta_network, 2 * x)
    ),
    "observation hook": lambda model: model.observation.register_forward_hook(
        lambda module, inputs, output: output + 1
    ),
    "double": lambda model: model.double(),
    "double and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_seen(change):
    torch.manual_seed(0)
    model = BacktrackModel(3, 2, num_cells=(16, 16))
    before = walk(model)
    CHANGES[change](model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a transposed weight walks in torch
        after = walk(model)
    # The eager form has no way around what was put upon a module.
    other = "reference" if change in ("forward", "observation hook", "order") else "eager"
    assert_same(after, walk(model, other), 1e-5)
    if change != "double and back" and after["observation"].dtype == F32:
        same = all(torch.equal(v, after[k]) for k, v in before.items(True, True))
        assert not same


def test_a_hook_or_a_parametrization_is_seen():
    model = BacktrackModel(3, 2, num_cells=(16,))
    walk(model)
    layer = next(iter(model.action_network))
    handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match="falls back to the reference backend.*hooks"):
        hooked = walk(model)
    assert_same(hooked, walk(model, "reference"), 0)
    handle.remove()
    assert_same(walk(model), walk(model, "native"), 0)
    handle = model.delta_network.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match=r"delta_network has hooks"):
        assert_same(walk(model), walk(model, "reference"), 0)
    handle.remove()
    nn.utils.parametrizations.spectral_norm(layer)
    with pytest.warns(UserWarning, match="falls back to the reference backend"):
        normed = walk(model.eval())
    assert_same(normed, walk(model, "reference"), 0)


def test_settings_of_an_activation_and_a_lost_bias_are_seen():
    model = BacktrackModel(3, 2, num_cells=(16,), activation_class=nn.LeakyReLU)
    before = walk(model)
    for network in (model.action_network, model.delta_network):
        network[1].negative_slope = 0.7
    assert_same(walk(model), walk(model, "eager"), 1e-5)
    assert not torch.equal(walk(model)["action"], before["action"])
    model.action_network[0].bias = None
    with pytest.warns(UserWarning, match="falls back to the reference backend.*without bias"):
        traces = walk(model)
    assert_same(traces, walk(model, "reference"), 0)


def test_one_activation_module_for_all_layers():
    activation = nn.ReLU()
    model = BacktrackModel(3, 2, num_cells=(16, 16))
    model.action_network[1] = model.action_network[3] = activation
    assert_same(walk(model, "native"), walk(model, "eager"), 1e-5)


def test_copies_pickles_and_garbage():
    model = BacktrackModel(3, 2, num_cells=(16,))
    traces = walk(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(walk(twin), traces, 0)
        next(iter(twin.parameters())).data.add_(1)
        assert_same(walk(model), traces, 0)
    reference = weakref.ref(model)
    del model
    assert reference() is None


def test_the_default_device_and_dtype_of_the_caller_do_not_matter():
    model = BacktrackModel(3, 2, num_cells=(16,))
    start = torch.zeros(5, 3)
    expected = sample_traces(model, start, num_steps=2, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    torch.set_default_dtype(F64)
    try:
        with torch.device("meta"):
            trace = sample_traces(
                twin, start, num_steps=2, generator=torch.Generator("cpu").manual_seed(1)
            )
    finally:
        torch.set_default_dtype(F32)
    assert_same(trace, expected, 0)
