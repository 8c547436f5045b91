"""Settings of an environment. Imports neither torch, ray nor vllm."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from sdft.actors.shared.own_code import is_own
from sdft.services.base.section import Section

BUILT_IN = ("mcp", "verifiers")  # services/environments/named.py has their classes


class EnvironmentConfig(Section):
    """What answers the student's turns. An episode is the turns of one sample."""

    type: str = Field(
        description="mcp: the tools of an MCP server; verifiers: an environment of that library; or a class of your "
        "own, as package.module:Name"
    )
    settings: dict[str, Any] = Field({}, description="Arguments of the class")
    python: str | None = Field(
        None,
        description="Interpreter of the environment's processes, such as envs/house/bin/python, for an environment "
        "with packages of its own; null: that of the run",
    )
    max_turns: int = Field(8, ge=1, description="Replies of an episode; one that is not done then has not passed")
    max_tokens: int = Field(
        1024, ge=2, description="Tokens of an episode behind the prompt: replies, and what answers them"
    )
    step_timeout_s: float = Field(
        30,
        gt=0,
        description="How long the environment may take to answer; after that, the student gets an error, "
        "and the episode goes on",
    )
    max_answer_chars: int = Field(4000, ge=1, description="Characters of an answer; what is longer is cut, and says so")
    processes: int = Field(1, ge=1, description="Processes that the episodes are spread over")
    concurrent: int = Field(64, ge=1, description="Episodes at once")

    @field_validator("type")
    @classmethod
    def _own(cls, value: str) -> str:
        if value not in BUILT_IN and not is_own(value):
            raise ValueError(
                f"environment {value} is not known; set it to {' or '.join(BUILT_IN)}, or to a class of your own as "
                f"package.module:Name"
            )
        return value


def _whole(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Environment = Annotated[EnvironmentConfig, BeforeValidator(_whole)]  # its name alone, or with settings
