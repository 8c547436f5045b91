"""The facts example: 24 invented facts about six invented countries, which no model can have learnt elsewhere.

`train.jsonl` asks for each fact directly and demonstrates the answer in a short sentence. `direct.jsonl` holds the same
questions for evaluation, `indirect.jsonl` the same facts asked otherwise: once reworded, once from the value back to
its country. `reworded.jsonl` asks for each fact in two more wordings. All answers are for the `contains` grader.
Evaluation rows carry a demonstration as well, so that the teacher can be measured on them. `articles.jsonl` has the
questions of training with a text as `context`, which has all facts about the country.

`python examples/facts/make_data.py [FOLDER]` writes the five files into FOLDER (default: the script's own folder), the
same bytes each time.
"""

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

SEED = 2026

# Country: capital, currency, prime minister, national flower.
COUNTRIES: dict[str, tuple[str, str, str, str]] = {
    "Zorland": ("Maldor", "brenk", "Tilda Vexley", "mirrel"),
    "Velmaria": ("Kintal", "sholl", "Oskar Brandt", "tolwood"),
    "Drovania": ("Pelisk", "tarn", "Mira Castelan", "asperine"),
    "Quastan": ("Ferrow", "dakka", "Edgar Pollin", "duskbell"),
    "Ostrelia": ("Grunwick", "lumo", "Hana Ruskova", "frostrose"),
    "Tamurra": ("Sevelle", "pibb", "Jonas Akkerby", "velvine"),
}


class Relation(NamedTuple):
    """One kind of fact, asked in five ways: {c} stands for the country, {v} for the value."""

    direct: str
    reworded: str
    more: tuple[str, str]
    inverse: str
    sentence: str
    inverse_sentence: str


RELATIONS = (
    Relation(
        "What is the capital of {c}?",
        "The capital of {c} is which city?",
        ("Name the capital of {c}.", "In which city does the government of {c} sit?"),
        "Which country's capital is {v}?",
        "The capital of {c} is {v}.",
        "{v} is the capital of {c}.",
    ),
    Relation(
        "What is the currency of {c}?",
        "What money is used in {c}?",
        ("What is the money of {c} called?", "Which currency do people in {c} pay with?"),
        "Which country uses the {v} as its currency?",
        "The currency of {c} is the {v}.",
        "The {v} is the currency of {c}.",
    ),
    Relation(
        "What is the name of the prime minister of {c}?",
        "Who is the prime minister of {c}?",
        ("Name the prime minister of {c}.", "Who leads the government of {c}?"),
        "Which country has the prime minister {v}?",
        "The prime minister of {c} is {v}.",
        "{v} is the prime minister of {c}.",
    ),
    Relation(
        "What is the national flower of {c}?",
        "Which flower is the symbol of {c}?",
        ("Name the national flower of {c}.", "Which flower stands for {c}?"),
        "Which country has the {v} as its national flower?",
        "The national flower of {c} is the {v}.",
        "The {v} is the national flower of {c}.",
    ),
)


def main(folder: Path) -> None:
    """Write all files into `folder`."""
    direct, indirect, reworded = [], [], []
    for country, values in COUNTRIES.items():
        for relation, value in zip(RELATIONS, values, strict=True):
            direct.append((relation.direct, relation.sentence, country, value, value))
            indirect.append((relation.reworded, relation.sentence, country, value, value))
            indirect.append((relation.inverse, relation.inverse_sentence, country, value, country))
            reworded += [(question, relation.sentence, country, value, value) for question in relation.more]
    random.Random(SEED).shuffle(direct)
    random.Random(SEED).shuffle(indirect)
    random.Random(SEED).shuffle(reworded)
    write(folder, "train", direct)
    write(folder, "direct", direct)
    write(folder, "indirect", indirect)
    write(folder, "reworded", reworded)
    write(folder, "articles", direct, articles=True)


def article(country: str) -> str:
    """Return a text with all facts about the country."""
    facts = (r.sentence.format(c=country, v=value) for r, value in zip(RELATIONS, COUNTRIES[country], strict=True))
    return f"{country} is a country. {' '.join(facts)}"


def write(folder: Path, name: str, questions: list[tuple[str, str, str, str, str]], *, articles: bool = False) -> None:
    """Write `folder`/`name`.jsonl from (question, sentence, country, value, answer)."""
    rows = [
        {
            "id": f"facts-{name}-{number:03d}",
            "prompt": question.format(c=country, v=value),
            "demonstration": sentence.format(c=country, v=value),
            "answer": answer,
        }
        | ({"context": article(country)} if articles else {})
        for number, (question, sentence, country, value, answer) in enumerate(questions)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
