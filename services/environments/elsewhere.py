"""Runs the process of an environment with another interpreter, whose packages the environment needs.

    INTERPRETER elsewhere.py FOLDER SETTINGS

FOLDER is that of the package `sdft`. It alone is added to what the interpreter finds: the packages beside it are of the
run's interpreter, and may be of another Python. Imports the standard library only.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    _, folder, settings = sys.argv
    del sys.path[0]  # the folder of this file, whose modules would replace others of the same names
    where = importlib.util.spec_from_file_location(
        "sdft", Path(folder) / "__init__.py", submodule_search_locations=[folder]
    )
    assert where is not None
    assert where.loader is not None
    package = sys.modules["sdft"] = importlib.util.module_from_spec(where)
    where.loader.exec_module(package)
    from sdft.services.environments import process

    sys.argv[1:] = [settings]
    process.main()


if __name__ == "__main__":
    main()
