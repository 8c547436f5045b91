"""1000 requests with rules that a program can check, to measure whether the model still follows instructions.

`instructions.jsonl`, for the `instruction` grader: forty topics in each of 25 kinds of request. 1000 requests give the
accuracy to within 3 points (95 %, 1.96 * sqrt(p (1 - p) / 1000)). No request was selected by the replies of a model.

`python examples/general/make_instructions.py [FOLDER]` writes the file, the same bytes each time.
"""

import json
import sys
from pathlib import Path
from typing import Any

TOPICS = (
    *("rain", "bread", "bicycles", "the moon", "gardens", "trains", "coffee", "winter", "dogs", "the sea"),
    *("music", "mountains", "books", "cheese", "friendship", "bees", "clocks", "forests", "football", "kites"),
    *("bridges", "tea", "painting", "rivers", "horses", "snow", "markets", "stars", "cats", "islands"),
    *("maps", "soup", "lighthouses", "autumn", "birds", "letters", "castles", "oranges", "windows", "sleep"),
)
KINDS: tuple[tuple[str, list[dict[str, Any]]], ...] = (
    ("Write one sentence about {t}.", [{"rule": "sentences", "n": 1}]),
    ("Write exactly two sentences about {t}.", [{"rule": "sentences", "n": 2}]),
    ("Write exactly three sentences about {t}.", [{"rule": "sentences", "n": 3}]),
    ("Describe {t} in at most five words.", [{"rule": "words_at_most", "n": 5}]),
    ("Describe {t} in at most ten words.", [{"rule": "words_at_most", "n": 10}]),
    ("Say something about {t} in fewer than twenty words.", [{"rule": "words_at_most", "n": 19}]),
    ("Tell me about {t} in at least twenty words.", [{"rule": "words_at_least", "n": 20}]),
    ("List three things about {t}. Begin each line with a dash.", [{"rule": "bullets", "n": 3}]),
    ("List two facts about {t} as bullet points.", [{"rule": "bullets", "n": 2}]),
    ("Give a numbered list of three words about {t}.", [{"rule": "numbered", "n": 3}]),
    ("Give a numbered list of two reasons to like {t}.", [{"rule": "numbered", "n": 2}]),
    ("Write a sentence about {t} in capital letters only.", [{"rule": "uppercase"}]),
    ("Write a sentence about {t} in lower case only, without any capital letter.", [{"rule": "lowercase"}]),
    ("Write a question about {t}.", [{"rule": "ends_with", "text": "?"}]),
    ("Write an exclamation about {t}. It must end with an exclamation mark.", [{"rule": "ends_with", "text": "!"}]),
    ('Write a sentence about {t} that begins with "Sometimes".', [{"rule": "starts_with", "text": "Sometimes"}]),
    ('Begin your answer with "Dear friend" and tell me about {t}.', [{"rule": "starts_with", "text": "Dear friend"}]),
    ('Write about {t} and use the word "yellow".', [{"rule": "contains", "text": "yellow"}]),
    ('Write about {t} and use the words "grandmother" and "Tuesday".',
     [{"rule": "contains", "text": "grandmother"}, {"rule": "contains", "text": "Tuesday"}]),
    ('Write a sentence about {t} without using the word "the".', [{"rule": "lacks", "text": "the"}]),
    ('Write a sentence about {t} without using the word "and".', [{"rule": "lacks", "text": "and"}]),
    ("Write two lines about {t}, and nothing else.", [{"rule": "lines", "n": 2}]),
    ("Write a poem of four lines about {t}.", [{"rule": "lines", "n": 4}]),
    ('Reply with a JSON object with the one key "topic", whose value is "{t}".', [{"rule": "json"}]),
    ('Answer with "Yes." or "No." only: do you know what {t} means?', [{"rule": "words_at_most", "n": 1}]),
)  # fmt: skip


def main(folder: Path) -> None:
    """Write instructions.jsonl into `folder`."""
    rows = [
        {"id": f"instruction-{kind:02d}-{topic:02d}", "prompt": text.format(t=name), "answer": rules}
        for kind, (text, rules) in enumerate(KINDS)
        for topic, name in enumerate(TOPICS)
    ]
    (folder / "instructions.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
