"""Metrics for Prometheus, read from a real Ray node as Prometheus does. Alerts and dashboard query only these
metrics."""

import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from sdft.services.config.sections import MonitoringConfig
from sdft.services.monitoring.log import RunLog
from sdft.services.monitoring.prometheus import BY_PATH, EVAL, METRICS, PREFIX, TIME
from sdft.services.monitoring.sinks import Sinks
from sdft.services.records.figures import PHASES, path_of
from sdft.services.records.rows import PERPLEXITY, STUDENT_ACCURACY, TEACHER_ACCURACY, EvalResult, StepMetrics
from tests.fakes.promql import Query, parse
from tests.papers.documents import ROOT
from tests.services.records.test_metrics import STEP

MONITORING = ROOT / "deploy" / "monitoring"
ADDED = {"instance"}  # Prometheus adds it to every metric
RAYS_OWN = {
    "ray_node_mem_used": {"instance"},
    "ray_node_mem_total": {"instance"},
    "ray_node_cpu_utilization": {"instance"},
    "ray_node_gpus_utilization": {"instance"},  # served only with GPUs
    "ray_node_manager_unexpected_worker_failure_total": {"instance", "Type", "Name"},  # once a worker has died
}
VALUES = {
    "phase": {phase.name for phase in PHASES},
    "metric": {STUDENT_ACCURACY, TEACHER_ACCURACY, PERPLEXITY},
    "Type": {"Raylet.UnexpectedActorFailure.Total"},
}
SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")
PROMETHEUS_ONLY = MonitoringConfig(tensorboard=False, prometheus=True)


def served() -> dict[tuple[str, ...], float]:
    """Return what the node serves: (name, values of our tags) -> value. Needs no token."""
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        ours = [tags[key] for key in ("run", "phase", "task", "metric") if key in tags]
        found[name, *ours] = float(value)
    return found


def served_when(key: tuple[str, ...], value: float) -> dict[tuple[str, ...], float]:
    """Return the same once `key` has this value. A process reports every 10 s."""
    deadline = time.monotonic() + 30
    while (found := served()).get(key) != value:
        assert time.monotonic() < deadline, f"{key} is {found.get(key)} and not {value} after 30 s"
        time.sleep(0.5)
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_node_serves_what_a_run_logs(tmp_path: Path) -> None:
    """With a lost learner, after which the log is opened again, and a step that is not finite."""
    run = tmp_path.name
    notices: list[str] = []
    sinks = Sinks(tmp_path, PROMETHEUS_ONLY, notices.append)
    log = RunLog(tmp_path, sinks)
    log.step(replace(STEP, loss=0.75))
    log.close()
    log = RunLog(tmp_path, sinks)
    began = time.time()
    log.step(replace(STEP, step=2, loss=math.nan, trained=16))
    log.evaluation(EvalResult(2, 0, "tools", "accuracy", 0.875, 80))
    log.close()
    sinks.close()
    assert notices == []

    found = served_when(("ray_sdft_step", run), 2)
    assert found["ray_sdft_eval_value", run, "tools", "accuracy"] == 0.875
    assert {key[2]: value for key, value in found.items() if key[0] == f"{PREFIX}{TIME.name}"} == {
        "rollout": 2.0,
        "score": 1.0,
        "learn": 4.0,
        "sync": 1.0,
        "wait": 0.5,
    }
    assert found["ray_sdft_divergence", run] == 0.25
    assert found["ray_sdft_step_seconds", run] == 8.5
    assert found["ray_sdft_samples_trained", run] == 16
    # Work is added up, also over several logs.
    assert found["ray_sdft_completion_tokens_total", run] == 480
    assert began - 1 < found["ray_sdft_progress_timestamp_seconds", run] < time.time()
    # Ray serves no NaN: the loss is missing, and another metric tells why.
    assert ("ray_sdft_loss", run) not in found
    assert found["ray_sdft_not_finite", run] == 1
    assert {name for name, *_ in found if name.startswith("ray_sdft_")} == {
        f"{PREFIX}{m.name}" for m in METRICS if m.name != "sdft_loss"
    }
    assert found["ray_node_mem_used",] > 0


