"""The public names, their signatures, and that docstrings say all of them."""

from __future__ import annotations

import importlib
import inspect

import pytest
from public_api import (
    MODULES,
    SNAPSHOT,
    documented,
    function_of,
    methods,
    overrides_library,
    parameters,
    public,
    snapshot,
)

import torchrl_recall

PUBLIC = public()
CALLABLES = {
    **PUBLIC,
    **{
        f"{name}.{method}": function
        for name, value in PUBLIC.items()
        if inspect.isclass(value)
        for method, function in methods(value)
        if not isinstance(function, property)
    },
}


def test_the_public_names_and_signatures_are_the_committed_ones():
    assert snapshot() == SNAPSHOT.read_text(encoding="utf-8"), (
        "if the change is meant, run `python tests/public_api.py` and say so in the changelog"
    )


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_complete(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    missing = [each for each in module.__all__ if not hasattr(module, each)]
    assert not missing


def test_the_version_is_the_installed_one():
    metadata = pytest.importorskip("importlib.metadata")
    try:
        installed = metadata.version("torchrl-recall")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only on the path")
    assert torchrl_recall.__version__ == installed


@pytest.mark.parametrize("name", PUBLIC)
def test_there_is_an_example(name):
    assert "Examples:\n" in inspect.cleandoc(PUBLIC[name].__doc__)


@pytest.mark.parametrize("name", CALLABLES)
def test_all_parameters_are_documented_and_no_others(name):
    value = CALLABLES[name]
    said, taken = documented(value), [each.name for each in parameters(value)]
    owner, _, method = name.rpartition(".")
    if not said and owner in PUBLIC and overrides_library(PUBLIC[owner], method):
        return  # the library's own words hold
    assert sorted(said) == sorted(taken)


@pytest.mark.parametrize("name", CALLABLES)
def test_all_parameters_and_results_have_types(name):
    # Below the wrappers of TorchRL's `dispatch`, which name no types.
    value = inspect.unwrap(function_of(CALLABLES[name]))
    untyped = [p.name for p in parameters(value) if p.annotation is inspect.Parameter.empty]
    assert not untyped
    if not inspect.isclass(value):
        returned = inspect.signature(value).return_annotation
        assert returned is not inspect.Signature.empty


@pytest.mark.parametrize("name", CALLABLES)
def test_there_is_a_docstring_of_a_sentence(name):
    purpose = inspect.cleandoc(function_of(CALLABLES[name]).__doc__ or "").partition("\n\n")[0]
    assert purpose.rstrip().endswith(".")


TENSOR_WORDS = ("Tensor", "TensorDict", "TensorDictBase")


@pytest.mark.parametrize("name", CALLABLES)
def test_tensors_come_with_a_shape(name):
    """``name (Tensor)`` is followed by ``[...]``, a number of dimensions, or where to read on."""
    text = inspect.cleandoc(function_of(CALLABLES[name]).__doc__)
    for line_number, line in enumerate(lines := text.splitlines()):
        entry = line.strip()
        kind = entry.partition("(")[2].partition(")")[0].removesuffix(", optional")
        if line.startswith("    ") and ": " in entry and kind in TENSOR_WORDS:
            following = " ".join(lines[line_number : line_number + 3])
            assert any(word in following for word in ("[", "as for", "see", "batch", "scalar")), (
                line
            )
