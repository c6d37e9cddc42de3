"""gemkit: Google's Gemma family of open models, on the machine you have.

    >>> import gemkit
    >>> model = gemkit.load()                # real Gemma 3 270M weights, from the extra [starter]
    >>> print(model.generate("The Gemma family is"))

Names are loaded when they are first used, so that `import gemkit` costs milliseconds and a command that only
prints a configuration never waits for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.errors import GemkitError as GemkitError
    from gemkit.family import get as get
    from gemkit.family import names as names
    from gemkit.gemma import Gemma as Gemma
    from gemkit.gemma import load as load

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "load": "gemkit.gemma",
    "Gemma": "gemkit.gemma",
    "get": "gemkit.family",
    "names": "gemkit.family",
    "GemkitError": "gemkit.errors",
}
__all__ = ["GemkitError", "Gemma", "__version__", "get", "load", "names"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gemkit' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted(__all__)
