"""One prompt, several continuations: compute the prefix once, fork it, share its memory.

python examples/branches.py                (the bundled model; no network)
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

import mnemon
from mnemon.zoo import bundled_model_path


def main() -> None:
    path = bundled_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    prompt = tokenizer("import os\nimport sys\n\n\n", return_tensors="pt").input_ids

    with mnemon.attach(model) as attached:
        trunk = mnemon.Cache(model.config)
        mnemon.prefill(model, prompt, trunk)
        for start in ("def main(", "class Reader", "if __name__"):
            ids = tokenizer(tokenizer.decode(prompt[0]) + start, return_tensors="pt").input_ids
            branch = trunk.fork()  # copies memory only when it writes
            output = model.generate(ids, past_key_values=branch, max_new_tokens=12, do_sample=False)
            print(repr(tokenizer.decode(output[0, prompt.shape[1] :])))
        print(attached.report().splitlines()[-1])
        print(trunk.report())


if __name__ == "__main__":
    main()
