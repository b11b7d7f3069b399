"""Generation in vLLM, one step of its engine at a time: the first computes the prompts, each other one token of each.

The engine runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), without chunks and without a cache of prefixes, so
prefill and decode are timed apart, not derived from totals.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ast_sparse.errors import UserError
from ast_sparse.peak import peak_bytes, reset_peak
from ast_sparse.speed.cases import Case

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}  # before vLLM is imported
_SPARE = 1.25  # factor for keys and values: blocks are not filled
_LEAST_CACHE = 2**28


class VllmEngine:
    """An offline engine of vLLM; arguments as in `TransformersEngine`.

    Args:
        cases: all that will be measured, for the sizes of the engine.
        cache_bytes: for keys and values, at the largest case.
        eager: without compilation and graphs (vLLM's `enforce_eager`).
    """

    def __init__(
        self, folder: Path, dtype: str, vocabulary: int, cases: Sequence[Case], cache_bytes: int, eager: bool
    ) -> None:
        from vllm import LLM

        self.vocabulary = vocabulary
        longest = max(case.prompt + case.new for case in cases)
        llm: Any = LLM(
            model=str(folder),
            dtype=dtype,
            seed=0,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            async_scheduling=False,  # a step then returns the tokens it computed
            max_model_len=longest,
            max_num_seqs=max(case.batch for case in cases),
            max_num_batched_tokens=max(longest, *(case.batch * case.prompt for case in cases)),
            gpu_memory_utilization=0.1,  # only what must be free at the start: two engines share the memory
            kv_cache_memory_bytes=max(_LEAST_CACHE, int(cache_bytes * _SPARE)),
        )
        self._engine = llm.llm_engine
        self._new: dict[str, list[int]] = {}
        self._calls = 0

    def begin(self, case: Case) -> float:
        """Compute the prompts and the first new tokens; returns the seconds it took."""
        from vllm import SamplingParams

        reset_peak()
        self._calls += 1
        self._new = {f"{self._calls}-{row}": [] for row in range(case.batch)}
        greedy = SamplingParams(temperature=0.0, max_tokens=case.new, ignore_eos=True, detokenize=False)
        prompts = case.prompts(self.vocabulary).tolist()
        start = time.perf_counter()
        for name, tokens in zip(self._new, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": tokens}, greedy)
        while not all(self._new.values()):
            self._step()
        return time.perf_counter() - start

    def advance(self, steps: int) -> float:
        """Compute `steps` more tokens of each prompt; returns the seconds it took."""
        wanted = min(map(len, self._new.values())) + steps
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        elapsed = time.perf_counter() - start
        if min(map(len, self._new.values())) < wanted:
            raise UserError("vLLM interrupted requests because its memory is too small. Measure a smaller --batch.")
        return elapsed

    def finish(self) -> dict[str, Any]:
        """The new tokens of each prompt and the peak memory, in bytes; what is unfinished is dropped."""
        self._engine.abort_request(list(self._new))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return {"tokens": list(self._new.values()), "peak": peak_bytes()}

    def _step(self) -> None:
        for output in self._engine.step():
            self._new[output.request_id] = list(output.outputs[0].token_ids)
