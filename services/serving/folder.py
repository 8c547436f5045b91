"""The folder of a service: where everything is.

service.json         address and process of the service, while it runs
config.yaml          its configuration, with absolute paths
inbox.jsonl          records as they came, and deletions
journal.jsonl        decisions: windows, candidates, releases
receipts.sqlite      prompts and answers, for feedback
releases/0002/       a release: a plain Hugging Face folder
windows/0001/        window.yaml, train.jsonl, held-out-*.jsonl, train.log, and run/, a run directory
engines/             logs of the engines
"""

from dataclasses import dataclass
from pathlib import Path

SERVICE = "service.json"


@dataclass(frozen=True)
class ServiceFolder:
    """Paths in a service's folder."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def inbox(self) -> Path:
        return self.path / "inbox.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def receipts(self) -> Path:
        return self.path / "receipts.sqlite"

    @property
    def engines(self) -> Path:
        return self.path / "engines"

    def window(self, number: int) -> Path:
        return self.path / "windows" / f"{number:04d}"

    def run(self, window: int) -> Path:
        return self.window(window) / "run"

    def release(self, number: int) -> Path:
        return self.path / "releases" / f"{number:04d}"
