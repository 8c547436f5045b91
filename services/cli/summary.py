"""Lines that `sdft train` and `sdft check` print before a run starts and after it has ended."""

from pathlib import Path
from typing import Any

from sdft.services.analysis.status import status_text
from sdft.services.config.dtype import has_bfloat16
from sdft.services.config.run import RunConfig
from sdft.services.data.generation import DEFAULTS, EOS_FILES, end_ids, sampling_defaults
from sdft.services.planning.prepared import Prepared
from sdft.services.records.rows import Reply, read_rows


def run_lines(prepared: Prepared) -> list[str]:
    """Return the lines about a run that has not started: its model and stages, what it samples, warnings."""
    return [
        *model_lines(prepared),
        *dtype_lines(prepared.config),
        *reply_lines(prepared),
        *stage_lines(prepared),
        *sampling_lines(prepared),
    ]


def model_lines(prepared: Prepared) -> list[str]:
    """Return lines about what is special in the model: it is a copy, or its sequences are not packed."""
    lines = list(prepared.model_notes)
    if prepared.alone is not None:
        lines.append(f"the learner computes sequences one by one, which is slower than in packs: {prepared.alone}")
    return lines


def dtype_lines(config: RunConfig) -> list[str]:
    """Return a warning if this processor has no instructions for the run's dtype."""
    if config.device != "cpu" or config.dtype != "bfloat16" or has_bfloat16():
        return []
    return [
        "warning: this processor has no instructions for bfloat16, so a step can take a hundred times as long; "
        "set dtype: float32 or auto"
    ]


def reply_lines(prepared: Prepared) -> list[str]:
    """Return what ends a reply, with warnings of ends that other servers do not know or that replies may contain."""
    tokenizer, folder = prepared.tokenizer, prepared.model
    end, *others = prepared.stop_ids
    named = end_ids(folder)
    token, *also = tokenizer.convert_ids_to_tokens([end, *others])
    further = [text for text in also if text is not None]
    lines = [f"replies end with {token}{f'; engines also stop at {_listed(further)}' if further else ''}"]
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for i, text in zip(others, also, strict=True):
        if i not in known:
            what = "no token of the tokenizer" if text is None else f"ordinary text ({text}), and replies end there"
            lines.append(f"warning: eos_token_id in {named[i]} names {i}, which is {what}; correct eos_token_id")
    path = next(folder / name for name in EOS_FILES if (folder / name).is_file())
    if end != tokenizer.eos_token_id and end not in end_ids(folder, path.name):
        lines.append(
            f"warning: a reply ends with {token}, but eos_token_id in {path} does not name it, so other servers of the "
            f"model would not stop there; add {end} to eos_token_id"
        )
    return lines


def sampling_lines(prepared: Prepared) -> list[str]:
    """Return what each stage's rollouts are sampled from, and which defaults of the model folder are not used."""
    defaults = sampling_defaults(prepared.model)
    lines: dict[str, None] = {}
    for stage in prepared.stages:
        c = stage.config
        used: dict[str, float] = {}
        if c.method.student_samples or c.method.teacher_scores:
            used = {"temperature": c.sampling.temperature, "top_p": c.sampling.top_p}
            text = (
                f"rollouts are sampled with temperature {used['temperature']:g} and top_p {used['top_p']:g}, and their "
                f"log-probs are of that distribution"
            )
        elif prepared.sets:
            text = "replies to evaluation sets are greedy"
        else:
            continue
        ignored = [_setting(name, value) for name, value in defaults.items() if used.get(name) != value]
        verb = "is" if len(ignored) == 1 else "are"
        lines[text + (f"; {_listed(ignored)} in {DEFAULTS} {verb} not used" if ignored else "")] = None
    return list(lines)


def _setting(name: str, value: Any) -> str:
    return f"{name} {value:g}" if isinstance(value, int | float) else name


def _listed(items: list[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def stage_lines(prepared: Prepared) -> list[str]:
    """Return a line for each stage: demonstrations, steps and loss; and its warning, if there is one."""
    lines = []
    for stage in prepared.stages:
        c, schedule = stage.config, stage.schedule
        several = f"s {_listed(list(c.teacher.models))}" if c.teacher.models else ""
        teacher = f", {c.teacher.weights} teacher{several}" if c.method.teacher_scores else ""
        learns = f"{c.method.label}{teacher}"
        rows = f"{len(stage.prompts) - stage.recalled} {c.method.learns_from}"
        rows += "" if schedule.end_is_known else " so far"
        rows += f" and {stage.recalled} prompts to recall" if stage.recalled else ""
        steps = "steps" if schedule.last is None else f"{schedule.last - schedule.before} steps"
        if schedule.last is not None and not schedule.end_is_known:
            steps = f"at most {steps}"
        until = "" if schedule.end_is_known else f" until {schedule.source.name} is closed"
        lines.append(
            f"{f'{stage.name}: ' if stage.name else ''}{rows}, {steps} of {c.training.batch_size} prompts{until}, "
            f"{learns}"
        )
        lines += [f"warning: {warning}" for warning in stage.warnings]
    return lines


def print_outcome(run_dir: Path) -> None:
    """Print the results and a few replies, so that they can be read without the report."""
    print(status_text(run_dir))
    replies = read_rows(run_dir, Reply)
    for task in dict.fromkeys(r.task for r in replies):
        of_task = [r for r in replies if r.task == task]
        for identity in list(dict.fromkeys(r.id for r in of_task))[:3]:  # the first in the file, not the best
            by_step = {r.step: r for r in of_task if r.id == identity}
            print(f"\n{task}: {next(iter(by_step.values())).prompt.strip().splitlines()[-1]}")
            for step in dict.fromkeys((min(by_step), max(by_step))):
                text = " / ".join(by_step[step].text.strip().splitlines())
                grade = "right" if by_step[step].correct else "wrong"
                print(f"  step {step:<4} {grade}  {text[:140]}{'…' if len(text) > 140 else ''}")
