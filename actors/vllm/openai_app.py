"""vLLM's own OpenAI server over an engine that we own: chat, completions, models, streams, tools, Anthropic's messages.

The engine stays ours: its weights change by `update_weights`, as in a run.
"""

from fastapi import FastAPI
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sdft.actors.vllm.engine import VllmEngine


async def openai_app(engine: VllmEngine, name: str, tool_parser: str | None) -> FastAPI:
    """Return the application. The engine must have started.

    name: of the model in requests. tool_parser: vLLM's parser of tool calls; None: tool calls stay in the text.
    """
    words = ["--model", engine.settings.model, "--served-model-name", name, "--disable-fastapi-docs"]
    if tool_parser is not None:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", tool_parser]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    tasks = await engine.client.get_supported_tasks()
    app = build_app(args, tasks, engine.client.model_config)
    await init_app_state(engine.client, app.state, args, tasks)
    return app
