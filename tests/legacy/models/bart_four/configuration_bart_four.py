"""Config of a small encoder-decoder in the style of 4.36: four tensors a layer."""

from transformers.configuration_utils import PretrainedConfig


class BartFourConfig(PretrainedConfig):
    model_type = "old_bart_four"
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "heads"}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=64,
        d_model=32,
        heads=4,
        num_hidden_layers=2,
        max_position_embeddings=128,
        use_cache=True,
        is_encoder_decoder=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.heads = heads
        self.num_hidden_layers = num_hidden_layers
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            decoder_start_token_id=decoder_start_token_id,
            is_encoder_decoder=is_encoder_decoder,
            **kwargs,
        )
