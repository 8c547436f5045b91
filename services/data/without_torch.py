"""Import transformers without torch, for tokenizers and configurations only: 1.1 s instead of 3.5 s.

transformers checks for torch once, at import. A process that imports it without torch cannot use its models later.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_tokenizers_only = False


def promise_tokenizers_only() -> None:
    """Declare that this process uses only tokenizers and configurations of transformers, never a model."""
    global _tokenizers_only
    _tokenizers_only = True


@contextmanager
def import_for_tokenizers() -> Iterator[None]:
    """Hide torch while transformers is imported, after promise_tokenizers_only() and unless torch is loaded already."""
    if not _tokenizers_only or "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # None marks a module that cannot be imported
    advises = os.environ.get(ADVICE)
    os.environ[ADVICE] = "1"  # suppress the warning that models are unavailable
    try:
        yield
    finally:
        del sys.modules["torch"]
        if advises is None:
            del os.environ[ADVICE]
        else:
            os.environ[ADVICE] = advises
