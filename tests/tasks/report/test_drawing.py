"""Charts: one description, drawn as SVG and PNG, whole with one model and with many, and with any label."""

import struct
import xml.etree.ElementTree as ET

import pytest

from eclectus.tasks.report.chart import Chart, Series
from eclectus.tasks.report.drawing import HOVER_POINTS, draw_png, draw_svg

HOSTILE = "<b>$x_2$</b> & \x07日本語 a name that does not fit beside any plot"
COLOUR = "#e08a2e"


def series(kind, number, name):
    points = range(3)
    return Series(
        name, COLOUR, x=(1.0, 2.0, 3.0) if kind != "map" else tuple(points),
        y=(number,) * 3 if kind == "map" else tuple(points), labels=tuple(f"{name}: {each}" for each in points),
        intervals=((0.5, 1.5),) * 3 if kind == "dots" else (), shares=(0.1, 0.3, 0.6) if kind == "map" else (),
    )  # fmt: skip


def chart(kind, models):
    names = [HOSTILE, *(f"a model with a long name {number}" for number in range(1, models))]
    found = tuple(series(kind, number, name) for number, name in enumerate(names))
    rows = {"lines": (), "map": tuple(names)}.get(kind, ("English", HOSTILE, "漢" * 40))
    return Chart("c", HOSTILE, kind, found, "training step", "nats", rows=rows)


def size(png):
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("models", [1, 12])
@pytest.mark.parametrize("kind", ["lines", "bars", "dots", "map"])
def test_a_chart_of_any_kind_is_whole_with_one_model_and_with_twelve(kind, models, recwarn):
    described = chart(kind, models)
    svg = ET.fromstring(draw_svg(described))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    titles = [each.text for each in svg.iter("title")]
    assert len(titles) == 3 * models and titles[0].startswith("<b>$x_2$</b> &  日本語")
    for shape in svg.find("g[@class='values']"):
        x, y = (float(shape.get(key) or shape.get(f"c{key}")) for key in "xy")
        assert 0 <= x <= width and 0 <= y <= height
    assert not [each for each in svg.iter() if each.tag in ("script", "style", "metadata")]
    wide, high = size(draw_png([described, described, described], columns=2))
    assert wide == 4 * width and high > 4 * height
    assert not recwarn.list


def test_a_long_curve_is_drawn_whole_and_shows_evenly_spread_values():
    steps = range(5000)
    long = Series("m", COLOUR, tuple(steps), tuple(map(float, steps)), tuple(map(str, steps)))
    titles = [each.text for each in ET.fromstring(draw_svg(Chart("c", "t", "lines", (long,)))).iter("title")]
    assert len(titles) == HOVER_POINTS and (titles[0], titles[-1]) == ("0", "4999")


def test_the_same_chart_drawn_twice_is_the_same():
    assert draw_svg(chart("lines", 2)) == draw_svg(chart("lines", 2))
    assert draw_png([chart("map", 2)]) == draw_png([chart("map", 2)])
