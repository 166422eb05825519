"""Scans of no scanner in particular: grid, contrast, artefacts and what is left of the head are drawn anew for each.

Domain randomisation (Billot et al. 2023, SynthSeg): a network that has seen every contrast and resolution takes a stranger's scan
for one more. Brightness is relative to normal white matter, lengths are in mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .anatomy import AIR, BONE, CSF, FAT, FLUID, GLAND, MARROW, MUSCLE
from .scan import Acquisition, Anatomy, Scan, Site
from .seeds import stable_seed

CSF_LABEL, BONE_LABEL, SOFT_LABEL = 3, 6, 7  # of `Acquisition.tissue`, above the mask's 0, 1, 2; grey and white matter follow CSF
_VERTEX = 76  # mm, MNI height


@dataclass(frozen=True)
class Contrast:
    """Ranges of brightness: of anatomy's tissues from AIR to FLUID, of grey matter, and of a lesion, which differs from white
    matter by at least `apart` and, where it has to be the `brightest`, lies that far above grey matter too."""

    tissues: tuple[tuple[float, float], ...]
    grey: tuple[float, float]
    lesion: tuple[float, float]
    apart: float
    brightest: bool = False
    speckle: bool = False  # ultrasound: multiplicative, compressed by a logarithm
    window: float = np.inf  # brightest value a display window leaves
    bias: float = 0.6  # log range of the receive field
    noise: tuple[float, float] = (0.01, 0.12)


_ANY = (0.05, 2.5)
KINDS = {
    "flair": Contrast(((0, 0), (.02, .45), (.02, .3), (.2, 1.6), (.3, 3.2), (.3, 1.0), (.5, 1.8), (.7, 2.2), (1, 2.8), (.03, .4)),
                      grey=(0.98, 1.6), lesion=(1.3, 2.3), apart=0.25, brightest=True),
    "t1": Contrast(((0, 0), (.1, .4), (.02, .2), (.5, 1.4), (1.1, 2.3), (.4, .8), (.5, 1.2), (.6, 1.1), (.4, .8), (.1, .35)),
                   grey=(0.55, 0.88), lesion=(0.4, 0.82), apart=0.15),
    "ct": Contrast(((0, 0), (.3, .65), (2.5, 6), (1.8, 4), (0, .1), (1.3, 2), (1.1, 1.7), (1.2, 1.9), (1, 1.6), (.3, .6)),
                   grey=(1.08, 1.35), lesion=(0.55, 0.85), apart=0.15, window=2.6, bias=0, noise=(0.04, 0.2)),
    "ultrasound": Contrast(((0, 0), (.1, .35), (1.5, 3), (1, 2), (.8, 2), (.4, 1), (.8, 2), (.6, 1.5), (.6, 1.5), (.05, .3)),
                           grey=(1.15, 1.6), lesion=(1.6, 2.8), apart=0.4, speckle=True, bias=0.3),
    "any": Contrast(((0, 0), *[_ANY] * 9), grey=_ANY, lesion=_ANY, apart=0.25),
}
_ON_T1 = ((AIR, 0.0), (BONE, 0.12), (CSF, 0.3), (MUSCLE, 0.6), (GLAND, 0.9), (MARROW, 1.2), (FAT, 1.7))  # relative to white matter
_MIXED = {"flair": 0.6, "any": 0.16, "t1": 0.12, "ct": 0.07, "ultrasound": 0.05}  # shares of "mixed"


def make_scan(kind: str, seed: int, scale: float = 1.0, head: str = "") -> Acquisition:
    """One case of a contrast of KINDS, or "mixed", any of them; `scale` coarsens the in-plane voxels, `head` is a T1w scan of whom the case is
    ("": the brain is the MNI152's). `flair` holds the one image there is, whatever its contrast; `tissue` is uint8: 0 none, 3 CSF, 4 grey, 5 white
    matter, 6 bone, 7 soft tissue."""
    rng = np.random.default_rng(stable_seed("scanner", kind, seed))
    kind = str(rng.choice(list(_MIXED), p=list(_MIXED.values()))) if kind == "mixed" else kind
    return RandomScan(KINDS[kind], _site(rng, bool(head)), seed, scale, rng, head).acquire()


class RandomScan(Scan):
    """One patient in one scanner that there is once; contrast and artefacts are drawn from `rng`."""

    def __init__(self, contrast: Contrast, site: Site, seed: int, scale: float, rng: np.random.Generator, head: str):
        super().__init__(site, seed, scale, head)
        self.contrast, self.rng = contrast, rng

    def acquire(self) -> Acquisition:
        anatomy = self.anatomy()
        grey, white, lesion = (self.pool(part) for part in (anatomy.grey, anatomy.white, anatomy.lesion))
        mask = (lesion >= self.rng.uniform(0.3, 0.5)).to(torch.uint8)  # raters outline what they see, thinned by thick slices or not
        mask[self.pool(anatomy.extent) >= 0.5] = 2
        keep = self.kept()
        image = self.image(self.pool(self.flair(anatomy)), keep)
        tissue = torch.tensor([0, CSF_LABEL, BONE_LABEL, BONE_LABEL, *[SOFT_LABEL] * 6], dtype=torch.uint8)[
            anatomy.labels[..., self.site.sub // 2 :: self.site.sub].int()]
        inside, matter = self.pool(anatomy.inside.float()) > 0.5, torch.stack([1 - grey - white, grey, white]).argmax(0)
        tissue[self.slices()][inside] = (CSF_LABEL + matter[inside]).to(torch.uint8)
        return Acquisition(self.finish(image), None, self.finish(self.around_brain(mask)), self.finish(self.around_brain(self.ventricles(anatomy, mask))), self.affine(),
                           self.finish(self.whole(tissue * keep)))

    def flair(self, anatomy: Anatomy) -> torch.Tensor:
        contrast, brain, uniform = self.contrast, self.patient.inner, self.rng.uniform
        values = [uniform(*r) for r in contrast.tissues]
        for inside, like in ((MARROW, BONE), (FLUID, CSF)):
            if uniform() < 0.3:
                values[inside] = values[like]
        cortex, bright = self._brain_contrast()
        brains, shade = anatomy.grey + anatomy.white, uniform(0, 1.5)
        tissue = anatomy.grey * cortex * (1 + shade * (brain.grey_shades() - 1)) + anatomy.white * (1 + shade * (brain.white_shades() - 1))
        own = torch.exp(uniform(0, 0.4) * brain.field(uniform(8, 25))).clamp_(0.4, 1.6)  # of each lesion, some are faint
        level = 1 + (bright - 1) * own * (1 - uniform(0, 0.3) + uniform(0, 0.4) * anatomy.depth.clamp(min=0) + uniform(0, 0.2) * brain.fine)
        if uniform() < 0.7:  # dirty-appearing white matter (Ge et al. 2003) and penumbra (Maillard et al. 2011): lesser change around lesions, which raters leave out
            near = torch.exp(-(anatomy.depth.clamp(max=0) / uniform(0.15, 0.8)).square())
            tissue += uniform(0, 0.45) * near * anatomy.white * (bright - 1) * own
        tissue += anatomy.lesion * (level * brains - tissue)
        tissue += uniform(0.4, 1) * anatomy.extent * (bright * brains - tissue)
        fluid = values[CSF] + uniform(0, 1.3) * brain.fluid_shades() * contrast.brightest
        image = self.compose(anatomy, tissue, fluid, values)
        if self.patient.whole and uniform() < 0.6:
            self._own_head(image, anatomy, values)
        return image.clamp_(0, contrast.window)

    def _own_head(self, image: torch.Tensor, anatomy: Anatomy, values: list[float]) -> None:
        """Around the brain the head that the person has, in `image` and labels: each T1w brightness as bright as the tissue that is so on T1w."""
        t1, = self.patient.whole(self.patient.points)
        outside = t1 >= 0
        outside[self.patient.inner.box] &= ~anatomy.inside
        t1 = t1[outside]
        knots, levels = zip(*((at, values[tissue]) for tissue, at in _ON_T1))
        image[outside] = torch.from_numpy(np.interp(t1.numpy(), knots, levels).astype(np.float32))
        anatomy.labels[outside] = torch.tensor([AIR, BONE, MUSCLE], dtype=torch.uint8)[torch.bucketize(t1, torch.tensor([0.06, 0.25]))]

    def _brain_contrast(self) -> tuple[float, float]:
        """Brightness of grey matter and of lesions."""
        contrast, uniform = self.contrast, self.rng.uniform
        while True:
            grey, lesion = uniform(*contrast.grey), uniform(*contrast.lesion)
            above = lesion - grey if contrast.brightest else abs(lesion - 1)
            if above >= contrast.apart and (grey > 0.98 or abs(grey - 1) > 0.1):
                return grey, lesion

    def kept(self) -> torch.Tensor:
        """Voxels that are left: all, the brain alone (more or less of its rim), or without the face."""
        patient, uniform = self.patient, self.rng.uniform
        fate, outside = uniform(), self.pool(patient.to_brain)
        if fate < 0.3:
            return outside + uniform(0, 1.2) * self.pool(patient.fine) < uniform(-1.5, 3)
        if fate < 0.75:
            return torch.ones_like(outside, dtype=torch.bool)
        return self.without_face(outside, uniform)

    def image(self, image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Receive field, what the k-space of each slice lacks or repeats, noise, gamma and an arbitrary scale."""
        patient, contrast, uniform = self.patient, self.contrast, self.rng.uniform
        image = self.whole(image * torch.exp((self.pool(patient.field(uniform(60, 120))) * uniform(0, contrast.bias)).clamp_(-1, 1)))
        if contrast.speckle:
            image = self._speckle(image)
        image = image * torch.exp(uniform(0, 0.05) * torch.randn(image.shape[2], generator=patient.generator))  # slice by slice
        sigma = uniform(*contrast.noise)
        noise = torch.complex(*(sigma * torch.randn(image.shape, generator=patient.generator) for _ in range(2)))
        image = (torch.fft.ifft2(torch.fft.fft2(image, dim=(0, 1)) * self._transfer()[..., None], dim=(0, 1)) + noise).abs()
        return image ** uniform(0.75, 1.3) * self.over_air(keep) * np.exp(uniform(0, np.log(2000)))

    def _transfer(self) -> torch.Tensor:
        """What of each spatial frequency arrives: less of the high ones (blur), none beyond the matrix acquired (Gibbs ringing),
        and unequal odd and even lines (a ghost, half a field of view away)."""
        uniform, lines = self.rng.uniform, []
        for n, spacing in zip(self.shape[:2], self.spacing):
            frequency = np.fft.fftfreq(n)  # cycles a pixel
            blur = np.exp(-2 * (np.pi * frequency * uniform(0, 0.9) / spacing) ** 2)
            lines.append(blur * (np.abs(frequency) <= uniform(0.3, 0.6)))
        phase, ghost = self.rng.integers(2), uniform(0, 0.06) * (uniform() < 0.3)
        lines[phase] = lines[phase] * (1 + ghost * (-1) ** np.arange(self.shape[phase]))
        return torch.from_numpy(np.outer(*lines).astype(np.float32))

    def _speckle(self, image: torch.Tensor) -> torch.Tensor:
        """Fully developed speckle (Rayleigh), weaker with depth, compressed by a logarithm."""
        generator, uniform = self.patient.generator, self.rng.uniform
        rayleigh = torch.complex(*(torch.randn(image.shape, generator=generator) for _ in range(2))).abs() / 1.25
        depth = torch.linspace(0, 1, image.shape[1])[:, None] * uniform(0.2, 1)
        return torch.log1p(4 * image * (1 + uniform(0.2, 0.5) * (rayleigh - 1)) * torch.exp(-depth)) / np.log(5)


def _site(rng: np.random.Generator, own: bool) -> Site:
    """A grid: 2.5 to 8.5 mm from slice to slice, in-plane voxels of 0.75 to 1.4 mm, any direction of the axes. A quarter of them stand
    for 3-D scans: thin slices, of which there is one every few millimetres. The folds of one person's `own` brain are moved the more."""
    step = rng.uniform(2.5, 4) if rng.random() < 0.5 else rng.uniform(4, 8.5)
    thin = rng.random() < 0.25
    thickness = rng.uniform(1, 1.5) if thin else step * rng.uniform(0.75, 1.05)
    extent = rng.uniform(132, 185)
    pixel = rng.uniform(0.8, 1.3)
    spacing = (pixel * rng.uniform(0.92, 1.08), pixel, step)
    return Site("random", (round(rng.uniform(195, 245) / spacing[0]), round(rng.uniform(218, 255) / spacing[1]), round(extent / step)), spacing,
                tuple(rng.choice((-1, 1), 3).tolist()), centre=_VERTEX + rng.uniform(-6, 14) - extent / 2, thickness=(thickness, thickness),
                grey=(1, 1), fat=(1, 1), noise=(0, 0), blur=(0, 0), bias=0, defaced=0, sub=2 if thin else max(2, round(thickness / 1.6)),
                burden=(0.3, 80), softness=(0.04, 0.25), folds=rng.uniform(0.8, 2) if own else 1.0)
