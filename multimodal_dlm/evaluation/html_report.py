"""The report as one page that needs nothing else: tables, intervals, heat maps, lines, sheets."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1em; font-weight: 600; margin: 1.4em 0 0.4em; }
table { border-collapse: collapse; margin: 0.6em 0; } th, td { padding: 3px 12px 3px 0; }
th { text-align: left; font-weight: 600; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; } tr + tr td { border-top: 1px solid #eee; }
table.heat td { text-align: center; min-width: 2.6em; padding: 3px 6px; border: 1px solid #fff; }
table.heat th { padding: 3px 8px; font-weight: 400; } img { max-width: 100%; }
.quiet { color: #777; } nav a { margin-right: 1.2em; } code { font-size: 0.92em; }
"""
_BAR_WIDTH, _BAR_HEIGHT = 220, 14
_PLOT = (620, 260)
_MARGINS = (52, 150, 40, 24)  # Left, right, bottom, top.
_FONT_SIZE = 11
_COLOURS = ("#3a6ea5", "#c4572e", "#4c8f4c", "#8457a8", "#a08020", "#666666")


def write_html(
    path: Path, report: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the page.

    Args:
        path: File to write; the sheets lie in `parts/` beside it and are copied into the page.
        report: Content of `report.json`.
        parts: Measured parts by name, with metrics, tables, curves and the names of sheets.
    """
    title = f"Evaluation of {report['pipeline']['name'] or 'a pipeline'}"
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a> ' for name in parts)
    body = [f"<h1>{escape(title)}</h1>", _summary(report), f"<nav>{links}</nav>"]
    for name, part in parts.items():
        body.append(_section(name, part, report, path.parent / "parts"))
    if report["left_out"]:
        reasons = "".join(
            f'<li id="{escape(name)}"><b>{escape(name)}</b>'
            f"{' (failed)' if name in report['failed'] else ''}: {escape(reason)}</li>"
            for name, reason in report["left_out"].items()
        )
        body.append(f"<h2>Left out</h2><ul>{reasons}</ul>")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def format_value(value: float | None) -> str:
    """A number with as many digits as it deserves."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return (
        f"{value:.4f}"
        if abs(value) < 1
        else f"{value:.4g}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def _summary(report: Mapping[str, Any]) -> str:
    settings, machine = report["settings"], report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"Suite <code>{escape(settings['suite'])}</code>, seed {settings['seed']}, batch size"
        f" {settings['batch_size']}, data <code>{escape(settings['manifest']['name'])}</code>"
        f" (<code>{settings['manifest']['fingerprint'][:12]}</code>).",
        f"{escape(str(machine['processor']))}, {machine['num_threads']} threads,"
        f" {escape(packages)}, commit <code>{escape(str(machine['commit'])[:12])}</code>.",
        "Brackets are 95 % bootstrap intervals. The bar is the value, the line its interval, the"
        " grey ticks the baselines.",
    ]
    return f'<p class="quiet">{"<br>".join(lines)}</p>'


