"""The scripts of the recipes as modules: they are no package, and lie beside the project's own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes"


def load(path: str) -> ModuleType:
    """A recipe's script as a module. Each finds its neighbours by itself, as when it is run."""
    file = RECIPES / path
    sys.path[:0] = [str(file.parent), str(RECIPES)]
    try:
        spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        del sys.path[:2]
