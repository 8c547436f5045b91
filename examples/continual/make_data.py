"""Data that only the continual example has: more held-out tool calls, and routing of messages.

`tools-heldout.jsonl`: 120 requests like those of ../tools/heldout.jsonl, six per wording instead of four.

`routing-train.jsonl`, `routing-heldout.jsonl`: 120 messages of customers each, with desk and number as the reply:

    Desk: billing, number 417

The desk follows from the subject of the message, and the number is copied from it. The held-out messages share neither
wordings nor numbers with training. The `exact` grader compares the whole reply. (A first version had labels such as
`[BILLING|P2|417]`: after 40 steps this model put brackets around the answer to every question.)

`python examples/continual/make_data.py [FOLDER]` writes the three files, the same bytes each time.
"""

import importlib.util
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SEED = 2026
WORDINGS = {
    "train": {
        "billing": [
            "I was charged twice for order {n}.",
            "The amount on invoice {n} is wrong.",
            "Please refund the fee on bill {n}.",
            "Why is payment {n} higher than last month?",
            "I have not received the receipt for invoice {n}.",
        ],
        "shipping": [
            "My parcel {n} has not arrived yet.",
            "Where is the package with number {n}?",
            "The courier left parcel {n} at a wrong address.",
            "Delivery {n} is three days late.",
            "The box of shipment {n} came damaged.",
        ],
        "technical": [
            "The app shows error {n} when it starts.",
            "My screen freezes with code {n}.",
            "The software crashes after update {n}.",
            "Nothing prints, the machine says fault {n}.",
            "The page does not load and shows error {n}.",
        ],
        "account": [
            "Please change the email address of customer {n}.",
            "I forgot the password of account {n}.",
            "Close my account, the customer number is {n}.",
            "The name on profile {n} is spelled wrong.",
            "I want to add a second user to account {n}.",
        ],
    },
    "heldout": {
        "billing": [
            "You took the money for bill {n} two times.",
            "I do not agree with the price on invoice {n}.",
            "Can I get my money back for payment {n}?",
        ],
        "shipping": [
            "I am still waiting for parcel {n}.",
            "Shipment {n} went to my old address.",
            "When will delivery {n} come?",
        ],
        "technical": [
            "The program stops and says error {n}.",
            "After the update I only see code {n} on the screen.",
            "My machine does not start any more, fault {n}.",
        ],
        "account": [
            "I cannot sign in to account {n} since I lost my password.",
            "Please delete profile {n}.",
            "My phone number has changed, I am customer {n}.",
        ],
    },
}
ROWS = 120
NUMBERS = {"train": range(100, 600), "heldout": range(600, 1000)}


def main(folder: Path) -> None:
    """Write all files into `folder`."""
    for split in WORDINGS:
        write(folder / f"routing-{split}.jsonl", routing(split))
    write(folder / "tools-heldout.jsonl", tools())


def routing(split: str) -> list[dict[str, Any]]:
    """Return ROWS messages, equally many of each wording, in a seeded order; every number occurs once."""
    rng = random.Random(f"{SEED} routing {split}")
    wordings = [(desk, text) for desk, texts in WORDINGS[split].items() for text in texts]
    numbers = rng.sample(NUMBERS[split], ROWS)
    rows = []
    for i, n in enumerate(numbers):
        desk, text = wordings[i % len(wordings)]
        reply = f"Desk: {desk}, number {n}"
        prompt = f"{text.format(n=n)}\n\nReply with the desk and number of this message."
        rows.append({"prompt": prompt, "demonstration": reply, "answer": reply})
    rng.shuffle(rows)
    return [{"id": f"routing-{split}-{number:03d}", **row} for number, row in enumerate(rows)]


def tools() -> list[dict[str, Any]]:
    """Return held-out requests of the tool example, six per wording."""
    spec = importlib.util.spec_from_file_location("tools_make_data", HERE.parent / "tools" / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROWS_PER_WORDING["heldout"] = 6
    description = yaml.safe_load((HERE.parent / "tools" / "apis.yaml").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = module.make_rows(description, "heldout")
    return rows


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
