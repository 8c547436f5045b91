"""What is on each GPU of a plan, and what is refused: each sentence names settings with which the run fits."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.allocated import model_shape
from sdft.actors.shared.process import GIB
from sdft.services.base.errors import PreflightError
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.planning.cards import card_gib, cards
from sdft.services.planning.engine_memory import WORKSPACE_GIB
from sdft.services.planning.gpu_fit import check_gpu_memory
from sdft.services.planning.parts import Part, together_gib
from sdft.services.planning.plan import Plan, make_plan
from sdft.services.planning.prepare import prepare
from tests.runs.run import write_run

SHAPE = model_shape("1.5b", fused=True)
SHARED: dict[str, Any] = {
    "learner": {"gpus": 0.4, "gradient_checkpointing": False},
    "actors": {"student": {"gpus": 0.3, "kv_cache_gib": 4}, "teacher": {"gpus": 0.3, "kv_cache_gib": 4}},
}
SLEEPING = {name: pool | {"sleep": True} for name, pool in SHARED["actors"].items()}
LORA = {"gpus": 0.4, "gradient_checkpointing": True, "lora": {"rank": 16}}
RECOMPUTE, SMALLER = "learner.gradient_checkpointing", "learner.micro_batch_tokens"
RANK = "learner rank 0 needs about"
CACHES = ["actors.student.kv_cache_gib", "actors.teacher.kv_cache_gib"]
ALONE: dict[str, Any] = {"gpus": 0.3, "kv_cache_gib": 4}
LARGE: dict[str, Any] = {"kv_cache_gib": 30}
# GiB of a GPU, settings, what is refused, and the settings that are named.
REFUSED: list[tuple[float, dict[str, Any], str, list[str]]] = [
    (60, SHARED, "share a GPU of 60.0 GiB", [RECOMPUTE]),
    (57, SHARED, "for learner rank 0", [SMALLER, RECOMPUTE]),
    (50, SHARED | {"learner": {"gpus": 0.4}}, "share a GPU", ["learner.offload", RECOMPUTE]),
    (36, SHARED | {"learner": {"gpus": 0.4}}, "share a GPU", ["learner.lora", RECOMPUTE]),
    (50, SHARED | {"actors": SLEEPING}, "need about 54.4 GiB", ["learner.offload"]),
    (36, {}, RANK, ["learner.offload"]),
    (24, {}, RANK, ["learner.offload", RECOMPUTE]),
    (24, {"learner": {"offload": True}}, RANK, [RECOMPUTE]),
    (20, {}, RANK, ["learner.ranks", RECOMPUTE]),
    (17, {}, RANK, ["learner.ranks", "learner.zero_stage", RECOMPUTE]),
    (40, {"learner": LORA, "actors": {"student": ALONE | LARGE, "teacher": ALONE}}, "for student engine 0", CACHES[:1]),
    (20, {"learner": LORA, "actors": SHARED["actors"]}, "share a GPU of 20.0 GiB", CACHES),
    (24, {"learner": LORA | {"gpus": 1}, "actors": {"student": LARGE}}, "student engine 0 needs", CACHES[:1]),
    (
        80,
        {"actors": {"student": {"gpu_memory_utilization": 0.05}}},
        "is 4.0 of a GPU's 80.0 GiB",
        ["actors.student.gpu_memory_utilization"],
    ),
]


def with_gpus(**sections: object) -> RunConfig:
    """A run of the shape on GPUs. sections: as in a configuration."""
    common = {"model": "m", "device": "cuda", "data": {"train": "t"}, "training": {"steps": 1}}
    return RunConfig.model_validate(common | sections)


def plan_of(card: float | None, **sections: object) -> Plan:
    return make_plan(with_gpus(**sections), SHAPE, [384], card_gib=card)


def test_the_table_has_the_gpu_memory_of_each_process_and_of_each_gpu_that_is_shared() -> None:
    text = plan_of(80, **SHARED).text()
    print(text)
    head, student, _, rank, driver, total, gpu, card = text.splitlines()
    assert head.split() == ["process", "Ray", "CPUs", "GPUs", "memory", "GPU", "memory"]
    assert [line[:22].strip() for line in (student, rank, total)] == ["student engine 0", "learner rank 0", "total"]
    gib = [float(line.split()[-2]) for line in (student, rank, total)]
    assert gib[2] == pytest.approx(2 * gib[0] + gib[1], abs=0.11)
    assert len({len(line) for line in (head, student, rank, total)}) == 1
    assert "GPU" not in driver
    assert gpu == f"GPU 0: student engine 0, teacher engine 0, learner rank 0: {gib[2]:.1f} GiB"
    assert card == "memory of a GPU: 80.0 GiB"


def test_the_main_memory_of_a_rank_on_a_gpu_is_its_process_and_the_snapshots() -> None:
    snapshot = 2 * SHAPE.parameters / GIB
    ema, live = (plan_of(80, teacher={"weights": w}).learners[0].memory_gib for w in ("ema", "live"))
    assert ema - live == pytest.approx(snapshot, abs=0.01)
    assert snapshot < live < snapshot + 3


def test_without_gpus_the_table_has_no_column_for_them() -> None:
    assert "GPU memory" not in make_plan(with_gpus(device="cpu"), SHAPE, [384]).text()


def test_nothing_is_refused_if_the_memory_of_a_gpu_is_not_known() -> None:
    plan = plan_of(None, actors={"student": {"kv_cache_gib": 10**6}})
    check_gpu_memory(plan)
    assert "not known" in plan.text()
    (teacher,) = (line for line in plan.text().splitlines() if line.startswith("teacher"))
    assert "from" in teacher  # its share is not known


@pytest.mark.parametrize(("card", "sections", "needs", "mends"), REFUSED)
def test_what_does_not_fit_is_refused_with_settings_with_which_it_fits(
    card: float, sections: dict[str, Any], needs: str, mends: list[str]
) -> None:
    with pytest.raises(PreflightError, match=re.escape(needs)) as refused:
        check_gpu_memory(plan_of(card, **sections))
    print(refused.value)
    changes = mended(str(refused.value))
    assert list(changes) == mends
    settings = with_gpus(**sections).model_dump(mode="json")
    for key, value in changes.items():
        *places, name = key.split(".")
        section = settings
        for place in places:
            section = section[place]
        section[name] = value
    check_gpu_memory(make_plan(RunConfig.model_validate(settings), SHAPE, [384], card_gib=card))


def mended(sentence: str) -> dict[str, Any]:
    """The settings that a sentence names, by their keys."""
    share = re.search(r"^(\S+gpu_memory_utilization) .*; set it to ([\d.]+)$", sentence)
    if share:
        return {share[1]: float(share[2])}
    mend = re.sub(r" \(then .*\)$", "", sentence.rpartition("; set ")[2])
    return {key: yaml.safe_load(value) for key, value in (part.split(": ", 1) for part in re.split(", | and ", mend))}


def test_engines_that_sleep_and_the_activations_of_a_step_are_not_there_at_a_time() -> None:
    awake, asleep = (plan_of(80, **(SHARED | {"actors": actors})) for actors in (SHARED["actors"], SLEEPING))
    (rank,), engines = awake.learners, [p for pool in awake.pools.values() for p in pool]
    everything = together_gib(awake.parts)
    assert everything == pytest.approx(rank.gpu_gib + sum(p.gpu_gib for p in engines))
    stepping = rank.gpu_gib + len(engines) * WORKSPACE_GIB
    computing = rank.resting_gib + sum(p.gpu_gib for p in engines)
    assert rank.resting_gib < rank.gpu_gib
    assert together_gib(asleep.parts) == pytest.approx(max(stepping, computing))
    assert max(stepping, computing) < everything - 10


def test_ranks_that_divide_tokens_hold_a_part_of_the_activations() -> None:
    usual, batch = {"gradient_checkpointing": False, "ranks": 4}, {"steps": 1, "batch_size": 128}
    alone, divided, equal = (
        plan_of(
            80, learner=usual | {"micro_batch_tokens": tokens, "sequence_parallel": together}, training=batch
        ).learners[0]
        for tokens, together in ((20480, 1), (8192, 4), (8192, 1))  # equal: as many tokens in a forward as divided
    )
    assert divided.resting_gib == alone.resting_gib
    assert divided.gpu_gib < alone.gpu_gib - 15
    assert divided.gpu_gib == pytest.approx(equal.gpu_gib, rel=0.02)


def test_what_fits_with_no_setting_needs_another_model_or_gpu() -> None:
    with pytest.raises(PreflightError, match="use a smaller model, or GPUs with more memory"):
        check_gpu_memory(plan_of(6, learner={"gpus": 0.4}, actors=SHARED["actors"]))
    with pytest.raises(PreflightError, match="use a smaller model, or GPUs with more memory"):
        check_gpu_memory(plan_of(4))


def test_fractions_of_gpus_are_put_together_in_the_order_of_the_processes() -> None:
    names = "abcdef"
    parts = [Part(name, 1, gpus, 1) for name, gpus in zip(names, (0.5, 1, 0.6, 0.4, 0.1, 0), strict=True)]
    assert [[p.name for p in on_one] for on_one in cards(parts)] == [["a", "e"], ["b"], ["c", "d"]]
    third = [Part(name, 1, gpus, 1) for name, gpus in zip(names, (0.3, 0.3, 0.4), strict=False)]
    assert len(cards(third)) == 1


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that reports two GPUs, the only program on PATH besides the shell's."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=memory.total,memory.reserved ] && echo 143771, 600 && echo 81559, 551\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.defpath}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return program


def test_the_memory_of_a_gpu_is_that_of_the_smallest_here_or_the_configured_one(smi: Path) -> None:
    elsewhere = {"address": "10.0.0.1:6379"}
    assert card_gib(with_gpus()) == (81559 - 551) / 1024
    assert card_gib(with_gpus(device="cpu")) is None
    assert card_gib(with_gpus(ray={"gpu_memory_gib": 40})) == 40
    assert card_gib(with_gpus(ray=elsewhere)) is None
    assert card_gib(with_gpus(ray=elsewhere | {"gpu_memory_gib": 24})) == 24
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\n")
    assert card_gib(with_gpus()) is None
    smi.unlink()
    assert card_gib(with_gpus()) is None


@pytest.mark.parametrize(("spared", "chosen"), [(-0.001, True), (0.001, False), (None, False)])
def test_gradient_checkpointing_is_on_if_a_rank_does_not_fit_without(
    tiny_model: Path, tmp_path: Path, spared: float | None, chosen: bool
) -> None:
    """The GPU has a little less or more than a rank needs without."""
    path = write_run(tmp_path, tiny_model, "bfloat16", micro_batch_tokens=8192)
    alone = ["device=cuda", "training.batch_size=64", "actors.student={}", "actors.teacher={}"]

    def prepared(*overrides: str) -> tuple[Mapping[str, object], Plan]:
        ready = prepare(load_config(path, [*alone, *overrides]), path)
        return ready.config.learner.model_dump(), ready.plan

    (without,) = prepared("learner.gradient_checkpointing=false", "ray.gpu_memory_gib=80")[1].learners
    card = 80.0 if spared is None else without.gpu_gib + spared
    learner, plan = prepared(f"ray.gpu_memory_gib={card}")
    assert learner["gradient_checkpointing"] is chosen
    assert ("learner.gradient_checkpointing: true" in plan.text()) is chosen
    assert (plan.learners[0].gpu_gib < without.gpu_gib) is chosen
