"""Settings of a source that grows: which combinations have a meaning."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.base.errors import UserError
from sdft.services.config.append import appended
from sdft.services.config.load import load_config, resolved_yaml
from sdft.services.config.paths import with_absolute_paths
from sdft.services.config.run import RunConfig
from sdft.services.data.check_files import check_files

LOG: dict[str, Any] = {"train": "log.jsonl", "source": "log"}
CONSTANT = {"optimizer": {"schedule": "constant"}}
RUN: dict[str, Any] = {"model": "m", "data": LOG, "training": {"batch_size": 2}, "learner": CONSTANT}
STAGE = {"name": "b", "data": {"train": "b.jsonl"}, "steps": 2}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | changes))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"steps": 3}, "learner": {}},
        {"data": LOG | {"source": "my.own:Source", "train": "kafka://x"}},
        {"data": None, "stages": [STAGE, STAGE | {"name": "log", "data": LOG, "steps": None}]},
    ],
)
def test_a_source_that_grows_may_have_no_length(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = load_config(written(tmp_path, **changes))
    (tmp_path / "again.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": LOG | {"source": "logg"}}, "data: source must be file, log, or a class of your own as package"),
        ({"data": LOG | {"split": "test"}}, "data: split is of a hub data set, and source names none; remove split"),
        ({"training": {"epochs": 2}}, "training: epochs has no meaning with data.source: log, whose records are"),
        ({"training": {"epochs": 2, "steps": 3}}, "training: give exactly one of epochs and steps"),
        ({"learner": {}}, "training.steps is missing, so that the learning rate's cosine has no end; set it, or"),
        ({"data": LOG | {"source": "file"}}, "training: give exactly one of epochs and steps"),
        ({"data": None, "stages": [STAGE | {"data": LOG, "steps": None, "epochs": 1}]}, "stages[0]: epochs has no mea"),
        (
            {"method": {"type": "recall", "prompts": "p.jsonl"}, "teacher": {"weights": "base"}},
            "method recall trains its prompts in each epoch, and a source that grows has none; set data.source: file",
        ),
    ],
)
def test_a_combination_without_a_meaning_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(written(tmp_path, **changes))
    assert expected in str(error.value)


def test_a_log_must_be_a_jsonl_file_that_is_there(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    with pytest.raises(UserError, match=r"data\.train: .*log\.jsonl does not exist"):
        check_files(config, tmp_path)
    (tmp_path / "log.jsonl").touch()
    check_files(config, tmp_path)
    (tmp_path / "log.txt").touch()
    with pytest.raises(UserError, match=r"log\.txt must be a \.jsonl file, because data\.source is log"):
        check_files(load_config(written(tmp_path, data=LOG | {"train": "log.txt"})), tmp_path)


def test_a_log_is_not_sent_to_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match=r"log\.jsonl would be copied to the cluster, .* give its absolute path"):
        check_files(load_config(written(tmp_path)), tmp_path, sent=tmp_path)
    check_files(load_config(written(tmp_path, data=LOG | {"train": "/storage/log.jsonl"})), tmp_path, sent=tmp_path)


def test_a_stage_can_be_appended_to_a_run_on_a_log(tmp_path: Path) -> None:
    run_dir, more = tmp_path / "run", tmp_path / "more.yaml"
    run_dir.mkdir()
    for name in ("log.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    config = with_absolute_paths(RunConfig.model_validate(RUN), tmp_path)
    assert config.data is not None
    assert config.data.train == str(tmp_path / "log.jsonl")
    (run_dir / "config.yaml").write_text(resolved_yaml(config))
    more.write_text(json.dumps(STAGE))
    first, second = appended(run_dir, tmp_path, [], more).stages
    assert (first.data, first.steps, first.epochs) == (config.data, None, None)
    assert second.name == "b"
