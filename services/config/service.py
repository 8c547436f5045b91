"""Settings of a service, `sdft serve`. Imports neither torch, ray nor vllm."""

from typing import Any, Literal

from pydantic import Field, model_validator

from sdft.actors.config import Execution
from sdft.services.base.section import Section
from sdft.services.config.evaluation import Grader

INBOX = "inbox"  # stands for data.train in the configuration of a service
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ProxiesConfig(Section):
    """Ray Serve's proxies, one on each node of the cluster that has replicas, in front of the gateway."""

    host: str = Field("0.0.0.0", description="Address that the proxies listen on")
    port: int = Field(8080, gt=0, lt=65536, description="Port that they listen on")
    replicas: int = Field(2, ge=1, description="Replicas that pass requests on to the gateway")
    cpus: float = Field(0.1, ge=0, description="Ray CPUs reserved by each replica")
    max_ongoing: int = Field(256, ge=1, description="Requests that one replica passes on at once; further ones wait")


class HttpConfig(Section):
    """Where the service listens, and how much it takes."""

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs tokens")
    port: int = Field(8000, ge=0, lt=65536, description="Port to listen on; 0: a free one")
    tokens: str | None = Field(
        None, description="File of tokens, made by `sdft tokens`, relative to the config file; null: none are needed"
    )
    tls_certificate: str | None = Field(None, description="PEM file of the certificate; null: plain HTTP")
    tls_key: str | None = Field(None, description="PEM file of the certificate's key")
    max_body_mib: float = Field(8, gt=0, description="Largest body of a request")
    max_in_flight: int = Field(
        128, ge=1, description="Requests to the model that are answered or wait at once; further ones get 429"
    )
    max_per_minute: int | None = Field(
        None, ge=1, description="Requests of one token, or of all without tokens, in a minute; further ones get 429"
    )
    max_waiting: int = Field(
        100_000, ge=1, description="Records that wait for a window; while there are more, further ones get 429"
    )
    request_timeout_s: float = Field(600, gt=0, description="How long an answer of the model may take")
    proxies: ProxiesConfig | None = Field(
        None,
        description="Requests come through Ray Serve's proxies on the cluster's nodes, too; null: to host and port",
    )

    @model_validator(mode="after")
    def _loopback_or_tokens(self) -> "HttpConfig":
        if self.host not in LOOPBACK and self.tokens is None:
            raise ValueError(
                f"host {self.host} is reachable from other machines; set http.tokens to a file of tokens, which "
                f"`sdft tokens` makes, or host: 127.0.0.1"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; give both, or neither")
        if self.proxies is not None and self.host in LOOPBACK:
            raise ValueError(
                f"proxies on other nodes cannot reach host {self.host}; set http.host to an address of this node, or "
                f"to 0.0.0.0"
            )
        if self.proxies is not None and self.tls_key is not None:
            raise ValueError(
                "the proxies speak plain HTTP to the gateway; remove tls_key, and end TLS in front of them"
            )
        return self


class ClusterPlace(Section):
    """What each engine needs on a node of the cluster."""

    cpus: float = Field(1, gt=0, description="Ray CPUs reserved by each engine")
    gpus: float = Field(1, ge=0, description="GPUs of each engine, or a part of one; used with device: cuda only")
    labels: dict[str, str] = Field({}, description="Only on nodes that have these labels (ray start --labels)")

    @model_validator(mode="after")
    def _whole_gpus(self) -> "ClusterPlace":
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus:g} must be a part of one GPU or a whole number; round it")
        return self


