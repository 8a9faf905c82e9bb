"""The bundled diffusion transformer: a DiT that draws scikit-learn's 8 x 8 digits.

    from mnemon.diffusion.digits import load_pipeline
    pipe = load_pipeline()                        # a diffusers.DiTPipeline
    pipe(class_labels=[3, 7], num_inference_steps=20, guidance_scale=2.0).images

- `data`: the images, in training and held-out halves that never change
- `architecture`, `pixels`: the model, and the "autoencoder" of a model that works on pixels
- `trainer`, `train`: how it was trained; `sampling`: from flow-matching models
- `classifier`: what an image shows, and features to compare images by
"""

from mnemon.diffusion.digits.architecture import (
    SIZES,
    build_transformer,
    bundled_path,
    load_pipeline,
)

__all__ = ["SIZES", "build_transformer", "bundled_path", "load_pipeline"]
