"""A real run on a log and on a source of a user's own, to which records are added while the run goes on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from sdft.services.analysis.status import status_text
from sdft.services.records.rows import read_jsonl
from sdft.services.records.waits import read_waiting
from tests.fakes.table_log import add
from tests.runs.run import command, finish, metrics, wait_for_step, wait_until, write_run

CLOSE: dict[str, Any] = {"closed": True}
ROWS = [{"prompt": f"Say number {i}.", "demonstration": f"The number is {i}."} for i in range(18)]
BAD = {"prompt": "Say nothing."}


def write_config(folder: Path, model: Path, log: Path, table: Path) -> Path:
    """Write the small run: one step on the log, then all that the table gives. One engine samples and scores."""
    path = write_run(folder, model, "float32")
    config = yaml.safe_load(path.read_text())
    data = config.pop("data")
    config["stages"] = [
        {"name": "log", "data": data | {"train": str(log), "source": "log"}, "steps": 1},
        {"name": "table", "data": data | {"train": str(table), "source": "tests.fakes.table_log:TableLog"}},
    ]
    config["teacher"] = {"weights": "live"}
    config["learner"]["optimizer"]["schedule"] = "constant"
    del config["training"]["steps"], config["evaluation"]
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_that_was_killed_goes_on_with_the_records_that_came_since(tiny_model: Path, tmp_path: Path) -> None:
    log, table, run_dir = tmp_path / "log.jsonl", tmp_path / "records.sqlite", tmp_path / "run"
    log.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    add(table, [*ROWS[4:9], BAD])
    config = write_config(tmp_path, tiny_model, log, table)
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(command(config, run_dir), stdout=out, stderr=out)
        wait_for_step(2, run_dir, driver)
        add(table, ROWS[9:13])
        wait_for_step(3, run_dir, driver)
        what = f"record 12 of {table} (9 known)"
        wait_until(lambda: what in [w.what for w in read_waiting(run_dir)], "it waited for records", driver)
        assert what in status_text(run_dir)
        driver.kill()
        driver.wait()
    said, before = (tmp_path / "out").read_text(), metrics(run_dir)
    assert f"waiting for {what}" in said
    assert f"warning: rows skipped: 1, the last one {table}:6: demonstration is missing" in said
    with log.open("a") as file:
        file.write(json.dumps(BAD))
    add(table, [*ROWS[13:], CLOSE])
    finish(config, run_dir)  # from the checkpoint of step 2: step 3 is trained again, with new records behind it
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [(row["stage"], row["samples"], row["trained"]) for row in rows] == [
        (0, 4, 4),
        (1, 4, 8),
        (1, 4, 12),
        (1, 4, 16),
        (1, 2, 18),
    ]
    assert metrics(run_dir)[:3] == before
    assert "skipped     1 rows" in status_text(run_dir)
