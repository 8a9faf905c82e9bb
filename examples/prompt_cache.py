"""Save a long prompt's cache, load it in another process, pay for the new tokens only.

python examples/prompt_cache.py            (the bundled model; no network)
"""

import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemon
from mnemon.zoo import bundled_model_path


def main() -> None:
    path = bundled_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    document = Path(__file__).read_text() * 4
    prompt = tokenizer(document, return_tensors="pt").input_ids[:, :2048]
    question = tokenizer("\n# Now answer:\n", return_tensors="pt").input_ids

    with tempfile.TemporaryDirectory() as folder, mnemon.attach(model) as attached:
        file = Path(folder) / "document.cache"
        cache = mnemon.Cache(model.config)
        started = time.perf_counter()
        mnemon.prefill(model, prompt, cache)
        print(f"prefilled {cache.num_tokens} tokens in {time.perf_counter() - started:.2f} s")
        cache.save(file)
        print(f"saved {file.stat().st_size / 2**20:.1f} MiB")

        started = time.perf_counter()
        loaded = mnemon.load_cache(file, model)
        ids = torch.cat([prompt, question], dim=1)
        output = model.generate(ids, past_key_values=loaded, max_new_tokens=8, do_sample=False)
        print(f"loaded and continued by 8 tokens in {time.perf_counter() - started:.2f} s")
        print(repr(tokenizer.decode(output[0, ids.shape[1] :])))
        print(attached.report().splitlines()[-1])


if __name__ == "__main__":
    main()
