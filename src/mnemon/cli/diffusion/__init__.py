"""`mnemon diffusion ...`: caching between denoising steps, shown, timed, judged and fitted.

- `demo`, `bench`, `evaluate`, `fit`, `train_router`: one file for each command
- `sources`: pipelines and learned files; `settings`, `peers`: what is compared
- `work`, `measure`, `judging`: running and counting; `fronts`: what is best at equal cost
- `tables`, `charts`, `pictures`, `pages`: how results look; `progress`: while they are awaited
"""
