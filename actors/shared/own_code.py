"""Classes of a user's own, named in the configuration as `package.module:Name`."""

import importlib
import sys
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class NotImportable(ValueError):
    """A name cannot be imported, or is not the expected class. The message is a sentence with the mend."""


def is_own(name: str) -> bool:
    """Return whether a name in the configuration is that of a user's own class."""
    return ":" in name


def own_class(name: str, base: type[T]) -> type[T]:
    """Import the class `package.module:Name`, which must be a subclass of `base`. Raises NotImportable.

    A module is found where Python finds it: installed, on PYTHONPATH, or in the working directory.
    """
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file there replaces no installed module
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise NotImportable(
            f"{name} cannot be imported ({type(error).__name__}: {error}); write it as package.module:Name, and "
            f"install the package or put its folder on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise NotImportable(f"{name} is not a subclass of {base.__module__}.{base.__name__}; derive it from that class")
    return found
