"""Named camera moves: direction, size, smoothness, and the message for a misspelt name."""

import math

import pytest
import torch

from geometry import inv_se3
from lib.camera_paths import TRAVEL, TURN_AXIS, ZOOM, camera_move, load_camera
from lib.metrics import rotation_angle

NAMES = [*TRAVEL, *TURN_AXIS, *ZOOM, "spiral"]


@pytest.mark.parametrize("name", NAMES)
def test_every_move_starts_at_the_identity_with_the_given_focal_length_and_rotates_rigidly(name):
    w2c, focal = camera_move(name, 9)
    torch.testing.assert_close(w2c[0], torch.eye(3, 4), rtol=0, atol=0)  # -0. is 0.
    assert focal[0] == 1
    R = w2c[..., :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(9, 3, 3))
    assert torch.equal(camera_move(name, 1)[0][0], torch.eye(3, 4))


@pytest.mark.parametrize(
    "name, direction",
    [
        ("forward", (0, 0, 1)),
        ("backward", (0, 0, -1)),
        ("right", (1, 0, 0)),
        ("left", (-1, 0, 0)),
        ("up", (0, -1, 0)),
        ("down", (0, 1, 0)),
    ],
)
def test_travel_ends_three_tenths_of_a_scene_unit_away_with_y_down(name, direction):
    centre = inv_se3(camera_move(name, 9)[0])[-1, :, 3]
    torch.testing.assert_close(centre, 0.3 * torch.tensor(direction, dtype=torch.float32))
    torch.testing.assert_close(inv_se3(camera_move(name, 9, amount=-2.0)[0])[-1, :, 3], -2 * centre)


@pytest.mark.parametrize(
    "name, forward",
    [
        ("pan_right", (0.5, 0, 1)),
        ("pan_left", (-0.5, 0, 1)),
        ("tilt_up", (0, -0.5, 1)),
        ("tilt_down", (0, 0.5, 1)),
    ],
)
def test_turns_end_half_a_view_to_the_named_side_without_moving(name, forward):
    c2w = inv_se3(camera_move(name, 9)[0])
    want = torch.tensor(forward) * torch.tensor([1, 1, math.cos(math.radians(30))])
    torch.testing.assert_close(c2w[-1, :, 2], want)
    assert not c2w[..., 3].any()


def test_orbit_moves_right_at_constant_distance_and_keeps_the_pivot_on_the_axis():
    w2c, _ = camera_move("orbit", 17)
    pivot = torch.tensor([0, 0, 1.0])
    seen = w2c[..., :3] @ pivot + w2c[..., 3]
    torch.testing.assert_close(seen, pivot.expand(17, 3))
    assert inv_se3(w2c)[-1, 0, 3] > 0


def test_easing_by_hand():
    """s^2 (3 - 2s) at a quarter, half, three quarters."""
    gone = torch.tensor([0, 0.15625, 0.5, 0.84375, 1])
    w2c, _ = camera_move("forward", 5)
    torch.testing.assert_close(inv_se3(w2c)[:, 2, 3], 0.3 * gone)
    w2c, _ = camera_move("pan_left", 5)
    turned = rotation_angle(w2c[:, :, :3], torch.eye(3).expand(5, 3, 3))
    torch.testing.assert_close(turned, 30 * gone)


@pytest.mark.parametrize("name", NAMES)
def test_amount_scales_every_move_and_a_negative_one_reverts_it(name):
    """Half the turn, the way or the logarithm of the zoom; for the orbit the angle, for the spiral
    the radius."""

    def size(amount):
        w2c, focal = camera_move(name, 9, amount=amount)
        R = w2c[-1, :, :3] if name != "spiral" else torch.eye(3)
        turn = math.radians(rotation_angle(R, torch.eye(3)))
        way = inv_se3(w2c)[..., 3].norm(dim=-1).max() if name in TRAVEL or name == "spiral" else 0.0
        return turn, float(way), math.log(focal[-1])

    assert [2 * x for x in size(0.5)] == pytest.approx(size(1), abs=1e-5)
    assert [abs(x) for x in size(-1)] == pytest.approx([abs(x) for x in size(1)], abs=1e-5)
    if name != "static":
        assert (
            not torch.allclose(camera_move(name, 9, -1.0)[0], camera_move(name, 9)[0])
            or name in ZOOM
        )
        there, back = (camera_move(name, 9, a)[1] for a in (1.0, -1.0))
        torch.testing.assert_close(there * back, torch.ones(9))


def test_spiral_returns_to_its_axis_and_looks_at_one_point():
    w2c, focal = camera_move("spiral", 33)
    centre, pivot = inv_se3(w2c)[..., 3], torch.tensor([0, 0, 1.0])
    seen = torch.nn.functional.normalize(w2c[..., :3] @ pivot + w2c[..., 3], dim=-1)
    torch.testing.assert_close(seen, torch.tensor([0, 0, 1.0]).expand(33, 3), atol=1e-6, rtol=0)
    # two windings
    torch.testing.assert_close(centre[[0, 16, 32]], torch.zeros(3, 3), atol=1e-6, rtol=0)
    assert (
        (focal == 1).all() and centre[:, 0].abs().max() > 0.05 and centre[:, 2].abs().max() < 1e-6
    )


def test_zoom_changes_the_focal_length_only():
    for name, factor in (("zoom_in", 1.5), ("zoom_out", 1 / 1.5)):
        w2c, focal = camera_move(name, 9)
        assert torch.equal(w2c, camera_move("static", 9)[0])
        torch.testing.assert_close(focal[-1].item(), factor)


def test_key_frames_may_be_longer_than_the_name_of_a_file():
    """Seen: File name too long, for 16 of them in whole numbers."""
    text = " | ".join(f"0,0,{i} -> 0,0,{i + 1}" for i in range(25))
    w2c, _ = load_camera(text, 25, (48, 64))
    torch.testing.assert_close(inv_se3(w2c)[0, :, 2, 3], torch.arange(25.0))


def test_unknown_move_is_named_with_the_nearest_known_ones():
    with pytest.raises(ValueError, match="'pan_rigth'.*nearest: pan_right"):
        camera_move("pan_rigth", 5)
