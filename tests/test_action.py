"""Actions read into the model's form and back, the head that fits the spec, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded

from torchrl_recall.model.action import ActionCodec
from torchrl_recall.model.heads import CategoricalHead, NormalHead, TanhNormalHead

F32, F64 = torch.float32, torch.float64
CPU = torch.device("cpu")
RANGE = (-5.0, 2.0)

# Name: spec, head, event shape inside the model.
KINDS = {
    "size": (2, TanhNormalHead, (2,)),
    "bounded": (Bounded(-2, 3, (3,)), TanhNormalHead, (3,)),
    "bounded_matrix": (Bounded(-1, 1, (2, 2)), TanhNormalHead, (4,)),
    "bounded_scalar": (Bounded(0, 1, ()), TanhNormalHead, (1,)),
    "unbounded": (Unbounded((3,)), NormalHead, (3,)),
    "infinite_bounds": (Bounded(-torch.inf, torch.inf, (2,)), NormalHead, (2,)),
    "categorical": (Categorical(5), CategoricalHead, ()),
    "categorical_column": (Categorical(5, shape=(1,)), CategoricalHead, ()),
    "categorical_int32": (Categorical(5, dtype=torch.int32), CategoricalHead, ()),
    "one_hot_bool": (OneHot(5), CategoricalHead, ()),
    "one_hot_int64": (OneHot(5, dtype=torch.int64), CategoricalHead, ()),
    "one_hot_float": (OneHot(5, dtype=F32), CategoricalHead, ()),
}


def make_codec(action, dtype=F32):
    return ActionCodec(action, RANGE, dtype=dtype)


def make_data(action, batch):
    torch.manual_seed(0)
    spec = Bounded(-1, 1, (action,)) if isinstance(action, int) else action
    if isinstance(spec, Bounded) and not spec.space.low.isfinite().all():
        spec = Unbounded(spec.shape)
    value = spec.expand(*batch, *spec.shape).rand() if batch else spec.rand()
    return TensorDict({"action": value}, batch)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_restores_what_it_read(kind, batch):
    action, head, event = KINDS[kind]
    codec = make_codec(action)
    assert type(codec.head) is head
    data = make_data(action, batch)
    flat = codec.read(data, "action", CPU)
    assert flat.shape == (*batch, *event)
    assert flat.dtype == (torch.int64 if head is CategoricalHead else F32)
    restored = codec.restore(flat)
    assert restored.dtype == data["action"].dtype
    assert torch.equal(restored, data["action"])


def test_reads_a_nested_key():
    data = TensorDict({"agent": {"action": torch.ones(4, 2)}}, [4])
    assert make_codec(2).read(data, ("agent", "action"), CPU).tolist() == [[1.0, 1.0]] * 4


@pytest.mark.parametrize("action", [2, Unbounded((2,))])
def test_the_dtype_follows_the_module(action):
    codec = make_codec(action).to(F64)
    data = TensorDict({"action": torch.full((4, 2), 0.1, dtype=F64)}, [4])
    assert torch.equal(codec.read(data, "action", CPU), data["action"])
    # What the spec promises is taken, and cast.
    as_spec = codec.read(data.float(), "action", CPU)
    assert torch.equal(as_spec, data["action"].float().double())
    with pytest.raises(ValueError, match=r"'action' has dtype torch\.float16.*torch\.float64"):
        codec.read(data.half(), "action", CPU)


def test_bounds_are_the_specs():
    head = make_codec(Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))).head
    assert head.middle.tolist() == [0.0, 5.0]
    assert head.half_range.tolist() == [2.0, 5.0]


def test_only_unbounded_actions_have_statistics():
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    unbounded = make_codec(Unbounded((2,)))
    unbounded.update_normalization(rows, torch.tensor([True, True, False]))
    assert unbounded.head.normalizer.mean.tolist() == [2.0, 4.0]
    bounded = make_codec(2)
    before = {name: value.clone() for name, value in bounded.state_dict().items()}
    bounded.update_normalization(rows)
    assert all(torch.equal(value, before[name]) for name, value in bounded.state_dict().items())


@pytest.mark.parametrize(
    ("action", "value", "message"),
    [
        (2, torch.zeros(5, 3), r"'action' has shape \(5, 3\), expected \(5, 2\)"),
        (2, torch.zeros(5), r"'action' has shape \(5,\), expected \(5, 2\)"),
        (2, torch.zeros(5, 2, dtype=F64), "'action' has dtype torch.float64"),
        (2, torch.zeros(5, 2, dtype=torch.int64), "'action' has dtype torch.int64"),
        (2, torch.full((5, 2), torch.nan), "'action' must be finite"),
        (Unbounded((2,)), torch.full((5, 2), torch.inf), "'action' must be finite"),
        (2, torch.zeros(5, 2, device="meta"), "'action' is on device meta"),
        (Categorical(3), torch.zeros(5), "'action' must hold integers"),
        (Categorical(3), torch.zeros(5, dtype=torch.bool), "'action' must hold integers"),
        (Categorical(3), torch.full((5,), 3), "'action' must lie in 0 to 2, got 3 to 3"),
        (Categorical(3), torch.full((5,), -1), "'action' must lie in 0 to 2, got -1 to -1"),
        (Categorical(3), torch.zeros(5, 1, dtype=torch.int64), r"'action' has shape \(5, 1\)"),
        (OneHot(3), torch.zeros(5, 3, dtype=torch.bool), "'action' must be one-hot"),
        (OneHot(3), torch.ones(5, 3, dtype=torch.bool), "'action' must be one-hot"),
        (OneHot(2, dtype=F32), torch.full((5, 2), 0.5), "'action' must be one-hot"),
        (OneHot(3, dtype=F32), torch.full((5, 3), torch.nan), "'action' must be one-hot"),
        (OneHot(3), torch.ones(5, 2, dtype=torch.bool), r"'action' has shape \(5, 2\)"),
    ],
)
def test_refuses_values_by_name(action, value, message):
    with pytest.raises(ValueError, match=message):
        make_codec(action).read(TensorDict({"action": value}, [5]), "action", CPU)


def test_non_finite_values_pass_where_asked():
    data = TensorDict({"action": torch.full((5, 2), torch.nan)}, [5])
    flat = make_codec(2).read(data, "action", CPU, require_finite=False)
    assert flat.shape == (5, 2)
    assert flat.isnan().all()


def test_refuses_a_missing_key():
    data = TensorDict({"act": torch.zeros(5, 2)}, [5])
    with pytest.raises(KeyError, match=r"'action' is missing .*act"):
        make_codec(2).read(data, "action", CPU)


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (Unbounded((2,), dtype=torch.int64), TypeError, "action is a Unbounded"),
        (Bounded(0, 3, (2,), dtype=torch.int64), TypeError, "action is a Bounded"),
        (2.0, TypeError, "action is a float"),
        (None, TypeError, "action is a NoneType"),
        (True, TypeError, "action must be an int"),
        (0, ValueError, "action must be at least 1"),
        (Bounded(0, torch.inf, (2,)), ValueError, "all finite or all infinite"),
        (
            Bounded(torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, torch.inf])),
            ValueError,
            "all finite or all infinite",
        ),
        (Bounded(torch.zeros(2), torch.tensor([1.0, 0.0])), ValueError, "action has low >= high"),
    ],
)
def test_refuses_specs(action, error, message):
    with pytest.raises(error, match=message):
        make_codec(action)
