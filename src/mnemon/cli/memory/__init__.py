"""`mnemon memory ...`: learned memories, measured.

- `listops`, `digits`, `lm`: gated recurrent caches on three tasks, one file for each command
- `experiments`: what these share; `report`, `progress`: how they look
"""
