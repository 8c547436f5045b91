"""The tool-call example: one call in a fixed format, a skill that SmolLM2-135M-Instruct can follow but does not have.

`apis.yaml` describes five small APIs of two tools each. A prompt documents the two tools of one API and has a request;
the demonstration is the one right call, as

    Action: the tool's name
    Action Input: its parameters as a JSON object

(a model this small copies a prompt that spells this out). `train.jsonl` holds 120 demonstrations, 12 per tool.
`heldout.jsonl` holds 80 requests, eight per tool, for the `tool_call` grader. The tools are those of training; no
wording and no value (city, title, name, number…) occurs in training. Held-out rows have a demonstration as well, so
that the teacher can be measured on them.

`python examples/tools/make_data.py [FOLDER]` writes both files into FOLDER (default: the script's own folder), the same
bytes each time.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

SEED = 2026
ROWS_PER_WORDING = {"train": 2, "heldout": 4}
FORMAT = "Reply with the right call in the format Action, Action Input."


def main(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl into `folder`."""
    description = yaml.safe_load((Path(__file__).parent / "apis.yaml").read_text(encoding="utf-8"))
    for split in ("train", "heldout"):
        rows = make_rows(description, split)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_bytes("".join(lines).encode())


def make_rows(description: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Every wording of every tool, ROWS_PER_WORDING times with values of the split, in a seeded order."""
    rng = random.Random(f"{SEED} {split}")
    values = {kind: by_split[split] for kind, by_split in description["values"].items()}
    rows: dict[str, dict[str, Any]] = {}  # by prompt, so that no prompt comes twice
    for tools in description["apis"]:
        for tool in tools:
            for wording in tool[split]:
                wanted = len(rows) + ROWS_PER_WORDING[split]
                while len(rows) < wanted:
                    arguments = draw(rng, tool["parameters"], values)
                    row = make_row(tools, values, tool["name"], wording.format(**arguments), arguments)
                    rows.setdefault(row["prompt"], row)
    ordered = list(rows.values())
    rng.shuffle(ordered)
    return [{"id": f"tools-{split}-{number:03d}", **row} for number, row in enumerate(ordered)]


def draw(rng: random.Random, parameters: dict[str, str], values: dict[str, list[Any]]) -> dict[str, Any]:
    """A value for each parameter; two parameters of one kind get different ones."""
    left = {kind: rng.sample(values[kind], len(values[kind])) for kind in parameters.values()}
    return {parameter: left[kind].pop() for parameter, kind in parameters.items()}


def make_row(
    tools: list[dict[str, Any]], values: dict[str, list[Any]], name: str, request: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """The row without its id."""
    documentation = "\n".join(document(tool, values) for tool in tools)
    call = f"Action: {name}\nAction Input: {json.dumps(arguments)}"
    return {
        "prompt": f"You have access to the following tools:\n{documentation}\n\n{FORMAT}\n\nQuestion: {request}",
        "demonstration": call,
        "answer": [{"Action": name, "Action_Input": arguments}],
    }


def document(tool: dict[str, Any], values: dict[str, list[Any]]) -> str:
    """One line on a tool, with the JSON type of each parameter."""
    parameters = ", ".join(
        f"{parameter} ({'integer' if isinstance(values[kind][0], int) else 'string'})"
        for parameter, kind in tool["parameters"].items()
    )
    return f"{tool['name']}: {tool['description']}. Parameters: {parameters}"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
