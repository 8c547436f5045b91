"""The command `sdft`.

Exit 0: done; 1: a process of the run failed, or a crash; 2: bad configuration or data; 3: it cannot run here; 4: the
retention guard ended the run; 130: stopped by SIGINT or SIGTERM; 141: the reader of the output has gone.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from sdft.services.base.environment import check_environment, named_proxies
from sdft.services.base.errors import PreflightError, RetentionLost, RunFailed, UserError
from sdft.services.base.files import check_output, check_output_file, part_name, write_atomically
from sdft.services.base.output import CLOSED, OutputFailed, drop, lasting_output, reader_gone, told_output
from sdft.services.base.signals import STOPPED, sigterm_interrupts
from sdft.services.data.without_torch import promise_tokenizers_only

if TYPE_CHECKING:
    from sdft.services.config.run import RunConfig
    from sdft.services.records.rows import EvalResult


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        with told_output():
            return _main(argv)
    except BrokenPipeError:
        if reader_gone():
            return CLOSED
        raise
    except OutputFailed as error:
        _say(f"the output cannot be written ({error.strerror}); make room, or send it elsewhere")
        return PreflightError.exit_code


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    if argv is None and arguments.run in (_train, _check):  # the process runs this command only
        promise_tokenizers_only()
    try:
        with sigterm_interrupts():
            check_environment()
            return int(arguments.run(arguments) or 0)
    except (UserError, PreflightError, RetentionLost, RunFailed) as error:
        _say(str(error))
        return error.exit_code
    except ImportError as error:
        if "socksio" not in str(error):
            raise
        _say(
            f"the environment names a SOCKS proxy ({named_proxies()}), which needs the package socksio; run "
            f"`pip install socksio`, or unset the variable"
        )
        return UserError.exit_code
    except KeyboardInterrupt:
        resumes = "; the same command resumes from the last checkpoint" if arguments.run is _train else ""
        _say(f"stopped{resumes}")
        return STOPPED


def _say(text: str) -> None:
    """Print a line on standard error, which may be on the same full disk as the output."""
    try:
        print(f"sdft: {text}", file=sys.stderr)
    except OSError:
        drop(sys.stderr)


def _train(a: argparse.Namespace) -> None:
    from rich.console import Console

    from sdft.services.cli.summary import dtype_lines, print_outcome, reply_lines, stage_lines
    from sdft.services.config.load import load_config, resolved_yaml
    from sdft.services.planning.prepare import prepare
    from sdft.services.records.checkpoints import begun

    path = Path(a.config)
    config = load_config(path, a.set)
    run_dir = Path(a.run_dir or config.run_dir or Path("runs") / path.stem)
    if a.append:
        from sdft.services.config.append import appended

        config, path = appended(run_dir, path.parent, a.set, Path(a.append)), run_dir / "config.yaml"
    prepared = prepare(config, path, begun=begun(run_dir, a.resume))
    output = lasting_output()
    console = Console(file=output)
    shape = prepared.shape
    size = f"{shape.parameters / 1e6:.1f} M parameters"
    if shape.adapters:
        size += f" (LoRA trains {shape.adapters / 1e6:.1f} M)"
    lines = [f"{size} in {config.dtype}", *dtype_lines(config), *reply_lines(prepared), *stage_lines(prepared)]
    console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
    console.print(prepared.plan.text(), markup=False, highlight=False)
    if a.dry_run:
        print(resolved_yaml(config))
        return
    from sdft.services.cli.train import train

    with _explained(run_dir):
        report = train(prepared, run_dir, a.resume, console)
    with redirect_stdout(output):
        print_outcome(run_dir)
    if report is not None:
        console.print(f"report: {report}", markup=False, soft_wrap=True)


@contextmanager
def _explained(run_dir: Path | None) -> Iterator[None]:
    """Convert a failed engine or learner into RunFailed, with the root cause from its log. The log has the rest."""
    try:
        yield
    except (UserError, PreflightError, RetentionLost):
        raise
    except Exception as error:
        from sdft.services.cli.root_cause import explained

        if (failure := explained(error, run_dir)) is None:
            raise
        raise failure from error


def _check(a: argparse.Namespace) -> None:
    from sdft.services.cli.summary import dtype_lines, reply_lines, stage_lines
    from sdft.services.config.load import load_config
    from sdft.services.planning.prepare import prepare

    path = Path(a.config)
    prepared = prepare(load_config(path, a.set), path)
    longest = max(len(p.teacher_ids or []) for stage in prepared.stages for p in stage.prompts)
    print(f"{path}: valid; the longest teacher prompt has {longest} tokens")
    print(*dtype_lines(prepared.config), *reply_lines(prepared), *stage_lines(prepared), sep="\n")
    print(f"evaluation: {', '.join(s.settings.name for s in prepared.sets) or 'none'}")
    print(prepared.plan.text())


def _status(a: argparse.Namespace) -> None:
    from sdft.services.analysis.status import status_text

    print(status_text(Path(a.run_dir)))


def _report(a: argparse.Namespace) -> None:
    from sdft.services.analysis.report import write_report
    from sdft.services.records.run_dir import check_run_dir

    run_dir = Path(a.run_dir)
    check_run_dir(run_dir)
    check_output(run_dir / "report.html")
    try:
        path = write_report(run_dir)
    except OSError as error:
        raise PreflightError(f"{run_dir}: the report could not be written ({error}); mend that") from None
    print(path)


def _matrix(a: argparse.Namespace) -> None:
    from sdft.services.analysis.matrix import matrix_text, read_matrix

    print(matrix_text([read_matrix(Path(run_dir)) for run_dir in a.run_dirs]))


def _export(a: argparse.Namespace) -> None:
    from sdft.services.records.checkpoints import damage, folder_of, newest_usable

    run_dir, out = Path(a.run_dir), Path(a.out)
    check_output(out, "--out")
    if out.exists():
        raise UserError(f"--out {out} exists already; name a new folder")
    folder, notes = newest_usable(run_dir) if a.step is None else (folder_of(run_dir, a.step), [])
    for note in notes:
        print(note)
    if folder is None or not folder.is_dir():
        raise UserError(
            f"{run_dir} has no checkpoint{'' if a.step is None else f' of step {a.step}'}; see `sdft status`"
        )
    # newest_usable() has checked the folder that it returns.
    if a.step is not None and (reason := damage(folder)) is not None:
        raise UserError(f"{folder} cannot be exported: {reason}")
    part = out.with_name(part_name(out))
    shutil.rmtree(part, ignore_errors=True)
    try:
        _export_student(folder / "student", part)
        part.rename(out)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise PreflightError(
            f"--out {out}: the model could not be written ({error}); free disk space, or name another folder"
        ) from None
    print(f"{out}: the student of {folder.name}, a plain Hugging Face folder")


def _export_student(student: Path, out: Path) -> None:
    if not (student / "adapter_config.json").exists():
        out.mkdir(parents=True)
        for path in student.iterdir():
            shutil.copyfile(path, out / path.name)  # without permissions
        return
    from sdft.learner.weights.export import BaseModelGone, merge_adapter

    try:
        merge_adapter(student, out)
    except (BaseModelGone, ValueError) as error:
        raise UserError(
            f"{student}: {error}; put the base model back, or load the adapter on another base with peft"
        ) from None


def _replay(a: argparse.Namespace) -> int:
    from rich.console import Console

    from sdft.services.cli.replay import replay

    difference = replay(Path(a.run_dir), a.steps, Console(file=lasting_output(), highlight=False))
    print(difference or "no difference: every figure and every saved state is the same bit for bit")
    return 0 if difference is None else 1


def _eval(a: argparse.Namespace) -> None:
    from rich.console import Console

    from sdft.services.config.load import load_config
    from sdft.services.planning.prepare import prepare

    path = Path(a.config)
    if a.regrade and a.model:
        raise UserError("--regrade grades the replies in a file, without a model; remove --regrade or --model")
    # A path on the command line is relative to the working directory, one in the file to the file's folder.
    overrides = a.set + ([f"model={json.dumps(str(_local(a.model)))}"] if a.model else [])
    config = load_config(path, overrides)
    if a.out:
        check_output_file(Path(a.out), "--out")
    if a.harness:
        _harness(a, config, path.parent)
        return
    if not config.sets:
        raise UserError(f"{path}: evaluation.sets is empty; give at least one set to evaluate")
    from sdft.services.evaluation.replies import regrade, write_replies

    if a.regrade:
        results, replies = regrade(config, path.parent, Path(a.regrade))
    else:
        prepared = prepare(config, path, trains=False)
        from sdft.services.cli.evaluate import evaluate

        with _explained(None):
            results, replies = evaluate(prepared, Console(file=lasting_output()))
    _show_results(map(_line, results), a.out, "results and replies", lambda out: write_replies(out, results, replies))


def _line(r: "EvalResult") -> str:
    from sdft.services.records.rows import PERPLEXITY
    from sdft.services.records.text import percent

    if r.metric == PERPLEXITY:
        return f"{r.label:<24}{r.text}  n {r.n} tokens"
    low, high = r.interval
    return f"{r.label:<24}{percent(r.value):>8}  n {r.n:<5} 95 % interval {percent(low)} to {percent(high)}"


def _show_results(lines: Iterable[object], out: str | None, what: str, write: Callable[[Path], None]) -> None:
    """Print the lines and write the file of --out, each even if the other fails."""
    try:
        print(*lines, sep="\n", flush=True)
    finally:
        try:
            if out:
                write(Path(out))
        except OSError as error:
            raise PreflightError(
                f"--out {out}: the {what} could not be written ({error}); the results above are complete"
            ) from None
    if out:
        print(f"{what}: {out}")


def _harness(a: argparse.Namespace, config: "RunConfig", base: Path) -> None:
    from sdft.services.evaluation.lm_eval import run_harness, scores
    from sdft.services.planning.examined import examined
    from sdft.services.planning.models import resolve_model

    model = resolve_model(config.model, base)
    with examined(model, trains=False):
        pass
    results = run_harness(config, model, a.harness, a.harness_tasks, a.harness_limit)
    lines = scores(json.loads(results))
    _show_results(lines, a.out, "results", lambda out: write_atomically(out, results))


def _local(model: str) -> Path | str:
    return Path(model).absolute() if Path(model).exists() else model


def _submit(a: argparse.Namespace) -> int:
    import asyncio

    from sdft.services.cluster.submit import follow, submit
    from sdft.services.config.load import load_config
    from sdft.services.data.check_files import check_files

    path = Path(a.config)
    config = load_config(path, a.set)
    check_files(config, path.parent, sent=Path.cwd())
    job = submit(path, a.run_dir or config.run_dir, a.set, a.address)
    print(f"submitted as {job}; the same command again resumes a job that was stopped")
    if not a.follow:
        print(f"follow it with: ray job logs --follow --address {a.address} {job}")
        return 0
    try:
        done = asyncio.run(follow(job, a.address))
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on; stop it with: ray job stop --address {a.address} {job}")
        return 130
    return 0 if done else 1


def _model(a: argparse.Namespace) -> None:
    from sdft.services.planning.models import materialise

    materialise(a.name, Path(a.out))
    print(a.out)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdft", description="Self-distillation fine-tuning on Ray, vLLM and DeepSpeed"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    c = add("train", _train, "Train, or continue a run that was stopped")
    _config(c)
    c.add_argument("--run-dir", help="the run directory (default: runs/<config name>)")
    c.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest whole checkpoint, if there is one; never: a new run; PATH: from this checkpoint "
        "(default: auto)",
    )
    c.add_argument("--append", metavar="STAGE.yaml", help="add this stage to a run that exists")
    c.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, and start nothing")
    _config(add("check", _check, "Check configuration, data and prompts without starting anything"))
    c = add("eval", _eval, "Run a configuration's evaluation sets on a model, without training")
    _config(c)
    c.add_argument("--model", metavar="PATH", help="use this model folder instead of the config's model")
    c.add_argument("--out", metavar="FILE", help="write results and all replies to this file, as JSON lines")
    c.add_argument("--regrade", metavar="FILE", help="grade the replies in an earlier --out again, without a model")
    c.add_argument("--harness", metavar="TASK,…", help="run these benchmarks of lm-eval instead, such as hellaswag")
    c.add_argument("--harness-tasks", metavar="DIR", help="folder with your own task files for lm-eval")
    c.add_argument("--harness-limit", metavar="N", type=int, help="questions per benchmark (default: all)")
    c = add("submit", _submit, "Send the current folder to a Ray cluster, and run `sdft train` there as a job")
    _config(c)
    c.add_argument(
        "--address", required=True, metavar="URL", help="address of the cluster's dashboard, such as http://HEAD:8265"
    )
    c.add_argument("--run-dir", help="the run directory: an absolute path that all nodes see")
    c.add_argument("--follow", action="store_true", help="print the job's output, and exit with 1 if the job fails")
    _run_dir(add("status", _status, "Show the state of a run"))
    _run_dir(add("report", _report, "Write a run's report.html"))
    c = add("matrix", _matrix, "Show the accuracy of every task before training and after each stage")
    c.add_argument(
        "run_dirs",
        metavar="RUN",
        nargs="+",
        help="run directory; of several runs, which may differ only in seed, the mean and its 95 %% interval are shown",
    )
    c = add("export", _export, "Write the student of a checkpoint as a Hugging Face folder")
    _run_dir(c)
    c.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    c.add_argument("--out", required=True, metavar="DIR", help="the folder to write, which must not exist")
    c = add("replay", _replay, "Run the learner again on recorded rollouts, and exit with 1 at the first difference")
    _run_dir(c)
    c.add_argument("--steps", metavar="a:b", help="first and last step, both included (default: all recorded steps)")
    c = add("model", _model, "Write a built-in model as a Hugging Face folder")
    c.add_argument("name", help="name of the model, such as smollm2-135m")
    c.add_argument("--out", required=True, metavar="DIR", help="the folder to write, which must be new or empty")
    return parser


def _config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="the configuration, a YAML file")
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=v", help="override a setting; may be given several times"
    )


def _run_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", metavar="RUN", help="the run directory")


if __name__ == "__main__":
    sys.exit(main())
