"""Training the same network by several strategies: the same learning curve for less memory. No framework.

In reading order: `settings` (what was asked for), `idx` and `data` (images as they lie on the disk), `weights`
(those to start from), `loop` (the epochs of one strategy), `records` (a line an epoch, which the report draws),
`checkpoints` (what `--resume` goes on from), `summary` (the table), `command` (all of it in turn).
"""
