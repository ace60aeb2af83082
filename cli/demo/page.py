"""The demo's page: one HTML file with everything inside, no script needed to read it.

The template in `page.html` holds all that does not depend on the run. What belongs to one quality carries the class
``at at-N``; a style rule shows it while the N-th choice is checked, so the page works without scripts.
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from cli.demo.results import STAGES, WAY, Coded, Demo, Found, Picture, Rgb, match, overlap

TEMPLATE = Path(__file__).with_name("page.html")
MAX_SIDE = 1280  # pixels; pictures are embedded no larger than this
PANEL_WIDTH = 400  # pixels; how wide a picture is shown on a wide screen, by which labels are laid out


def render(demo: Demo) -> str:
    """The whole page."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        quality_rules="\n".join(
            f":root:has(#quality-{n}:checked) .at-{n} {{ display: revert; }}" for n in range(len(demo.qualities))
        ),
        lead=lead(demo),
        summaries=at_each(demo, lambda quality: summary(demo, quality)),
        choices="".join(choice(n, quality, quality == demo.shown_quality) for n, quality in enumerate(demo.qualities)),
        now=at_each(demo, lambda quality: now(demo, quality)),
        plates="\n".join(plate(demo, n, picture) for n, picture in enumerate(demo.pictures)),
        times=at_each(demo, lambda quality: times(demo, quality)),
        facts=facts(demo),
    )


def at_each(demo: Demo, part: Callable[[float], str]) -> str:
    return "".join(f'<div class="at at-{n}">{part(quality)}</div>' for n, quality in enumerate(demo.qualities))


def lead(demo: Demo) -> str:
    number = {1: "One picture", 2: "Two pictures", 3: "Three pictures", 4: "Four pictures", 5: "Five pictures"}
    return (
        f"{number.get(len(demo.pictures), f'{len(demo.pictures)} pictures')} went from a camera to an edge service, "
        "which kept what a detector needs and dropped the rest, and on to a cloud service that looked at what arrived. "
        "These are the real bytes and the real answers of that run."
    )


def summary(demo: Demo, quality: float) -> str:
    coded = demo.coded(quality)
    jpeg = sum(picture.jpeg_bytes for picture in demo.pictures)
    sent = sum(one.sent_bytes for one in coded)
    before = sum(len(picture.found) for picture in demo.pictures)
    kept = sum(count_kept(picture, one) for picture, one in zip(demo.pictures, coded, strict=True))
    times_as, words = compared(jpeg / sent)
    trips = sorted(one.round_trip_ms for one in coded)
    figures = [
        (f"{words.capitalize()} than JPEG", times_as, f"{kilobytes(sent)} sent in place of {kilobytes(jpeg)}"),
        (
            "Objects still found",
            f"{kept} of {before}" if before else "none",
            "same kind, same place, by the same detector" if before else "as on the originals",
        ),
        ("Picture to answer", f"{trips[len(trips) // 2]:.0f} ms", "median, from camera to consumer, on this machine"),
    ]
    return (
        '<dl class="sum">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in figures)
        + "</dl>"
    )


def choice(n: int, quality: float, checked: bool) -> str:
    return (
        f'<label><input type="radio" name="quality" id="quality-{n}"{" checked" if checked else ""}>'
        f"<span>{quality:g}</span></label>"
    )


def now(demo: Demo, quality: float) -> str:
    coded = demo.coded(quality)
    sent = sum(one.sent_bytes for one in coded)
    pixels = sum(picture.width * picture.height for picture in demo.pictures)
    return f"{kilobytes(sent)} in all, {8 * sent / pixels:.3f} bit per pixel"


