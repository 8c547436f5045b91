"""The Ray actor around one learner rank. It sets up the process before torch is imported, then only forwards calls."""

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError

from sdft.actors.roles import ROLES
from sdft.actors.shared.drafts import Draft, joined
from sdft.actors.shared.process import kept_heap, large_imports, openmp_wait_policy
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import IntArray, Process, SampleId, Snapshot
from sdft.learner.completions import counted
from sdft.learner.shares import Share
from sdft.learner.types import LearnerSettings, StepResult

# Concurrency groups. Ray runs their methods concurrently with the others.
SAVING, SENDING, COPYING, HEALTH = "saving", "sending", "copying", "health"
LIMIT = timedelta(minutes=10)  # for one collective; the health check detects a lost rank much earlier


class LearnerWorker:
    """One rank in its own process."""

    def where(self) -> Process:
        return Process(os.getpid(), ray.get_runtime_context().get_node_id())

    def rendezvous(self) -> tuple[str, int]:
        """Return address and port of this process's machine at which the ranks meet.

        The port is held from this call on: another process could take a released port while torch is imported.
        """
        address = _own_address()
        self._meeting = socket.create_server((address, 0), backlog=1024)
        return address, self._meeting.getsockname()[1]

    def start(self, settings: LearnerSettings, ranks: int, address: str, port: int, probe_ids: IntArray) -> None:
        """Load the model. Call it on all ranks at once: they wait for each other at the port of rank 0."""
        os.environ.update(_environment(settings, ranks))
        with large_imports():
            import torch

            from sdft.actors.shared.collective import serve, visit
            from sdft.actors.transport.named import transport_class
            from sdft.learner.checkpoint.saving import Saver
            from sdft.learner.engine import LearnerEngine
            from sdft.learner.weights.publisher import Publisher
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        limit_s = settings.config.start_timeout_s
        store = serve(self._meeting) if settings.rank == 0 else visit(address, port, limit_s)
        store.set_timeout(timedelta(seconds=limit_s))
        several = settings.device == "cuda" and ranks > 1  # NCCL then gets the device, as DeepSpeed would pass it
        torch.distributed.init_process_group(
            "gloo" if settings.device == "cpu" else "nccl",
            store=store,
            rank=settings.rank,
            world_size=ranks,
            timeout=LIMIT,
            device_id=torch.device("cuda", 0) if several else None,
        )

        self._engine = LearnerEngine(settings)
        self._saver = Saver()
        self._publisher = None
        if settings.rank == 0:
            node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
            model, dtype = Path(settings.model), self._engine.dtype
            transport = transport_class(settings.transport)
            self._on_gpu = transport.on_gpu
            self._publisher = Publisher(
                model, dtype, probe_ids, node, settings.vocabulary, settings.device, transport.on_gpu
            )
            self._sender = transport.sender(settings.device, _own_address())

    def fetch(self, share: Share) -> list[SampleId]:
        """Fetch the values of this rank's share for the next step. Returns the samples whose values are lost."""
        drafts = [sequence for sequence in share.sequences if isinstance(sequence, Draft)]
        values: list[list[Any]] = []
        lost = []
        try:
            values = _values(drafts)  # one call for all of them
        except ObjectLostError:
            for draft in drafts:
                try:
                    values += _values([draft])
                except ObjectLostError:
                    lost.append(draft.sample)
        if not lost:
            fetched = iter(joined(draft, of_draft) for draft, of_draft in zip(drafts, values, strict=True))
            self._share = share.of([next(fetched) if isinstance(s, Draft) else s for s in share.sequences])
        return lost

    def train_step(self) -> StepResult:
        """Take one optimizer step on the batch whose shares were fetched. `completions` is of this rank. Collective."""
        self._saver.detach()
        own = [sequence for sequence in self._share.sequences if isinstance(sequence, TrainingSequence)]
        counts = counted(own, self._engine.stage.watched)
        return replace(self._engine.train_step(self._share), completions=counts)

    def begin_stage(self) -> None:
        """Prepare the first step of a stage. Collective."""
        self._saver.detach()
        self._engine.begin_stage()

    def refresh_teacher(self) -> None:
        """Set the teacher to the student. Collective."""
        self._saver.detach()
        self._engine.refresh_teacher()

    def publish(self, role: str, version: int) -> Snapshot | None:
        """Return the snapshot, offered, on rank 0. The others contribute their parts of the weights and return None."""
        content = self._engine.snapshot(ROLES[role].weights)
        if self._publisher is not None:
            snapshot = self._publisher.publish(role, version, content)
            payload = self._publisher.payload(role)
            return self._sender.offer(snapshot, payload if self._on_gpu else payload.numpy())
        for _ in content.weights:
            pass
        return None

    @ray.method(concurrency_group=COPYING)
    def payload(self, role: str) -> list[ray.ObjectRef]:
        """Put the bytes of the role's last snapshot into Ray's object store, for other nodes.

        The reference is returned in a list, so that the caller gets the reference and not the bytes.
        """
        assert self._publisher is not None
        return [ray.put(self._publisher.host_bytes(role))]

    @ray.method(concurrency_group=SENDING)
    def sender(self, method: str, *arguments: Any) -> Any:
        """Call a method of the weight transport's sender. Runs also in the middle of a step."""
        return getattr(self._sender, method)(*arguments)

    def save(self, folder: str) -> None:
        """Begin to write the training state, and the student as a Hugging Face or peft folder beside it. Collective.

        `written` returns when it is done. Steps may run meanwhile.
        """
        from sdft.learner.weights.export import adapter_file, student_files

        settings, out = self._engine.settings, Path(folder) / "student"
        files = self._engine.state(Path(folder))
        weights = {}
        for name, tensor in self._engine.snapshot("student").weights:
            if self._publisher is not None:  # at ZeRO stage 3 one GPU has no room for all whole weights
                weights[name] = (tensor.cpu() if self._engine.divided else tensor).contiguous()
        if self._publisher is not None and settings.config.lora is not None:
            files.append(adapter_file(Path(settings.model), weights, settings.config.lora, out))
        elif self._publisher is not None:
            files += student_files(Path(settings.model), weights, self._engine.tied, out)
        self._saver.begin(files)

    @ray.method(concurrency_group=SAVING)
    def written(self) -> None:
        """Return when all that `save` began is written, though not flushed to the disk."""
        self._saver.finish()

    @ray.method(concurrency_group=HEALTH)
    def ping(self) -> None:
        """Return at once, also in the middle of a step: the health check."""

    def load(self, folder: str) -> int:
        """Load the state of a folder and return the step that it belongs to."""
        self._engine.load(Path(folder))
        return self._engine.step

    def parameters(self, role: str) -> dict[str, Any]:
        """Return all parameters as float32 numpy arrays, for comparisons on small models. Collective."""
        import torch

        return {name: tensor.cpu().numpy().copy() for name, tensor in self._engine.weights(role, torch.float32)}


