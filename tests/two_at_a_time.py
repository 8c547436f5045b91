"""Order of the tests with `pytest -n 2`: files two at a time, the long ones first, then those that must run alone.

A file that must run alone has short limits: on a busy machine it would take healthy nodes for lost ones. A worker gets
the first of them only when the other workers have ended.
"""

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ALONE = ("tests/runs/test_elastic.py",)
# Files that start Ray or engines, the longest first, so that at the end no worker waits for a long file of the other.
LONG = (
    "tests/runs/test_run.py",
    "tests/runs/chaos/",
    "tests/models/",
    "tests/runs/test_job.py",
    "tests/services/planning/",
    "tests/papers/test_own_data.py",
    "tests/learner/",
    "tests/actors/vllm/",
    "tests/papers/test_examples.py",
    "tests/runs/",
    "tests/services/cli/",
    "tests/services/cluster/",
    "tests/services/evaluation/",
    "tests/services/fleet/",
    "tests/services/grading/",
    "tests/services/training/",
)


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return long files, then short ones, then those that run alone."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        first = next((i for i, begin in enumerate(LONG) if item.nodeid.startswith(begin)), len(LONG))
        return item.nodeid.startswith(ALONE), first

    return sorted(items, key=place)


class TwoAtATime(LoadFileScheduling):
    """xdist's scheduler by file (pytest-xdist 3.8.0), which leaves one worker for the files in ALONE."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        if next(iter(self.workqueue)).startswith(ALONE) and len(self.nodes) > 1:
            if not all(other.shutting_down for other in self.nodes if other is not node):
                node.shutdown()
            return
        super()._assign_work_unit(node)

    def remove_node(self, node: WorkerController) -> str | None:
        crashed = super().remove_node(node)
        for left in self.nodes:
            self._reschedule(left)
        return crashed
