"""Images by procedure: an image id gives a scene, and a scene gives pixels.

A scene is a background and a few objects of five categories, each with its own place, size, orientation, colours
and contrast. Places and sizes are fractions of the image side, so that a scene can be drawn at any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from featcache.simulate.config import generator

CATEGORIES = ("face", "body", "place", "word", "other")
BACKGROUNDS = ("texture", "landscape", "interior", "grating", "gradient")
NOISE_SIDE = 64  # pixels per side of the background's noise, before it is enlarged
# Ellipses are drawn as polygons of these corners, which can be turned.
CIRCLE = tuple((math.cos(math.pi * k / 16), math.sin(math.pi * k / 16)) for k in range(32))

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene."""

    category: str  # one of CATEGORIES
    variant: int  # 0 or 1: two kinds within the category
    x: float  # centre from the left, fraction of the image side
    y: float  # centre from the top, fraction of the image side
    size: float  # side of its square, fraction of the image side
    angle: float  # anticlockwise, degrees
    contrast: float  # opacity in (0, 1]
    colours: tuple[Colour, Colour, Colour]  # RGB, 0 to 255
    details: tuple[float, ...]  # eight numbers in [0, 1] that shape its parts

    @property
    def mass(self) -> float:
        """Visibility: contrast times the square root of the size, about 0.3 to 1."""
        return self.contrast * float(np.sqrt(self.size / 0.5))


@dataclass(frozen=True)
class Scene:
    """Description of one image, complete enough to draw it."""

    background: str  # one of BACKGROUNDS
    colours: tuple[Colour, Colour, Colour]  # RGB, 0 to 255
    horizon: float  # from the top, fraction of the image side
    angle: float  # of gratings and gradients, radians
    cycles: float  # of gratings, per image side
    noise: np.ndarray  # (NOISE_SIDE, NOISE_SIDE) float32, as by `_fractal`, standard deviation 1
    noise_level: float  # standard deviation on the 0 to 255 scale
    roughness: float  # in [0, 1]; the larger, the slower the spectrum of the noise falls
    objects: tuple[SceneObject, ...]  # largest first: the order of drawing


def compose(seed: int, image_id: int) -> Scene:
    """Scene of an image id: a pure function of its two arguments."""
    rng = generator(seed, "scene", image_id)
    roughness = float(rng.uniform())
    background = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=(0.3, 0.25, 0.2, 0.1, 0.15))]
    # Each image prefers some categories, so that images differ in content as a whole.
    theme = rng.dirichlet(np.full(len(CATEGORIES), 0.6))
    objects = [_compose_object(rng, theme) for _ in range(rng.integers(1, 6))]
    return Scene(
        background=background,
        colours=(_colour(rng, 30, 225), _colour(rng, 30, 225), _colour(rng, 30, 225)),
        horizon=float(rng.uniform(0.3, 0.7)),
        angle=float(rng.uniform(0, np.pi)),
        cycles=float(rng.uniform(3, 14)),
        noise=_fractal(rng, exponent=2.2 - 1.2 * roughness),
        noise_level=float(rng.uniform(4, 26)),
        roughness=roughness,
        objects=tuple(sorted(objects, key=lambda thing: -thing.size)),
    )


def draw(scene: Scene, image_size: int) -> np.ndarray:
    """Pixels of a scene: (image_size, image_size, 3) uint8."""
    image = Image.fromarray(_background(scene, image_size))
    for thing in scene.objects:
        patch = _object_patch(thing, image_size)
        corner = (round(thing.x * image_size - patch.width / 2), round(thing.y * image_size - patch.height / 2))
        image.paste(patch, corner, patch)
    # 32 levels per channel: the eye sees no loss, and the compressed file has half the bytes.
    return np.asarray(image) & 0xF8


# ---------------------------------------------------------------------------------------------- composing


