"""Write a Llama that transformers saved as a GGUF file without a tokenizer.

    PEER_PYTHON to_gguf.py FOLDER FILE [--dtype bf16]

Runs in the peer's environment: NumPy and gguf, no torch. The weights are the same numbers; only the
rows of the query and key projections change places, since llama.cpp rotates neighbouring pairs.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 numbers of each bfloat16 or float32 tensor."""
    data = np.memmap(path, mode="r", dtype=np.uint8)
    header_bytes = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + at for at in entry["data_offsets"])
        raw = np.array(data[begin:end])
        if entry["dtype"] == "BF16":
            numbers = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F32":
            numbers = raw.view(np.float32)
        else:
            raise SystemExit(f"{name} is {entry['dtype']}; expected BF16 or F32")
        yield name, numbers.reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """What llama.cpp calls a weight of transformers' Llama."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)  # model.layers.7.self_attn...
    return f"blk.{layer}.{NAMES[rest]}"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from [first half, second half] to neighbouring pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "f16"), default="bf16")
    options = parser.parse_args()
    config = json.loads((options.folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    kind = getattr(gguf.GGMLQuantizationType, options.dtype.upper())

    writer = gguf.GGUFWriter(options.file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(options.folder.glob("*.safetensors")):
        for name, numbers in read_safetensors(path):
            projection = name.split(".")[-2]
            if projection in heads:
                numbers = interleaved(numbers, heads[projection])
            if numbers.ndim == 1:
                writer.add_tensor(gguf_name(name), numbers)
            else:
                packed = gguf.quantize(numbers, kind)
                writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
