"""What holds of every loss of TorchRL, as a base class of tests."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from loss_data import close, gradients, same


class LossContract:
    """What holds of any loss of TorchRL; a subclass says how to make one and what it reads."""

    def make(self, **kwargs):
        raise NotImplementedError

    def data(self, *batch):
        raise NotImplementedError

    def networks(self, loss):
        """The modules as the user knows them."""
        raise NotImplementedError

    def total(self, out):
        return sum(value for key, value in out.items() if key.startswith("loss_"))

    def test_in_keys_are_enough(self):
        loss, data = self.make(), self.data(4)
        alone = data.select(*loss.in_keys)
        assert same(self.total(loss.eval()(alone)), self.total(loss(alone.clone())))
        for key in loss.in_keys:
            with pytest.raises(KeyError, match=str(key[-1] if isinstance(key, tuple) else key)):
                loss(alone.exclude(key))
        loss.in_keys = ["other"]
        assert loss.in_keys == ["other"]

    def test_dispatch(self):
        loss, data = self.make().eval(), self.data(4).exclude(("trace", "collector"))
        arguments = {"_".join([k] if isinstance(k, str) else k): data[k] for k in loss.in_keys}
        expected = loss(data)
        got = loss(**arguments)
        assert len(got) == len(loss.out_keys)
        for value, key in zip(got, loss.out_keys, strict=True):
            close(value, expected[key])
        name = loss.out_keys[0]
        loss.select_out_keys(name)
        close(loss(**arguments), expected[name])

    def test_out_keys_and_detached_logs(self):
        loss = self.make()
        out = loss(self.data(4))
        assert list(out.keys()) == loss.out_keys
        assert out.batch_size == ()
        for key, value in out.items():
            assert value.shape == ()
            assert torch.isfinite(value)
            assert value.requires_grad == key.startswith("loss_")

    def test_reductions(self):
        data = self.data(4)
        out = {r: self.make(reduction=r).eval() for r in ("mean", "sum", "none")}
        for other in out.values():
            other.load_state_dict(out["mean"].state_dict())
        results = {r: loss(data) for r, loss in out.items()}
        for key in out["mean"].out_keys:
            if not key.startswith("loss_"):
                close(results["mean"][key], results["none"][key])
                continue
            rows = results["none"][key]
            mask = self.mask(data, key)
            assert rows.shape == mask.shape
            assert same(rows[~mask], 0)
            close(results["sum"][key], rows.sum())
            close(results["mean"][key], rows.sum() / mask.sum())
        with pytest.raises(ValueError, match=r"reduction must be .*, got 'max'"):
            self.make(reduction="max")

    def test_input_is_not_changed(self):
        loss, data = self.make(), self.data(4)
        before, keys = data.clone(), set(data.keys(True, True))
        loss(data)
        data.lock_()
        loss(data)
        assert set(data.keys(True, True)) == keys
        assert same(data, before)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, copied):
        loss, data = self.make().eval(), self.data(4)
        other = copied(loss)
        close(self.total(other(data)), self.total(loss(data)))
        self.total(other(data)).backward()
        assert all(p.grad is None for p in loss.parameters())
        assert any(p.grad is not None for p in other.parameters())
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        optimizer.step()
        assert self.total(other(data)) != self.total(loss(data))
        other.set_keys(action=None)

    def test_state_dict(self):
        loss, data = self.make(), self.data(4)
        loss(data)
        other = self.make()
        assert self.total(other.eval()(data)) != self.total(loss.eval()(data))
        other.load_state_dict(loss.state_dict())
        assert same(self.total(other(data)), self.total(loss(data)))

    def test_float64(self):
        loss, data = self.make(), self.data(4)
        networks = self.networks(loss)
        parameters = [p for network in networks for p in network.parameters()]
        loss.to(torch.float64)
        out = loss(data.apply(lambda x: x.double() if x.is_floating_point() else x))
        assert all(value.dtype == torch.float64 for value in out.values())
        self.total(out).backward()
        assert all(p.dtype == torch.float64 for p in parameters)
        assert all(a is b for a, b in zip(parameters, self.parameters(loss), strict=True))
        assert all(p.grad is not None for p in parameters)

    def test_reset_parameters(self):
        loss = self.make()
        before = [p.clone() for p in loss.parameters()]
        loss.reset_parameters_recursive()
        assert all(not same(a, b) for a, b in zip(before, loss.parameters(), strict=True))

    def test_parameters_are_the_networks_own(self):
        loss = self.make()
        ours = {id(p) for p in loss.parameters()}
        assert ours == {id(p) for network in self.networks(loss) for p in network.parameters()}

    def parameters(self, loss):
        return [p for network in self.networks(loss) for p in network.parameters()]

    def test_unknown_key(self):
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            self.make().set_keys(reward="r")

    # tensordict reads a setting that torch 2.15 has retired; torch 2.13 warns of its own tracing.
    @pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules:FutureWarning")
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("batch", [(4,), (2, 3)])
    def test_compiled(self, batch):
        loss, data = self.make(), self.data(*batch)
        twin = copy.deepcopy(loss)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        out, expected = compiled(data), twin(data)
        for key in loss.out_keys:
            close(out[key], expected[key])
        self.total(out).backward()
        self.total(expected).backward()
        for a, b in zip(gradients(loss), gradients(twin), strict=True):
            close(a, b)
        for a, b in zip(loss.buffers(), twin.buffers(), strict=True):
            close(a, b)
