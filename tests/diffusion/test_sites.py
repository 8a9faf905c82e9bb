"""The table of sites says what the models do."""

import inspect
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from tests.diffusion.pipelines import PIPELINES, by_name
from torch import Tensor, nn

from mnemon.diffusion.sites import Sites, find_sites
from mnemon.errors import NoSites

# attention, cross_attention, mlp
EXPECTED = {
    "dit": (3, 0, 3),
    "pixart-alpha": (3, 3, 3),
    "pixart-sigma": (3, 3, 3),
    "sana": (3, 3, 3),
    "hunyuan-dit": (6, 6, 6),
    "sd3": (4, 0, 5),  # one block has a second attention, the last one no MLP for the text
    "flux": (7, 0, 10),
    "flux-true-cfg": (7, 0, 10),
    "aura-flow": (6, 0, 9),
    "qwen-image": (3, 0, 6),
    "lumina2": (3, 0, 3),
    "wan": (3, 3, 3),
    "cogvideox": (3, 0, 3),
    "ltx": (3, 3, 3),
    "allegro": (3, 3, 3),
    "chroma": (5, 0, 8),
    "cogview4": (3, 0, 0),
    "flux2": (5, 0, 4),
    "hunyuan-video": (5, 0, 7),
    "mochi": (3, 0, 5),
    "skyreels": (3, 3, 3),
}
HEADS, HEAD_DIM, TEXT_DIM, TEXT = 2, 8, 8, 6
DIM = HEADS * HEAD_DIM


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _allegro() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
        caption_channels=TEXT_DIM,
    )
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2))
    unturned = (torch.ones(2, 4), torch.zeros(2, 4))  # cos and sin
    return model, {
        "hidden_states": _noise(1, 4, 2, 4, 4),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
        "timestep": torch.tensor([500]),
        "attention_mask": torch.ones(1, 2, 4, 4),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "image_rotary_emb": ((unturned,) * 3, tuple(positions.T[:, None])),
    }


def _chroma() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=16,
        approximator_hidden_dim=DIM,
        approximator_layers=1,
    )
    return model, {
        "hidden_states": _noise(1, 4, 4),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _cogview4() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    size = torch.tensor([[8, 8]])
    return model, {
        "hidden_states": _noise(1, 4, 4, 4),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
        "timestep": torch.tensor([500]),
        "original_size": size,
        "target_size": size,
        "crop_coords": size * 0,
    }


def _flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    return model, {
        "hidden_states": _noise(1, 4, 4),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 4),
        "txt_ids": torch.zeros(TEXT, 4),
    }


def _hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 2, 2),
    )
    return model, {
        "hidden_states": _noise(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "pooled_projections": _noise(1, 8),
    }


def _mochi() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=4,
    )
    return model, {
        "hidden_states": _noise(1, 4, 2, 4, 4),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    }


def _skyreels() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": _noise(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _noise(1, TEXT, TEXT_DIM),
    }


# Models of the table without a pipeline among the tiny ones: the model, and what to call it with.
BARE: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "allegro": _allegro,
    "chroma": _chroma,
    "cogview4": _cogview4,
    "flux2": _flux2,
    "hunyuan-video": _hunyuan_video,
    "mochi": _mochi,
    "skyreels": _skyreels,
}


@dataclass
class Seen:
    """The calls of all modules in the order in which they ended, and what the last ones were."""

    calls: list[str] = field(default_factory=list)
    args: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _watched(transformer: nn.Module, sites: Sites) -> Iterator[Seen]:
    """Within it, calls of the transformer (as ""), of its blocks and sublayers are recorded."""
    seen = Seen()
    paths = ["", *(block.path for block in sites.blocks), *(s.path for s in sites.sublayers)]

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.calls.append(path)
            seen.args[path], seen.kwargs[path], seen.outputs[path] = args, kwargs, output

        return transformer.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(path) for path in paths]
    yield seen
    for handle in handles:
        handle.remove()


