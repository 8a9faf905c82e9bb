"""llama.cpp's side of compare.py: a JSON request per line on stdin, an answer per line on stdout.

Runs in the peer's environment: llama_cpp and NumPy, no torch. One context per type of keys and
values lives side by side, so that they can take turns.

    {"do": "check", "tokens": [...]}                  logits after these tokens, from an f16 cache
    {"do": "fill", "kv": "q8_0", "tokens": 8192}      hold this many tokens
    {"do": "steps", "kv": "q8_0", "count": 16}        seconds of single decode steps after those
    {"do": "prefill", "kv": "q8_0", "tokens": 8192}   seconds to read a prompt into an empty cache
"""

import argparse
import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

TYPES = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}
FIRST_TOKENS = 1024  # read by the model; longer contexts are copies of these
BATCH_TOKENS = 512
SEED = 1


class Holder:
    """A context with one type of keys and values: sequence 0 is what is measured."""

    def __init__(self, model: Any, kv: str, capacity: int, threads: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = capacity
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = threads
        options.n_seq_max = 2  # the second one is where copies arrive
        options.kv_unified = True
        options.type_k = options.type_v = TYPES[kv]
        options.flash_attn_type = 1  # quantized values need it; f16 is faster with it too
        options.no_perf = True
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context with keys and values in {kv}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.held = 0  # tokens of the context; steps come after and are taken back

    def decode(self, tokens: list[int], position: int) -> None:
        """Run the model over tokens at these positions; logits of the last one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode refused {len(tokens)} tokens at {position}")
        llama_cpp.llama_synchronize(self.context)

    def read(self, tokens: list[int]) -> None:
        """Read a prompt into an empty sequence."""
        llama_cpp.llama_memory_seq_rm(self.memory, -1, -1, -1)
        for start in range(0, len(tokens), BATCH_TOKENS):
            self.decode(tokens[start : start + BATCH_TOKENS], start)
        self.held = len(tokens)

    def random(self, count: int) -> list[int]:
        """The same random tokens for the same count."""
        return np.random.default_rng(SEED).integers(0, self.vocabulary, count).tolist()

    def fill(self, num_tokens: int) -> None:
        """Hold `num_tokens`: a prompt is read, then copied behind itself until it is long enough.

        What keys and values say does not matter for speed, and reading 32k tokens takes minutes.
        """
        if self.held == 0 or num_tokens < self.held:
            self.read(self.random(min(num_tokens, FIRST_TOKENS)))
        while self.held < num_tokens:
            size = llama_cpp.llama_state_seq_get_size(self.context, 0)
            state = (llama_cpp.ctypes.c_uint8 * size)()
            if llama_cpp.llama_state_seq_get_data(self.context, state, size, 0) != size:
                raise SystemExit("llama.cpp did not hand out the state of a sequence")
            if llama_cpp.llama_state_seq_set_data(self.context, state, size, 1) != size:
                raise SystemExit("llama.cpp did not take the state of a sequence")
            llama_cpp.llama_memory_seq_add(self.memory, 1, -1, -1, self.held)
            llama_cpp.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)
            self.held = min(2 * self.held, num_tokens)
            llama_cpp.llama_memory_seq_rm(self.memory, 0, self.held, -1)
        for position in (num_tokens, num_tokens + 1):  # the first one moves the copied keys
            self.decode([position % self.vocabulary], position)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, num_tokens, -1)
        last = llama_cpp.llama_memory_seq_pos_max(self.memory, 0)
        if last != num_tokens - 1:
            raise SystemExit(f"the cache ends at position {last}, not {num_tokens - 1}")

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` decode steps behind the context."""
        seconds = []
        for i in range(count):
            position = self.held + i
            begin = time.perf_counter()
            self.decode([position * 7919 % self.vocabulary], position)
            seconds.append(time.perf_counter() - begin)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, self.held, -1)
        return seconds

    def prefill(self, num_tokens: int) -> float:
        """Seconds to read a prompt into an empty cache."""
        tokens = self.random(num_tokens)
        begin = time.perf_counter()
        self.read(tokens)
        return time.perf_counter() - begin

    def logits(self, tokens: list[int]) -> list[float]:
        """Of the token that follows these."""
        self.read(tokens)
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        found = np.ctypeslib.as_array(pointer, (self.vocabulary,)).tolist()
        self.held = 0
        return found


class Worker:
    """The model and its holders."""

    def __init__(self, path: str, capacity: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {os.path.basename(path)}")
        self.capacity, self.threads = capacity, threads
        self.holders: dict[str, Holder] = {}

    def holder(self, kv: str) -> Holder:
        if kv not in self.holders:
            self.holders[kv] = Holder(self.model, kv, self.capacity, self.threads)
        return self.holders[kv]

    def answer(self, request: dict[str, Any]) -> Any:
        if request["do"] == "check":
            return self.holder("f16").logits(request["tokens"])
        holder = self.holder(request["kv"])
        if request["do"] == "fill":
            return holder.fill(request["tokens"])
        if request["do"] == "prefill":
            return holder.prefill(request["tokens"])
        return holder.steps(request["count"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--capacity", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, llama_cpp.ctypes.c_void_p(0))
    worker = Worker(options.file, options.capacity, options.threads)
    system = llama_cpp.llama_print_system_info().decode().strip()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
