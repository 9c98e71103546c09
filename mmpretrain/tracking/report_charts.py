"""Line charts as HTML that stays sharp and legible at any width, in light and dark.

Enter: series of points by step. Leave: a <figure> whose lines stretch (SVG without aspect ratio, strokes of fixed
width) under labels that do not (HTML placed in percent). Points that are not finite are left out.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from mmpretrain.tracking.figures import significant

BUCKETS = 400
"""Points drawn of one series; more rows are averaged, with their range behind the line."""
SMOOTHING_PART = 40
"""The bold line of a noisy series is a mean over 1/40 of its points."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line and its name in the legend."""

    name: str
    points: Sequence[Point]
    look: str = "noisy"
    """noisy: its mean over its range; dots: a line through marked points; dashed: a reference."""


@dataclass(frozen=True)
class Chart:
    """Some series over the same steps."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    limits: tuple[float, float] | None = None
    """Ends of the y axis; None: from the data."""
    logarithmic: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Timeline:
    """What every chart of a run shares: its steps, where attempts resumed, which steps were skipped."""

    first: int
    last: int
    resumed: Sequence[int] = ()
    skipped: Sequence[int] = ()

    def x(self, step: float) -> float:
        """Place of a step in per mille of the width."""
        return 1000.0 * (step - self.first) / max(1, self.last - self.first)


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points of a series as one."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """The y axis."""

    low: float
    high: float
    logarithmic: bool = False

    def y(self, value: float) -> float:
        """Place of a value in per mille of the height, from the top."""
        low, high, value = (self._bent(number) for number in (self.low, self.high, value))
        return 1000.0 * (high - value) / (high - low)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return nice_ticks(self.low, self.high, 4)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(powers) <= 4 else (1,)
        ticks = [factor * 10.0**power for power in powers[:: max(1, len(powers) // 5)] for factor in factors]
        return [tick for tick in ticks if self.low <= tick <= self.high]

    def _bent(self, value: float) -> float:
        return math.log10(max(value, 1e-30)) if self.logarithmic else value


def draw(chart: Chart, timeline: Timeline) -> str:
    """The chart, or nothing where no series has a point."""
    reduced = [(series, reduce_points(series.points)) for series in chart.series]
    reduced = [(series, buckets) for series, buckets in reduced if buckets]
    if not reduced:
        return ""
    logarithmic = chart.logarithmic and all(bucket.low > 0 for _, buckets in reduced for bucket in buckets)
    scale = Scale(*(chart.limits or _limits([buckets for _, buckets in reduced], logarithmic)), logarithmic)
    lines = "".join(_line(series, buckets, scale, timeline, i) for i, (series, buckets) in enumerate(reduced))
    return (
        f'<figure class="chart{" wide" if chart.wide else ""}">'
        f"<figcaption><b>{escape(chart.title)}</b>{_legend(reduced, chart.unit)}</figcaption>"
        f'<div class="plot" data-plot="{escape(_data(reduced, scale, timeline, chart.unit))}">'
        f'<svg{_dotted(chart)} viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.title)}">'
        f"{_grid(scale)}{_marks(timeline)}{lines}</svg>"
        f"{_labels(chart, scale, timeline)}</div></figure>"
    )


def sparkline(points: Sequence[Point], timeline: Timeline) -> str:
    """A small line without axes."""
    buckets = reduce_points(points)
    if len(buckets) < 2:
        return ""
    scale = Scale(*_limits([buckets], logarithmic=False))
    path = _path([(timeline.x(bucket.x), scale.y(bucket.mean)) for bucket in buckets])
    return (
        '<svg class="spark" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="line c0" d="{path}"/></svg>'
    )


def reduce_points(points: Sequence[Point], limit: int = BUCKETS) -> list[Bucket]:
    """At most `limit` buckets of neighbours, by their order."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    size = math.ceil(len(finite) / limit) if finite else 1
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [
        Bucket(
            x=sum(x for x, _ in group) / len(group),
            mean=math.fsum(y for _, y in group) / len(group),
            low=min(y for _, y in group),
            high=max(y for _, y in group),
        )
        for group in groups
    ]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two values, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean around each value, over fewer at the ends."""
    half = window // 2
    return [
        math.fsum(part) / len(part) for part in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    ]


def _dotted(chart: Chart) -> str:
    """Marked points may stand on the frame, so they are not cut at it."""
    return ' class="dotted"' if any(series.look == "dots" for series in chart.series) else ""


def _limits(drawn: Sequence[Sequence[Bucket]], logarithmic: bool) -> tuple[float, float]:
    """From the lowest to the highest line, without the wildest hundredth of what lies behind them, and some air."""
    lines = [mean for buckets in drawn for mean in _smooth(buckets)]
    lows = sorted(bucket.low for buckets in drawn for bucket in buckets)
    highs = sorted(bucket.high for buckets in drawn for bucket in buckets)
    low, high = min(*lines, lows[len(lows) // 100]), max(*lines, highs[-1 - len(highs) // 100])
    if logarithmic:
        return 10 ** (math.log10(low) - 0.1), 10 ** (math.log10(high) + 0.1)
    if math.isclose(high, low):  # closer than a float can be divided
        return (low - 1.0, high + 1.0) if low == 0 else (min(0.0, 2 * low), max(0.0, 2 * high))
    air = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.35 * high else low - air), high + air


def _smooth(buckets: Sequence[Bucket]) -> list[float]:
    return moving_mean([bucket.mean for bucket in buckets], max(1, len(buckets) // SMOOTHING_PART))


def _line(series: Series, buckets: Sequence[Bucket], scale: Scale, timeline: Timeline, colour: int) -> str:
    xs = [timeline.x(bucket.x) for bucket in buckets]
    if series.look == "noisy":
        smooth = [(x, scale.y(mean)) for x, mean in zip(xs, _smooth(buckets), strict=True)]
        return f'{_behind(xs, buckets, scale, colour)}<path class="line c{colour}" d="{_path(smooth)}"/>'
    places = [(x, scale.y(bucket.mean)) for x, bucket in zip(xs, buckets, strict=True)]
    if series.look == "dashed":
        return f'<path class="line dashed c{colour}" d="{_path(places)}"/>'
    # A stroke of no length with round ends is a dot that stays round in a stretched picture.
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    return f'<path class="line c{colour}" d="{_path(places)}"/><path class="dot c{colour}" d="{dots}"/>'


def _behind(xs: Sequence[float], buckets: Sequence[Bucket], scale: Scale, colour: int) -> str:
    """The single values, or their range where buckets hold several."""
    tops = [(x, scale.y(bucket.high)) for x, bucket in zip(xs, buckets, strict=True)]
    bottoms = [(x, scale.y(bucket.low)) for x, bucket in zip(xs, buckets, strict=True)]
    if tops == bottoms:
        return f'<path class="raw c{colour}" d="{_path(tops)}"/>'
    return f'<path class="band c{colour}" d="{_path(tops + bottoms[::-1])}Z"/>'


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _grid(scale: Scale) -> str:
    return "".join(f'<path class="grid" d="M0 {scale.y(tick):.1f}H1000"/>' for tick in scale.ticks())


def _marks(timeline: Timeline) -> str:
    resumed = "".join(f'<path class="resumed" d="M{timeline.x(step):.1f} 0V1000"/>' for step in timeline.resumed)
    skipped = "".join(f'<path class="skipped" d="M{timeline.x(step):.1f} 1000V955"/>' for step in timeline.skipped)
    return resumed + skipped


def _labels(chart: Chart, scale: Scale, timeline: Timeline) -> str:
    down = "".join(
        f'<span class="y" style="top:{scale.y(tick) / 10:.2f}%">{_tick(tick)}{chart.unit}</span>'
        for tick in scale.ticks()
    )
    ticks = _step_ticks(timeline, 8 if chart.wide else 4)
    across = "".join(f'<span class="x" style="left:{x / 10:.2f}%">{text}</span>' for x, text in ticks)
    return down + across


def _step_ticks(timeline: Timeline, about: int) -> Iterator[tuple[float, str]]:
    for tick in nice_ticks(timeline.first, max(timeline.last, timeline.first + 1), about):
        if tick == int(tick):
            yield timeline.x(tick), _tick(tick)


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 else significant(value)


def _legend(reduced: Sequence[tuple[Series, Sequence[Bucket]]], unit: str) -> str:
    entries = [
        f'<span class="key c{i}{" dashed" if series.look == "dashed" else ""}">{escape(series.name)} '
        f"<i>{significant(_smooth(buckets)[-1])}{unit}</i></span>"
        for i, (series, buckets) in enumerate(reduced)
    ]
    return f'<span class="legend">{"".join(entries)}</span>'


def _data(reduced: Sequence[tuple[Series, Sequence[Bucket]]], scale: Scale, timeline: Timeline, unit: str) -> str:
    """What the page's script shows under the pointer."""
    series = [
        {
            "name": series.name,
            "x": [round(bucket.x) for bucket in buckets],
            "y": [float(f"{bucket.mean:.4g}") for bucket in buckets],
        }
        for series, buckets in reduced
        if series.look != "dashed"
    ]
    content = {"first": timeline.first, "last": timeline.last, "unit": unit, "series": series}
    return json.dumps(content, separators=(",", ":"))