def learner_actor(device: str) -> Any:
    """Return the Ray actor class of a rank on a device, cpu or cuda."""
    groups = {SAVING: 1, SENDING: 2, COPYING: 1, HEALTH: 1}
    return ray.remote(concurrency_groups=groups, runtime_env={"env_vars": kept_heap(device)})(LearnerWorker)


def _environment(settings: LearnerSettings, ranks: int) -> dict[str, str]:
    environment = openmp_wait_policy(settings.exclusive) | {
        "RANK": str(settings.rank),
        "LOCAL_RANK": str(settings.rank) if settings.device == "cpu" else "0",  # a rank sees only its own GPU
        "WORLD_SIZE": str(ranks),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": settings.device,
    }
    if settings.device == "cuda" and settings.config.deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it matrix products differ from run to run
    cores = len(os.sched_getaffinity(0))
    environment["OMP_NUM_THREADS"] = str(settings.config.threads or max(1, cores // ranks))
    return environment


def _values(drafts: Sequence[Draft]) -> list[list[Any]]:
    """Fetch the values of the references of each draft. Raises ObjectLostError."""
    held = [value for draft in drafts for value in draft.references]
    there = iter(ray.get([value for value in held if isinstance(value, ObjectRef)]))
    return [[next(there) if isinstance(v, ObjectRef) else v for v in draft.references] for draft in drafts]


def _own_address() -> str:
    return ray.util.get_node_ip_address()
