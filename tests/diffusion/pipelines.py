"""Tiny pipelines of diffusers with random weights, built and run without a network.

Every one runs the pipeline's own ``__call__`` from end to end: its scheduler, its guidance, its
calls of the transformer. The text encoder is None and the prompt arrives as embeddings; what comes
out are the latents (DiT, whose pipeline has no such choice, decodes them with a tiny VAE).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

__all__ = ["PIPELINES", "Tiny", "by_name", "compare"]

Guidance = Literal["batched", "separate", "none"]

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM
TEXT_DIM = 8
PROMPT = 6  # tokens
NEGATIVE = 4  # tokens of the negative prompt, where a pipeline runs the two branches apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A pipeline to test with.

    Args:
        name: a short name, for test ids.
        build: makes the pipeline; the same weights every time.
        call: runs ``(pipeline, steps, batch, seed)`` and returns the latents, batch first.
        guidance: ``batched``: both branches in one call of the transformer, of twice the batch;
            ``separate``: one call for each branch; ``none``: one branch only.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[Any, int, int, int], Tensor]
    guidance: Guidance


def by_name(name: str) -> Tiny:
    """The pipeline of that name."""
    return {tiny.name: tiny for tiny in PIPELINES}[name]


def compare(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value of `a`."""
    return ((a - b).abs().max() / a.abs().max()).item()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _rows(batch: int, *shape: int, seed: int) -> Tensor:
    """Noise whose row i does not depend on how many rows there are."""
    return torch.stack([torch.randn(shape, generator=_seeded(seed + i)) for i in range(batch)])


def _text(batch: int, dim: int = TEXT_DIM, negative: int = PROMPT) -> dict[str, Tensor]:
    return {
        "prompt_embeds": _rows(batch, PROMPT, dim, seed=100),
        "negative_prompt_embeds": _rows(batch, negative, dim, seed=200),
    }


def _masks(batch: int) -> dict[str, Tensor]:
    """The last token of the prompt and the last two of the negative prompt are padding."""
    prompt, negative = torch.ones(2, batch, PROMPT, dtype=torch.long)
    prompt[:, -1:] = 0
    negative[:, NEGATIVE:] = 0
    return {"prompt_attention_mask": prompt, "negative_prompt_attention_mask": negative}