def _run(name: str) -> tuple[nn.Module, Sites, Seen]:
    if name in BARE:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # Chroma takes a name of diffusers from where it used to be; Mochi turns autocast off
            # by way of a dtype that the CPU has no autocast for.
            warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
            torch.manual_seed(0)
            transformer, inputs = BARE[name]()
            transformer.eval().requires_grad_(False)
            sites = find_sites(transformer)
            with _watched(transformer, sites) as seen:
                transformer(**inputs)
        return transformer, sites, seen
    tiny = by_name(name)
    pipeline = tiny.build()
    sites = find_sites(pipeline.transformer)
    with _watched(pipeline.transformer, sites) as seen:
        tiny.call(pipeline, 2, 1, 0)
    return pipeline.transformer, sites, seen


every = pytest.mark.parametrize("name", EXPECTED)


def test_every_pipeline_is_expected() -> None:
    assert set(EXPECTED) == {tiny.name for tiny in PIPELINES} | set(BARE)


@every
def test_sublayers(name: str) -> None:
    transformer, sites, seen = _run(name)
    assert sites.model == type(transformer).__name__
    kinds = Counter(sublayer.kind for sublayer in sites.sublayers)
    assert (kinds["attention"], kinds["cross_attention"], kinds["mlp"]) == EXPECTED[name]
    # Each once in every forward, in this order.
    forward = [sublayer.path for sublayer in sites.sublayers]
    assert [path for path in seen.calls if path in forward] == forward * seen.calls.count("")
    assert [block.index for block in sites.blocks] == list(range(len(sites.blocks)))
    for block in sites.blocks:
        for sublayer in block.sublayers:
            assert sublayer.path.rpartition(".")[0] == block.path
            assert sublayer.block == block.index
            output = seen.outputs[sublayer.path]
            parts = output if isinstance(output, tuple) else (output,)
            assert all(isinstance(part, Tensor) for part in parts if part is not None)
            assert isinstance(parts[0], Tensor)


@every
def test_tokens_that_an_mlp_treats_alone(name: str) -> None:
    transformer, sites, seen = _run(name)
    mlps = [sublayer for sublayer in sites.sublayers if sublayer.kind == "mlp"]
    assert {mlp.per_token for mlp in mlps} <= {name != "sana"}
    assert not any(s.per_token for s in sites.sublayers if s.kind != "mlp")
    for mlp in mlps:
        (tokens,) = seen.args[mlp.path]
        module, output = transformer.get_submodule(mlp.path), seen.outputs[mlp.path]
        if mlp.per_token:
            assert tokens.ndim == 3
            assert output.shape[:2] == tokens.shape[:2]
            torch.testing.assert_close(module(tokens[:, ::2]), output[:, ::2])
        else:
            assert tokens.ndim == 4


@every
def test_hidden_states_of_blocks(name: str) -> None:
    transformer, sites, seen = _run(name)
    assert sites.stacks
    for stack in sites.stacks:
        assert sorted(stack.hidden) == sorted(stack.returns)
        before: dict[str, Tensor | None] = {}
        for block in stack.blocks:
            forward = inspect.signature(transformer.get_submodule(block.path).forward)
            names = list(forward.parameters)
            assert [parameter for parameter in names if parameter in stack.hidden] == list(
                stack.hidden
            )
            # Passed as the table says, all of them.
            by_position = names[: len(seen.args[block.path])]
            for hidden in stack.hidden:
                passed = "positional" if hidden in by_position else "keyword"
                assert passed == stack.passed
                assert (hidden in seen.kwargs[block.path]) == (passed == "keyword")
            bound = forward.bind(*seen.args[block.path], **seen.kwargs[block.path]).arguments
            # The very tensors that the block before returned.
            for hidden, value in before.items():
                assert bound[hidden] is value
            output = seen.outputs[block.path]
            values = output if isinstance(output, tuple) else (output,)
            assert isinstance(output, tuple) == (len(stack.returns) > 1)
            before = dict(zip(stack.returns, values, strict=True))
            for hidden, value in before.items():
                if value is None:  # nobody needs the text behind the last block of SD3
                    assert (name, block, hidden) == (
                        "sd3",
                        stack.blocks[-1],
                        "encoder_hidden_states",
                    )
                else:
                    assert value.shape == bound[hidden].shape


def test_long_skips_of_hunyuan_dit() -> None:
    _, sites, seen = _run("hunyuan-dit")
    blocks = sites.blocks
    for index in (4, 5):
        skip = seen.kwargs[blocks[index].path]["skip"]
        assert skip is seen.outputs[blocks[5 - index].path]
    assert all("skip" not in seen.kwargs[block.path] for block in blocks[:4])


