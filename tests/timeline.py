"""A picture of what happened when: lanes with bars on one axis of seconds, as SVG, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

HOSTS = ("#4c8bf5", "#e69f00", "#2aa876", "#b06fd8", "#8a8d91")  # a colour for each host, also for the colour-blind
AWAY, FAULT = "#d6453d", "#9aa0a6"
LEFT, WIDTH, LANE, AXIS = 170, 1000, 22, 34  # pixels: the names, the whole, a lane, the axis
STYLE = """<style>
text { font: 12px sans-serif; fill: #6b7280 }
.title { font-weight: bold }
.bar text { font-size: 11px; fill: #111 }
.rule { stroke: #8884 }
.event { stroke: #d6453d; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) { text { fill: #d8dee4 } .bar text { fill: #111 } }
</style>"""


@dataclass
class Lane:
    """A row of the picture: its name and bars (start, end, colour, words); `title` stands above it."""

    name: str
    bars: list[tuple[float, float, str, str]] = field(default_factory=list)
    title: str = ""


def picture(lanes: Sequence[Lane], since: float, until: float, events: Iterable[tuple[float, str]] = ()) -> str:
    """The SVG. Bars, events and `since` are of one clock; the axis begins with 0 at `since`."""
    scale = (WIDTH - LEFT - 10) / max(until - since, 1e-9)
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 1e9) if (until - since) / step <= 16)
    body, top = [], 22

    def x(when: float) -> float:
        return round(LEFT + (min(max(when, since), until) - since) * scale, 1)

    for lane in lanes:
        if lane.title:
            top += 26
            body.append(f'<text class="title" x="4" y="{top - 8}">{escape(lane.title)}</text>')
        body.append(f'<text x="{LEFT - 8}" y="{top + 15}" text-anchor="end">{escape(lane.name)}</text>')
        for start, end, colour, words in lane.bars:
            width = max(1.0, x(end) - x(start))
            if end <= since or start >= until:
                continue
            shown = words if len(words) * 6.5 < width else ""
            body.append(
                f'<g class="bar"><title>{escape(words)} {start - since:.3f} to {end - since:.3f} s</title>'
                f'<rect x="{x(start)}" y="{top + 2}" width="{width:.1f}" height="{LANE - 4}" fill="{colour}"/>'
                f'<text x="{x(start) + 3}" y="{top + 15}">{escape(shown)}</text></g>'
            )
        top += LANE
    ticks = [since + step * number for number in range(int((until - since) / step + 1e-6) + 1)]
    rules = [
        f'<path class="rule" d="M{x(tick)} 20V{top + 4}"/>'
        f'<text x="{x(tick)}" y="{top + 18}" text-anchor="middle">{tick - since:g} s</text>'
        for tick in ticks
    ]
    marks = [
        f'<path class="event" d="M{x(when)} 18V{top}"/><text x="{x(when)}" y="13">{escape(words)}</text>'
        for when, words in events
    ]
    size = f'width="{WIDTH}" height="{top + AXIS}" viewBox="0 0 {WIDTH} {top + AXIS}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', STYLE, *rules, *body, *marks, "</svg>\n"])
