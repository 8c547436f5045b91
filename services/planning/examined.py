"""Whether a model folder's tensors fit its configuration: examined once, in another process, which imports torch."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import xxhash

from sdft import actors, learner
from sdft.services.base.errors import UserError
from sdft.services.base.files import write_atomically
from sdft.services.planning.apart import answer, start
from sdft.services.planning.models import cache_folder

REMEMBERED = 100  # the last folders that passed


@dataclass
class Examined:
    """The result of an examination, known at its end."""

    alone: str | None = None  # why the learner computes the sequences of a pack one by one, as the end of a sentence
    routed: bool = False  # the model has experts, and the learner can replay their choice
    divides: bool = False  # some layers, or all, compute the sequences of a pack one by one
    shared_by: Sequence[int] = (1,)  # numbers of ranks that can divide the tokens of a pack


@contextmanager
def examined(model: Path, trains: bool) -> Iterator[Examined]:
    """UserError at exit unless the folder's tensors are those that the model needs and the learner can run it.

    The examination needs torch, which this process does not import. A subprocess runs it in 3 s, in parallel with the
    body of the `with` statement. A folder that passed and has not changed is not examined again, by later commands too.
    """
    stamp = _stamp(model, trains)
    if (passed := _passed().get(stamp)) is not None:
        yield passed
        return
    found = Examined()
    with start("sdft.learner.model.examine", str(model), *(["--trains"] if trains else [])) as process:
        yield found
        result = answer(process)
    if fault := result["fault"]:
        raise UserError(f"model: {model} cannot be {'trained' if trains else 'evaluated'} here: {fault}")
    found.alone, found.routed, found.divides = result["alone"], result["routed"], result["divides"]
    found.shared_by = result["shared_by"]
    with suppress(OSError, UserError):  # without it the next command examines the folder again
        path = _memory()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} {json.dumps(asdict(passed))}" for key, passed in (_passed() | {stamp: found}).items()]
        write_atomically(path, "\n".join(lines[-REMEMBERED:]).encode())


def _stamp(model: Path, trains: bool) -> str:
    """Return a digest of all that the result depends on: the folder's files, our code, torch and transformers.

    A file is taken for the same while its number, size and times are. The kernel sets its change time at every write.
    """
    stats = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    files = [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
    libraries = version("torch"), version("transformers")
    digest = xxhash.xxh3_128(repr((str(model), trains, files, libraries)).encode())
    for package in (learner, actors):
        for source in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _memory() -> Path:
    return cache_folder() / "examined"


def _passed() -> dict[str, Examined]:
    """Return the results of the folders that passed, by their stamps, the oldest first."""
    try:
        lines = [line.partition(" ")[::2] for line in _memory().read_text().splitlines()]
        return {stamp: Examined(**json.loads(result)) for stamp, result in lines}
    except (OSError, UserError, ValueError, TypeError):  # of another version, too
        return {}
