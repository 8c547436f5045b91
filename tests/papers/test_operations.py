"""docs/operations.md describes exactly the alerts of alerts.yaml, and names only settings that exist."""

import re

import yaml

from sdft.services.config.explain import all_settings
from sdft.services.config.run import RunConfig
from tests.papers.documents import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()
FILES = ("json", "jsonl", "sqlite", "yaml")  # endings of file names, which are no settings
DOTTED = re.compile(r"([a-z_]+(?:\.(?:[a-z_]+|\*))+)(?:: \S+)?")  # `weights.timeout_s`, `teacher.weights: live`


def settings_named() -> set[str]:
    """Return the settings in backticks, as written."""
    found = (DOTTED.fullmatch(code) for code in re.findall(r"`([^`\n]+)`", TEXT))
    return {match[1] for match in found if match and not match[1].endswith(FILES)}


def test_every_alert_has_its_heading_and_no_other_has_one() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yaml").read_text())["groups"]
    _, _, alarms = TEXT.partition("\n## Alarms\n")
    headings = re.findall(r"^### (.+)$", alarms.partition("\n## ")[0], re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in group["rules"])


def test_every_setting_that_is_named_exists() -> None:
    existing = {".".join(map(str, loc)) for loc in all_settings(RunConfig, ())}
    named = settings_named()
    assert {"actors.*.max_replicas", "weights.timeout_s", "teacher.weights"} <= named
    assert {name for name in named if name.replace("*", "student") not in existing} == set()
