"""All figures of a machine with a GPU, one benchmark after the other, each in processes of its own.

    python -m benchmarks.gpu.all [--device cuda] [--gpus 2] [--trl PYTHON]

One that fails does not end the others; the exit status is then 1.
"""

import subprocess
import sys

from benchmarks.measure import device_parser

SHAPE = "1.5b"


def commands(device: str, gpus: int, trl: str | None) -> list[list[str]]:
    """Return the modules with their arguments. On a CPU with the tiny shape."""
    if device == "cpu":
        small = ["--shape", "tiny"]
        steps = [[*small, "--tokens", "256", "--micro-batch", "128"], [*small, "--tokens", "256", "--lora", "4"]]
    else:
        small = ["--shape", SHAPE]
        steps = [small, [*small, "--any-order"]]
        steps += [["--shape", "3b", "--checkpointing"], ["--shape", "7b", "--checkpointing", "--lora", "16"]]
    given = [["learner", *words] for words in steps]
    given += [["engines", *small], ["update", *small], ["training", *small]]
    if gpus > 1:
        given.append(["training", *small, "--gpus", "2"])
    made = [[f"benchmarks.gpu.{name}", *words, "--device", device] for name, *words in given]
    if trl is not None:
        made.append(["benchmarks.peer", "--device", device, *small, "--trl", trl])
    return made


def main() -> None:
    parser = device_parser(__doc__ or "")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--trl", metavar="PYTHON", help="with it benchmarks.peer runs too; as its option of this name")
    given = parser.parse_args()
    failed = []
    for command in commands(given.device, given.gpus, given.trl):
        if subprocess.run([sys.executable, "-m", *command]).returncode:
            failed.append(" ".join(command))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
