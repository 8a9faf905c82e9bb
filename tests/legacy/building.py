"""Builds the old models as users meet them: a folder with code, config and weights.

Weights come from a seed and a tensor's name, not from transformers' initialisation, which differs
from release to release. Nothing here imports mnemon: the recorder runs under old releases.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

__all__ = ["MODELS", "STYLES", "Style", "build", "load"]

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """One old way of writing a modeling file.

    Args:
        config_class: its config, in ``configuration_<style>.py``.
        model_class: its model, in ``modeling_<style>.py``.
        auto_class: the Auto class that loads it.
        native: the newest recorded release that runs it without help.
        config: arguments of the config beyond its defaults.
    """

    config_class: str
    model_class: str
    auto_class: str = "AutoModelForCausalLM"
    native: str = "4.57.6"
    config: dict[str, Any] = field(default_factory=dict)


STYLES = {
    "llama_position": Style(
        config_class="LlamaPositionConfig", model_class="LlamaPositionForCausalLM"
    ),
    "recent": Style(config_class="RecentConfig", model_class="RecentForCausalLM"),
    "minicpm_legacy": Style(
        config_class="MiniCpmLegacyConfig", model_class="MiniCpmLegacyForCausalLM"
    ),
    "indexed_pairs": Style(
        config_class="IndexedPairsConfig", model_class="IndexedPairsForCausalLM"
    ),
    "deepseek_fx": Style(
        config_class="DeepseekFxConfig",
        model_class="DeepseekFxForCausalLM",
        config={"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ),
    "gemma_hybrid": Style(config_class="GemmaHybridConfig", model_class="GemmaHybridForCausalLM"),
    "bart_four": Style(
        config_class="BartFourConfig",
        model_class="BartFourForConditionalGeneration",
        auto_class="AutoModelForSeq2SeqLM",
    ),
    "bloom_folded": Style(config_class="BloomFoldedConfig", model_class="BloomFoldedForCausalLM"),
    "crop_lookback": Style(
        config_class="CropLookbackConfig", model_class="CropLookbackForCausalLM"
    ),
    "qwen_tuple": Style(config_class="QwenTupleConfig", model_class="QwenTupleLMHeadModel"),
    "qwen_v1": Style(config_class="QwenV1Config", model_class="QwenV1LMHeadModel", native="4.48.3"),
    "phi3": Style(config_class="OldPhi3Config", model_class="OldPhi3ForCausalLM", native="4.48.3"),
    "deepseek_v2": Style(
        config_class="OldDeepseekV2Config", model_class="OldDeepseekV2ForCausalLM", native="4.48.3"
    ),
    "minicpm_lists": Style(
        config_class="MiniCpmListsConfig", model_class="MiniCpmListsForCausalLM", native="4.48.3"
    ),
    "got_ocr": Style(config_class="GotOcrConfig", model_class="GotOcrForCausalLM", native="4.48.3"),
    "sundial": Style(
        config_class="OldSundialConfig", model_class="OldSundialForPrediction", native="4.48.3"
    ),
}


def build(style: str, folder: Path) -> Path:
    """Write the model of `style` to ``folder/<style>`` and return that path."""
    spec, home = STYLES[style], folder / style
    home.mkdir(parents=True)
    for source in (MODELS / style).glob("*.py"):
        shutil.copy(source, home)
    config = spec.config | {
        "model_type": f"old_{style}",
        "architectures": [spec.model_class],
        "auto_map": {
            "AutoConfig": f"configuration_{style}.{spec.config_class}",
            spec.auto_class: f"modeling_{style}.{spec.model_class}",
        },
    }
    (home / "config.json").write_text(json.dumps(config, indent=1))
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    (home / "generation_config.json").write_text(json.dumps(tokens))
    model_class = get_class_from_dynamic_module(
        f"modeling_{style}.{spec.model_class}", str(home), local_files_only=True
    )
    made = model_class.config_class(**spec.config)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in model_class(made).state_dict().items()}
    if made.tie_word_embeddings:
        del shapes["lm_head.weight"]
    weights = {name: _weight(f"{name} of the {style}", shape) for name, shape in shapes.items()}
    if made.tie_word_embeddings:  # or every token would call for itself
        weights = {name: w * (0.3 if "embed" in name else 3.0) for name, w in weights.items()}
    save_file(_shared_once(weights, shapes), home / "model.safetensors", {"format": "pt"})
    return home


def load(home: Path, auto_class: str) -> Any:
    """Load it as users do, with the code that lies beside the weights."""
    import transformers

    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(str(home), trust_remote_code=True, local_files_only=True)
    return model.eval()


def _shared_once(
    weights: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The encoder of `bart_four` shares the embeddings: the same numbers under each name."""
    for name in shapes:
        if name == "encoder.embed_tokens.weight":
            weights[name] = weights["shared.weight"].clone()
        elif name == "encoder.embed_positions.weight":
            weights[name] = weights["places.weight"].clone()
    return weights


def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 1:
        return 0.1 * noise + float("weight" in name)
    embeds = any(
        part in name.split(" of ")[0] for part in ("embed", "wte", "tokens", "places", "shared")
    )
    return noise if embeds else noise * 1.5 / math.sqrt(shape[-1])
