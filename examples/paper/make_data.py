"""The data of the SDFT paper as files for `sdft`: tool use (ToolAlpaca) and science (SciKnowEval, chemistry, level 3).

    python examples/paper/make_data.py CLONE

CLONE is a checkout of the paper's code (github.com/Continual-Intelligence/Self-Distillation), whose `data/` has both
sets as the paper divides them. Four files go to `data/` beside this script:

    CLONE/data/tooluse_data/{train_data,eval_data}     ─► tools-train.jsonl, tools-heldout.jsonl
    CLONE/data/science_data/{train_data,eval_data}     ─► science-train.jsonl, science-heldout.jsonl

A set is a folder of the library `datasets`, or a file with `.json` behind its name. Training rows have a demonstration:
the lines of `golden_response`, or `output_text`. Held-out rows have an answer: `golden_answer`, or `answer`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

HERE = Path(__file__).parent
Row = Mapping[str, Any]


def rows_of(place: Path) -> Iterable[Row]:
    """Return the rows of a set. Exits with a sentence if it is not there."""
    file = place.with_name(place.name + ".json")
    if place.is_dir():
        return datasets.load_from_disk(str(place))
    if file.is_file():
        return datasets.Dataset.from_json(str(file))
    text = f"make_data: {place} is not there, nor is {file.name}; give the folder of a clone of the paper's code"
    print(text, file=sys.stderr)
    sys.exit(2)


def tools_train(row: Row) -> dict[str, Any]:
    return {"prompt": row["prompt"], "demonstration": "\n".join(row["golden_response"])}


def tools_heldout(row: Row) -> dict[str, Any]:
    answer = row["golden_answer"]
    if isinstance(answer, Mapping):  # `datasets` turns a list of objects into an object of lists
        answer = [dict(zip(answer, values, strict=True)) for values in zip(*answer.values(), strict=True)]
    return {"prompt": row["prompt"], "answer": answer}


def science_train(row: Row) -> dict[str, Any]:
    return {"prompt": _asked(row), "demonstration": row["output_text"]}


def science_heldout(row: Row) -> dict[str, Any]:
    return {"prompt": _asked(row), "answer": row["answer"]}


def _asked(row: Row) -> Any:
    return [dict(message) for message in (row["messages"] if "messages" in row else row["prompt"])]


FILES: dict[str, tuple[str, Callable[[Row], dict[str, Any]]]] = {
    "tools-train.jsonl": ("tooluse_data/train_data", tools_train),
    "tools-heldout.jsonl": ("tooluse_data/eval_data", tools_heldout),
    "science-train.jsonl": ("science_data/train_data", science_train),
    "science-heldout.jsonl": ("science_data/eval_data", science_heldout),
}


def main(clone: Path, out: Path) -> None:
    """Write the four files into `out`."""
    out.mkdir(exist_ok=True)
    for name, (place, convert) in FILES.items():
        lines = [json.dumps(convert(row), ensure_ascii=False) + "\n" for row in rows_of(clone / "data" / place)]
        (out / name).write_text("".join(lines), encoding="utf-8")
        print(f"{out / name}: {len(lines)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/paper/make_data.py CLONE")
    main(Path(sys.argv[1]), HERE / "data")
