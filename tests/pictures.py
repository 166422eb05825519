"""Pictures for the tests, and how they are written."""

import io

import numpy as np
from PIL import Image

from wmhlib.files import write_atomic


def save(path, array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, options.pop("format", "PNG"), **options)
    write_atomic(path, buffer.getvalue())
    return path


def photograph(height=45, width=70, seed=0):
    """uint8 H x W x 3: three colours of their own brightness, a corner of each its own."""
    rng = np.random.default_rng(seed)
    return (np.array([150, 90, 30]) + rng.integers(0, 40, (height, width, 3))).astype(np.uint8)
