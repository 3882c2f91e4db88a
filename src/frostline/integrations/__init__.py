"""Trainers of other packages: BN watched, kept frozen and recalibrated inside their loops.

Import the module of the trainer that you use; each imports its package, and none is imported by
``import frostline``:

- ``frostline.integrations.transformers``: callbacks of the Hugging Face ``Trainer``;
- ``frostline.integrations.lightning``: callbacks of Lightning;
- ``frostline.integrations.ultralytics``: callbacks of Ultralytics' models.

Accelerate needs none: its loop is yours, so :func:`frostline.watch` and
:func:`frostline.assert_frozen` go into it, on ``accelerator.unwrap_model(model)``.
"""
