"""The pictures: what they show, where, and that equal data is equal bytes."""

import numpy as np
import pytest
from matplotlib.image import imread

from aldm import pictures
from aldm.errors import UserError

SHAPE = (12, 16, 10)
SPACING_MM = (2.0, 2.0, 3.0)


def panel(path, **changes):
    rng = np.random.default_rng(0)
    arguments = {
        "source": rng.random(SHAPE),
        "prediction": rng.random(SHAPE),
        "target": rng.random(SHAPE),
        "uncertainty": rng.random(SHAPE) * 0.1,
        "source_name": "t1",
        "target_name": "t2",
        "spacing_mm": SPACING_MM,
        "title": "subject-1",
    }
    pictures.save_translation_panel(path, **(arguments | changes))
    return imread(path)


def test_panel_is_a_wide_png_and_the_same_bytes_twice(tmp_path):
    image = panel(tmp_path / "a.png")
    panel(tmp_path / "b.png")
    assert image.shape[1] > image.shape[0] > 100
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_panel_without_truth_and_uncertainty_is_narrower(tmp_path):
    full = panel(tmp_path / "a.png")
    bare = panel(tmp_path / "b.png", target=None, uncertainty=None)
    assert bare.shape[1] < full.shape[1] / 2


def test_panel_of_a_constant_source_is_drawn(tmp_path):
    assert panel(tmp_path / "a.png", source=np.zeros(SHAPE)).size > 0


def test_panel_refuses_volumes_of_different_shapes(tmp_path):
    with pytest.raises(UserError, match="90% within"):
        panel(tmp_path / "a.png", uncertainty=np.zeros((3, 3, 3)))
    assert list(tmp_path.iterdir()) == []


def test_planes_go_through_the_middle_of_the_foreground():
    volume = np.zeros((20, 20, 20))
    volume[2:7, 10:13, 15:20] = 1
    volume[0, 0, 0] = 0.05  # noise in the background does not count
    assert pictures.planes_through(volume) == (4, 11, 17)
    assert pictures.planes_through(np.zeros((4, 6, 8))) == (1, 2, 3)


def test_axial_plane_has_right_at_the_right_and_front_up():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2), dpi=50)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    volume = np.zeros((10, 10, 10))
    volume[8, 9, 5] = 1  # right and front
    pictures._draw_plane(axes, volume, 2, 5, (1.0, 1.0, 1.0), "gray", 1.0)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., 0]
    rows, columns = np.nonzero(pixels[5:-5, 5:-5] > 200)
    assert rows.mean() < 15
    assert columns.mean() > 65


def test_card_draws_every_method_and_refuses_nothing_to_draw(tmp_path):
    points = [pictures.CardPoint("aldm", "ddim", steps, steps * 0.1, 20.0 + steps) for steps in (1, 4, 10)]
    pictures.save_quality_card(tmp_path / "one.png", points)
    pictures.save_quality_card(tmp_path / "two.png", [*points, pictures.CardPoint("unet", "", 0, 0.05, 19.0)])
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    with pytest.raises(UserError, match="no point"):
        pictures.save_quality_card(tmp_path / "none.png", [])


def test_a_gallery_breaks_its_row_and_shows_errors(tmp_path):
    truth = np.random.default_rng(0).random(SHAPE)
    one_row = {f"method {number}": truth for number in range(6)}
    pictures.save_gallery(tmp_path / "one.png", truth, one_row)
    pictures.save_gallery(tmp_path / "two.png", truth, one_row | {"another": truth})
    pictures.save_gallery(tmp_path / "wrong.png", truth, one_row | {"method 5": 1 - truth})
    one, two, wrong = (imread(tmp_path / f"{name}.png") for name in ("one", "two", "wrong"))
    assert two.shape[1] == one.shape[1]
    assert two.shape[0] > 1.7 * one.shape[0]
    assert one[..., :3].sum() < wrong[..., :3].sum()  # an error of 0 is black
    with pytest.raises(UserError, match="method 5 has shape"):
        pictures.save_gallery(tmp_path / "no.png", truth, one_row | {"method 5": truth[1:]})
    assert not (tmp_path / "no.png").exists()


def test_drawing_leaves_matplotlib_s_global_state_alone(tmp_path):
    import matplotlib.pyplot as plt

    panel(tmp_path / "a.png")
    assert plt.get_fignums() == []
