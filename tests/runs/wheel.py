"""The project as users install it: the built wheel in its own environment, with the dependencies of the test
environment."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.papers.documents import ROOT

# What the wheel is built from. The build uses a copy, because setuptools leaves folders beside the sources.
SOURCES = ("actors", "learner", "services", "sdft", "pyproject.toml", "README.md")


def install_wheel(folder: Path) -> Path:
    """Build the wheel and install it below `folder`. Returns the folder of its commands `sdft`, `ray` and `python`."""
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, timeout=120)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    # The dependencies. Python searches a path in a .pth file last and does not read .pth files in it: this project's
    # editable installation is not found.
    here = sysconfig.get_path("purelib")
    own = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    (Path(own) / "packages.pth").write_text(f"{here}\n")
    ray = Path(sys.executable).with_name("ray").read_text()
    (python.parent / "ray").write_text(ray.replace(sys.executable, str(python)))
    (python.parent / "ray").chmod(0o755)
    return python.parent
