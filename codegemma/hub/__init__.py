"""Where a model comes from: its name or path, the caches, the packaged default; licence terms; downloads."""

from codegemma.files import cache_dir
from codegemma.hub.catalogue import (
    DEFAULT,
    NOTICE,
    ModelInfo,
    assemble,
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
    "assemble",
    "cache_dir",
    "hub_cache_dir",
    "models",
    "preset",
    "preset_in",
    "resolve",
]
