"""The errors users meet. Each message names the file or setting, what was found, what was expected and what to do."""


class WMHError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(WMHError, ValueError):
    """A scan, mask, table or folder that cannot be used as it is."""


class RecipeError(WMHError, ValueError):
    """A setting that is unknown or impossible, or a run folder that belongs to another recipe."""


class CheckpointError(WMHError, ValueError):
    """Weights that do not fit the model, or a file that is damaged."""


class MissingStepError(WMHError, FileNotFoundError):
    """A file that an earlier notebook writes is not there."""