def test_every_number_of_a_step_is_described() -> None:
    """`direction` is text, and `step` has a separate metric."""
    of_phases = {f"time_{phase.name}_s" for phase in PHASES}
    names = {f.name for f in fields(StepMetrics)}
    assert of_phases < names
    assert {path_of(name) for name in names - of_phases - {"step", "direction"}} == set(BY_PATH)


def test_names_are_those_that_prometheus_asks_for() -> None:
    """https://prometheus.io/docs/practices/naming: the unit comes last, and exactly the counters end in _total."""
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    for m in METRICS:
        assert re.fullmatch(r"sdft_[a-z_]+", m.name)
        assert m.name.endswith("_total") == m.counter
        assert m.tags[0] == "run"
    assert EVAL.tags == ("run", "task", "metric")


def test_without_ray_the_sink_says_what_it_needs(tmp_path: Path) -> None:
    """In a separate process, since other tests may have connected this one."""
    code = (
        "from pathlib import Path; from sdft.services.monitoring.prometheus import Prometheus; "
        f"Prometheus(Path({str(tmp_path)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "monitoring.prometheus needs a process that is connected to Ray" in result.stderr


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return list(json.loads((MONITORING / "dashboard.json").read_text())["panels"])


def expressions() -> list[str]:
    return [rule["expr"] for rule in alerts()] + [t["expr"] for panel in panels() for t in panel["targets"]]


def unknown(query: Query) -> list[str]:
    """Return what an expression names and nothing serves, as sentences."""
    tags = {f"{PREFIX}{m.name}": {*m.tags, *ADDED} for m in METRICS} | RAYS_OWN
    wrong = [f"no metric {name}" for name in query.metrics if name not in tags]
    for name, label, value in query.matchers:
        if label not in tags.get(name, {label}):
            wrong.append(f"{name} has no tag {label}")
        elif value not in VALUES.get(label, {value}):
            wrong.append(f"{label} is never {value}")
    every = set().union(*(tags.get(name, set()) for name in query.metrics))
    return wrong + [f"no tag {label} in {query.metrics}" for label in query.grouped if label not in every]


@pytest.mark.parametrize("expression", expressions())
def test_alerts_and_dashboard_ask_for_what_is_served(expression: str) -> None:
    query = parse(expression.replace("$run", "a"))
    assert query.metrics
    assert unknown(query) == []


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("max by (run) (ray_sdft_los)", "no metric ray_sdft_los"),
        ("max by (run) (sdft_loss)", "no metric sdft_loss"),
        ('avg_over_time(ray_sdft_time_seconds{phase="waiting"}[5m])', "phase is never waiting"),
        ('rate(ray_sdft_samples_total{task="tools"}[5m])', "ray_sdft_samples_total has no tag task"),
        ("max by (phase) (ray_sdft_loss)", "no tag phase in ('ray_sdft_loss',)"),
    ],
)
def test_an_expression_that_asks_for_something_else_is_found(expression: str, said: str) -> None:
    assert unknown(parse(expression))[0] == said


def test_rays_own_metrics_exist_in_the_ray_that_is_installed() -> None:
    """In Ray's table of node metrics, or in the dashboards that Ray ships."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    shipped = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "".join(path.read_text() for path in sorted(shipped.glob("*.py")))
    for name, labels in RAYS_OWN.items():
        own = METRICS_GAUGES.get(name.removeprefix(PREFIX))
        assert own is not None or re.search(rf"\b{name}\{{.*\(Type, Name, instance\)", text), name
        assert own is None or labels == ADDED


def test_every_alert_says_what_it_is_about() -> None:
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert named <= set(parse(rule["expr"]).grouped), rule["alert"]
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "0s"))


def test_the_dashboards_panels_lie_beside_each_other_and_name_their_lines() -> None:
    seen: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & seen, panel["title"]
        assert at["x"] + at["w"] <= 24
        seen |= cells
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert labels <= set(parse(target["expr"]).grouped), panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_prometheus_finds_the_nodes_where_ray_lists_them() -> None:
    """In the file that Ray's own configuration for Prometheus names."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    shipped = "dashboard/modules/metrics/export/prometheus/prometheus.yml"
    rays = yaml.safe_load((Path(ray.__file__).parent / shipped).read_text())
    assert config["scrape_configs"] == rays["scrape_configs"]
    assert [(MONITORING / name).exists() for name in config["rule_files"]] == [True]
