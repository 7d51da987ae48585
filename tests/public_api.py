"""What is public: names, signatures, and what docstrings say of parameters.

`python tests/public_api.py` writes `public_api.txt`, which `test_public_api.py` holds the library
to: a change of a signature is then a change of that file, which a reader of the commit sees.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "torchrl_recall",
    "torchrl_recall.starts",
    "torchrl_recall.trace_masks",
    "torchrl_recall.support",
    "torchrl_recall.goals",
    "torchrl_recall.imitation",
    "torchrl_recall.traces",
    "torchrl_recall.temporal_distance",
    "torchrl_recall.diagnostics",
    "torchrl_recall.envs",
    "torchrl_recall.trainer",
    "torchrl_recall.checkpoint",
)
SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public() -> dict[str, Any]:
    """Return all public objects by name, each once, where a user imports it from."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if not any(value is other for other in found.values()):
                found[f"{module.__name__}.{name}"] = value
    return found


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class, or a base of ours, defines.

    What overrides a method of a library is documented there, if it says nothing of its own.
    """
    ours = [base for base in cls.__mro__ if base.__module__.startswith("torchrl_recall")]
    seen: set[str] = set()
    for base in ours:
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            if isinstance(value, (property, staticmethod, classmethod)) or inspect.isfunction(
                value
            ):
                seen.add(name)
                yield name, value


def overrides_library(cls: type, name: str) -> bool:
    """Tell whether a class outside the package has a method of this name, too."""
    return any(
        name in vars(base)
        for base in cls.__mro__
        if not base.__module__.startswith("torchrl_recall")
    )


def function_of(value: Any) -> Any:
    """Return the function that a descriptor holds."""
    return getattr(value, "__func__", value)


def signature_of(value: Any) -> inspect.Signature | None:
    """Return how to call a function, or how to build a class; None of a protocol."""
    if not inspect.isclass(value):
        return inspect.signature(function_of(value))
    if getattr(value, "_is_protocol", False):
        return None
    # Not the class itself: metaclasses, such as TorchRL's, take anything.
    init = value.__init__ if "__new__" not in vars(value) else value.__new__
    return inspect.signature(init)


def parameters(value: Any) -> list[inspect.Parameter]:
    """Return a signature's parameters, without the object itself."""
    signature = signature_of(value)
    if signature is None:
        return []
    return [p for p in signature.parameters.values() if p.name not in ("self", "cls", "_cls")]


def documented(value: Any) -> list[str]:
    """Return the parameters that a docstring, or a record's attribute docstrings, speak of."""
    names, section = [], ""
    for line in inspect.cleandoc(function_of(value).__doc__ or "").splitlines():
        if line and not line[0].isspace():
            heading = re.fullmatch(r"([A-Z][A-Za-z ]*):", line)
            section = heading[1] if heading else ""
        elif section in ("Args", "Keyword Args", "Attributes"):
            entry = re.match(r"    (\*{0,2}\w[\w, *]*)(?: \(.*\))?:", line)
            if entry:
                names += [name.strip(" *") for name in entry[1].split(",")]
    if inspect.isclass(value) and not names and hasattr(value, "_fields"):
        # A docstring below each field, which Python does not keep.
        source = inspect.getsource(value)
        names = re.findall(r'^    (\w+): .+\n    """', source, re.MULTILINE)
    return names


def described(value: Any) -> str:
    """Return names, kinds and defaults of the parameters, without annotations."""
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters(value)]
    return str(inspect.Signature(shown))


def snapshot() -> str:
    """Return one line for each public name and method."""
    lines = []
    for name, value in sorted(public().items()):
        lines.append(name + described(value))
        if inspect.isclass(value):
            for method, function in sorted(methods(value)):
                is_property = isinstance(function, property)
                lines.append(f"    .{method}" + ("" if is_property else described(function)))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
