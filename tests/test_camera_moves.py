"""Named camera moves: direction, size, smoothness, and the message for a misspelt name."""
import math

import pytest
import torch

from geometry import TRAVEL, TURN_AXIS, ZOOM, camera_move, inv_se3

NAMES = [*TRAVEL, *TURN_AXIS, *ZOOM]


@pytest.mark.parametrize("name", NAMES)
def test_every_move_starts_at_the_identity_with_the_given_focal_length_and_rotates_rigidly(name):
    w2c, focal = camera_move(name, 9)
    assert torch.equal(w2c[0], torch.eye(3, 4)) and focal[0] == 1
    R = w2c[..., :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(9, 3, 3))
    assert torch.equal(camera_move(name, 1)[0][0], torch.eye(3, 4))


@pytest.mark.parametrize("name, direction", [("forward", (0, 0, 1)), ("backward", (0, 0, -1)),
                                             ("right", (1, 0, 0)), ("left", (-1, 0, 0)),
                                             ("up", (0, -1, 0)), ("down", (0, 1, 0))])
def test_travel_ends_three_tenths_of_a_scene_unit_away_with_y_down(name, direction):
    centre = inv_se3(camera_move(name, 9)[0])[-1, :, 3]
    torch.testing.assert_close(centre, 0.3 * torch.tensor(direction, dtype=torch.float32))
    torch.testing.assert_close(inv_se3(camera_move(name, 9, amount=-2.0)[0])[-1, :, 3], -2 * centre)


@pytest.mark.parametrize("name, forward", [("pan_right", (.5, 0, 1)), ("pan_left", (-.5, 0, 1)),
                                           ("tilt_up", (0, -.5, 1)), ("tilt_down", (0, .5, 1))])
def test_turns_end_half_a_view_to_the_named_side_without_moving(name, forward):
    c2w = inv_se3(camera_move(name, 9, fov_deg=60.0)[0])
    want = torch.tensor(forward) * torch.tensor([1, 1, math.cos(math.radians(30))])
    torch.testing.assert_close(c2w[-1, :, 2], want)
    assert not c2w[..., 3].any()


def test_orbit_moves_right_at_constant_distance_and_keeps_the_pivot_on_the_axis():
    w2c, _ = camera_move("orbit", 17, pivot_depth=1.5)
    pivot = torch.tensor([0, 0, 1.5])
    seen = w2c[..., :3] @ pivot + w2c[..., 3]
    torch.testing.assert_close(seen, pivot.expand(17, 3))
    assert inv_se3(w2c)[-1, 0, 3] > 0


def test_moves_start_and_stop_at_rest():
    z = inv_se3(camera_move("forward", 33)[0])[:, 2, 3]
    speed = z.diff()
    assert (speed > 0).all() and speed[0] < 0.2 * speed[16] and speed[-1] < 0.2 * speed[16]


def test_zoom_changes_the_focal_length_only():
    for name, factor in (("zoom_in", 1.5), ("zoom_out", 1 / 1.5)):
        w2c, focal = camera_move(name, 9)
        assert torch.equal(w2c, camera_move("static", 9)[0])
        torch.testing.assert_close(focal[-1].item(), factor)


def test_unknown_move_is_named_with_the_nearest_known_ones():
    with pytest.raises(ValueError, match="'pan_rigth'.*nearest: pan_right"):
        camera_move("pan_rigth", 5)
