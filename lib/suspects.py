"""Views that disagree (lib/views.py): which usual mistake, undone, makes them agree?

Each mistake is undone in turn.  It is named only if that cures: the views then agree as a
recording's do, and clearly better than before."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from geometry import inv_se3, mat_to_quat, pixel_rays, quat_to_mat, scaled, valid_depth
from lib.views import NOISE, agreement, disagreement, error_ratio, per_pair, shifted, typical

# What to do about each mistake.
HINTS = {
    "c2w stored as w2c": "invert every matrix: w2c = [R^T | -R^T t]",
    "OpenGL camera axes": "negate rows 2 and 3 of every w2c (y up, z backward -> down, forward)",
    "c2w in OpenGL axes": "invert every matrix, negate its rows 2 and 3 (of nerfstudio, Blender)",
    "rotation transposed": "transpose the 3x3 part of every matrix, keep its last column",
    "3x4 matrix transposed": "the 12 numbers are column-major: reshape to (4, 3) and transpose",
    "pixel intrinsics": "divide fx, cx by the width and fy, cy by the height of the image",
    "depth in millimetres": "divide by 1000, or say depth_scale 0.001 in metadata.json",
    "ray length instead of z-depth": "divide depth by the length of ((u-cx)/fx, (v-cy)/fy, 1)",
    "inverse depth": "store 1 / d, or give the sample inverse_depth true in metadata.json",
    "poses one frame late": "frame t has the camera of t-1: drop the first camera, the last frame",
    "poses one frame early": "frame t has the camera of t+1: drop the first frame, the last camera",
    "poses several frames late": "drop as many cameras at the start, frames at the end as given",
    "poses several frames early": "drop as many frames at the start, cameras at the end as given",
    "poses in reverse": "the cameras run from the last frame to the first: reverse their order",
    "cameras in string order": "the cameras were sorted as text (1, 10, 11, 2): sort by number",
    "frames in string order": "pictures and depth were sorted as text (1, 10, 2): sort by number",
    "translation scale off": "multiply every translation (last column) by the factor given",
    "relative depth": "not metric: trains with depth_mode ssi only, or say its depth_scale",
    "camera axes permuted": "reorder and negate the rows of every w2c as given",
    "c2w in permuted axes": "invert every matrix, then reorder and negate its rows as given",
    "left-handed axes": "mirrored (Unity, Unreal): negate row 2 and then column 2 of every w2c",
    "quaternion order": "the quaternion's w, first in the file, was read as last, or the reverse",
    "depth flipped": "the cameras and pictures fit depth that is flipped as given: flip every map",
    "focal length off": "multiply fx and fy by the factor given (of which size are they pixels?)",
    "affine depth": "depth is a z + b: subtract the b given from it, then check its scale",
    "relative inverse depth": "of a / z + b, subtract the b given, store 1 / d, check its scale",
    "depth scaled frame by frame": "each frame has its own scale, as an estimator's: align them",
    "largest depth is no depth": "give the sample the depth_invalid named, or depth_max",
}

# Name and detail of poses that come late or early -> frames that undoing it moves the cameras by.
SHIFTS = {("poses one frame late", ""): 1, ("poses one frame early", ""): -1}
SHIFTS |= {("poses several frames late", f"by {n}"): n for n in (2, 3)}
SHIFTS |= {("poses several frames early", f"by {n}"): -n for n in (2, 3)}
FLIPS = {"top to bottom": (-2,), "left to right": (-1,), "by half a turn": (-2, -1)}
BETTER = 0.65  # a suspect must cut the typical disagreement of a pair to this share
CURED = 0.03, 0.6  # and leave views that agree: typical disagreement, share within 2 %
EXPLAINED = 0.02  # share of the disagreement: what leaves no more explains it all
FLIP = torch.tensor([[1.0, -1, -1]], dtype=torch.float64).T
MIRROR = torch.tensor([1.0, -1, 1], dtype=torch.float64)


def permutations():
    """(Q (3, 3), words) of the 24 ways to name a camera's axes."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            Q = torch.tensor(signs)[:, None] * torch.eye(3, dtype=torch.float64)[list(order)]
            if torch.linalg.det(Q) > 0:
                names = ["+-"[sign < 0] + str(c + 1) for c, sign in zip(order, signs)]
                yield Q, f"rows {' '.join(names)}".replace("+", "")


