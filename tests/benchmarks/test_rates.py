"""Rates of a user's cluster: read from a file, used by the simulation and by the projection of a step."""

from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.given import file_of
from benchmarks.projected import CLUSTERS, phases, projected, read
from simulation.cluster import Case, simulate
from simulation.rates import Rates


def test_the_simulation_takes_rates_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("token_s: 0.1\nroom: 4\n")
    rates = Rates.read(file)
    assert rates == replace(Rates(), token_s=0.1, room=4)
    case = Case("two", 2, staleness=0, steps=5, learner=1.0)
    usual, slow, small = (simulate(replace(case, rates=r)) for r in (Rates(), Rates(token_s=0.1), rates))
    assert slow["step s"] > 1.5 * usual["step s"]
    assert usual["samples"] == 4 * small["samples"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens_s: 1", "tokens_s is not a rate; the rates are room, token_s"),
        ("token_s: 0", "token_s is 0; set it to a number above 0"),
        ("room: 1.5", "room is 1.5; set it to a whole number above 0"),
        ("load_s: fast", "load_s is 'fast'; set it to a number above 0"),
        ("- 1", "is not a mapping; it may set room"),
    ],
)
def test_a_wrong_rate_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Rates.read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("room: 0", "mine.yaml: room is 0; set it to a whole number above 0"),
        ("room: [", "mine.yaml: it is no YAML (while parsing"),
        (None, "mine.yaml: it cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_file_is_the_parsers_error(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ArgumentTypeError) as error:
        file_of(Rates.read)(str(tmp_path / "mine.yaml"))
    assert message in str(error.value)


def test_a_wrong_file_of_a_projection_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rates: {}\n")
    with pytest.raises(ArgumentTypeError, match=r"mine\.yaml: rates\.products_tflops: Field required"):
        file_of(read)(str(file))


def test_a_projected_step_follows_its_rates() -> None:
    cluster = read(CLUSTERS / "h100.yaml")
    case, batch, rates = cluster.cases[0], cluster.batch, cluster.rates
    usual = phases(case, batch, rates)
    faster = phases(case, batch, rates.model_copy(update={"products_tflops": 2 * rates.products_tflops}))
    for name, ratio in {"learn": 0.5, "score": 0.5, "rollout": 1, "weights": 1, "controller": 1}.items():
        assert faster[name] == pytest.approx(ratio * usual[name])
    # 6 operations for each of 7.6e9 parameters and 655,360 tokens, at 0.41 of four cards' rate.
    assert usual["learn"] == pytest.approx(6 * 7.6e9 * 256 * 2560 / (798e12 * 0.41 * 4))
    row = projected(case, cluster)
    assert row["one ahead s"] <= row["strict step s"]
    assert row["bound by"] in ("rollout", "score", "learner")


def test_an_unknown_rate_of_a_projection_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((CLUSTERS / "h100.yaml").read_text().replace("memory_tb_s", "memory_tbs"))
    with pytest.raises(ValidationError, match="memory_tbs"):
        read(file)