def _compose_object(rng: np.random.Generator, theme: np.ndarray) -> SceneObject:
    category = CATEGORIES[rng.choice(len(CATEGORIES), p=theme)]
    upright = category in ("face", "place", "word")
    return SceneObject(
        category=category,
        variant=int(rng.integers(2)),
        x=float(rng.uniform(0.12, 0.88)),
        y=float(rng.uniform(0.12, 0.88)),
        size=float(rng.uniform(0.16, 0.55)),
        angle=float(rng.normal(0, 8 if upright else 35)),
        contrast=float(rng.uniform(0.45, 1.0)),
        colours=(_skin(rng) if category in ("face", "body") else _colour(rng), _colour(rng), _colour(rng)),
        details=tuple(rng.uniform(size=8).tolist()),
    )


def _colour(rng: np.random.Generator, low: int = 0, high: int = 256) -> Colour:
    red, green, blue = rng.integers(low, high, size=3).tolist()
    return red, green, blue


def _skin(rng: np.random.Generator) -> Colour:
    shade = rng.uniform(0.35, 1.0)
    red, green, blue = (np.array([240, 195, 165]) * shade).astype(int).tolist()
    return red, green, blue


def _fractal(rng: np.random.Generator, exponent: float) -> np.ndarray:
    """Noise whose amplitude falls as 1 / frequency ** exponent: (NOISE_SIDE, NOISE_SIDE) float32."""
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.rfftfreq(NOISE_SIDE)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((NOISE_SIDE, NOISE_SIDE))) / frequency**exponent
    noise = np.fft.irfft2(spectrum, s=(NOISE_SIDE, NOISE_SIDE))
    return np.asarray((noise / noise.std()).astype(np.float32))


# --------------------------------------------------------------------------------------------- background


