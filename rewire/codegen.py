"""Graphs as functions of a home and what they read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from rewire.errors import CannotTrace
from rewire.structure import flatten


def compiled(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """A function (home, *placeholders) from a graph, which is used up, and its source."""
    for node in list(graph.nodes):
        if node.name == "self":  # a child of that name; the code calls the home so
            node._rename("self_child")
        if node.op == "call_module" and _has_container((*node.args, *node.kwargs.values())):
            with graph.inserting_before(node):
                child = graph.get_attr(str(node.target))
                arguments = child, node.target, node.args, node.kwargs
                node.replace_all_uses_with(graph.call_function(handed, arguments))
            graph.erase_node(node)
    code = graph.python_code(root_module="self")
    return _function(code.src, _Globals(code.globals)), code.src


def handed(child: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    """What a child gives that is handed lists or dicts.

    They are copies of those that the home's author wrote: what is written into them would be lost.

    Raises:
        CannotTrace: The child has put other things into them.
    """
    before, spec = flatten((args, kwargs))
    result = child(*args, **kwargs)
    after, found = flatten((args, kwargs))
    if found != spec or any(a is not b for a, b in zip(before, after, strict=True)):
        raise CannotTrace(
            f"{name} changes a list or dict that it is handed (`exclude=` leaves its caller alone)"
        )
    return result


def _has_container(value: Any) -> bool:
    """Whether a list or dict is among arguments."""
    if isinstance(value, tuple):
        return any(map(_has_container, value))
    return isinstance(value, (list, dict))


class _Globals(dict[str, Any]):
    """A function's globals, hashable by content so that equal blocks share their code."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))


@functools.lru_cache(maxsize=1024)
def _function(source: str, names: _Globals) -> Callable[..., Any]:
    scope = dict(names)
    exec(compile(source, "<rewire>", "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]
