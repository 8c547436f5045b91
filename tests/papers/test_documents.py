"""What the documents show is there: commands, targets, configurations, settings, links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdft.services.cli.app import parse
from sdft.services.config.explain import models_of
from sdft.services.config.reference import page, sections
from sdft.services.config.run import RunConfig
from sdft.services.config.service import with_records_of_a_service
from tests.papers.documents import DOCUMENTS, README, ROOT, block, blocks, commands

LEAST = {"model": "m", "data": {"train": "t"}, "training": {"steps": 1}}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_document_is_one(document: Path) -> None:
    for command in commands("sdft", document):
        assert not isinstance(parse(command[1:]), int), command
    for command in commands("make", document):
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_the_commands_are_found() -> None:
    assert {c[1] for c in commands("make")} == {"demo", "service", "test", "chaos", "models"}
    found = {c[1] for document in DOCUMENTS for c in commands("sdft", document)}
    run = {"check", "train", "eval", "submit", "status", "report", "matrix", "export"}
    assert found == run | {"serve", "releases", "records", "rollback", "promote", "tokens"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_of_a_document_is_one(document: Path) -> None:
    for text in blocks(document):
        given = yaml.safe_load(text) if text.partition(":")[0] in RunConfig.model_fields else {}
        if "service" in given:
            RunConfig.model_validate(with_records_of_a_service(given))
            continue
        own = LEAST | given | {"training": given.get("training", {}) | {}}
        if "stages" in given:
            del own["data"]
        elif not {"steps", "epochs"} & own["training"].keys():
            own["training"] |= {"steps": 1}
        RunConfig.model_validate(own)


def test_configurations_that_are_explained_do_what_is_said() -> None:
    stream = RunConfig.model_validate(yaml.safe_load(block("model:", ROOT / "docs" / "continual.md")))
    assert [(task.training.epochs, task.training.steps) for task in stream.tasks] == [(2, None), (None, 80)]
    assert stream.guarded == ("general",)
    shared = RunConfig.model_validate(LEAST | yaml.safe_load(block("device: cuda", ROOT / "docs" / "cluster.md")))
    assert shared.learner.gpus + shared.actors.student.gpus + shared.actors.teacher.gpus == 1


def test_the_page_of_settings_is_made_from_them() -> None:
    """After a change: python -m sdft.services.config.reference > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == page()
    shown = {place for place in sections().values() if place}
    assert {"learner.optimizer", "evaluation.sets[].judge", "stages[]"} <= shown


def test_what_development_shows_of_a_second_implementation_is_short_and_run_by_a_test() -> None:
    """The page includes the files themselves. A test imports or names one class of each."""
    text = (ROOT / "docs" / "development.md").read_text()
    shown = [(ROOT / "docs" / path).resolve() for path in re.findall(r"{literalinclude} (\S+)", text)]
    assert len(shown) == 4
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for path in shown:
        assert len(path.read_text().splitlines()) <= 60
        names = "|".join(re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE))
        used = re.compile(rf"({path.stem}:|import .*)\b({names})\b")
        assert any(used.search(test) for other, test in tests.items() if other != path), f"no test uses {path}"


def test_every_setting_is_described() -> None:
    bare = [
        f"{place}.{name}"
        for model, place in sections().items()
        for name, field in model.model_fields.items()
        if not models_of(field.annotation) and not field.description
    ]
    assert bare == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """A link to a page or heading that is not there is one."""
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in tmp_path.glob("*.html")} >= pages
    assert all(f"docs/{name}.md" in README.read_text() for name in pages - {"index"})
