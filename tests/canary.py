"""Canaries: one line for each undocumented name that a compat.py uses, and one sentence if an upgrade has taken it.

    CANARIES = {"vllm.v1.engine.utils.get_mp_context": lambda: named("vllm.v1.engine.utils:get_mp_context")}

A canary returns something true if the library still has the name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature, unwrap
from pkgutil import resolve_name
from platform import python_version
from types import CodeType
from typing import Any

import pytest

Canary = Callable[[], object]
GONE = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)  # what a missing name raises


@dataclass(frozen=True)
class Library:
    """A library, the version that a file knows, and that file."""

    name: str
    known: str
    file: str
    packages: tuple[str, ...]  # its names as a distribution, of which one is installed; none: Python itself

    @property
    def installed(self) -> str:
        """The installed version, without the suffix of a build such as +cpu."""
        for package in self.packages:
            try:
                return version(package).partition("+")[0]
            except PackageNotFoundError:
                continue
        return python_version()

    def check_version(self) -> None:
        """Fail if another version is installed than the one that the file knows."""
        if self.installed != self.known:
            pytest.fail(
                f"{self.file} knows {self.name} {self.known}, and {self.installed} is installed: review the file, then "
                f"set its version",
                pytrace=False,
            )

    def check(self, what: str, canary: Canary) -> None:
        """Fail if the canary finds nothing."""
        try:
            found = canary()
        except GONE:
            found = None
        if not found:
            pytest.fail(
                f"{self.name} {self.known} had {what}; the installed version {self.installed} has not: see {self.file}",
                pytrace=False,
            )


def named(path: str) -> Any:
    """The object at "module:attribute.attribute"."""
    return resolve_name(path)


def takes(path: str, *parameters: str) -> bool:
    """Whether a function has these parameters."""
    return set(parameters) <= signature(named(path)).parameters.keys()


def mentions(path: str, *words: str) -> bool:
    """Whether the code of a function, or of a function inside it, has these names (no local ones) and texts."""
    return set(words) <= _words(unwrap(named(path)).__code__)


def _words(code: CodeType) -> set[str]:
    words = {*code.co_names, *(word for word in code.co_consts if isinstance(word, str))}
    return words.union(*(_words(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