@contextmanager
def _solver() -> Iterator[None]:
    """Let DPMSolverMultistepScheduler hand a tensor to ``np.array``.

    numpy 2 warns that torch's ``__array__`` does not take `copy`; neither is ours to mend.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield


def _built(make: Callable[[], DiffusionPipeline]) -> Any:
    """The pipeline that `make` returns, seeded, ready to run, with blocks that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make()
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.eval().requires_grad_(False)
                _sharpen(module)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sharpen(module: nn.Module) -> None:
    """More weight to all matrices, for what the blocks write to matter.

    torch starts a matrix with about half of the customary spread, so that attention is nearly
    uniform and its output faint next to the residual; in AuraFlow it would not reach the latents.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            assert parameter.any(), f"{name} starts as zeros: what stands before it is cut off"
            parameter.mul_(1.5)


# --- DiT ---------------------------------------------------------------------------------------


def _dit() -> Any:
    return _built(
        lambda: diffusers.DiTPipeline(
            transformer=diffusers.DiTTransformer2DModel(
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                in_channels=4,
                out_channels=8,  # it predicts a variance, too
                num_layers=3,
                sample_size=8,
                num_embeds_ada_norm=1000,
            ),
            vae=diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",),
                up_block_types=("UpDecoderBlock2D",),
                block_out_channels=(8,),
                norm_num_groups=4,
            ),
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
        )
    )


def _call_dit(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        class_labels=[7 * (i + 1) for i in range(batch)],
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=_seeded(seed),
        output_type="pt",
    ).images
    return output


# --- Images, text in cross-attention -----------------------------------------------------------


def _pixart(pipeline: type) -> Callable[[], Any]:
    return lambda: _built(
        lambda: pipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=diffusers.PixArtTransformer2DModel(
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                in_channels=4,
                out_channels=8,
                num_layers=3,
                cross_attention_dim=DIM,
                caption_channels=TEXT_DIM,
                sample_size=8,
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    )


def _call_pixart(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    with _solver():
        output: Tensor = pipeline(
            negative_prompt=None,
            **_text(batch),
            **_masks(batch),
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=_seeded(seed),
            output_type="latent",
            clean_caption=False,
            use_resolution_binning=False,
        ).images
    return output


def _sana() -> Any:
    return _built(
        lambda: diffusers.SanaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                num_layers=3,
                num_cross_attention_heads=HEADS,
                cross_attention_head_dim=HEAD_DIM,
                cross_attention_dim=DIM,
                caption_channels=TEXT_DIM,
                sample_size=4,
            ),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


def _call_sana(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    with _solver():
        output: Tensor = pipeline(
            negative_prompt=None,
            **_text(batch),
            **_masks(batch),
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=_seeded(seed),
            height=128,
            width=128,
            output_type="latent",
            use_resolution_binning=False,
            complex_human_instruction=None,
        ).images
    return output


def _hunyuan_dit() -> Any:
    return _built(
        lambda: diffusers.HunyuanDiTPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=diffusers.HunyuanDiT2DModel(
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                hidden_size=DIM,
                in_channels=4,
                patch_size=2,
                sample_size=8,
                num_layers=6,  # the last two take what the first two returned
                cross_attention_dim=TEXT_DIM,
                cross_attention_dim_t5=TEXT_DIM,
                pooled_projection_dim=8,
                text_len=PROMPT,
                text_len_t5=PROMPT,
            ),
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def _call_hunyuan_dit(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    first = _text(batch) | _masks(batch)
    output: Tensor = pipeline(
        **first,
        **{f"{name}_2": value for name, value in first.items()},
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=64,
        width=64,
        output_type="latent",
        use_resolution_binning=False,
    ).images
    return output


# --- Images, text and image in one attention ---------------------------------------------------


def _sd3() -> Any:
    return _built(
        lambda: diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=HEADS,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=DIM,
                pooled_projection_dim=8,
                pos_embed_max_size=8,
                dual_attention_layers=(0,),  # as 3.5 medium has in its first half
                qk_norm="rms_norm",
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def _call_sd3(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch),
        pooled_prompt_embeds=_rows(batch, 8, seed=300),
        negative_pooled_prompt_embeds=_rows(batch, 8, seed=400),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=64,
        width=64,
        output_type="latent",
    ).images
    return output


def _flux(guidance_embeds: bool) -> Callable[[], Any]:
    return lambda: _built(
        lambda: diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True
            ),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=16,
                num_layers=3,
                num_single_layers=4,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=HEADS,
                joint_attention_dim=TEXT_DIM,
                pooled_projection_dim=8,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
            ),
        )
    )


def _call_flux(pipeline: Any, steps: int, batch: int, seed: int, **negative: Any) -> Tensor:
    output: Tensor = pipeline(
        prompt_embeds=_rows(batch, PROMPT, TEXT_DIM, seed=100),
        pooled_prompt_embeds=_rows(batch, 8, seed=300),
        **negative,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=64,
        width=64,
        output_type="latent",
    ).images
    return output


def _call_flux_true_cfg(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    return _call_flux(
        pipeline,
        steps,
        batch,
        seed,
        negative_prompt_embeds=_rows(batch, PROMPT, TEXT_DIM, seed=200),
        negative_pooled_prompt_embeds=_rows(batch, 8, seed=400),
        true_cfg_scale=2.0,
    )


def _aura_flow() -> Any:
    return _built(
        lambda: diffusers.AuraFlowPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=diffusers.AuraFlowTransformer2DModel(
                sample_size=8,
                num_mmdit_layers=3,
                num_single_dit_layers=3,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=HEADS,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=DIM,
                pos_embed_max_size=64,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def _call_aura_flow(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch),
        **_masks(batch),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=64,
        width=64,
        output_type="latent",
    ).images
    return output


def _qwen_image() -> Any:
    return _built(
        lambda: diffusers.QwenImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True
            ),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=diffusers.QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=3,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=HEADS,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 2, 2),
            ),
        )
    )


def _call_qwen_image(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch, negative=NEGATIVE),
        prompt_embeds_mask=torch.ones(batch, PROMPT, dtype=torch.long),
        negative_prompt_embeds_mask=torch.ones(batch, NEGATIVE, dtype=torch.long),
        true_cfg_scale=3.0,
        num_inference_steps=steps,
        generator=_seeded(seed),
        height=64,
        width=64,
        output_type="latent",
    ).images
    return output


def _lumina2() -> Any:
    return _built(
        lambda: diffusers.Lumina2Pipeline(
            transformer=diffusers.Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=DIM,
                num_layers=3,
                num_refiner_layers=1,
                num_attention_heads=HEADS,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 2, 2),
                axes_lens=(32, 16, 16),
                cap_feat_dim=TEXT_DIM,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def _call_lumina2(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch),
        **_masks(batch),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=64,
        width=64,
        output_type="latent",
    ).images
    return output


# --- Videos ------------------------------------------------------------------------------------


def _wan() -> Any:
    return _built(
        lambda: diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=diffusers.WanTransformer3DModel(
                num_attention_heads=HEADS,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=TEXT_DIM,
                freq_dim=16,
                ffn_dim=32,
                num_layers=3,
                rope_max_seq_len=32,
            ),
        )
    )


def _call_wan(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=32,
        width=32,
        num_frames=5,
        output_type="latent",
    ).frames
    return output


def _cogvideox() -> Any:
    return _built(
        lambda: diffusers.CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                in_channels=4,
                out_channels=4,
                time_embed_dim=8,
                text_embed_dim=TEXT_DIM,
                num_layers=3,
                sample_width=4,
                sample_height=4,
                sample_frames=5,
                max_text_seq_length=PROMPT,
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(clip_sample=False),
        )
    )


def _call_cogvideox(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=PROMPT,
        output_type="latent",
    ).frames
    return output


def _ltx() -> Any:
    return _built(
        lambda: diffusers.LTXPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True
            ),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                cross_attention_dim=DIM,
                num_layers=3,
                caption_channels=TEXT_DIM,
            ),
        )
    )


def _call_ltx(pipeline: Any, steps: int, batch: int, seed: int) -> Tensor:
    output: Tensor = pipeline(
        **_text(batch),
        **_masks(batch),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=_seeded(seed),
        height=96,
        width=96,
        num_frames=9,
        output_type="latent",
    ).frames
    return output


PIPELINES: tuple[Tiny, ...] = (
    Tiny(name="dit", build=_dit, call=_call_dit, guidance="batched"),
    Tiny(
        name="pixart-alpha",
        build=_pixart(diffusers.PixArtAlphaPipeline),
        call=_call_pixart,
        guidance="batched",
    ),
    Tiny(
        name="pixart-sigma",
        build=_pixart(diffusers.PixArtSigmaPipeline),
        call=_call_pixart,
        guidance="batched",
    ),
    Tiny(name="sana", build=_sana, call=_call_sana, guidance="batched"),
    Tiny(name="hunyuan-dit", build=_hunyuan_dit, call=_call_hunyuan_dit, guidance="batched"),
    Tiny(name="sd3", build=_sd3, call=_call_sd3, guidance="batched"),
    Tiny(name="flux", build=_flux(True), call=_call_flux, guidance="none"),
    Tiny(name="flux-true-cfg", build=_flux(False), call=_call_flux_true_cfg, guidance="separate"),
    Tiny(name="aura-flow", build=_aura_flow, call=_call_aura_flow, guidance="batched"),
    Tiny(name="qwen-image", build=_qwen_image, call=_call_qwen_image, guidance="separate"),
    Tiny(name="lumina2", build=_lumina2, call=_call_lumina2, guidance="separate"),
    Tiny(name="wan", build=_wan, call=_call_wan, guidance="separate"),
    Tiny(name="cogvideox", build=_cogvideox, call=_call_cogvideox, guidance="batched"),
    Tiny(name="ltx", build=_ltx, call=_call_ltx, guidance="batched"),
)
