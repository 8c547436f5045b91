"""Plain vLLM in an actor, as its users start it: the engine that ours are compared with."""

import os
import time

from sdft.actors.shared.types import IntArray


class PlainEngine:
    """An actor with vLLM's own settings: a GPU's model is compiled and has CUDA graphs, a CPU's is run eagerly."""

    def __init__(self, model: str, dtype: str, device: str, max_model_len: int, max_num_seqs: int, cache: int) -> None:
        """cache: bytes of the KV cache."""
        if device == "cpu":
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the V2 runner needs Triton
        from vllm import LLM

        self._llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=cache,
            gpu_memory_utilization=0.1,  # free at the start; the cache has a size of its own
            enforce_eager=device == "cpu",
            enable_prefix_caching=False,
        )

    def start(self) -> None:
        """Return when the engine has started."""

    def decode(self, prompts: list[IntArray], new_tokens: int) -> float:
        """Sample as many tokens behind each prompt. Returns the seconds."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": ids.tolist()} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    def stop(self) -> None:
        """End vLLM's processes, which otherwise leave a name in /dev/shm."""
        self._llm.llm_engine.engine_core.shutdown()
