"""Plots as SVG files, with the standard library alone: lines over an axis, and values with their spread in rows.

A file holds one or more panels side by side and one legend. It has a background of its own, light or dark as the
reader's system is, so it can be read on any page. Every text is escaped. What is no finite number, or has no place
on a logarithmic axis, is left out; a panel without any point is refused (`Empty`), since an empty plot looks like
a measurement.

    write(path, [Panel("Title", Axis("clients", "log"), Axis("requests/s"), [Series("alone", [(1, 10), (4, 31)])])])
    write(path, [Rows("Title", Axis("ns", "symlog"), ["launch"], [Series("1 thread", [(2.5, 0)], spread=[(2.1, 3)])])])
"""
import math
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

LIGHT = ("#0b63a5", "#c2500a", "#147a57", "#9a3f86", "#6b6b00", "#b3262b")
DARK = ("#63b3f2", "#ff9d57", "#4fd0a3", "#e39bd4", "#d2d25a", "#ff8a8a")
LEFT, RIGHT, TOP, BOTTOM, ROW = 62, 16, 40, 50, 30
LETTER = 6.3  # the width of a letter of 11 px, about


class Empty(Exception):
    """There is nothing to plot."""


def plain(text):
    """One line, of letters that XML has."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def clean(text):
    """Text for XML."""
    return escape(plain(text))


def short(value):
    """A tick's label: 0.25, 40, 2k, 3M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{letter}"
    return f"{value:.6g}"


@dataclass
class Axis:
    """`kind`: linear (from 0 if all is above it), log, or symlog (both signs; the logarithm of 1 + |v|)."""
    label: str
    kind: str = "linear"
    ticks: list = None  # where labels stand; else found
    text: callable = short

    def fit(self, values):
        values = [v for v in values if usable(v) and (self.kind != "log" or v > 0)]
        if not values:
            raise Empty(self.label)
        low, high = min(values), max(values)
        if self.kind == "linear":
            low, high = min(low, 0.0), max(high, 0.0)
            high += (high - low or 1.0) * 0.04
            self.marks = self.ticks or steps(low, high)
            if low < 0:
                low -= (high - low) * 0.04
        else:
            low, high = self.bend(low), self.bend(high)
            pad = max((high - low) * 0.05, 0.1)
            if self.kind == "symlog":
                low, high = min(low, 0.0), max(high, 0.0)
            low, high = low - pad, high + pad
            self.marks = [t for t in self.ticks or self.powers(low, high) if low <= self.bend(t) <= high]
        self.low, self.high = low, high
        return self

    def bend(self, value):
        if self.kind == "log":
            return math.log10(value)
        if self.kind == "symlog":
            return math.copysign(math.log10(1 + abs(value)), value) if abs(value) > 0 else 0.0
        return value

    def has(self, value):
        return usable(value) and (self.kind != "log" or value > 0)

    def at(self, value):
        """0 to 1."""
        return (self.bend(value) - self.low) / (self.high - self.low)

    def powers(self, low, high):
        if self.kind == "symlog":
            few = high - low < 3.5
            tens = [m * 10.0 ** n for n in range(0, 12) for m in ((1, 2, 5) if few else (1,))]
            return [-t for t in reversed(tens)] + [0.0] + tens
        few = high - low < 2.2
        return [m * 10.0 ** n for n in range(math.floor(low), math.ceil(high) + 1) for m in ((1, 2, 5) if few else (1,))]


@dataclass
class Series:
    name: str
    points: list
    spread: list = None  # a (low, high) per point, or None
    dashed: bool = False
    line: bool = True
    color: int = None  # else by its place among the names of the file; with one, the legend has it without a colour


@dataclass
class Panel:
    """Lines: y over x."""
    title: str
    x: Axis
    y: Axis
    series: list
    width: int = 430
    height: int = 300

    def draw(self, out, left, styles):
        x = self.x.fit([p[0] for s in self.series for p in s.points])
        y = self.y.fit([v for s in self.series for _, v in s.points])
        wide, high = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        px, py = (lambda v: left + LEFT + wide * x.at(v)), (lambda v: TOP + high * (1 - y.at(v)))
        heading(out, self.title, left + LEFT)
        for tick in y.marks:
            line(out, "grid", left + LEFT, py(tick), left + LEFT + wide, py(tick))
            text(out, "t", left + LEFT - 6, py(tick) + 4, y.text(tick), "end")
        bottom_axis(out, x, px, TOP, TOP + high)
        frame(out, left + LEFT, TOP, wide, high)
        text(out, "l", left + LEFT + wide / 2, self.height - 12, x.label, "middle")
        middle = TOP + high / 2
        out.append(f'<text class="l" x="{left + 14:.1f}" y="{middle:.1f}" text-anchor="middle" '
                   f'transform="rotate(-90 {left + 14:.1f} {middle:.1f})">{clean(y.label)}</text>')
        for one in self.series:
            number = styles[one.name] if one.color is None else one.color
            points = [(px(a), py(b)) for a, b in one.points if x.has(a) and y.has(b)]
            if one.line and len(points) > 1:
                path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
                out.append(f'<polyline class="s{number}{" dash" if one.dashed else ""}" points="{path}"/>')
            if not one.dashed:
                for a, b in points:
                    mark(out, number, a, b)


