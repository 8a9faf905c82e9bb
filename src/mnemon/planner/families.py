"""Which model types the planner knows, by what their attention layers keep.

Every name here was run: a tiny model of it, one forward pass, its cache counted. To add one, put
it in its set, run `python -m tests.planner_defaults`, and give it a row in the tests.
"""

# Keys and values of `num_key_value_heads` heads of `head_dim`.
PLAIN = frozenset(
    "llama mistral mixtral ministral ministral3 qwen2 qwen2_moe qwen3 qwen3_moe qwen2_vl_text "
    "qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text gemma gemma2 gemma3_text gemma3n_text "
    "gemma4_text gemma4_unified_text phi phi3 phimoe starcoder2 stablelm olmo olmo2 olmo3 olmoe "
    "flex_olmo cohere cohere2 cohere2_moe granite granitemoe granitemoeshared granite_swa "
    "granitemoe_swa glm glm4 glm4_moe gpt_oss llama4_text smollm3 exaone4 exaone_moe ernie4_5 "
    "ernie4_5_moe helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder "
    "jais2 arcee apertus aria_text afmoe beam bitnet cwm diffllama flint kolibri1 laguna mellum "
    "mimo_v2_flash minimax_m2 moshi nanochat nemotron seed_oss solar_open vaultgemma "
    "modernbert-decoder hrm_text jetmoe doge dots1 dbrx "
    "gpt2 gpt_neo gpt_neox gpt_neox_japanese gptj gpt-sw3 gpt_bigcode codegen ctrl bloom falcon "
    "mpt opt xglm biogpt persimmon trocr bert bert-generation roberta roberta-prelayernorm "
    "camembert xlm-roberta xlm-roberta-xl electra ernie megatron-bert rembert roc_bert roformer "
    "data2vec-text".split()
)

# Multi-head latent attention: transformers 5.23 caches the compressed latent (kv_lora_rank) as
# keys and the rotary part (qk_rope_head_dim) as values, one head of each.
LATENT = frozenset(
    "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu "
    "axk1 kimi_linear bailing_hybrid".split()
)

# States of a fixed size beside, or instead of, keys and values.
STATEFUL = frozenset(
    "mamba falcon_mamba mamba2 jamba bamba falcon_h1 granitemoehybrid zamba zamba2 nemotron_h "
    "lfm2 lfm2_moe lfm3 recurrent_gemma qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid "
    "kimi_linear bailing_hybrid".split()
)

# Encoder-decoders: the decoder's own keys and those of the encoder, heads as the decoder has.
BART_LIKE = frozenset(
    "bart mbart marian pegasus pegasus_x blenderbot blenderbot-small m2m_100 nllb-moe led plbart "
    "mvp bigbird_pegasus whisper".split()
)
T5_LIKE = frozenset("t5 mt5 umt5 longt5 switch_transformers".split())
ENCODER_DECODER = BART_LIKE | T5_LIKE

MODEL_TYPES = PLAIN | LATENT | STATEFUL | ENCODER_DECODER

# Their attention counts the keys it is handed, so `static(n)` (and StaticCache) cannot serve them.
NO_STATIC = frozenset({"bloom", "gpt_neo", "led", "paligemma"})

# Multimodal models: the section that generates text, and its type where the section names none.
COMPOSITES = {
    "aria": ("text_config", "aria_text"),
    "aya_vision": ("text_config", "cohere2"),
    "gemma3": ("text_config", "gemma3_text"),
    "gemma3n": ("text_config", "gemma3n_text"),
    "gemma4": ("text_config", "gemma4_text"),
    "gemma4_unified": ("text_config", "gemma4_unified_text"),
    "got_ocr2": ("text_config", "qwen2"),
    "idefics2": ("text_config", "mistral"),
    "idefics3": ("text_config", "llama"),
    "internvl": ("text_config", "qwen2"),
    "llama4": ("text_config", "llama4_text"),
    "llava": ("text_config", "llama"),
    "llava_next": ("text_config", "llama"),
    "llava_next_video": ("text_config", "llama"),
    "llava_onevision": ("text_config", "qwen2"),
    "mistral3": ("text_config", "mistral"),
    "paligemma": ("text_config", "gemma"),
    "qwen2_5_vl": ("text_config", "qwen2_5_vl_text"),
    "qwen2_vl": ("text_config", "qwen2_vl_text"),
    "qwen3_5": ("text_config", "qwen3_5_text"),
    "qwen3_5_moe": ("text_config", "qwen3_5_moe_text"),
    "qwen3_vl": ("text_config", "qwen3_vl_text"),
    "qwen3_vl_moe": ("text_config", "qwen3_vl_moe_text"),
    "smolvlm": ("text_config", "llama"),
    "vipllava": ("text_config", "llama"),
}
