"""transformers without torch, in a process that needs it for tokenizers and configurations only: 1.1 s in place of 3.5.

transformers imports torch where it finds it, and asks once: from then on the process can have no models of it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_tokenizers_only = False


def promise_tokenizers_only() -> None:
    """This process, from here to its end, uses tokenizers and configurations of transformers and no model."""
    global _tokenizers_only
    _tokenizers_only = True


def can_have_models() -> bool:
    """Whether this process has torch already, and may use models of transformers."""
    return not _tokenizers_only and sys.modules.get("torch") is not None


@contextmanager
def import_for_tokenizers() -> Iterator[None]:
    """Import transformers in it: without torch where that was promised, and torch is not there already."""
    if not _tokenizers_only or "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own mark of a module that is not there
    advises = os.environ.get(ADVICE)
    os.environ[ADVICE] = "1"  # it would warn that there are no models
    try:
        yield
    finally:
        del sys.modules["torch"]
        if advises is None:
            del os.environ[ADVICE]
        else:
            os.environ[ADVICE] = advises