@dataclass
class Rows:
    """A row per name; each series has (value, number of the row), and the spread as a bar of its own."""
    title: str
    x: Axis
    names: list
    series: list
    width: int = 620
    height: int = field(init=False)

    def __post_init__(self):
        self.height = TOP + BOTTOM + ROW * len(self.names)

    def draw(self, out, left, styles):
        spreads = [v for s in self.series for pair in s.spread or [] if pair for v in pair]
        x = self.x.fit([v for s in self.series for v, _ in s.points] + spreads)
        wide_names = min(220, 20 + LETTER * max(len(str(name)) for name in self.names))
        begin, wide, high = left + wide_names, self.width - wide_names - RIGHT, ROW * len(self.names)
        px = lambda v: begin + wide * x.at(v)
        heading(out, self.title, left + 16)
        bottom_axis(out, x, px, TOP, TOP + high)
        if x.kind != "log" and 0 < x.at(0) < 1:
            line(out, "zero", px(0), TOP, px(0), TOP + high)
        frame(out, begin, TOP, wide, high)
        text(out, "l", begin + wide / 2, TOP + high + 38, x.label, "middle")
        for row, name in enumerate(self.names):
            text(out, "t", begin - 8, TOP + ROW * (row + 0.5) + 4, name, "end")
            if row:
                line(out, "grid", begin, TOP + ROW * row, begin + wide, TOP + ROW * row)
        for order, one in enumerate(self.series):
            number, shift = styles[one.name], ROW * (order + 1) / (len(self.series) + 1)
            for (value, row), pair in zip(one.points, one.spread or [None] * len(one.points)):
                if not x.has(value):
                    continue
                y = TOP + ROW * row + shift
                if pair and all(x.has(v) for v in pair):
                    line(out, f"s{number}", px(pair[0]), y, px(pair[1]), y)
                mark(out, number, px(value), y)


def usable(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def steps(low, high):
    """Round numbers, about five."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= rough)
    return [n * size for n in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def line(out, name, x1, y1, x2, y2):
    out.append(f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def text(out, name, x, y, what, anchor="start"):
    out.append(f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{clean(what)}</text>')


def heading(out, what, x):
    text(out, "h", x, 24, what)


def frame(out, x, y, wide, high):
    out.append(f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>')


def bottom_axis(out, axis, place, top, bottom):
    """Grid and labels; labels that would touch the one before are left out."""
    end = -math.inf
    for tick in sorted(axis.marks, key=place):
        label = axis.text(tick)
        line(out, "grid", place(tick), top, place(tick), bottom)
        half = LETTER * len(label) / 2
        if place(tick) - half > end + 4:
            text(out, "t", place(tick), bottom + 16, label, "middle")
            end = place(tick) + half


def mark(out, number, x, y):
    """A shape per series, so that they are told apart without colours."""
    shape = number % 4
    if shape == 0:
        out.append(f'<circle class="m{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>')
        return
    corners = {1: ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)), 2: ((0, -4.4), (4.2, 3.2), (-4.2, 3.2)),
               3: ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0))}[shape]
    out.append(f'<polygon class="m{number}" points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>')


def style():
    """Colours for light and for dark; what knows no media queries takes the light ones."""
    def rules(paper, ink, faint, soft, colors):
        text = (f".paper{{fill:{paper}}} .h,.l,.t{{fill:{ink}}} .t{{fill:{soft}}} .grid{{stroke:{faint}}} "
                f".frame{{stroke:{soft}}} .zero,.s-any{{stroke:{ink}}}")
        return text + "".join(f" .s{n}{{stroke:{c}}} .m{n}{{fill:{c};stroke:{paper}}}" for n, c in enumerate(colors))
    names = ",".join(f".s{n}" for n in range(len(LIGHT)))
    return ("text{font-family:system-ui,sans-serif} .h{font-size:14px;font-weight:600} .l{font-size:12px} .t{font-size:11px} "
            f".frame{{fill:none}} {names},.s-any{{fill:none;stroke-width:2}} .dash{{stroke-dasharray:5 4;stroke-width:1.4}} "
            + rules("#ffffff", "#1c1c1c", "#e4e4e4", "#595959", LIGHT)
            + " @media (prefers-color-scheme: dark){" + rules("#16191d", "#eceff1", "#343a40", "#aab2ba", DARK) + "}")


def legend(out, series, styles, x, y, width):
    """A mark or a line and the name, in as many lines as needed; returns its height."""
    left, top = x, y
    for one in series:
        wide = 34 + LETTER * len(one.name) + 14
        if left > x and left + wide > width:
            left, top = x, top + 20
        number = styles[one.name] if one.color is None else "-any"
        if one.line:
            line(out, f"s{number}{' dash' if one.dashed else ''}", left, top, left + 24, top)
        if not one.dashed:
            mark(out, number, left + 12, top)
        text(out, "l", left + 30, top + 4, one.name)
        left += wide
    return top - y + 20


def write(path, panels, about=""):
    """Writes the file, or raises `Empty`."""
    named = {}
    for panel in panels:
        for one in panel.series:
            named.setdefault(one.name, one)
    own = [name for name, one in named.items() if one.color is None]
    styles = {name: number % len(LIGHT) for number, name in enumerate(own)}
    body, left = [], 0
    for panel in panels:
        panel.draw(body, left, styles)
        left += panel.width
    height = max(panel.height for panel in panels)
    height += legend(body, list(named.values()), styles, 16, height + 8, left - 16)
    title = about or panels[0].title
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left} {height}" width="{left}" height="{height}" role="img" '
            f'aria-label={quoteattr(plain(title))}>\n<title>{clean(title)}</title>\n<style>{style()}</style>\n'
            f'<rect class="paper" width="{left}" height="{height}" rx="6"/>')
    path.write_text("\n".join([head, *body, "</svg>"]) + "\n")
