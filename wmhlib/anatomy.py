"""The patient of a synthetic case: one of many heads with its brain, lesions and, at times, other pathology.

Brains are nilearn's MNI152 grey- and white-matter maps (1 mm), or those of one person (`heads`), warped per patient; the head around them is built from
the distance to the brain and from ellipsoids. Lengths are in mm, positions in MNI coordinates (x to the right, y to
anterior, z to superior), brightness relative to normal white matter.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from .atlas import Maps, template
from .volumetric.boxes import resample, splines

AIR, CSF, BONE, MARROW, FAT, MUSCLE, SKIN, GLAND, MUCOSA, FLUID = range(10)

# Tissue, centre and radii, from the outside in; x > 0 means one on each side.
_FACE = (
    (GLAND, (56, -2, -78), (11, 16, 26)), (FAT, (44, 50, -72), (17, 22, 26)), (MUSCLE, (57, 28, -80), (8, 20, 30)),
    (BONE, (47, 12, -85), (4, 15, 30)), (MARROW, (47, 12, -85), (1.5, 11, 25)), (MUSCLE, (35, 18, -72), (11, 14, 22)),
    (FAT, (27, 8, -76), (5, 10, 20)), (BONE, (50, -34, -50), (13, 17, 18)), (BONE, (36, -20, -44), (22, 9, 9)),
    (AIR, (54, -32, -52), (7, 9, 11)), (BONE, (0, 2, -52), (17, 14, 17)), (MARROW, (0, -1, -52), (11, 9, 14)),
    (FAT, (31, 50, -40), (18, 27, 17)), (MUSCLE, (44, 53, -40), (2.2, 17, 5)), (MUSCLE, (19, 50, -40), (2.2, 17, 5)),
    (MUSCLE, (30, 47, -29), (5, 17, 2.2)), (MUSCLE, (30, 47, -51), (5, 17, 2.2)), (SKIN, (26, 40, -40), (2.6, 20, 2.6)),
    (SKIN, (33, 67, -40), (13.2, 13.2, 13.2)), (FLUID, (33, 67, -40), (12, 12, 12)),
    (SKIN, (33, 76, -40), (4.5, 2, 4.5)),
    (MUCOSA, (0, 56, -62), (15, 36, 30)), (AIR, (4, 58, -62), (1.8, 30, 25)), (AIR, (10, 54, -66), (1.6, 24, 18)),
    (BONE, (0, 42, -38), (14, 26, 12)), (AIR, (8, 45, -38), (5, 20, 9)), (AIR, (0, 20, -44), (13, 11, 9)),
    (MUCOSA, (28, 52, -70), (15, 18, 19)), (AIR, (28, 52, -70), (13, 16, 17)), (MUSCLE, (0, 42, -106), (26, 34, 20)),
    (AIR, (0, 5, -90), (9, 6, 28)), (BONE, (0, -30, -115), (23, 17, 46)), (MARROW, (0, -20, -115), (13, 8, 42)),
    (CSF, (0, -45, -105), (11, 9, 48)), (SKIN, (0, -45, -105), (6, 5, 50)), (FAT, (16, -72, -100), (4, 20, 40)),
    (SKIN, (75, -24, -40), (9, 12, 24)), (AIR, (70, -17, -44), (14, 4, 4)), (AIR, (84, -20, -38), (4, 6, 12)),
)


class Patient:
    """One patient as a scanner's grid samples it; tensors are columns x rows x sub-slices, in RAS order.

    axes: positions (mm) of columns, rows and sub-slices from the middle of the grid; centre: MNI height of that middle.
    `head` is of the whole grid. What concerns the brain alone is asked of `inner`, the same patient in the part of the grid
    (`box`) that holds the brain. All is drawn from `rng` and `generator`, which both share, in the order of the calls, so
    that the same calls give the same patient. `sub` sub-slices are averaged into one slice of a scan; `burden` (mL) and
    `softness` (of the lesions' edges) are ranges; `folds` times the usual are a brain's folds moved. The brain is the MNI152's, or that of
    the T1w scan `head`.
    """

    def __init__(self, axes: tuple[np.ndarray, ...], centre: float, rng: np.random.Generator, generator: torch.Generator,
                 sub: int, burden: tuple[float, float], softness: tuple[float, float], folds: float, head: str):
        self.axes, self.rng, self.generator, self.box = axes, rng, generator, (slice(None),) * 3
        self.sub, self.softness = sub, softness
        self.burden = self.log_uniform(*burden)  # mL
        self.age = self.uniform(0, 1)  # wide ventricles and wide sulci come together

        pitch, roll, yaw = (self.uniform(-a, a) for a in (14, 7, 9))
        size = np.clip(self.rng.normal(0.95, 0.035), 0.86, 1.04) * self.rng.normal(1, 0.02, 3)
        self.pose = rotation(pitch, roll, yaw) / size
        self.shift = np.array([self.uniform(-4, 4), self.uniform(-16, -2), centre + self.uniform(-5, 5)])
        brain, wide, self.whole = template(head)  # whole: that person's head on T1w, None of the MNI152
        pose, shift, *axes = (torch.tensor(v, dtype=torch.float32) for v in (self.pose, self.shift, *self.axes))
        places = (pose @ torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)).view(3, *map(len, axes))
        places += shift[:, None, None, None]
        self.points = places.movedim(0, -1)  # ... x 3, each coordinate in one piece
        self.deform(2.5, 80)
        self.to_brain, self.depth = self.lattice(wide, slice(1, 3))
        self.deform(0.9 * folds, 28)
        self.deform(0.7 * folds, 12)
        outward = self.lattice(wide, slice(3, 6))
        stretch = self.uniform(-1, 2 + 5 * self.age)
        for place, away in zip(places, outward):
            place -= away.mul_(stretch)
        self.to_ventricles, = self.lattice(wide, slice(0, 1))
        self.fine = self.field(7)
        self.inner = self.around(self.to_brain < 6)
        near = self.inner.to_brain < 6
        self.inner.template_grey, self.inner.template_white = torch.zeros(2, *near.shape)
        self.inner.template_grey[near], self.inner.template_white[near] = brain(self.inner.points[near])

    def around(self, mask: torch.Tensor) -> Patient:
        """The same patient in the smallest part of the grid, of whole slices, that holds `mask`."""
        found = [mask.amax([a for a in range(3) if a != axis]).nonzero().flatten()[[0, -1]].tolist() for axis in range(3)]
        (x0, x1), (y0, y1), (z0, z1) = found
        part = copy.copy(self)
        part.box = (slice(x0, x1 + 1), slice(y0, y1 + 1), slice(z0 // self.sub * self.sub, (z1 // self.sub + 1) * self.sub))
        for name in ("points", "to_brain", "to_ventricles", "fine"):
            setattr(part, name, getattr(self, name)[part.box])
        return part

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def log_uniform(self, low: float, high: float) -> float:
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def field(self, *size: float) -> torch.Tensor:
        """Smooth noise of mean 0 and variance about 1 whose bumps are `size` mm wide (one size, or one an axis)."""
        bases = [splines((a - a[0]) / s) for a, s in zip(self.axes, size * (3 // len(size)))]
        knots = 3 * torch.randn([b.shape[1] for b in bases], generator=self.generator)
        return resample(knots, [base[part] for base, part in zip(bases, self.box)])

    def deform(self, amplitude: float, size: float) -> None:
        """Moves `points` by smooth noise of `amplitude` mm, bumps `size` mm wide."""
        for place in self.points.unbind(-1):
            place += self.field(size).mul_(amplitude)

    def lattice(self, maps: Maps, channels: slice) -> list[torch.Tensor]:
        """Smooth `maps` at `points`, read every 3 mm or so and interpolated linearly in between."""
        every = [max(1, round(3 / (a[1] - a[0]))) for a in self.axes]
        picks = [np.append(np.arange(0, len(a) - 1, e), len(a) - 1) for a, e in zip(self.axes, every)]
        bases = [_tent(a, a[pick]) for a, pick in zip(self.axes, picks)]
        return [resample(coarse, bases) for coarse in maps(self.points[np.ix_(*picks)])[channels]]

    def ellipsoid(self, centre, radii, rough: float = 0.15, middle=None) -> tuple[tuple[slice, ...], torch.Tensor]:
        """A box of the grid around an ellipsoid, and in it the squared normalised radius (1 on the surface), roughened.
        Where the centre's place in the scanner (`middle`) is known, the box need not allow for elastic deformation."""
        inverse = np.linalg.inv(self.pose)
        half = abs(inverse) @ np.array(radii) * 1.2 + (8 if middle is None else 2)
        middle = inverse @ (np.array(centre) - self.shift) if middle is None else middle
        axes = [a[part] for a, part in zip(self.axes, self.box)]
        box = tuple(slice(*np.searchsorted(a, (m - h, m + h))) for a, m, h in zip(axes, middle, half))
        centre, radii = (torch.tensor(v, dtype=torch.float32) for v in (centre, radii))
        return box, ((self.points[box] - centre) / radii).square_().sum(-1) + rough * self.fine[box]

    def pair(self, centre, radii, rough: float = 0.15):
        """`ellipsoid` on both sides of the head, or the one on the midline."""
        for side in (1, -1) if centre[0] else (1,):
            yield self.ellipsoid((side * centre[0], *centre[1:]), radii, rough)

    def head(self) -> torch.Tensor:
        """Tissue labels (uint8) of scalp, skull, face and neck; the room of the brain is CSF."""
        x, y, z = self.points.unbind(-1)
        vault = torch.sigmoid((z + 22 + 0.25 * (y + 30)) / 7)  # the base of the skull is thinner
        gap = (self.uniform(0.8, 1.5) + 2 * self.age + 0.3 * self.field(40)) * (0.4 + 0.6 * vault)
        skull = gap + (self.uniform(4.5, 8) + 0.6 * self.field(55)) * (0.25 + 0.75 * vault)
        fat = (self.uniform(3.5, 7) + 0.8 * self.field(50)).clamp_(min=1.5)
        temporalis = self.uniform(5, 11) * torch.exp(-((y - 15) / 32) ** 2 - ((z + 14) / 32) ** 2) * (x.abs() > 25)
        skin = torch.maximum(skull + fat + temporalis - self.to_brain, self.depth + 1.5 * self.field(30))
        bundles, sheaths = self.field(7, 9, 16), self.field(8, 14, 24)
        labels = torch.full_like(x, MUSCLE, dtype=torch.uint8)
        labels[bundles > 0.8] = GLAND
        labels[bundles < -1.3] = BONE
        labels[(skin < fat) | (bundles > 1.6) | (sheaths.abs() < 0.06 * bundles)] = FAT
        labels[skin < self.uniform(1.2, 2.2)] = SKIN
        labels[skin <= 0] = AIR
        for tissue, centre, radii in _FACE:
            centre = np.array(centre) + self.rng.normal(0, 0.8, 3) * np.sign([centre[0], 1, 1])
            radii = np.array(radii) * self.uniform(0.88, 1.12)
            for box, radius in self.pair(centre, radii, 0.3 if tissue in (AIR, MUCOSA, FAT) else 0.12):
                labels[box][(radius < 1) & ((labels[box] > AIR) | (tissue == SKIN))] = tissue
        bone = (self.to_brain < skull) & (skin > 0)
        labels[bone] = BONE
        share = (self.to_brain - gap) / (skull - gap)
        labels[bone & ((share - 0.5).abs() < 0.24 + 0.08 * self.fine) & (z > -30)] = MARROW
        for box, radius in self.pair((9, 79, -10), (9, self.uniform(2, 6), 11), 0.4):  # frontal sinus
            labels[box][(radius < 1) & bone[box]] = AIR
        labels[self.to_brain < gap] = CSF
        return labels

    def brain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fractions of grey and white matter. The rest is CSF, more of it where age has widened the sulci."""
        x, y, z = self.points.unbind(-1)
        grey, white = self.template_grey, self.template_white
        sulci = torch.exp(-(self.field(11) / 0.13).square())  # this brain's own beside those all brains share
        folia = torch.exp(-(self.field(40, 4, 5) / 0.3).square()) * ((z < -20) & (y < -42) & (x.abs() < 48))
        fluid = 1 - grey - white + (self.uniform(0.1, 0.3) * sulci + 0.22 * folia) * grey * (self.to_brain > -14)
        keep = 1 - ((fluid - 0.22 + 0.15 * self.age + 0.04 * self.field(25)) / 0.22).clamp_(0, 1)
        white = ((white / (grey + white + 1e-3) - 0.5) * 1.8 + 0.5).clamp_(0, 1)
        return keep * (1 - white), keep * white

    def lesions(self, white: torch.Tensor, voxel: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Lesion fraction, and depth: up to 1 inside a lesion, below 0 outside, where it says how near white matter was to becoming one. A score
        falls with the distance to the ventricles (bands, caps) and from focal centres; the cut through it leaves the volume drawn for this
        patient in voxels of `voxel` mm3."""
        height = self.points[..., 2]
        score = 1 - self.to_ventricles.clamp(min=0) / self.uniform(3, 6)
        score += 0.5 * self.field(18) + 0.25 * self.field(5) + 0.1 * self.fine
        score -= self.uniform(0.3, 1.2) * (self.points[..., 0].abs() < 6)
        for centre in ((18, 36, 10), (27, -58, 16)):  # caps of the frontal and occipital horns
            for box, radius in self.pair(centre, (9, 12, 14)):
                score[box] += self.uniform(0.2, 0.9) * torch.exp(-radius)
        grain = 0.5 * self.fine + 0.4 * self.field(3.5)
        places = ((white > 0.8) & (height > -15)).nonzero()[::7]
        likely = torch.exp(-self.to_ventricles[tuple(places.T)] / 16)
        for index in places[torch.multinomial(likely, int(self.uniform(25, 160)), generator=self.generator)].tolist():
            radii = self.log_uniform(1.5, 7) * self.rng.uniform(0.7, 1.4, 3)
            middle = [a[part][i] for a, part, i in zip(self.axes, self.box, index)]
            box, radius = self.ellipsoid(self.points[tuple(index)].tolist(), radii, 0, middle)
            score[box] = torch.maximum(score[box], self.uniform(0.6, 2.4) - radius - grain[box])

        gate = ((white - 0.6) * 4).clamp_(0, 1) * (height > -18 + 3 * self.fine)
        soft = self.uniform(*self.softness)

        def fraction(score, gate):  # small lesions too reach their full contrast
            return (1.3 * torch.sigmoid(score / soft) * gate).clamp_(max=1)

        slices = sum(gate[..., k :: self.sub] for k in range(self.sub)) > 0.2
        some_score, some_gate = (torch.stack([v[..., k :: self.sub][slices] for k in range(self.sub)], -1) for v in (score, gate))
        wanted = 1000 * self.burden / voxel
        low, high = -8.0, 8.0
        for _ in range(16):
            middle = (low + high) / 2
            drawn = (fraction(some_score - middle, some_gate).mean(-1) >= 0.5).sum()
            low, high = (middle, high) if drawn > wanted else (low, middle)
        score -= high
        return fraction(score, gate), score.clamp_(max=1)

    def other_pathology(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In a fifth of the cases a cortical infarct or a lacune: fluid core and whole extent, as fractions."""
        core, extent = torch.zeros_like(self.fine), torch.zeros_like(self.fine)
        if self.uniform(0, 1) < 0.2:
            cortical = self.uniform(0, 1) < 0.6
            low, high, where = (4, 9, -self.to_brain) if cortical else (5, 14, self.to_ventricles)
            places = self.points[(where > low) & (where < high) & (self.points[..., 2] > 0)]
            radii = self.uniform(*((9, 20) if cortical else (3, 6))) * self.rng.uniform(0.8, 1.3, 3)
            box, radius = self.ellipsoid(places[self.rng.integers(len(places))].tolist(), radii, 0.3)
            core[box], extent[box] = torch.sigmoid((0.35 - radius) / 0.08), torch.sigmoid((1 - radius) / 0.1)
        return core, extent

    def grey_shades(self) -> torch.Tensor:
        """Relative brightness of grey matter on FLAIR: insula, hippocampus and cingulum bright, pallidum dark."""
        shade = 1 + 0.03 * self.field(20)
        for centre, radii, gain in (((38, 4, -2), (9, 24, 14), 0.12), ((26, -14, -22), (11, 20, 10), 0.15),
                                    ((5, 10, 30), (5, 40, 18), 0.1), ((20, -4, 0), (6, 9, 7), -0.15)):
            gain *= self.uniform(0.2, 1.3)
            for box, radius in self.pair(centre, radii):
                shade[box] += gain * torch.exp(-radius.square())
        return shade

    def white_shades(self) -> torch.Tensor:
        """The same of white matter: a thin line along the ventricles and the corticospinal tract are bright."""
        shade = 1 + 0.03 * self.field(20) + 0.02 * self.fine
        shade += self.uniform(0, 0.25) * torch.exp(-(self.to_ventricles / 1.5).square())
        for box, radius in self.pair((24, -20, 12), (5, 7, 26)):
            shade[box] += self.uniform(0, 0.12) * torch.exp(-radius.square())
        return shade

    def fluid_shades(self) -> torch.Tensor:
        """What makes CSF bright on FLAIR: flow in cisterns and ventricles, and the choroid plexus."""
        basal = torch.sigmoid(-(self.points[..., 2] + 15) / 8) * (self.to_brain < -1)
        shade = (self.field(9) - 0.4).clamp_(min=0) * self.uniform(0, 0.5) * basal
        shade += (self.field(12) - 1.2).clamp_(min=0) * self.uniform(0, 0.4) * (self.to_ventricles < 0)
        plexus = self.uniform(0.3, 1.1)
        for box, radius in self.pair((22, -40, 10), (4, 8, 5), 0.4):
            shade[box] = torch.maximum(shade[box], plexus * (radius < 1))
        return shade


def rotation(*degrees: float) -> np.ndarray:
    """3 x 3 rotation about x, then y, then z."""
    matrix = np.eye(3)
    for (a, b), angle in zip(((1, 2), (2, 0), (0, 1)), np.radians(degrees)):
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[b, a] = np.sin(angle)
        step[a, b] = -step[b, a]
        matrix = step @ matrix
    return matrix


def _tent(positions: np.ndarray, knots: np.ndarray) -> torch.Tensor:
    """Linear interpolation as a matrix, positions x knots."""
    columns = [np.interp(positions, knots, row) for row in np.eye(len(knots))]
    return torch.from_numpy(np.stack(columns, 1).astype(np.float32))