def _section(name: str, part: Mapping[str, Any], report: Mapping[str, Any], folder: Path) -> str:
    spec = report["settings"]["measurements"][name]
    options = ", ".join(f"{key} {value}" for key, value in spec.items())
    found = [
        f'<h2 id="{escape(name)}">{escape(name)}</h2>',
        f'<p class="quiet">{escape(options)}; {part["seconds"]} s</p>',
        _metrics(part["metrics"]),
    ]
    if part.get("times"):
        rows = "".join(
            f'<tr><td>{escape(each)}</td><td class="number">{format_value(seconds)}</td></tr>'
            for each, seconds in part["times"].items()
        )
        found.append(f"<h3>times in seconds, of this machine</h3><table>{rows}</table>")
    for title, curve in part["curves"].items():
        found.append(f"<h3>{escape(title)}</h3>{line_plot(curve)}")
    for title, table in part["tables"].items():
        found.append(f"<h3>{escape(title)}</h3>{_heat_map(table)}")
    for title, file in part["sheets"].items():
        data = base64.b64encode((folder / file).read_bytes()).decode()
        image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        found.append(f"<h3>{escape(title)}</h3>{image}")
    return "\n".join(found)


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, metric in metrics.items():
        interval = ""
        if metric["low"] is not None:
            interval = f"[{format_value(metric['low'])}, {format_value(metric['high'])}]"
        baselines = ", ".join(
            f"{escape(key)} {format_value(value)}" for key, value in metric["baselines"].items()
        )
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="number">{format_value(metric["value"])}</td>'
            f'<td>{interval}</td><td>{_bar(metric)}</td><td class="number">{metric["n"]:,}</td>'
            f"<td>{baselines}</td></tr>"
        )
    head = (
        '<tr><th>metric</th><th class="number">value</th><th>interval</th><th></th>'
        '<th class="number">n</th><th>baselines</th></tr>'
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _bar(metric: Mapping[str, Any]) -> str:
    """The value between 0 and 1, or between 0 and the largest number of its row."""
    numbers = [metric["value"], metric["high"] or 0, *metric["baselines"].values()]
    top = 1.0 if max(numbers) <= 1 else max(numbers)
    if min(numbers) < 0:
        return ""

    def x(value: float) -> float:
        return round(_BAR_WIDTH * value / top, 1)

    middle = _BAR_HEIGHT / 2
    marks = [
        f'<rect width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" fill="#f1f1f1"/>',
        f'<rect width="{x(metric["value"])}" height="{_BAR_HEIGHT}" fill="#7da7d9"/>',
    ]
    if metric["low"] is not None:
        marks.append(
            f'<line x1="{x(metric["low"])}" x2="{x(metric["high"])}" y1="{middle}" y2="{middle}"'
            ' stroke="#123" stroke-width="1.5"/>'
        )
    marks += [
        f'<line x1="{x(value)}" x2="{x(value)}" y1="0" y2="{_BAR_HEIGHT}" stroke="#777"'
        f' stroke-width="2"><title>{escape(name)}</title></line>'
        for name, value in metric["baselines"].items()
    ]
    return f'<svg width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" role="img">{"".join(marks)}</svg>'


def _heat_map(table: Mapping[str, Any]) -> str:
    """Counts as a share of their row: true values down, given values across."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in table["columns"])
    rows = []
    for name, counts in zip(table["rows"], table["counts"], strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td style="background: rgba(70, 130, 200, {0.85 * count / total:.2f})">{count}</td>'
            for count in counts
        )
        rows.append(f"<tr><th>{escape(str(name))}</th>{cells}</tr>")
    corner = '<th class="quiet">true / given</th>'
    return f'<table class="heat"><tr>{corner}{head}</tr>{"".join(rows)}</table>'


def line_plot(curve: Mapping[str, Any]) -> str:
    """Lines as an SVG picture, their names to the right of their ends."""
    left, right, bottom, top = _MARGINS
    width, height = _PLOT
    xs, lines = curve["x"], curve["lines"]
    numbers = [y for ys in lines.values() for y in ys]
    high_y = max(*numbers, 1e-9)
    low_y = min(numbers) if min(numbers) < -0.01 * high_y else 0.0
    base = height - bottom

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (y - low_y) / (high_y - low_y)
        return (
            round(left + across * (width - left - right), 1),
            round(base - up * (base - top), 1),
        )

    marks = [f'<path d="M{left} {top} V{base} H{width - right}" fill="none" stroke="#999"/>']
    ends = _apart([place(xs[-1], ys[-1])[1] for ys in lines.values()], height - 8)
    for colour, (name, ys), end in zip(cycle(_COLOURS), lines.items(), ends, strict=False):
        points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
        path = " ".join(f"{x},{y}" for x, y in points)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in points]
        marks.append(_text(width - right + 8, end + 4, name, "start", colour))
    marks += [_text(place(x, low_y)[0], base + 15, format_tick(x)) for x in xs]
    ticks = [low_y, high_y]
    if low_y < 0:
        zero = place(xs[0], 0.0)[1]
        line = f'd="M{left} {zero} H{width - right}" stroke="#999" stroke-dasharray="3 3"'
        marks.append(f"<path {line}/>")
        ticks += [0.0] if min(zero - top, base - zero) > _FONT_SIZE else []
    marks += [_text(left - 6, place(xs[0], y)[1] + 4, format_tick(y), "end") for y in ticks]
    marks.append(_text((left + width - right) / 2, height - 6, curve["x_label"]))
    marks.append(_text(left, top - 8, curve["y_label"], "start"))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = 'font-family="system-ui, sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{"".join(marks)}</svg>'


def _apart(places: Sequence[float], lowest: float, distance: float = 13.0) -> list[float]:
    """The same heights, moved until no two labels overlap and none is below `lowest`."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + distance)
    moved[order[-1]] = min(moved[order[-1]], lowest)
    for below, above in pairwise(reversed(order)):
        moved[above] = min(moved[above], moved[below] - distance)
    return moved


def format_tick(value: float) -> str:
    """A number on an axis."""
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#555") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{_FONT_SIZE}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def metric_lines(metrics: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """The metrics as lines of text for a terminal, baselines after the value."""
    width = max(map(len, metrics), default=0) + 2
    lines = []
    for name, metric in metrics.items():
        interval = ""
        if metric["low"] is not None:
            interval = f" [{format_value(metric['low'])}, {format_value(metric['high'])}]"
        others = ", ".join(f"{k} {format_value(v)}" for k, v in metric["baselines"].items())
        line = (
            f"  {name:<{width}}{format_value(metric['value']):>8}{interval:<20} n {metric['n']:,}"
        )
        lines.append(f"{line}  ({others})" if others else line)
    return lines