def plate(demo: Demo, n: int, picture: Picture) -> str:
    """One picture: original, what the machine sees, detections."""
    coded = picture.coded
    jpeg = "as its own JPEG" if picture.jpeg_is_own else "as JPEG, quality 85"
    title = escape(picture.title)
    original = view(picture, embed(picture.rgb, 88), f"{title}, the original picture")
    seen, detected = [], []
    for q, one in enumerate(coded):
        source = embed(one.rgb, 90)
        described = f"{title}, decoded from {kilobytes(one.sent_bytes)}"
        hold = '<button class="hold" type="button" aria-pressed="false">Hold to see the original</button>'
        seen.append(
            view(picture, source, described, hold)
            + caption("What the machine sees", f"{kilobytes(one.sent_bytes)}, {picture.bpp(one):.3f} bit per pixel")
        )
        overlay = boxes(picture, one.found, f"box-{n}-{q}")
        detected.append(
            view(
                picture,
                source,
                f"{described}, with a box around each object",
                f'<div class="boxes" aria-hidden="true">{overlay}</div>',
            )
            + caption("Detections", f"{len(one.found)} found, {len(picture.found)} on the original")
            + objects(picture, one, f"box-{n}-{q}")
        )
    return f"""<article class="plate" aria-labelledby="plate-{n}">
<div class="plate-head"><div><h2 id="plate-{n}">{title}</h2>
<p class="quiet">{picture.width} &times; {picture.height}</p></div>
{switched([ratio(picture.ratio(one)) for one in coded])}</div>
{switched([scale(picture, one) for one in coded])}
<div class="panels">
<figure class="original">{original}{caption("Original", f"{kilobytes(picture.jpeg_bytes)} {jpeg}")}</figure>
<figure>{switched(seen)}</figure>
<figure>{switched(detected)}</figure>
</div></article>"""


def switched(parts: Sequence[str]) -> str:
    return "".join(f'<div class="at at-{n}">{part}</div>' for n, part in enumerate(parts))


def ratio(fewer: float) -> str:
    return '<p class="ratio"><b>{}</b> {}</p>'.format(*compared(fewer))


def compared(fewer: float) -> tuple[str, str]:
    """How many times fewer bytes, said so that it also reads where they are more."""
    return (f"{fewer:.1f}&times;", "fewer bytes") if fewer >= 1 else (f"{1 / fewer:.1f}&times;", "more bytes")


def scale(picture: Picture, coded: Coded) -> str:
    said = f"{kilobytes(coded.sent_bytes)} sent, {kilobytes(picture.jpeg_bytes)} as JPEG"
    width = min(100.0, 100 * coded.sent_bytes / picture.jpeg_bytes)
    return f'<div class="scale" role="img" aria-label="{said}" title="{said}"><i style="width:{width:.2f}%"></i></div>'


def view(picture: Picture, source: str, described: str, over: str = "") -> str:
    return (
        f'<div class="view" style="aspect-ratio:{picture.width}/{picture.height}">'
        f'<img src="{source}" width="{picture.width}" height="{picture.height}" alt="{described}">{over}</div>'
    )


def caption(name: str, said: str) -> str:
    return f'<figcaption><h3>{name}</h3><span class="quiet">{said}</span></figcaption>'


def boxes(picture: Picture, found: Sequence[Found], name: str) -> str:
    """A frame around each object, small ones over large ones, its label in a corner that is still free."""
    parts = []
    labels: list[tuple[float, float, float, float]] = []
    for i in sorted(range(len(found)), key=lambda i: -area(found[i].box)):
        corner, label = free_corner(picture, found[i], labels)
        if label:
            labels.append(label)
        left, top, right, bottom = found[i].box
        place = (
            f"left:{100 * left / picture.width:.2f}%;top:{100 * top / picture.height:.2f}%;"
            f"width:{100 * (right - left) / picture.width:.2f}%;height:{100 * (bottom - top) / picture.height:.2f}%"
        )
        parts.append(
            f'<div class="box {corner}" id="{name}-{i}" style="{place}"><span>{escape(found[i].label)}</span></div>'
        )
    return "".join(parts)