def _background(scene: Scene, size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    noise = np.asarray(Image.fromarray(scene.noise).resize((size, size), Image.Resampling.BICUBIC))
    pixels = BACKGROUND_PAINTERS[scene.background](scene, x, y, noise)
    return np.clip(pixels + scene.noise_level * noise[..., None], 0, 255).astype(np.uint8)


def _mix(scene: Scene, share: np.ndarray, first: int = 0, second: int = 1) -> np.ndarray:
    """Colour ``first`` where ``share`` is 0, ``second`` where it is 1."""
    start, stop = (np.array(scene.colours[number], dtype=np.float32) for number in (first, second))
    return np.asarray(start + (stop - start) * np.clip(share, 0, 1)[..., None])


def _paint_texture(scene: Scene, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return _mix(scene, 0.5 + 0.4 * noise)


def _paint_landscape(scene: Scene, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    ridge = scene.horizon + 0.04 * noise[noise.shape[0] // 2]
    sky = _mix(scene, y / scene.horizon, 0, 1)
    ground = _mix(scene, 0.3 + 0.3 * noise, 2, 1)
    return np.where((y > ridge)[..., None], ground, sky)


def _paint_interior(scene: Scene, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A room in one-point perspective: the back wall, and tiles that grow towards the viewer."""
    dx, dy = x - 0.5, y - scene.horizon
    depth = np.maximum(np.abs(dx), np.abs(dy))
    tiles = np.floor(0.6 / np.maximum(depth, 0.12)) + np.floor(4 * np.arctan2(dy, dx))
    walls = _mix(scene, 0.4 + 0.3 * (tiles % 2), 0, 1) * (0.5 + depth)[..., None]
    return np.where((depth < 0.15)[..., None], np.array(scene.colours[2], dtype=np.float32), walls)


def _paint_grating(scene: Scene, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    along = np.cos(scene.angle) * x + np.sin(scene.angle) * y
    return _mix(scene, 0.5 + 0.5 * np.sin(2 * np.pi * scene.cycles * along))


def _paint_gradient(scene: Scene, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return _mix(scene, 0.5 + np.cos(scene.angle) * (x - 0.5) + np.sin(scene.angle) * (y - 0.5))


BACKGROUND_PAINTERS: dict[str, Callable[[Scene, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "texture": _paint_texture,
    "landscape": _paint_landscape,
    "interior": _paint_interior,
    "grating": _paint_grating,
    "gradient": _paint_gradient,
}


# ------------------------------------------------------------------------------------------------ objects


class Pen:
    """Draws on a transparent square, in coordinates from -1 to 1 (y downwards), turned anticlockwise by degrees."""

    def __init__(self, side: int, angle: float) -> None:
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self._half = side / 2
        self._cos, self._sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.polygon([(x + rx * dx, y + ry * dy) for dx, dy in CIRCLE], colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self._draw.polygon(self._pixels(points), fill=colour)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        self._draw.line(self._pixels(points), fill=colour, width=max(1, round(width * self._half)), joint="curve")

    def _pixels(self, points: list[Point]) -> list[Point]:
        half, cos, sin = self._half, self._cos, self._sin
        return [((x * cos + y * sin + 1) * half, (y * cos - x * sin + 1) * half) for x, y in points]


def _object_patch(thing: SceneObject, image_size: int) -> Image.Image:
    """Picture of an object on a transparent square, drawn twice as large and then reduced, for smooth edges."""
    pen = Pen(2 * max(4, round(thing.size * image_size)), thing.angle)
    OBJECT_PAINTERS[thing.category](pen, thing)
    patch = pen.image.reduce(2)
    opacity = np.rint(np.arange(256) * thing.contrast).astype(int).tolist()
    patch.putalpha(patch.getchannel("A").point(opacity))
    return patch


def _paint_face(pen: Pen, thing: SceneObject) -> None:
    skin, hair, iris = thing.colours
    eye_y, gap, mouth = -0.15 + 0.1 * thing.details[0], 0.25 + 0.08 * thing.details[1], 0.1 + 0.2 * thing.details[2]
    pen.ellipse(0, -0.15, 0.72, 0.8, hair)
    if thing.variant:  # long hair
        pen.box(-0.72, -0.1, 0.72, 0.8, hair)
    pen.ellipse(0, 0.08, 0.6, 0.82, skin)
    for side in (-1, 1):
        pen.ellipse(side * gap, eye_y, 0.15, 0.09, (245, 245, 245))
        pen.ellipse(side * gap, eye_y, 0.07, 0.08, iris)
        pen.ellipse(side * gap, eye_y, 0.035, 0.04, (10, 10, 10))
        pen.line([(side * (gap - 0.15), eye_y - 0.16), (side * (gap + 0.15), eye_y - 0.2)], 0.06, hair)
    shadow = _shade(skin, 0.65)
    pen.line([(0, eye_y + 0.05), (-0.08, 0.32), (0.06, 0.34)], 0.05, shadow)
    pen.ellipse(0, 0.58, 0.25, mouth / 2, (150, 40, 45))


def _paint_body(pen: Pen, thing: SceneObject) -> None:
    skin, shirt, trousers = thing.colours
    pen.ellipse(0, -0.78, 0.15, 0.19, skin)
    if thing.variant:  # a skirt
        pen.polygon([(-0.15, -0.05), (0.15, -0.05), (0.42, 0.5), (-0.42, 0.5)], trousers)
    for side, arm, leg in ((-1, thing.details[0], thing.details[1]), (1, thing.details[2], thing.details[3])):
        elbow = (side * (0.35 + 0.2 * arm), -0.2 - 0.5 * (arm - 0.5))
        pen.line([(side * 0.2, -0.48), elbow, (side * (0.4 + 0.4 * arm), 0.1 - 0.9 * arm)], 0.13, skin)
        knee = (side * (0.12 + 0.25 * leg), 0.42)
        pen.line([(side * 0.12, 0.0), knee, (side * (0.12 + 0.35 * leg), 0.95)], 0.17, _shade(trousers, 0.8))
    pen.polygon([(-0.26, -0.55), (0.26, -0.55), (0.18, 0.08), (-0.18, 0.08)], shirt)


def _paint_place(pen: Pen, thing: SceneObject) -> None:
    wall, roof, glass = thing.colours
    half = 0.4 + 0.15 * thing.details[0] if thing.variant else 0.75 + 0.2 * thing.details[0]
    top = -0.95 if thing.variant else -0.3
    pen.box(-half, top, half, 0.95, wall)
    if not thing.variant:  # a house rather than a tower
        pen.polygon([(-half - 0.05, top), (half + 0.05, top), (0, -0.95)], roof)
    columns, rows = 2 + int(3 * thing.details[1]), (5 if thing.variant else 2) + int(3 * thing.details[2])
    step_x, step_y = 2 * half / columns, (0.6 - top) / rows
    for column in range(columns):
        for row in range(rows):
            left, upper = -half + (column + 0.25) * step_x, top + (row + 0.25) * step_y
            pen.box(left, upper, left + 0.5 * step_x, upper + 0.55 * step_y, glass)
    pen.box(-0.1, 0.62, 0.1, 0.95, _shade(roof, 0.6))


# Letters as strokes in a unit cell, so that no font file decides what an image looks like.
GLYPHS: tuple[tuple[tuple[Point, ...], ...], ...] = (
    (((0, 1), (0.5, 0), (1, 1)), ((0.2, 0.6), (0.8, 0.6))),
    (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.8, 0.5))),
    (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),
    (((0, 0), (0, 1), (1, 1)),),
    (((0, 1), (0, 0), (1, 1), (1, 0)),),
    (((0, 0), (1, 0), (1, 1), (0, 1), (0, 0)),),
    (((0, 1), (0, 0), (1, 0), (1, 0.5), (0, 0.5)),),
    (((1, 0), (0, 0), (0, 0.5), (1, 0.5), (1, 1), (0, 1)),),
    (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),
    (((0, 0), (0.5, 1), (1, 0)),),
    (((0, 0), (1, 1)), ((1, 0), (0, 1))),
    (((0, 0), (1, 0), (0, 1), (1, 1)),),
)


def _paint_word(pen: Pen, thing: SceneObject) -> None:
    ink, paper, _ = thing.colours
    if sum(ink) > sum(paper):
        ink, paper = paper, ink
    length = 3 + int(5 * thing.details[0])
    lines = 2 if thing.variant else 1
    pen.box(-1, -0.42 * lines, 1, 0.42 * lines, _shade(paper, 1.3))
    for line in range(lines):
        for position in range(length):
            # Eight details give words of any length and kind.
            glyph = GLYPHS[int(thing.details[position] * 997 + 31 * line) % len(GLYPHS)]
            _write_glyph(
                pen, glyph, -0.9 + 1.8 * position / length, 0.84 * (line - lines / 2) + 0.12, 1.3 / length, ink
            )


def _write_glyph(
    pen: Pen, glyph: tuple[tuple[Point, ...], ...], left: float, top: float, width: float, ink: Colour
) -> None:
    for stroke in glyph:
        pen.line([(left + width * x, top + 0.6 * y) for x, y in stroke], 0.08, ink)


def _paint_other(pen: Pen, thing: SceneObject) -> None:
    body, stripe, spot = thing.colours
    if thing.variant:  # a star
        count = 5 + int(5 * thing.details[0])
        turns = np.arange(2 * count) * np.pi / count
        radii = np.where(np.arange(2 * count) % 2, 0.35 + 0.2 * thing.details[1], 0.95)
        pen.polygon(list(zip((radii * np.cos(turns)).tolist(), (radii * np.sin(turns)).tolist(), strict=True)), body)
        pen.ellipse(0, 0, 0.2, 0.2, spot)
        return
    pen.ellipse(0, 0, 0.9, 0.9, body)
    for offset in np.linspace(-0.5, 0.5, 2 + int(3 * thing.details[0])).tolist():
        reach = 0.9 * float(np.sqrt(1 - (offset / 0.9) ** 2)) - 0.05
        pen.line([(-reach, offset), (reach, offset)], 0.12, stripe)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue


OBJECT_PAINTERS: dict[str, Callable[[Pen, SceneObject], None]] = {
    "face": _paint_face,
    "body": _paint_body,
    "place": _paint_place,
    "word": _paint_word,
    "other": _paint_other,
}