def test_single_blocks_of_flux_take_what_double_blocks_return() -> None:
    _, sites, seen = _run("flux")
    double, single = sites.stacks
    text, image = seen.outputs[double.blocks[-1].path]
    assert seen.kwargs[single.blocks[0].path]["hidden_states"] is image
    assert seen.kwargs[single.blocks[0].path]["encoder_hidden_states"] is text
    assert double.returns == single.returns == ("encoder_hidden_states", "hidden_states")


def test_cogview4_runs_an_mlp_twice_in_a_block() -> None:
    """Which is why it is no site: reuse could not tell the image's output from the text's."""
    transformer, inputs = _cogview4()
    calls: list[str] = []
    transformer.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append("ff"))
    transformer(**inputs)
    assert calls == ["ff", "ff"]


class _Block(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        for name, child in children.items():
            self.add_module(name, child)


class _Toy(nn.Module):
    def __init__(self, *stacks: list[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Module()
        for number, stack in enumerate(stacks):
            self.inner.add_module(f"stack{number}", nn.ModuleList(stack))


def test_usual_names() -> None:
    def block() -> nn.Module:
        mlp = nn.Module()
        mlp.net = nn.ModuleList([_Block(ff=nn.Linear(4, 4))])  # not a stack: it is in a block
        return _Block(self_attn=nn.Linear(4, 4), cross_attn=nn.Linear(4, 4), mlp=mlp)

    sites = find_sites(_Toy([nn.Linear(4, 4)], [block(), block()]))
    (stack,) = sites.stacks
    assert sites.model == "_Toy"
    assert stack.name == "inner.stack1"
    assert (stack.hidden, stack.returns, stack.passed) == ((), (), None)
    assert [(s.path, s.kind, s.block, s.per_token) for s in sites.sublayers] == [
        ("inner.stack1.0.self_attn", "attention", 0, False),
        ("inner.stack1.0.cross_attn", "cross_attention", 0, False),
        ("inner.stack1.0.mlp", "mlp", 0, False),
        ("inner.stack1.1.self_attn", "attention", 1, False),
        ("inner.stack1.1.cross_attn", "cross_attention", 1, False),
        ("inner.stack1.1.mlp", "mlp", 1, False),
    ]


def test_a_subclass_is_looked_up_as_its_base() -> None:
    transformer = by_name("dit").build().transformer
    transformer.__class__ = type("MyDiT", (type(transformer),), {})
    sites = find_sites(transformer)
    assert sites.model == "MyDiT"
    assert sites.stacks[0].hidden == ("hidden_states",)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            _Toy([_Block(mixer=nn.Linear(4, 4)), _Block(mixer=nn.Linear(4, 4))]),
            ["_Toy", "attn1", "feed_forward", "inner.stack0 (2 x _Block: norm, mixer)"],
        ),
        # Blocks of two classes, one of which has a usual name.
        (_Toy([_Block(attn=nn.Linear(4, 4)), nn.Linear(4, 4)]), ["inner.stack0 (2 x _Block: nor"]),
        (_Toy([_Block(attn=nn.Linear(4, 4)), _Block()]), ["inner.stack0 (2 x _Block: norm, attn)"]),
        (_Toy([nn.Linear(4, 4)]), ["inner.stack0 (1 x Linear: no children)"]),
        (nn.Linear(4, 4), ["Linear", "ModuleLists are: none", "pipe.transformer"]),
    ],
)
def test_no_sites(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(NoSites) as caught:
        find_sites(model)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("stack", [[], [_Block(mixer=nn.Linear(4, 4))], None])
def test_a_known_model_that_is_built_otherwise(stack: list[nn.Module] | None) -> None:
    """Half of the sites, or none, must not pass for all of them."""
    model = type("WanTransformer3DModel", (nn.Module,), {})()
    if stack is not None:
        model.blocks = nn.ModuleList(stack)
    with pytest.raises(NoSites, match="looked in blocks for blocks with children named attn1"):
        find_sites(model)


def test_diffusers_is_not_imported() -> None:
    code = "import sys, mnemon.diffusion.sites; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
