"""Names in single backticks: ours become links by their shortest form, others must be known.

Without inventories from the network, names of TorchRL and the like stay text. A name that is
neither ours nor known is a warning, so that none in a docstring goes stale.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import lru_cache
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util.nodes import make_refnode

# Where names come from that docstrings mention without a link.
LIBRARIES = (
    "builtins",
    "torch",
    "torch.nn",
    "tensordict",
    "tensordict.nn",
    "torchrl.checkpoint",
    "torchrl.collectors",
    "torchrl.data",
    "torchrl.data.replay_buffers.samplers",
    "torchrl.envs",
    "torchrl.modules",
    "torchrl.objectives",
    "torchrl.trainers",
)


@lru_cache
def is_known(name: str) -> bool:
    """Tell whether a dotted name is an object of a library, or an inner one of ours."""
    head, *rest = name.split(".")
    for module in LIBRARIES:
        found = getattr(importlib.import_module(module), head, None)
        for part in rest:
            found = getattr(found, part, None)
        if found is not None:
            return True
    parts = name.split(".")
    for root in ([], ["torchrl_recall"]):
        for end in range(len(parts), -1 if root else 0, -1):
            try:
                found = importlib.import_module(".".join([*root, *parts[:end]]))
            except (ImportError, ValueError):
                continue
            for part in parts[end:]:
                found = getattr(found, part, None)
            if found is not None:
                return True
    return False


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Find what a reference means, or leave it as text if it is known."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip("~.").removesuffix("()")
    domain = env.get_domain("py")
    # The class whose docstring speaks comes first: `reset` there is its own.
    inside = ".".join(filter(None, [node.get("py:module"), node.get("py:class"), target]))
    found = [
        name
        for name, entry in domain.objects.items()
        if re.search(rf"(^|\.){re.escape(target)}$", name) and not entry.aliased
    ]
    if found:
        best = min(found, key=lambda name: (name != inside, name.count("."), len(name)))
        entry = domain.objects[best]
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, best
        )
    return contnode if is_known(target) or is_known(inside) else None


def link_names(app: Any, doctree: nodes.document, docname: str) -> None:
    """Make links of code literals on pages that name a public class or function."""
    objects = app.env.get_domain("py").objects
    names: dict[str, str] = {}
    for name, entry in sorted(objects.items(), key=lambda item: item[0].count("."), reverse=True):
        if entry.objtype in ("class", "function") and not entry.aliased:
            names[name] = names[name.rpartition(".")[2]] = name
    for literal in list(doctree.findall(nodes.literal)):
        name = names.get(literal.astext().removesuffix("()"))
        if name is None or isinstance(literal.parent, (nodes.reference, addnodes.pending_xref)):
            continue
        entry = objects[name]
        if entry.docname != docname:
            link = make_refnode(
                app.builder, docname, entry.docname, entry.node_id, literal.deepcopy(), name
            )
            literal.replace_self(link)


def sign(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: Any
) -> tuple[str, str] | None:
    """Show how a class is built, where its metaclass takes anything."""
    if what not in ("class", "exception") or not signature or "*args, **kwargs" not in signature:
        return None
    found = inspect.signature(obj.__init__)
    shown = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in list(found.parameters.values())[1:]
    ]
    return str(inspect.Signature(shown)), ""


def setup(app: Any) -> dict[str, bool]:
    """Register the resolver."""
    app.connect("missing-reference", resolve)
    app.connect("doctree-resolved", link_names)
    app.connect("autodoc-process-signature", sign)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
