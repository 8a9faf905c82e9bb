"""Tiny random models, one per way of using attention, and a decoding loop that shows logits."""

from collections.abc import Callable

import torch
import transformers as tf

from mnemon.hf.names import PreTrainedConfig
from releases import RELEASE

__all__ = ["MODELS", "SERVED", "build", "inputs", "logits_of"]

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 2}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "mha": lambda: tf.LlamaConfig(**{**_SMALL, "num_key_value_heads": 4}),
    "mqa": lambda: tf.LlamaConfig(**{**_SMALL, "num_key_value_heads": 1}),
    "mistral": lambda: tf.MistralConfig(**_SMALL, sliding_window=8, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**_SMALL, **_GEMMA, attn_logit_softcapping=1.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SMALL, **_GEMMA),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_SMALL,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**_SMALL, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=1
    ),
    "t5": lambda: tf.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=128, **_SPECIAL
    ),
    "bart": lambda: tf.BartConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        vocab_size=128,
        max_position_embeddings=128,
        forced_eos_token_id=None,
        **_SPECIAL,
    ),
}


#: Those whose modules ask transformers for their attention function. In 4.57 "eager" modules
#: compare with that name, and T5 has an attention of its own until 5.15.
SERVED = [
    name
    for name in MODELS
    if not (RELEASE < (5, 14) and name in ("gemma2", "gpt_oss"))
    and not (RELEASE < (5, 15) and name == "t5")
]


def build(name: str, **overrides: object) -> tf.PreTrainedModel:
    """A tiny random model in float32, with norms and sinks that are not at their neutral values."""
    config = MODELS[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(7)
    family = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    if name == "gemma2":  # older releases of transformers give it "sdpa", which does not soft-cap
        config._attn_implementation = "eager"
    model = family.from_config(config, attn_implementation=config._attn_implementation).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # attention that is far from uniform
            elif "sinks" in parameter_name:
                parameter.normal_()
    return model


def inputs(left_padding: int = 6, batch: int = 2, length: int = 18) -> dict[str, torch.Tensor]:
    """Prompts whose first row begins with padding."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :left_padding] = 0
    ids[0, :left_padding] = 2
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits_of(
    model: tf.PreTrainedModel,
    prompt: dict[str, torch.Tensor],
    num_steps: int = 8,
    **options: object,
) -> torch.Tensor:
    """Logits of a prefill and of every decoded token, [steps, batch, vocabulary]."""
    out = model.generate(
        **prompt,
        max_new_tokens=num_steps,
        min_new_tokens=num_steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits)
