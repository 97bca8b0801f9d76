"""Where a model comes from: its name or path, the caches, the packaged default; licence terms; downloads."""

from codegemma.hub.catalogue import (
    DEFAULT,
    NOTICE,
    ModelInfo,
    Packaged,
    assemble,
    cache_dir,
    hub_cache_dir,
    models,
    preset,
    preset_in,
    resolve,
)

__all__ = [
    "DEFAULT",
    "NOTICE",
    "ModelInfo",
    "Packaged",
    "assemble",
    "cache_dir",
    "hub_cache_dir",
    "models",
    "preset",
    "preset_in",
    "resolve",
]