class ServingConfig(Section):
    """The engines that answer requests. They have the weights of the release that is served."""

    replicas: int = Field(1, ge=1, description="Number of engines; with max_replicas the least")
    max_replicas: int | None = Field(
        None, ge=1, description="Engines are added up to so many while requests queue; null: their number stays"
    )
    grow_after_s: float = Field(
        10, gt=0, description="An engine is added when more requests than the engines decode at once last for so long"
    )
    first_token_s: float | None = Field(
        None,
        gt=0,
        description="An engine is also added while streams take longer than this to begin, on average, for "
        "grow_after_s; null: only the number of requests counts",
    )
    shrink_after_s: float = Field(
        300, gt=0, description="An engine is removed when half of what the others decode at once is enough for so long"
    )
    cluster: ClusterPlace | None = Field(
        None, description="Engines are actors on the nodes of a running Ray cluster; null: processes on this machine"
    )
    turns: bool = Field(
        False,
        description="The engine also makes the rollouts and scores of windows, in turns: less memory, and requests "
        "wait while it does; false: a window starts engines of its own",
    )
    threads: int | None = Field(None, ge=1, description="OpenMP threads of a CPU engine; null: every core")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="GiB of KV cache; null: 1 on a CPU, on a GPU what gpu_memory_utilization leaves for it"
    )
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1, description="Share of a GPU's memory an engine may use")
    max_num_seqs: int = Field(32, ge=1, description="Sequences decoded at once")
    max_model_len: int = Field(2048, ge=2, description="Longest prompt and answer together, in tokens")
    execution: Execution | None = Field(
        None,
        description="eager, graphs (CUDA graphs of the decoding steps; GPUs only) or compiled (faster answers, a "
        "longer start); null: graphs on a GPU, eager on a CPU",
    )
    tool_parser: str | None = Field(
        None, description="vLLM's parser of tool calls, such as hermes; null: tool calls stay in the text"
    )
    start_timeout_s: float = Field(600, gt=0, description="How long an engine may take to start or to change weights")

    @model_validator(mode="after")
    def _sizes(self) -> "ServingConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than replicas {self.replicas}, which is the least; raise "
                f"it, or leave it out for a number that stays"
            )
        for key in ("grow_after_s", "shrink_after_s", "first_token_s"):
            if self.max_replicas is None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect without max_replicas; set it, or remove {key}")
        if self.turns and (self.cluster is not None or max(self.replicas, self.max_replicas or 1) > 1):
            raise ValueError("turns is for one engine on this machine; remove cluster, replicas and max_replicas")
        if self.cluster is not None and self.cluster.gpus % 1 and self.kv_cache_gib is None:
            raise ValueError(
                f"cluster.gpus {self.cluster.gpus:g} puts several engines on a GPU, and each would take what is free; "
                f"set kv_cache_gib"
            )
        return self


class WindowConfig(Section):
    """When training begins, and on what. A window is one training run on the records that wait."""

    min_records: int = Field(32, ge=1, description="Records that wait until a window begins")
    max_wait_s: float = Field(
        86400, gt=0, description="A window begins with fewer records when the oldest one has waited for so long"
    )
    max_records: int = Field(4096, ge=1, description="Most new records of a window")
    epochs: int = Field(4, ge=1, description="Passes over the records of a window")
    replay: float = Field(
        0.2, ge=0, lt=1, description="Share of a window's training records that are drawn from earlier windows"
    )
    held_out: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of the new records that are never trained: the gate asks them, now and in later windows",
    )
    grader: Grader = Field("exact", description="How answers to held-out records are graded")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest answer to a held-out record, in tokens; null: sampling.max_new_tokens"
    )

    @model_validator(mode="after")
    def _graded_alone(self) -> "WindowConfig":
        if self.grader in ("judge", "environment", "perplexity"):
            raise ValueError(f"grader {self.grader} cannot grade held-out records; choose another grader")
        return self


class CanaryConfig(Section):
    """A candidate that passed the gate first answers a share of the users, and their feedback is compared.

    An answer is good if its last score is at least `feedback.good_score` (more than 0 if that is null), and bad if the
    score is lower or a correction came.
    """

    share: float = Field(0.1, gt=0, lt=1, description="Share of the users; the same user always gets the same release")
    min_feedback: int = Field(
        50, ge=1, description="Answers with feedback, of the canary and of the served release, that it takes to decide"
    )
    max_wait_s: float = Field(86400, gt=0, description="After so long without a decision the candidate is held")


