"""Tiny models with random weights, and counters, for the tests of the binding."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

VOCAB = 97
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _ready(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.no_grad():  # spread the logits, so that rounding decides no token
        head = model.get_output_embeddings()
        if head is not None:
            head.weight.mul_(8)
    return model.to(dtype).eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    return _ready(LlamaForCausalLM(LlamaConfig(**_SMALL | options)), dtype)


def mistral(window: int = 16, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return _ready(MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=window)), dtype)


def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return _ready(MambaForCausalLM(config))


def jamba() -> PreTrainedModel:
    torch.manual_seed(0)
    config = JambaConfig(
        **_SMALL, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False,
    )  # fmt: skip
    return _ready(JambaForCausalLM(config))


def lfm2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Lfm2Config(
        **_SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    )
    return _ready(Lfm2ForCausalLM(config))


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None, init_std=0.4,
    )  # fmt: skip
    return _ready(BartForConditionalGeneration(config))


def llava() -> PreTrainedModel:
    """Sees images: four placeholders (id 90) each."""
    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **_SMALL},
        image_token_id=90,
        vision_feature_layer=-1,
    )
    return _ready(LlavaForConditionalGeneration(config))


def prompt(num_tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (batch, num_tokens), generator=generator)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """``(rows, tokens)`` of every forward of `model`'s decoder stack inside the block."""
    shapes: list[tuple[int, int]] = []
    stack = model.get_decoder() if model.config.is_encoder_decoder else model.base_model

    def note(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        assert isinstance(ids, torch.Tensor)
        shapes.append((ids.shape[0], ids.shape[1]))

    handle = stack.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def num_computed(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * tokens for rows, tokens in shapes)
