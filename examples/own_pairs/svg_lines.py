"""Line art of coloured SVG pictures: every shape filled white with a black line, in painting order.

What lies in front hides the lines behind it, as in a drawing. The line has the same width on the picture, whatever the
transforms around a shape. Opacity, gradients, filters, text and images play no part; shapes that are nearly
transparent (glows, shadows) get no line.
"""

import io
import math
import re
import xml.etree.ElementTree as ET

import resvg_py
from PIL import Image

SVG = "http://www.w3.org/2000/svg"
SHAPES = {"path", "circle", "ellipse", "rect", "polygon", "polyline", "line", "use"}
IGNORED = {"text", "image", "filter", "style", "script", "foreignObject", "title", "desc", "metadata"}
PAINT = {"fill", "stroke", "opacity", "fill-opacity", "stroke-opacity", "filter", "style", "class", "mix-blend-mode"}
LEAST_OPACITY = 0.6
OVERSAMPLE = 4
ET.register_namespace("", SVG)


def wrap(body: str, width: float, height: float) -> str:
    """Make an SVG document of the body that an icon set stores."""
    return f'<svg xmlns="{SVG}" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">{body}</svg>'


def line_art(svg: str, width: float) -> str:
    """Return the drawing of a coloured picture.

    Args:
        svg: a document whose root has a viewBox.
        width: of the lines, in units of that viewBox.
    """
    root = ET.fromstring(svg)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    _draw(root, width, 1.0, {})
    return ET.tostring(root, encoding="unicode")


def rasterise(svg: str, side: int) -> Image.Image:
    """Render a document on white, `side` × `side` pixels, box-filtered from a larger rendering."""
    size = side * OVERSAMPLE
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((side, side), Image.Resampling.BOX)


def _draw(parent: ET.Element, width: float, scale: float, inherited: dict[str, str]) -> None:
    for element in list(parent):
        name = element.tag.rpartition("}")[2]
        if name in IGNORED:
            parent.remove(element)
            continue
        style = inherited | _style(element)
        inner = scale * _scale(element.get("transform", ""))
        if name in SHAPES:
            hidden = float(style.get("opacity", 1)) * float(style.get("fill-opacity", 1)) < LEAST_OPACITY
            fill, stroke = style.get("fill", "black"), style.get("stroke", "none")
            for attribute in PAINT | {"stroke-width", "stroke-dasharray", "stroke-miterlimit"}:
                element.attrib.pop(attribute, None)
            if hidden or fill == stroke == "none":
                parent.remove(element)
                continue
            element.set("fill", "none" if fill == "none" else "#fff")
            element.set("stroke", "#000")
            element.set("stroke-width", f"{width / inner:.4f}")
            element.set("stroke-linejoin", "round")
        elif name not in ("clipPath", "mask"):  # those keep what they cut
            kept = {key: value for key, value in style.items() if key in ("fill", "stroke", "opacity", "fill-opacity")}
            for attribute in PAINT | {"stroke-width"}:
                element.attrib.pop(attribute, None)
            _draw(element, width, inner, kept)


def _style(element: ET.Element) -> dict[str, str]:
    given = {key: value for key, value in element.attrib.items() if key in PAINT}
    return given | dict(re.findall(r"([\w-]+)\s*:\s*([^;]+)", element.get("style", "")))


def _scale(transform: str) -> float:
    """Return by how much a transform enlarges lengths, on average over directions."""
    factor = 1.0
    for name, text in re.findall(r"(\w+)\s*\(([^)]*)\)", transform):
        values = [float(v) for v in re.findall(r"[-+]?(?:\d*\.\d+|\d+\.?)(?:[eE][-+]?\d+)?", text)]
        if name == "matrix":
            factor *= math.sqrt(abs(values[0] * values[3] - values[1] * values[2]))
        elif name == "scale":
            factor *= math.sqrt(abs(values[0] * values[-1]))
    return factor or 1.0
