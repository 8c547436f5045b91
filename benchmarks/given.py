"""Files that are given to a benchmark: what is wrong with one is the parser's error, in a sentence."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

T = TypeVar("T")


def file_of(read: Callable[[Path], T]) -> Callable[[str], T]:
    """Return a type for argparse: what `read` makes of the file with the given name."""

    def given(name: str) -> T:
        try:
            return read(Path(name))
        except OSError as error:
            why = f"it cannot be read ({error.strerror})"
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except yaml.YAMLError as error:
            why = f"it is no YAML ({' '.join(str(error).split())})"
        except ValueError as error:  # `read` names the file
            raise argparse.ArgumentTypeError(str(error)) from None
        raise argparse.ArgumentTypeError(f"{name}: {why}")

    return given
