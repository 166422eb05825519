"""White matter hyperintensity segmentation on FLAIR MRI: a SAM encoder adapted with few trained parameters."""

from .errors import CheckpointError, InputError, MissingStepError, RecipeError, WMHError

__version__ = "0.1.0"
__all__ = ["CheckpointError", "InputError", "MissingStepError", "RecipeError", "WMHError"]
