"""Tool calls in a reply, by vLLM's own parsers, which know the formats of many models."""

from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager


def call_parser(name: str, model: str) -> Callable[[str, Any], list[tuple[str, str]]]:
    """Return a function from a reply, and the definitions of tools or None, to the names and arguments of its calls.

    name: of vLLM's parser. model: the folder of the tokenizer. Raises KeyError for an unknown name.
    """
    parser_class = ToolParserManager.get_tool_parser(name)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def calls(reply: str, tools: Any) -> list[tuple[str, str]]:
        request = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], tools=tools)
        found = parser_class(tokenizer, request.tools).extract_tool_calls(reply, request)
        return [(call.function.name, call.function.arguments) for call in found.tool_calls]

    return calls
