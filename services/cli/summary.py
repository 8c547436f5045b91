"""Lines that `sdft train` and `sdft check` print before a run starts and after it has ended."""

import json
from pathlib import Path

from sdft.services.analysis.status import status_text
from sdft.services.base.errors import UserError, first_line
from sdft.services.base.files import read_text
from sdft.services.config.dtype import has_bfloat16
from sdft.services.config.run import RunConfig
from sdft.services.planning.prepared import Prepared
from sdft.services.records.rows import Reply, read_rows


def model_lines(prepared: Prepared) -> list[str]:
    """Return lines about what is special in the model: it is a dequantized copy, or its sequences are not packed."""
    lines = []
    if prepared.quantized is not None:
        lines.append(
            f"the weights in {prepared.quantized} are quantized; the run begins with their dequantized copy in "
            f"{prepared.model}"
        )
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
    """Return a warning if a server without the chat template would not stop at the end of a reply."""
    end, folder = prepared.reply_end, prepared.model
    path = next(folder / name for name in ("generation_config.json", "config.json") if (folder / name).is_file())
    try:
        named = json.loads(read_text(path)).get("eos_token_id")
    except (AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a JSON object ({first_line(error)}); download the model again") from None
    if end in (prepared.tokenizer.eos_token_id, named) or (isinstance(named, list) and end in named):
        return []
    token = prepared.tokenizer.convert_ids_to_tokens(end)
    return [
        f"warning: a reply ends with {token}, but eos_token_id in {path} does not name it, so other servers of the "
        f"model would not stop there; add {end} to eos_token_id"
    ]


def stage_lines(prepared: Prepared) -> list[str]:
    """Return a line for each stage: demonstrations, steps and loss; and its warning, if there is one."""
    lines = []
    for stage in prepared.stages:
        c, schedule = stage.config, stage.schedule
        learns = f"{c.method.label}, {c.teacher.weights} teacher" if c.method.teacher_scores else c.method.label
        rows = f"{len(stage.prompts) - stage.recalled} demonstrations{'' if schedule.end_is_known else ' so far'}"
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
