"""What a gated recurrent cache brings, on three small tasks, with controls.

- `arms`: what is compared; `scales`: how large; `tasks`: the three by name
- `listops`, `listops_task`: nested lists of digits; `digits_task`: small images; `lm_task`: source
- `classifier`: the encoder of the first two
- `training`: one run; `runner`: all of them; `record`: what is written; `statistics`: what it says

`mnemon memory listops|digits|lm` runs them.
"""