def cameras_undone(w2c):
    """(name, detail, cameras) for each mistake in cameras alone; commoner ones first."""
    R, t, c2w = w2c[..., :3], w2c[..., 3:], inv_se3(w2c)
    yield "c2w stored as w2c", "", c2w
    yield "OpenGL camera axes", "", FLIP * w2c
    yield "c2w in OpenGL axes", "", FLIP * c2w
    yield "rotation transposed", "", torch.cat([R.mT, t], -1)
    yield from ((*words, shifted(w2c, n)) for words, n in SHIFTS.items())
    yield "poses in reverse", "", w2c.flip(0)
    for first in (0, 1):  # places of 0, 1, ... (or 1, 2, ...), their numbers sorted as text
        order = torch.tensor(sorted(range(len(w2c)), key=lambda n, first=first: str(n + first)))
        yield "cameras in string order", "", w2c[order.argsort()]
        yield "frames in string order", "", w2c[order]
    yield "left-handed axes", "", torch.cat([MIRROR[:, None] * R * MIRROR, MIRROR[:, None] * t], -1)
    for Q, words in permutations():  # also those above, which come first in a tie
        yield "camera axes permuted", words, Q @ w2c
        yield "c2w in permuted axes", words, Q @ c2w
    for turn in (1, -1):
        yield "quaternion order", "", rolled(w2c, turn)
        yield "quaternion order", "", inv_se3(rolled(c2w, turn))


def rolled(matrices, turn):
    """The matrices if the four numbers of their quaternions had been rolled."""
    R = quat_to_mat(mat_to_quat(matrices[..., :3]).roll(turn, -1))
    return torch.cat([R, matrices[..., 3:]], -1)


NEAR = 3.4, (25, 7), 200  # best_scale in a narrower range, quicker


def search(costs, centre, width, counts):
    """The x with the least of costs(x (n,)): a scan around centre +- width, then finer ones."""
    for count in counts:
        xs = torch.linspace(centre - width, centre + width, count, dtype=torch.float64)
        values, xs = costs(xs), xs.tolist()
        centre, width = xs[int(np.argmin(values))], 1.5 * 2 * width / count
    return centre, min(values)


def cost(g, w2c, focal=None):
    """Mean logarithm of the pairs' errors, as numbers; pairs that say nothing count as 1."""
    errors = per_pair(disagreement(g, w2c, focal))
    return (errors.nan_to_num(1.0) + NOISE[1]).log().mean(-1).tolist()


def best_scale(views, width=8.0, counts=(161, 13, 13, 13), count=400):
    """Factor on translations by which views agree best, exp(-width) to exp(width); its cost."""
    g, w2c = views.gather(count), views.w2c
    scale = lambda x: scaled(w2c, x.exp()[:, None, None, None])  # noqa: E731
    x, value = search(lambda x: cost(g, scale(x)), 0.0, width, counts)
    return math.exp(x), value


def best_focal(views):
    """Factor on fx and fy that makes the views agree best, 1/4 to 4."""
    g, widest = views.gather(400), math.log(4)
    return math.exp(search(lambda x: cost(g, views.w2c, x.exp()), 0.0, widest, (29, 9, 9))[0])


def less(views, b, inverse):
    """Depth d - b, or 1 / (d - b) of median 1: what a z + b and a / z + b are up to a."""
    d = views.depth - b
    d = torch.where(valid_depth(views.depth) & (d > 1e-6), d, 0)
    d = d / d[d > 0].median() if inverse and d.any() else d
    return replace(views, depth=torch.where(d > 0, 1 / d.clamp(min=1e-9), 0) if inverse else d)


def dilution(d, b):
    """How much larger d - b is than the typical depth d: far depth agrees better, even wrong."""
    return max(1.0, (d - b) / d)


def best_shift(views, inverse):
    """b of `less`, the translations' scale that goes with it, and the dilution."""
    d = views.depth[valid_depth(views.depth)]
    low, high, middle = (d.quantile(q).item() for q in (0.02, 0.98, 0.5))
    # The nearest pixel may be anywhere between the camera and far from it.
    first, last = low - 2 * (high - low), 0.95 * low

    def costs(shifts):
        near = (best_scale(less(views, b, inverse), *NEAR)[1] for b in shifts.tolist())
        return [n + math.log(dilution(middle, b)) for n, b in zip(near, shifts.tolist())]

    b, _ = search(costs, (first + last) / 2, (last - first) / 2, (17, 9, 9, 7))
    return b, best_scale(less(views, b, inverse), *NEAR)[0], dilution(middle, b)


@dataclass(frozen=True)
class Suspicion:
    """A mistake that was undone, and how the pairs agree then."""

    name: str
    detail: str
    errors: torch.Tensor  # (P,)
    agree: float
    free: bool = False  # fitted: has to be clearly better than what is not


def judged(name, detail, w2c, g, free=False):
    error = disagreement(g, w2c)
    errors = per_pair(error)
    return Suspicion(name, detail, errors, agreement(error, errors), free)


def undo(views):
    """Suspicions of the mistakes that leave nothing to fit, but for a scale."""
    g = views.gather()
    for words, sides in FLIPS.items():  # to depth alone, mirrored cameras do the same
        flipped = replace(views, depth=views.depth.flip(sides))
        yield judged("depth flipped", words, views.w2c, flipped.gather())
    yield from (judged(*rest, g) for rest in cameras_undone(views.w2c))
    ray = pixel_rays(views.K, views.depth.shape[-2:]).norm(dim=-1)
    z_depth = replace(views, depth=views.depth / ray)
    yield judged("ray length instead of z-depth", "", views.w2c, z_depth.gather())
    inverse = torch.where(valid_depth(views.depth), 1 / views.depth.clamp(min=1e-9), 0)
    yield judged("inverse depth", "", views.w2c, replace(views, depth=inverse).gather())
    coarse = views.coarse()
    k, value = best_scale(coarse)
    still = cost(coarse.gather(400), scaled(coarse.w2c, 0))
    if abs(math.log(k)) > 0.05 and value < still + math.log(0.8):  # better than no motion at all
        name = "depth in millimetres" if 800 < k < 1250 else "translation scale off"
        yield judged(name, f"factor {k:.4g}", scaled(views.w2c, k), g)


