"""Order of the tests with `pytest -n 2`: files two at a time, the long ones first.

A file in ALONE has short limits: on a busy machine it would take healthy processes for hung ones. It begins when no
other worker has a long file any more. Light files, which start neither Ray nor engines, run beside it.
"""

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ALONE = ("tests/runs/chaos/test_chaos.py", "tests/runs/test_elastic.py")
# Files that start Ray or engines, the longest first, so that at the end no worker waits for a long file of the other.
LONG = (
    "tests/runs/test_run.py",
    "tests/runs/chaos/test_service_chaos.py",
    "tests/models/",
    "tests/runs/test_job.py",
    "tests/services/planning/",
    "tests/papers/test_own_data.py",
    "tests/learner/",
    "tests/actors/vllm/",
    "tests/papers/",
    "tests/runs/",
    "tests/services/cli/",
    "tests/services/cluster/",
    "tests/services/evaluation/",
    "tests/services/fleet/",
    "tests/services/grading/",
    "tests/services/training/",
    "tests/services/serving/",
)


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return long files, then those that run alone, then light ones."""

    def place(item: pytest.Item) -> int:
        if item.nodeid.startswith(ALONE):
            return len(LONG)
        return next((i for i, begin in enumerate(LONG) if item.nodeid.startswith(begin)), len(LONG) + 1)

    return sorted(items, key=place)


class TwoAtATime(LoadFileScheduling):
    """xdist's scheduler by file (pytest-xdist 3.8.0), which runs the files in ALONE beside light ones only."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        scope = self._next_for(node)
        if scope is None:
            node.shutdown()
            return
        self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)

    def remove_node(self, node: WorkerController) -> str | None:
        crashed = super().remove_node(node)
        for left in self.nodes:
            self._reschedule(left)
        return crashed

    def _next_for(self, node: WorkerController) -> str | None:
        """Return the file that a worker gets; None: what is left must not run beside the others."""
        first = next(iter(self.workqueue))
        if not first.startswith(ALONE):
            return str(first)
        others = [work for other, work in self.assigned_work.items() if other is not node]
        running = [str(scope) for work in others for scope, tests in work.items() if not all(tests.values())]
        if not any(scope.startswith((*ALONE, *LONG)) for scope in running):
            return str(first)
        return next((str(scope) for scope in self.workqueue if not scope.startswith(ALONE)), None)
