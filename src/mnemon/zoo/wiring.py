"""An initialisation that contains one induction circuit, so that recall need not emerge.

From the usual random weights, copying from context appears in a small model only after
millions of tokens: hours on a CPU. Here two layers start as that circuit and everything else
starts silent (output projections at zero); training does the rest. The model's shape and
code are plain Llama; only the starting weights differ.

The residual stream's dimensions at the start::

    0          | 1 .. 64             | 65 .. 96                   | 97 .. 255
    a constant | code of the token   | code (half) of the token   | the token's own code,
               | before this one     | before that one            | 159 random signs

Layer 0: head 0 looks one token back and head 1 two tokens back (RoPE phases of its fast
pairs) and each writes the code it finds. Layer 1: heads 0 and 2 look for the place where
the two tokens before it are the present two (in RoPE's slow pairs, which hardly turn
over the context), and write the code of the token that stood there.

Source: induction heads are described in Olsson et al., "In-context Learning and Induction
Heads" (2022); structured starting weights for transformers in Trockman and Kolter,
"Mimetic Initialization of Self-Attention Layers" (2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemon.errors import ZooError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SCALE = 0.4  # of a code's entries in the residual stream
CONSTANT = 8.0  # times SCALE
ONE_BACK, TWO_BACK, CODE = 1, 65, 97  # where each part of the residual stream begins
ONE_BACK_DIMS, TWO_BACK_DIMS = 64, 32


def wire_induction(model: LlamaForCausalLM, *, seed: int) -> None:
    """Write the circuit into a freshly initialised model, in place.

    Args:
        model: float32, 256 wide, head_dim 64, 4 query and 2 KV heads, two layers or more.
        seed: draws the tokens' codes.

    Raises:
        ZooError: the model has another shape.
    """
    import torch

    config = model.config
    shape = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    if shape != (256, 4, 2) or config.head_dim != 64 or config.num_hidden_layers < 2:
        raise ZooError(
            "the induction wiring is drawn for hidden size, heads, KV heads = (256, 4, 2), "
            f"head_dim 64 and 2 layers or more (got {shape}, {config.head_dim}, "
            f"{config.num_hidden_layers})"
        )
    generator = torch.Generator().manual_seed(seed)
    size, half = config.head_dim, config.head_dim // 2
    code_dims = config.hidden_size - CODE
    frequency = model.model.rotary_emb.inv_freq.float()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        signs = torch.randint(0, 2, (embedding.shape[0], code_dims), generator=generator) * 2 - 1
        embedding.zero_()
        embedding[:, 0] = CONSTANT * SCALE
        embedding[:, CODE:] = SCALE * signs
        model.model.norm.weight.fill_(0.2)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

        # Layer 0. Keys are a constant vector; a query is that vector turned back by its offset.
        attention = model.model.layers[0].self_attn
        fast = torch.arange(0, 14)
        strength = 1.4
        attention.k_proj.weight[:size] = 0.0
        attention.k_proj.weight[fast, 0] = strength
        for head, offset in ((0, 1.0), (1, 2.0)):
            query = attention.q_proj.weight[head * size : (head + 1) * size]
            query.zero_()
            query[fast, 0] = strength * torch.cos(offset * frequency[fast])
            query[fast + half, 0] = -strength * torch.sin(offset * frequency[fast])
        value = attention.v_proj.weight[:size]
        value.zero_()
        value[:, CODE : CODE + size] = torch.eye(size)
        output = attention.o_proj.weight
        for i in range(ONE_BACK_DIMS):
            output[ONE_BACK + i, i] = SCALE
        for i in range(TWO_BACK_DIMS):
            output[TWO_BACK + i, size + i] = SCALE

        # Layer 1. 28 dims of RoPE's slow pairs: 16 match one token, 12 the token before it.
        attention = model.model.layers[1].self_attn
        slow = torch.arange(18, half)
        slots = torch.cat([slow, slow + half])
        one, two = slots[0::2], slots[1::2]
        one, two = torch.cat([one, two[12:]]), two[:12]
        strength = 3.6
        output = attention.o_proj.weight
        for kv_head, head in ((0, 0), (1, 2)):
            key = attention.k_proj.weight[kv_head * size : (kv_head + 1) * size]
            query = attention.q_proj.weight[head * size : (head + 1) * size]
            value = attention.v_proj.weight[kv_head * size : (kv_head + 1) * size]
            key.zero_()
            query.zero_()
            value.zero_()
            first = 16 * kv_head
            for i, slot in enumerate(one.tolist()):
                query[slot, CODE + first + i] = strength
                key[slot, ONE_BACK + first + i] = strength
            for i, slot in enumerate(two.tolist()):
                query[slot, ONE_BACK + first + i] = strength
                key[slot, TWO_BACK + first + i] = strength
            for i in range(size):
                value[i, CODE + size * kv_head + i] = 1.0
                output[CODE + size * kv_head + i, size * head + i] = 3.0 * SCALE
