"""The bundled DiT: its data, its autoencoder, its training, and the pipeline as shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline

from mnemon.diffusion import attach
from mnemon.diffusion.digits import build_transformer, bundled_path, load_pipeline
from mnemon.diffusion.digits.classifier import train_classifier
from mnemon.diffusion.digits.data import load_digits
from mnemon.diffusion.digits.pixels import identity_vae
from mnemon.diffusion.digits.sampling import sample_flow
from mnemon.diffusion.digits.trainer import Trainer, TrainOptions, noised
from mnemon.diffusion.fitting import psnr
from mnemon.errors import ZooError


def test_data() -> None:
    train, held_out = load_digits("train"), load_digits("held_out")
    assert len(train.labels) + len(held_out.labels) == 1797
    assert train.images.min() == -1
    assert train.images.max() == 1
    flat = {tuple(i.flatten().tolist()) for i in train.images}
    assert len(flat) == len(train.labels)  # no image twice
    assert not any(tuple(i.flatten().tolist()) in flat for i in held_out.images)
    assert torch.equal(load_digits("train").images, train.images)


def test_autoencoder_is_the_identity() -> None:
    vae = identity_vae()
    latents = torch.randn(4, 1, 8, 8).clamp(-4, 4)
    with torch.no_grad():
        assert (vae.decode(latents).sample - latents).abs().max() < 5e-5
        assert (vae.encode(latents).latent_dist.mode() - latents).abs().max() < 5e-5
        distribution = vae.encode(latents).latent_dist
        assert (distribution.sample() - latents).abs().max() < 5e-5


def test_shipped_pipeline() -> None:
    """It is diffusers' own classes alone, small, and draws the digits that it is asked for."""
    folder = bundled_path()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size <= 15e6
    assert (folder / "README.md").is_file()
    pipe = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert isinstance(pipe.vae, AutoencoderKL)
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(30)]
    images = pipe(
        class_labels=labels,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    classifier = train_classifier()
    assert classifier.accuracy > 0.95
    judged = classifier.judge(images * 2 - 1)
    assert (judged.labels == torch.tensor(labels)).float().mean() > 0.9


def test_a_cache_on_it() -> None:
    """Half of the steps computed: the figures of the documentation are of this kind."""
    pipe = load_pipeline()

    def run() -> torch.Tensor:
        made = pipe(
            class_labels=list(range(10)),
            num_inference_steps=20,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        )
        return made.images * 2 - 1

    plain = run()
    found = {}
    for method in ("interval(interval=2)", "taylor(order=2, interval=2)"):
        with attach(pipe, method) as attached:
            found[method] = psnr(run(), plain)
        assert attached.report().computed_share == pytest.approx(0.5)
    assert found["taylor(order=2, interval=2)"] > found["interval(interval=2)"] > 25


def test_noise() -> None:
    images = load_digits("train").images[:64]
    generator = torch.Generator().manual_seed(0)
    inputs, times, target = noised(images, "flow", generator)
    level = (times / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(inputs - level * target, images, atol=1e-5)  # x - sigma (noise - x0) = x0
    inputs, times, target = noised(images, "epsilon", generator)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[times].view(-1, 1, 1, 1)
    assert torch.allclose((inputs - (1 - kept).sqrt() * target) / kept.sqrt(), images, atol=1e-2)


def test_flow_sampling() -> None:
    """A transformer that knows one image leads every noise to it, whatever the steps."""
    image = load_digits("train").images[:1]

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: object) -> object:
            said = (x - image) / (timestep.view(-1, 1, 1, 1) / 1000)
            return type("Said", (), {"sample": said})

    for steps, scale in ((1, 1.0), (7, 3.0)):
        made = sample_flow(Oracle(), [0, 1], steps=steps, guidance_scale=scale)
        assert torch.allclose(made, image.expand(2, -1, -1, -1), atol=1e-5)
    with pytest.raises(ZooError, match="0 steps"):
        sample_flow(Oracle(), [0], steps=0)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = {"steps": 4, "batch": 8, "size": "tiny"}
    whole = Trainer(TrainOptions(out=tmp_path / "whole", **options))  # type: ignore[arg-type]
    whole.run(quiet=True)
    first = Trainer(TrainOptions(out=tmp_path / "parts", **options))  # type: ignore[arg-type]
    first.train_step()
    first.train_step()
    first.save()
    second = Trainer(TrainOptions(out=tmp_path / "parts", **options))  # type: ignore[arg-type]
    second.load()
    second.run(quiet=True)
    for name, value in whole.average.items():
        assert torch.equal(second.average[name], value)
    pipe = load_pipeline(tmp_path / "parts" / "pipeline")
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    with pytest.raises(ZooError, match="is of a run"):
        Trainer(TrainOptions(out=tmp_path / "parts", seed=5, **options)).load()  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="no checkpoint"):
        Trainer(TrainOptions(out=tmp_path / "none", **options)).load()  # type: ignore[arg-type]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(ZooError, match="expected one of tiny"):
        build_transformer("huge")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "moe.json").write_text("{}")
    with pytest.raises(ZooError, match="load_moe"):
        load_pipeline(tmp_path)
