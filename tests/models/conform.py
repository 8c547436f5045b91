"""Everything that conformance means for one model folder: learner, engine, export.

    python -m tests.models.conform PART FOLDER DTYPE SCRATCH        prints the figures of a part as JSON

PART is run, or export after it. Each has a process of its own, which starts its engine first: vLLM forks it, and a fork
of a process that has computed can wait for threads that it does not have.

    packed pack ── plain transformers, one sequence at a time        hidden states, loss, every gradient
    learner steps ── plain torch                                     parameters and EMA teacher
    engine ── transformers, before and after three updates           log-probs of sampled and of given tokens
    export ── the original folder                                    names, shapes, files; both load it

The learner and transformers compute in float32, the engine in DTYPE.
"""

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

from sdft.actors.config import EngineSettings
from sdft.actors.engine import Engine
from sdft.actors.shared.drafts import sequence_of
from sdft.actors.shared.model_files import SINGLE
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import FloatArray, GenerateRequest, IntArray, Rollout, SampleId, Sampling, TeacherScores
from sdft.actors.worker import engine_class, engine_environment
from sdft.learner.config import (
    Forward,
    ImportanceConfig,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    TeacherConfig,
)
from sdft.learner.engine import LearnerEngine
from sdft.learner.loss.divergences import token_objective
from sdft.learner.model.experts import freeze_routers
from sdft.learner.model.forward import hidden_states, why_alone
from sdft.learner.model.mixers import mixers
from sdft.learner.model.student import SelfDistillation, load_student
from sdft.learner.packing import pack
from sdft.learner.shares import shares
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.learner.weights.content import Content
from sdft.learner.weights.export import adapter_file, merge_adapter, student_files
from sdft.learner.weights.publisher import Publisher
from tests.fakes.reference import Reference

LENGTHS = ((7, 9), (3, 12), (70, 14), (5, 17))  # tokens of prompt and completion; one is longer than windows and chunks
K, SKIP, ALPHA, STEPS = 16, 2, 0.1, 3
LOSS = LossConfig(divergence=Forward(top_k=K), importance=ImportanceConfig(level="sequence", cap=2.0))
ADAMW: dict[str, Any] = {"weight_decay": 0.1, "eps": 1e-4}  # a small eps amplifies the rounding of small gradients
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant", grad_clip=1.0, **ADAMW)
PROBE = np.random.default_rng(7).integers(5, 500, 30).astype(np.int32)
GIVEN = [np.random.default_rng(8).integers(5, 500, n).astype(np.int32) for n in (7, 23, 70)]
PROMPTS = [*GIVEN, GIVEN[-1]]  # the last two share a block of the engine's cache
NEW_TOKENS = 12
SMALL = 0.1
BOUND = {"float32": 1e-4, "bfloat16": 0.15}  # of a log-prob, between engine and transformers


def sequences(model: PreTrainedModel, seed: int) -> list[TrainingSequence]:
    """Random sequences. Sampler log-probs are the model's own with small noise, the teacher's are random."""
    rng, made = np.random.default_rng(seed), []
    for i, (prompt_tokens, tokens) in enumerate(LENGTHS):
        prompt, completion = (rng.integers(5, 500, n).astype(np.int32) for n in (prompt_tokens, tokens))
        noise = torch.Generator().manual_seed(100 * seed + i)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        teacher = torch.log_softmax(torch.randn(tokens, vocabulary, generator=noise), -1)
        top = teacher.topk(K, -1)
        own = torch.from_numpy(completion).long()[:, None]
        scores = TeacherScores(
            top.indices.numpy().astype(np.int32), top.values.numpy(), teacher.gather(1, own)[:, 0].numpy(), 0
        )
        sampled = logprobs(model, prompt, completion) + rng.normal(0, 0.05, tokens).astype(np.float32)
        rollout = Rollout(prompt, completion, sampled, ((0, 0, tokens),), "stop")
        made.append(sequence_of(SampleId(0, 0, i, 0), rollout, scores, SKIP))
    return made