class GateConfig(Section):
    """What a candidate must show before it is served: paired by question with the release that is served.

    Worse means that the accuracy of a set falls by more than `max_drop`. The gate computes the probability of that for
    each set.
    """

    max_drop: float = Field(0.05, ge=0, lt=1, description="Largest drop of an accuracy that is no harm")
    promote_below: float = Field(
        0.2, gt=0, lt=1, description="A candidate is promoted if no set is worse with a probability of this or more"
    )
    refuse_above: float = Field(
        0.5, gt=0, lt=1, description="A candidate is refused if a set is worse with a probability of more than this"
    )
    max_rise: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Largest rise of the share of empty, truncated or repetitive answers",
    )
    length: float | None = Field(
        3.0,
        gt=1,
        description="Largest factor by which the mean length of answers may rise or fall, in sets with role: retention "
        "and those of earlier records; null: any",
    )
    entropy: float | None = Field(
        4.0, gt=1, description="The same for their entropy, the mean negative log-prob of a token"
    )
    split_up_to: int = Field(
        0,
        ge=0,
        description="The records of a refused window are tried again in halves, down to single ones, if they are at "
        "most so many; 0: never",
    )
    canary: CanaryConfig | None = Field(
        None, description="A candidate that passes answers a share of the users first; null: it is promoted at once"
    )
    promotion: Literal["automatic", "by_hand"] = Field(
        "automatic", description="by_hand: a candidate that passes is held until a person promotes it"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "GateConfig":
        if self.promote_below > self.refuse_above:
            raise ValueError(
                f"promote_below {self.promote_below:g} must not exceed refuse_above {self.refuse_above:g}; lower it"
            )
        return self


class ReceiptsConfig(Section):
    """What the service keeps of requests, so that feedback can refer to an answer."""

    keep: bool = Field(True, description="false: prompts and answers are not kept, and feedback is refused")
    days: float = Field(7, gt=0, description="Days after which a receipt is removed")


class FeedbackConfig(Section):
    """What becomes of feedback. A correction is a demonstration for its prompt."""

    comments: Literal["trained", "counted"] | None = Field(
        None,
        description="trained: the teacher sees the answer and the comment on it, and the student learns from it; "
        "counted: kept only; null: trained if the method's teacher can see it",
    )
    next_messages: Literal["trained", "counted"] | None = Field(
        None,
        description="The same for the user's next message, which is seldom about the answer; null: trained with "
        "method hindsight, else counted",
    )
    good_score: float | None = Field(
        None,
        description="A score of at least this makes the answer a demonstration; null: scores are counted only",
    )


class ServiceConfig(Section):
    """A model that learns while it serves: the section of `sdft serve`, which `sdft train` does not take."""

    name: str = Field("sdft", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the model in requests")
    http: HttpConfig = HttpConfig()
    serving: ServingConfig = ServingConfig()
    window: WindowConfig = WindowConfig()
    gate: GateConfig = GateConfig()
    receipts: ReceiptsConfig = ReceiptsConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    keep_releases: int = Field(
        5, ge=2, description="Releases whose weights are kept, beside the one served, the pinned and the first"
    )

    @model_validator(mode="after")
    def _a_canary_needs(self) -> "ServiceConfig":
        if self.gate.canary is not None and self.serving.replicas < 2:
            raise ValueError("gate.canary needs an engine of its own; set serving.replicas to 2 or more")
        if self.gate.canary is not None and not self.receipts.keep:
            raise ValueError("gate.canary compares feedback, which needs receipts; set receipts.keep: true")
        if self.gate.canary is not None and self.gate.promotion == "by_hand":
            raise ValueError("gate.canary has no effect with gate.promotion: by_hand; remove one of them")
        if self.gate.canary is not None and self.gate.canary.max_wait_s > self.receipts.days * 86400:
            raise ValueError(
                f"gate.canary.max_wait_s {self.gate.canary.max_wait_s:g} is longer than receipts.days "
                f"{self.receipts.days:g}, after which feedback is removed; lower it, or raise receipts.days"
            )
        return self

    @model_validator(mode="after")
    def _what_is_set_has_an_effect(self) -> "ServiceConfig":
        serving = self.serving
        if self.http.proxies is not None and serving.cluster is None:
            raise ValueError("http.proxies are of a Ray cluster; set serving.cluster too, or remove http.proxies")
        if not self.receipts.keep and self.feedback != FeedbackConfig():
            raise ValueError("feedback has no effect with receipts.keep: false, which refuses feedback; remove it")
        most = serving.max_replicas or serving.replicas
        if most > serving.replicas and self.http.max_in_flight <= (most - 1) * serving.max_num_seqs:
            raise ValueError(
                f"serving.max_replicas {most} is never reached: an engine is added when more requests than "
                f"serving.max_num_seqs {serving.max_num_seqs} for each are in flight, and http.max_in_flight is "
                f"{self.http.max_in_flight}; raise it to more than {(most - 1) * serving.max_num_seqs}"
            )
        return self


def with_records_of_a_service(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with those that a service does not set: it trains what it receives, in windows.

    given: as in the file, not checked yet; one without a section service is returned as it is. ValueError if a setting
    is of a run.
    """
    service, data, training = (given.get(key, {}) for key in ("service", "data", "training"))
    if not all(isinstance(section, dict) for section in (service, data, training)) or "service" not in given:
        return given  # what is of a wrong type is refused later
    window = service.get("window", {})
    epochs = window.get("epochs", WindowConfig().epochs) if isinstance(window, dict) else 1
    if given.get("stages"):
        raise ValueError("stages are of a run, and a service trains in windows; remove stages, or service")
    if data.get("train") not in (None, INBOX) or data.get("source", "file") != "file":
        raise ValueError("data.train and data.source are of a run, and a service trains what it receives; remove them")
    teacher = given.get("teacher", {})
    if isinstance(teacher, dict) and not teacher.keys() & {"weights", "alpha"}:
        # The first model. The student of a window's start has learned to answer without a demonstration. With one in
        # its prompt it teaches badly (benchmarks/gate.py).
        teacher = teacher | {"weights": "base"}
    saved = data.get("train") == INBOX  # a service's own file, with an override of the window's epochs perhaps
    if not saved and (training.get("steps") is not None or training.get("epochs") is not None):
        raise ValueError("training.epochs and steps are of a run; set service.window.epochs instead")
    filled = {"data": data | {"train": INBOX}, "training": training | {"epochs": epochs}, "teacher": teacher}
    return given | filled
