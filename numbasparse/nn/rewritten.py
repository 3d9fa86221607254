"""A model whose ``forward`` is a graph's, and whose class is still one of the model's own kind."""

from __future__ import annotations

import linecache
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer


class Rewritten:
    """Mixed into the class of a model that has a new ``forward``; such models can be copied and pickled."""

    _forward_text: str
    """Imports and the function, as Python text."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__mro__[2], self._forward_text), self.__getstate__()


def with_forward(model: nn.Module, graph: fx.Graph) -> nn.Module:
    """Give a model, in place, the ``forward`` of a graph: its class becomes one derived from its own.

    The graph's modules are the model's, by name.
    """
    code = graph.python_code("self")
    text = f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
    model.__class__ = _derived(type(model), text)
    return model


def _derived(base: type[nn.Module], text: str) -> type[nn.Module]:
    # As fx does: tracebacks show the lines of the text, and torch.compile can read it.
    name = f"<forward of {base.__qualname__}, {hash(text):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    found: dict[str, Any] = {}
    exec(compile(text, name, "exec"), found)
    members = {"forward": found["forward"], "_forward_text": text, "__module__": base.__module__}
    return type(base.__name__, (Rewritten, base), {**members, "__qualname__": base.__qualname__})


def _restored(base: type[nn.Module], text: str) -> nn.Module:
    made: nn.Module = object.__new__(_derived(base, text))
    return made