def area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def free_corner(
    picture: Picture, found: Found, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[str, tuple[float, float, float, float] | None]:
    """Corner (tl, tr, bl, br) of a box and the label's rectangle there: the first inside the picture that covers no
    label of `taken`; without a free one, "none" and no rectangle: the label is shown when the object is pointed at in
    the list. Measured for a picture shown PANEL_WIDTH pixels wide."""
    unit = picture.width / PANEL_WIDTH
    wide, high = (12 + 7 * len(found.label)) * unit, 20 * unit
    left, top, right, bottom = found.box
    corners = {
        "tl": (left, top, left + wide, top + high),
        "bl": (left, bottom - high, left + wide, bottom),
        "tr": (right - wide, top, right, top + high),
        "br": (right - wide, bottom - high, right, bottom),
    }
    for corner, label in corners.items():
        inside = label[0] >= -unit and label[2] <= picture.width + unit
        if inside and not any(overlap(label, other) for other in taken):
            return corner, label
    return "none", None


def objects(picture: Picture, coded: Coded, name: str) -> str:
    """What was found, by falling score, then what was lost on the way."""
    matched = match(picture.found, coded.found)
    items = [
        f'<li><button type="button" data-box="{name}-{i}">{escape(found.label)} <small>{100 * found.score:.0f} %'
        f"{'' if i in matched else ', new'}</small></button></li>"
        for i, found in enumerate(coded.found)
    ]
    items += [
        f'<li class="lost">{escape(found.label)} <small>lost, was {100 * found.score:.0f} %</small></li>'
        for found, at in zip(picture.found, matched, strict=True)
        if at is None
    ]
    if not items:
        return '<p class="objects quiet">Nothing found, neither here nor on the original.</p>'
    return f'<ul class="objects" aria-label="Objects found">{"".join(items)}</ul>'


def times(demo: Demo, quality: float) -> str:
    """A bar for each picture, all to one scale, and every stage as a number for who wants to know."""
    coded = demo.coded(quality)
    longest = max(sum(one.stages_ms.values()) for one in coded)
    bars, rows = [], []
    for picture, one in zip(demo.pictures, coded, strict=True):
        places = {place: sum(one.stages_ms[stage] for stage in stages) for place, stages in WAY.items()}
        said = ", ".join(f"{place} {value:.0f} ms" for place, value in places.items())
        parts = "".join(
            f'<i class="{place}" style="width:{100 * value / longest:.3f}%"></i>' for place, value in places.items()
        )
        title = escape(picture.title)
        bars.append(
            f'<li><span>{title}</span><span class="bar" role="img" aria-label="{said}" title="{said}">{parts}</span>'
            f"<span>{one.round_trip_ms:.0f} ms</span></li>"
        )
        numbers = "".join(f"<td>{one.stages_ms[stage]:.1f}</td>" for stage in STAGES)
        rows.append(f'<tr><th scope="row">{title}</th>{numbers}<td>{one.round_trip_ms:.0f}</td></tr>')
    key = "".join(f'<li><i class="{place}"></i>{place}</li>' for place in WAY)
    head = "".join(f'<th scope="col">{stage}</th>' for stage in (*STAGES, "picture to answer"))
    return (
        f'<ul class="key" aria-hidden="true">{key}</ul><ul class="bars">{"".join(bars)}</ul>'
        "<details><summary>Every stage, in milliseconds</summary>"
        '<div class="scroll" role="region" aria-label="Every stage, in milliseconds" tabindex="0"><table><thead><tr>'
        f'<th scope="col">Picture</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def facts(demo: Demo) -> str:
    said = [
        ("Codec", f"{escape(demo.codec)} <code>{demo.model_id[:12]}</code>"),
        ("Detector", escape(demo.task)),
        ("Software", f"Sightline {escape(demo.version)}"),
        ("Made by", "<code>sightline demo</code>"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in said)


def count_kept(picture: Picture, coded: Coded) -> int:
    return sum(at is not None for at in match(picture.found, coded.found))


def kilobytes(count: int) -> str:
    """Bytes for people, in units of 1000."""
    return (
        f"{count} bytes" if count < 1000 else f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.2f} MB"
    )


def embed(rgb: Rgb, quality: int) -> str:
    """A picture as a data URI: WebP, no larger than MAX_SIDE."""
    picture = Image.fromarray(rgb)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
