"""Observations read into flat states and back, their features, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)

from torchrl_recall.model.observation import ObservationCodec

F32, F64 = torch.float32, torch.float64

# Name: the specs, and the size of a flat state.
KINDS = {
    "size": ({"observation": 3}, 3),
    "scalar": ({"x": Unbounded(())}, 1),
    "bounded": ({"x": Bounded(-1, 2, (4,))}, 4),
    "image": ({"x": Unbounded((2, 3, 2))}, 12),
    "several": ({"b": Unbounded((2,)), "a": Bounded(0, 1, (2, 2)), "c": Unbounded(())}, 7),
    "nested": ({("agent", "state"): 2, ("world", "deep", "x"): Unbounded((3,))}, 5),
    "multi_categorical": ({"cell": MultiCategorical([3, 5])}, 2),
    "categorical": ({"n": Categorical(7)}, 1),
    "categorical_column": ({"n": Categorical(7, shape=(1,))}, 1),
    "categorical_vector": ({"n": Categorical(4, shape=(3,))}, 3),
    "categorical_matrix": ({"n": Categorical(3, shape=(2, 2))}, 4),
    "binary": ({"n": Binary(3)}, 3),
    "categorical_bool": ({"n": Categorical(2, dtype=torch.bool)}, 1),
    "categorical_int32": ({"n": Categorical(6, dtype=torch.int32)}, 1),
    "one_hot_bool": ({"n": OneHot(6)}, 1),
    "one_hot_int64": ({"n": OneHot(6, dtype=torch.int64)}, 1),
    "one_hot_float": ({"n": OneHot(6, dtype=torch.float32)}, 1),
    "several_discrete": (
        {"n": OneHot(3), ("in", "cell"): MultiCategorical([2, 4]), "m": Categorical(5)},
        4,
    ),
}


def make_data(observations, batch):
    torch.manual_seed(0)
    data = TensorDict({}, batch)
    for key, spec in observations.items():
        spec = Unbounded((spec,)) if isinstance(spec, int) else spec
        data.set(key, spec.expand(*batch, *spec.shape).rand() if batch else spec.rand())
    return data


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_restores_what_it_read(kind, batch):
    observations, size = KINDS[kind]
    codec = ObservationCodec(observations, dtype=F32)
    data = make_data(observations, batch)
    state = codec.read(data)
    assert codec.size == size
    assert state.shape == (*batch, size)
    assert state.dtype == (torch.int64 if codec.is_discrete else F32)
    restored = codec.restore(state)
    assert list(restored) == codec.keys
    for key, value in restored.items():
        assert value.dtype == data[key].dtype
        assert torch.equal(value, data[key])


@pytest.mark.parametrize("kind", KINDS)
def test_flatten_reads_a_tensor_dict_or_a_mapping_alike(kind):
    observations, _ = KINDS[kind]
    codec = ObservationCodec(observations, dtype=F32)
    data = make_data(observations, (5,))
    state = codec.read(data)
    mapping = {key: data[key] for key in codec.keys}
    assert torch.equal(codec.flatten(data, "x"), state)
    assert torch.equal(codec.flatten(mapping, "x"), state)
    if len(codec.keys) == 1:
        assert torch.equal(codec.flatten(data[codec.keys[0]], "x"), state)
    elif codec.is_discrete:
        with pytest.raises(TypeError, match="start must be a TensorDict or mapping"):
            codec.flatten(data["m"], "start")
    else:
        assert torch.equal(codec.flatten(state, "x"), state)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_kind_says(kind):
    observations, _ = KINDS[kind]
    codec = ObservationCodec(observations, dtype=F32)
    state = codec.read(make_data(observations, (6,)))
    features = codec(state)
    assert features.shape == (6, codec.feature_size)
    assert features.dtype == F32
    if not codec.is_discrete:
        assert torch.equal(features, state)  # no statistics yet
        return
    parts = [torch.nn.functional.one_hot(state[:, i], n) for i, n in enumerate(codec.cardinality)]
    if codec.size > 1:
        joint = state[:, 0]
        for i, n in enumerate(codec.cardinality[1:], 1):
            joint = joint * n + state[:, i]
        assert torch.equal(codec.joint_index(state), joint)
        assert torch.equal(codec.from_joint_index(joint), state)
        parts.append(torch.nn.functional.one_hot(joint, codec.num_states))
    assert torch.equal(features, torch.cat(parts, -1).float())


def test_every_joint_state_has_its_own_index():
    codec = ObservationCodec({"cell": MultiCategorical([2, 3, 4])}, dtype=F32)
    states = codec.from_joint_index(torch.arange(24))
    assert states[:6].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0], [0, 1, 1]]
    assert torch.equal(codec.joint_index(states), torch.arange(24))


def test_large_spaces_have_no_joint_code():
    small = ObservationCodec({"cell": MultiCategorical([32, 32])}, dtype=F32)
    large = ObservationCodec({"cell": MultiCategorical([32, 33])}, dtype=F32)
    assert small.feature_size == 64 + 1024
    assert large.feature_size == 65
    assert large(torch.tensor([31, 32])).nonzero().flatten().tolist() == [31, 64]


def test_normalises_by_its_statistics():
    codec = ObservationCodec({"x": 2}, dtype=F64)
    codec.normalizer.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=F64))
    features = codec(torch.tensor([[2.0, 6.0]], dtype=F64))
    assert features.tolist() == [[0.0, 2.0]]


def test_reads_other_keys_in_the_order_of_its_own():
    codec = ObservationCodec({"b": 1, "a": 1}, dtype=F32)
    data = TensorDict({"x": torch.tensor([[1.0]]), "y": torch.tensor([[2.0]])}, [1])
    assert codec.read(data, ["x", "y"]).tolist() == [[1.0, 2.0]]
    assert codec.read(data, ["y", "x"]).tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (3, torch.zeros(5, 4), r"'x' has shape \(5, 4\)"),
        (3, torch.zeros(5), r"'x' has shape \(5,\)"),
        (Unbounded((2, 2)), torch.zeros(5, 4), r"'x' has shape \(5, 4\)"),
        (Unbounded(()), torch.zeros(5, 1), r"'x' has shape \(5, 1\)"),
        (3, torch.zeros(5, 3, dtype=F64), "'x' has dtype torch.float64"),
        (3, torch.zeros(5, 3, dtype=torch.int64), "'x' has dtype torch.int64"),
        (3, torch.full((5, 3), torch.nan), "'x' must be finite, got 15 "),
        (3, torch.full((5, 3), torch.inf), "'x' must be finite, got 15 "),
        (3, torch.zeros(5, 3, device="meta"), "'x' is on device meta"),
        (Categorical(4), torch.zeros(5), "'x' must hold integers"),
        (Categorical(4), torch.full((5,), 4), "'x' must lie in .* got 4 to 4"),
        (Categorical(4), torch.full((5,), -1), "'x' must lie in .* got -1 to -1"),
        (Categorical(4), torch.zeros(5, 1, dtype=torch.int64), r"'x' has shape \(5, 1\)"),
        (MultiCategorical([2, 3]), torch.tensor([[1, 3]] * 5), "'x' must lie in"),
        (MultiCategorical([2, 3]), torch.tensor([[1]] * 5), r"'x' has shape \(5, 1\)"),
        (Categorical(3, shape=(2, 2)), torch.full((5, 2, 2), 3), "'x' must lie in"),
        (OneHot(3), torch.zeros(5, 3, dtype=torch.bool), "'x' must be one-hot"),
        (OneHot(3), torch.ones(5, 3, dtype=torch.bool), "'x' must be one-hot"),
        (OneHot(2, dtype=F32), torch.full((5, 2), 0.5), "'x' must be one-hot"),
        (OneHot(3, dtype=F32), torch.tensor([[1.0, 1.0, -1.0]] * 5), "'x' must be one-hot"),
        (OneHot(3, dtype=F32), torch.full((5, 3), torch.nan), "'x' must be one-hot"),
        (OneHot(3), torch.ones(5, 4, dtype=torch.bool), r"'x' has shape \(5, 4\)"),
        (OneHot(3), torch.ones(5, 3, dtype=torch.bool, device="meta"), "'x' is on device meta"),
    ],
)
def test_refuses_values_by_name(spec, value, message):
    codec = ObservationCodec({"x": spec}, dtype=F32)
    data = TensorDict({"x": value}, [5])
    with pytest.raises(ValueError, match=message):
        codec.read(data)
    if value.shape != (5, 1):  # without a TensorDict those may be a batch
        with pytest.raises(ValueError, match=r"^start "):
            codec.flatten(value.unsqueeze(0), "start")


def test_non_finite_values_pass_where_asked():
    codec = ObservationCodec({"x": 1}, dtype=F32)
    data = TensorDict({"x": torch.tensor([[torch.nan], [1.0]])}, [2])
    state = codec.read(data, require_finite=False)
    assert state[1].tolist() == [1.0]
    assert state[0].isnan().all()


def test_refuses_missing_keys():
    codec = ObservationCodec({"a": 1, ("n", "b"): 1}, dtype=F32)
    data = TensorDict({"a": torch.zeros(5, 1), "other": torch.zeros(5)}, [5])
    with pytest.raises(KeyError, match=r"\('n', 'b'\).* is missing .*other"):
        codec.read(data)
    with pytest.raises(KeyError, match="start lacks"):
        codec.flatten({"a": torch.zeros(5, 1)}, "start")


@pytest.mark.parametrize("value", [None, [1.0, 2.0], 3.0])
def test_refuses_what_is_no_tensor(value):
    codec = ObservationCodec({"a": 2}, dtype=F32)
    with pytest.raises(TypeError, match="start must be a tensor"):
        codec.flatten(value, "start")


@pytest.mark.parametrize(
    ("observations", "error", "message"),
    [
        ({}, ValueError, "observation must name at least one key"),
        ({"a": 2, "b": Categorical(3)}, ValueError, "mixes continuous and discrete"),
        ({"a": MultiOneHot([2, 3])}, TypeError, "observation 'a' is a MultiOneHot"),
        ({"a": Unbounded((2,), dtype=torch.int64)}, TypeError, "observation 'a' is a Unbounded"),
        ({"a": 0}, ValueError, r"observation\['a'\] must be at least 1"),
        ({"a": True}, TypeError, r"observation\['a'\] must be an int"),
        ({"a": 2.0}, TypeError, "observation 'a' is a float"),
        ({"a": None}, TypeError, "observation 'a' is a NoneType"),
    ],
)
def test_refuses_specs(observations, error, message):
    with pytest.raises(error, match=message):
        ObservationCodec(observations, dtype=F32)