def undo_fitted(views):
    """Suspicions of those that are fitted, and so explain some of everything."""
    coarse = views.coarse()
    k = best_focal(coarse)
    if abs(math.log(k)) > 0.05:
        K = views.K.clone()
        K[:, [0, 1], [0, 1]] *= k
        g = replace(views, K=K).gather()
        yield judged("focal length off", f"factor {k:.3g}", views.w2c, g)
    factor = views.frame_scales()
    if factor.log().std() > 0.02:
        fixed = replace(views, depth=views.depth * factor[:, None, None])
        # Their mean is the translations' matter.
        k, _ = best_scale(fixed.coarse(), 0.5, (25, 9, 9), 200)
        spread = f"factors {factor.min():.3g} to {factor.max():.3g}"
        name = "depth scaled frame by frame"
        yield judged(name, spread, scaled(views.w2c, k), fixed.gather(), True)
    for name, inverse in (("affine depth", False), ("relative inverse depth", True)):
        b, k, diluted = best_shift(coarse, inverse)
        g = less(views, b, inverse).gather()
        one = judged(name, f"b {b:.4g}", scaled(views.w2c, k), g, True)
        yield replace(one, errors=one.errors * diluted)


def find_suspect(views, fits=lambda views: False):
    """The mistake whose undoing makes the views agree: name or None, ratio of errors, detail.
    fits: whether pictures agree with views."""
    inner = replace(views, pairs=views.pairs[:-2] or views.pairs)
    before = per_pair(disagreement(inner.gather(), inner.w2c))
    was, suspicions = typical(inner.pairs, before), list(undo(inner))
    found = cures(inner, before, suspicions, fits)
    if was > 0.002 and inner.coarse().depth.any() and not (found and min(found)[0] < EXPLAINED):
        suspicions += undo_fitted(inner)
        found = cures(inner, before, suspicions, fits)
    if not found:
        return None, 1.0, ""
    # A tie goes to the commoner mistake: without travel, swapped and transposed are the same.
    near = (f for f in found if f[0] < 1.1 * min(found)[0])
    _, _, name, detail, ratio, left = min(near, key=lambda f: f[1])
    if name == "translation scale off" and affine_as_well(inner, left):
        detail += AFFINE_AS_WELL
    return name, ratio, detail


# Of a wall seen from the front, b and a scale of the translations do the same to the views.
AFFINE_AS_WELL = "; affine depth (a z + b) would do it as well: these views cannot tell"


def affine_as_well(views, left):
    """Whether depth that is 0.3 of its median off explains about as much as the scale which leaves
    this error.  Where views can tell, it leaves four times as much and more."""
    middle = views.depth[valid_depth(views.depth)].median().item()
    for b in (-0.3 * middle, 0.3 * middle):
        other = less(views, b, False)
        k, _ = best_scale(other.coarse(), *NEAR)
        errors = per_pair(disagreement(other.gather(), scaled(other.w2c, k)))
        if typical(views.pairs, errors) * dilution(middle, b) < 2 * max(left, 1e-4):
            return True
    return False


def valley(ratios, n):
    """Whether the errors over shifts of the cameras rise on both sides of n: small ones count."""
    sides = [ratios.get(n - 1), ratios.get(n + 1)]
    return n != 0 and None not in sides and min(sides) > 1.15 * ratios[n]


def cures(views, before, suspicions, fits):
    """(ratio, rank, name, detail, true ratio, errors left) of those that cure."""
    was, found = typical(views.pairs, before), []
    left = [typical(views.pairs, s.errors) for s in suspicions]
    noise = min(max(min([was, *left]), NOISE[0]), NOISE[1])
    ratios = [error_ratio(s.errors, before, noise) for s in suspicions]
    shifts = [SHIFTS.get((s.name, s.detail), 0) for s in suspicions]
    seen = lambda words: fits(replace(views, depth=views.depth.flip(FLIPS[words])))  # noqa: E731
    by_shift = {**dict(zip(shifts, ratios)), 0: 1.0}
    for rank, (s, now, ratio, shift) in enumerate(zip(suspicions, left, ratios, shifts)):
        cured = now < CURED[0] and s.agree > CURED[1]
        plain = ratio < 0.2 or was - now > 0.002 or valley(by_shift, shift)
        if cured and ratio < BETTER and plain and (s.name != "depth flipped" or seen(s.detail)):
            penalty = 1.5 if s.free else 1.0
            found.append((ratio * penalty, rank, s.name, s.detail, ratio, now))
    return found
