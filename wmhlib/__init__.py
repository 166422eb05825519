"""White matter hyperintensity segmentation on FLAIR MRI: a SAM encoder adapted with few trained parameters."""

import logging

from .errors import CheckpointError, InputError, MissingStepError, RecipeError, WMHError

__version__ = "0.1.0"
__all__ = ["CheckpointError", "InputError", "MissingStepError", "RecipeError", "WMHError"]

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses a package that only speeds up what is not used here
