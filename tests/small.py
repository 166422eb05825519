"""Settings that several tests share: augmentation that changes nothing, and an encoder of two blocks."""

from wmhlib.sections import Augment, Encoder

OFF = Augment(rotation=0, scale=0, flips=False, flips_ap=False, rotate90=False, gamma=0, noise=0, brightness=0, contrast=0)
ENCODER = Encoder(dim=32, depth=2, heads=2, global_blocks=(1,), window=3, grid=4)
