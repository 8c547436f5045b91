"""The live display of a run: a panel on a terminal, otherwise one plain line per step."""

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sdft.services.records.figures import PHASES
from sdft.services.records.rows import EvalResult, StepMetrics

# Evaluations shown on a terminal: the first and the last ones, so that the panel fits the screen.
SHOWN_EVALUATIONS = 8


class Progress:
    """Shows the progress of a run: `with Progress(console, total_steps=40, title="demo") as progress:`, then one method
    call per event."""

    def __init__(self, console: Console, total_steps: int | None, title: str) -> None:
        """total_steps: None if the end of the run is open."""
        self._console, self._total, self._title = console, total_steps, title
        self._last: StepMetrics | None = None
        self._began = 0.0  # start of this process's first step, on the monotonic clock
        self._steps_seen = 0
        self._ends = 0.0  # estimated end of the last step, on the same clock
        self._results: list[EvalResult] = []
        self._phase = "starting"
        self._spinner = Spinner("dots", self._phase)
        on_terminal = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=4) if on_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._spinner.update(text="done" if error_type is None else f"stopped by {error_type.__name__}")
            self._live.stop()

    def phase(self, text: str) -> None:
        """Show the current phase of the run, such as "starting engines"."""
        self._phase = text
        self._spinner.update(text=Text(text))
        if not self._live:
            self._line(text)

    def part(self, text: str) -> None:
        """Show the current part of the phase, beside it in the panel. Not shown without a terminal."""
        self._spinner.update(text=Text(f"{self._phase}, {text}"))

    def step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        if self._steps_seen == 0:
            self._began = now - metrics.time_step_s
        self._steps_seen += 1
        self._last = metrics
        # From the mean time per step, including evaluations and checkpoints between the steps.
        if self._total is not None:
            self._ends = now + (now - self._began) / self._steps_seen * (self._total - metrics.step)
        if not self._live:
            m = metrics
            times = " ".join(f"{phase.name} {m.seconds(phase):.1f}s" for phase in PHASES)
            self._line(
                f"step {self._of_total(m.step)}  loss {m.loss:.4f}  {m.divergence_name} {m.divergence:.4f}  "
                f"{m.loss_tokens} loss tokens  {m.tokens_per_s:.0f} tok/s  {times}{self._eta()}"
            )

    def evaluation(self, results: list[EvalResult]) -> None:
        """Show the results of one evaluation, all of the same step."""
        self._results += results
        if results and not self._live:
            cells = [f"{r.label} {r.text} (n {r.n})" for r in results]
            self._line(f"evaluation at step {results[0].step}  {'  '.join(cells)}")

    def note(self, text: str) -> None:
        """Print a permanent line, above the panel."""
        self._line(text)

    def _line(self, text: str) -> None:
        # soft_wrap: lines are neither wrapped nor cut at the reported width of the console.
        self._console.print(Text(text), soft_wrap=True)

    def _of_total(self, step: int) -> str:
        return str(step) if self._total is None else f"{step}/{self._total}"

    def _eta(self) -> str:
        """Return the time until the end of the run, to be put behind other text; empty if the end is open."""
        if self._total is None:
            return ""
        minutes, seconds = divmod(max(0, round(self._ends - time.monotonic())), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  ETA {hours}:{minutes:02}:{seconds:02}" if hours else f"  ETA {minutes}:{seconds:02}"

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar(), self._spinner]
        if self._last:
            parts += [Text(), self._numbers(self._last), self._times(self._last)]
        if self._results:
            parts += [Text(), self._evaluations()]
        return Panel(Group(*parts), title=f"sdft · {self._title}", title_align="left", border_style="bright_black")

    def _bar(self) -> RenderableType:
        step = self._last.step if self._last else 0
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        eta = self._eta().strip() if self._last else "ETA –"
        bar = ProgressBar(self._total, step, complete_style="green")
        row.add_row(Text(f"step {self._of_total(step)}", "bold"), bar, eta)
        return row

    def _numbers(self, m: StepMetrics) -> RenderableType:
        return Text.assemble(
            ("loss ", "dim"), f"{m.loss:.4f}",
            (f"   {m.divergence_name} ", "dim"), f"{m.divergence:.4f}",
            ("   gradient norm ", "dim"), f"{m.grad_norm:.2f}",
            ("   loss tokens ", "dim"), f"{m.loss_tokens}",
            ("   speed ", "dim"), f"{m.tokens_per_s:.0f} tok/s",
        )  # fmt: skip

    def _times(self, m: StepMetrics) -> RenderableType:
        line = Text.assemble(("last step ", "dim"), f"{m.time_step_s:.1f} s  ")
        for phase in PHASES:
            line.append(f" {phase.name} ", phase.terminal).append(f"{m.seconds(phase):.1f}")
        return line

    def _evaluations(self) -> RenderableType:
        shown = [result for result in self._results if result.k is None]  # no pass@k: a set may have a dozen
        sizes = {result.task: result.n for result in shown}
        rows: dict[str, dict[str, str]] = {}  # "teacher" or the step -> set -> share
        for result in shown:
            label = "teacher" if result.by_teacher else f"step {result.step}"
            rows.setdefault(label, {})[result.task] = result.text
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("evaluation")
        for task, n in sizes.items():
            table.add_column(Text(f"{task} (n {n})"), justify="right")
        labels = [label for label in rows if label != "teacher"]
        left_out = max(0, len(labels) - SHOWN_EVALUATIONS)
        for label in [*(["teacher"] if "teacher" in rows else []), *labels[:1], *labels[1 + left_out :]]:
            table.add_row(label, *(rows[label].get(task, "") for task in sizes))
            if left_out and label == labels[0]:
                table.add_row(Text(f"… {left_out} more", "dim"))
        return table
