"""Functions that spoil a good configuration, its data or its run. Each takes the folder as a Work."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

ROW = {"prompt": "Say one.", "demonstration": "One it is."}
QUESTION = {"prompt": "Say one.", "answer": "one"}


class Work:
    """A folder with a good configuration. A test case spoils it, then runs a command in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.lock: IO[str] | None = None  # the lock is held until the case ends
        self.config: dict[str, Any] = {
            "model": str(model),
            "dtype": "bfloat16",
            "data": {
                "train": "train.jsonl",
                "template": "turn",
                "max_prompt_tokens": 60,
                "max_teacher_prompt_tokens": 120,
            },
            "sampling": {"max_new_tokens": 8},
            "training": {"batch_size": 2, "steps": 2},
            "evaluation": {"sets": [{"name": "numbers", "file": "eval.jsonl", "grader": "exact"}]},
        }
        self.rows("train.jsonl", ROW, ROW)
        self.rows("eval.jsonl", QUESTION)

    def write(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def rows(self, name: str, *rows: Any) -> None:
        self.write(name, b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))

    def set(self, key: str, value: Any) -> None:
        """Set "a.b" in the configuration; the value None removes the key."""
        *path, last = key.split(".")
        section = self.config
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            del section[last]
        else:
            section[last] = value

    def save(self) -> None:
        if not (self.folder / "my.yaml").exists():
            self.write("my.yaml", yaml.safe_dump(self.config))


def as_run(work: Work) -> None:
    """Write the configuration as that of an existing run."""
    work.write("runs/my/config.yaml", yaml.safe_dump(work.config))


def setting(key: str, value: Any) -> Callable[[Work], None]:
    return lambda work: work.set(key, value)


def file(name: str, content: str | bytes) -> Callable[[Work], None]:
    return lambda work: work.write(name, content)


def rows(name: str, *given: Any) -> Callable[[Work], None]:
    return lambda work: work.rows(name, *given)


def big(name: str) -> Callable[[Work], None]:
    """A sparse file of 210 MB."""

    def spoil(work: Work) -> None:
        work.write(name, "")
        os.truncate(work.folder / name, 200 << 20)

    return spoil


def link(name: str, to: str) -> Callable[[Work], None]:
    return lambda work: (work.folder / name).symlink_to(to)


def run_folder(work: Work) -> None:
    """A run directory of another run, with an undamaged checkpoint."""
    from sdft.services.records import checkpoints

    part_of = work.folder / "runs" / "my"
    part_of.mkdir(parents=True)
    part = checkpoints.begin(part_of, 2)
    (part / "ledger.sqlite").write_bytes(b"")
    checkpoints.commit(part, part_of, checkpoints.CheckpointState(2, 1, 2, "bfloat16", "another"), keep=1)
    (part_of / "metrics.jsonl").write_text("")


def in_use(work: Work) -> None:
    """Lock the run directory, as another process that trains in it does."""
    work.write("runs/my/.lock", "")
    work.lock = (work.folder / "runs/my/.lock").open()
    fcntl.flock(work.lock, fcntl.LOCK_EX)


def damaged_checkpoint(work: Work) -> None:
    run_folder(work)
    (work.folder / "runs/my/checkpoints/step-000002/state.json").write_text("{")


def other_model(work: Work) -> Path:
    """Copy the model, with positions that depend on the length of a sequence."""
    folder = shutil.copytree(work.config["model"], work.folder / "m")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(shape | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})
    )
    return folder


def chat_template(text: str) -> Callable[[Work], None]:
    """Copy the model, with another chat template."""

    def spoil(work: Work) -> None:
        folder = shutil.copytree(work.config["model"], work.folder / "m")
        (folder / "chat_template.jinja").write_text(text)
        work.set("model", str(folder))

    return spoil


def larger_tokenizer(work: Work) -> None:
    """Copy the model, with a tokenizer that has more tokens than the model has rows, and a prompt with such a token."""
    from sdft.services.data.tokenizer import load_tokenizer

    folder = shutil.copytree(work.config["model"], work.folder / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)
    work.set("model", str(folder))
    work.rows("train.jsonl", ROW, {"prompt": "Say <199>.", "demonstration": "It is."})


def two(*spoilers: Callable[[Work], None]) -> Callable[[Work], None]:
    def spoil(work: Work) -> None:
        for one in spoilers:
            one(work)

    return spoil


def nothing(_: Work) -> None:
    """Spoil nothing: the mistake is in the command line."""