@torch.no_grad()
def logprobs(model: PreTrainedModel, prompt: IntArray, completion: IntArray) -> FloatArray:
    """Log-probs of a completion's tokens by transformers' own forward: [T]."""
    ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
    rows = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1)
    found: FloatArray = rows[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0].numpy()
    return found


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers computes it, with its most literal attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def apart(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """The largest difference, relative to the largest value or to `least`."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=max(least, 1e-6)))


def packed(folder: Path) -> dict[str, float]:
    """Compare a pack, forward and backward, with each sequence alone in plain transformers.

    The gradient of a decay is a small difference of large sums: plain transformers differs from itself by up to 2e-4 of
    it if another layer uses another kernel. In a model with such layers, a difference of small gradients is relative to
    SMALL of the largest one.
    """
    model, reference = load_student(folder, torch.float32), plain(folder)
    made = sequences(reference, 0)
    batch = pack(made, len(made), K)
    with torch.no_grad():
        ours = hidden_states(model, batch.input_ids, batch.position_ids, batch.lengths)
        theirs = [
            reference.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            for ids in batch.input_ids.split(batch.lengths)
        ]
    loss = SelfDistillation(model, replace_importance(LOSS))(batch)[0]
    loss.backward()
    total = torch.zeros(())
    for sequence in made:
        alone = pack([sequence], len(made), K)
        logits = reference(input_ids=alone.input_ids[None], use_cache=False).logits[0][alone.predicting]
        objective, _ = token_objective(logits, alone.targets, LOSS)
        total = total + (objective * alone.targets.share).sum()
    total.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    least = SMALL * largest if mixers(reference) else 0.0
    gradients = {
        name: apart(parameter.grad, expected[name], least)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name in expected
    }
    return {
        "hidden states": apart(ours, torch.cat(theirs)),
        "loss": apart(loss.detach(), total.detach()),
        "gradients": max(gradients.values()),
    }


def replace_importance(loss: LossConfig) -> LossConfig:
    """The loss without importance weights, as token_objective has it."""
    return loss.model_copy(update={"importance": ImportanceConfig(level="off")})


def settings(folder: Path, **changes: Any) -> LearnerSettings:
    config = LearnerConfig(threads=1, micro_batch_tokens=100, optimizer=OPTIMIZER, **changes)
    stage = StageSettings(0, STEPS, (LOSS,), OPTIMIZER)
    return LearnerSettings(str(folder), "float32", "cpu", 0, config, (stage,), TeacherConfig(alpha=ALPHA))


def step(engine: LearnerEngine, made: list[TrainingSequence]) -> None:
    (share,) = shares(made, 1, engine.settings.config.tokens_at_once("cpu"))
    engine.train_step(share)


def weights(engine: LearnerEngine, role: str) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.weights(role)}


def steps(folder: Path, scratch: Path) -> dict[str, float]:
    """Compare two steps with plain torch, and a third one after a resume with one that went on."""
    reference = Reference(folder, ALPHA, cap=2.0, clip=OPTIMIZER.grad_clip, betas=OPTIMIZER.betas, **ADAMW)
    reference.student.set_attn_implementation("eager")
    freeze_routers(reference.student)
    engine = LearnerEngine(settings(folder, gradient_checkpointing=True))
    for i in range(2):
        made = sequences(plain(folder), i)
        step(engine, made)
        reference.step(made, OPTIMIZER.lr)
    parameters = dict(engine._engine.module.model.named_parameters())
    student = max(apart(parameters[name].detach(), p) for name, p in reference.weights().items())
    resumed = LearnerEngine(settings(folder, gradient_checkpointing=True))
    (scratch / "state").mkdir()
    for file in engine.state(scratch / "state"):
        file.write()
    resumed.load(scratch / "state")
    for one in (engine, resumed):
        step(one, sequences(plain(folder), 2))
    same = all(
        torch.equal(a, b)
        for role in ("student", "teacher")
        for a, b in zip(weights(engine, role).values(), weights(resumed, role).values(), strict=True)
    )
    return {"student": student, "resumed": float(same)}


def engine_settings(folder: Path, dtype: str) -> EngineSettings:
    return EngineSettings(
        model=str(folder),
        dtype=dtype,
        device="cpu",
        max_model_len=256,
        max_logprobs=K,
        max_num_seqs=4,
        hold_batches=True,
        share_prompts=True,
        gpu_memory_utilization=0.1,
        execution="eager",
        max_probe_gap=BOUND[dtype],
        threads=1,
        kv_cache_gib=0.2,
    )


async def started(folder: Path, dtype: str) -> Engine:
    """An engine, started as its actor starts it. vLLM reads the environment when it is imported."""
    settings = engine_settings(folder, dtype)
    os.environ.update(engine_environment(settings) | {"VLLM_LOGGING_LEVEL": "ERROR"})
    engine = engine_class(settings.engine)(settings)
    await engine.start()
    return engine


async def difference(engine: Engine, model: PreTrainedModel) -> float:
    """The largest difference of a log-prob, of sampled and of scored tokens, between engine and transformers.

    Of held and of streamed batches. In bfloat16 the mean difference: rounding sends a token to another expert now and
    then, here and there.
    """
    found = []
    for held in (True, False):
        engine.settings = replace(engine.settings, hold_batches=held)
        rollouts = await engine.generate([GenerateRequest(p, i) for i, p in enumerate(PROMPTS)], Sampling(NEW_TOKENS))
        completions = [rollout.completion_ids for rollout in rollouts]
        scores = await engine.score(list(zip(PROMPTS, completions, strict=True)), K)
        for prompt, rollout, score in zip(PROMPTS, rollouts, scores, strict=True):
            expected = logprobs(model, prompt, rollout.completion_ids)
            found += [np.abs(rollout.logprobs - expected), np.abs(score.sampled - expected)]
    apart = np.concatenate(found)
    return float(apart.max() if engine.settings.dtype == "float32" else apart.mean())


async def served(folder: Path, dtype: str, scratch: Path) -> dict[str, Any]:
    """Compare an engine with transformers as loaded and after each of three updates. Leaves the exports in scratch."""
    engine = await started(folder, dtype)
    found: dict[str, Any] = {"loaded": await difference(engine, plain(folder, getattr(torch, dtype)))}
    join_group(scratch)
    learner = LearnerEngine(replace(settings(folder), dtype=dtype))
    publisher = Publisher(folder, learner.dtype, PROBE, "here")
    gaps, differences = [], []
    for version in range(1, STEPS + 1):
        step(learner, sequences(plain(folder), version))
        report = await engine.update_weights(publisher.publish("student", version, learner.snapshot("student")))
        exported = scratch / f"v{version}"
        whole = {name: weight.contiguous() for name, weight in learner.weights("student")}
        for file in student_files(folder, whole, learner.tied, exported):
            file.write()
        gaps.append(report.probe_gap)
        differences.append(await difference(engine, plain(exported, getattr(torch, dtype))))
    adapted, update = lora(folder, dtype, scratch)
    await engine.update_weights(publisher.publish("student", STEPS + 1, update))
    found["LoRA"] = await difference(engine, plain(adapted, getattr(torch, dtype)))
    before, after = (load_file(path / SINGLE) for path in (folder, exported))
    return found | {
        "updated": max(differences),
        "probe": max(gaps),
        "same tensors": float({n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}),
        "same files": float({p.name for p in folder.iterdir()} == {p.name for p in exported.iterdir()}),
    }


def lora(folder: Path, dtype: str, scratch: Path) -> tuple[Path, Content]:
    """Train adapters for two steps. Returns the folder with them merged, and what engines get."""
    config = LoraConfig(rank=4, alpha=8)
    learner = LearnerEngine(replace(settings(folder, lora=config), dtype=dtype))
    for i in range(2):
        step(learner, sequences(plain(folder), i))
    adapters = {name: adapter.clone() for name, adapter in learner.snapshot("student").weights}
    adapter_file(folder, adapters, config, scratch / "adapter").write()
    merge_adapter(scratch / "adapter", scratch / "merged")
    return scratch / "merged", learner.snapshot("student")


async def loaded(exported: Path, dtype: str) -> dict[str, Any]:
    """Compare a new engine with transformers on an exported folder."""
    return {"export": await difference(await started(exported, dtype), plain(exported, getattr(torch, dtype)))}


def join_group(scratch: Path) -> None:
    """Become the only rank of a learner. After an engine has started: its fork would wait for the group's threads."""
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/{os.getpid()}", rank=0, world_size=1)


def main() -> None:
    part, folder, dtype, scratch = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    if part == "export":
        found = asyncio.run(loaded(scratch / f"v{STEPS}", dtype))
    else:
        found = asyncio.run(served(folder, dtype, scratch))
        found |= {"alone": why_alone(AutoConfig.from_pretrained(folder))} | packed(folder) | steps(folder, scratch)
    print(json.dumps(found), flush=True)
    os._exit(0)  # without the clean-up of an engine's threads, which takes seconds


if __name__ == "__main__":
    main()
