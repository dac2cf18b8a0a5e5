"""Draws a batch of synthetic faces from their numbers.

Shapes are signed distances over the pixel grid with edges one pixel soft, painted back to front. The head is an
ellipsoid: turning it moves every feature drawn on it, and its normals take the light. Only + - * / sqrt, floor and
comparisons in float32, element by element: the same grey levels on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .synthetic_painting import (
    HAIR,
    IRIS,
    SKIN,
    Colour,
    Grid,
    Planes,
    blob,
    darken,
    distance,
    ellipse,
    inside,
    paint,
    ramp,
    scaled,
    triangle,
)
from .synthetic_parameters import OCCLUSIONS, Draws, sine

Mask = NDArray[np.bool_]  # (B, 1, 1)


class _Face:
    """One batch on the easel: the numbers, the grids in head coordinates, the planes painted so far."""

    def __init__(self, draws: Draws, size: int) -> None:
        self.p = {name: value[:, None, None] for name, value in draws.items()}
        p = self.p
        batch = next(iter(draws.values())).shape[0]
        steps = ((np.arange(size, dtype=np.float32) + 0.5) / np.float32(size) * 2 - 1).astype(np.float32)
        self.image_x = np.broadcast_to(steps[None, None, :], (batch, size, size))
        self.image_y = np.broadcast_to(steps[None, :, None], (batch, size, size))
        self.planes: Planes = np.empty((3, batch, size, size), dtype=np.float32)
        self.yaw, self.pitch = sine(p["yaw"]), sine(p["pitch"])
        roll = sine(p["roll"])
        turn = np.sqrt(1.0 - roll * roll)
        zoom = p["zoom"] * np.float32(1.04)
        self.pixel = np.float32(2.0 / size) / zoom
        # A face detector centres on the eyes and mouth, so the head moves against the turn.
        x = (self.image_x - p["shift_x"]) / zoom + 0.42 * self.yaw
        y = (self.image_y - p["shift_y"]) / zoom + 0.35 * self.pitch
        self.x, self.y = turn * x + roll * y, turn * y - roll * x
        self._turn()

    def _turn(self) -> None:
        """Unit normals of the head's ellipsoid, and the coordinates (u, v) of the unturned face under every pixel."""
        p = self.p
        a, b, middle = p["skull_width"] * 1.12, 1.0, -0.03
        nx, ny = self.x / a, (self.y - middle) / b
        nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.0))
        cos_yaw, cos_pitch = np.sqrt(1.0 - self.yaw * self.yaw), np.sqrt(1.0 - self.pitch * self.pitch)
        u = nx * cos_yaw - nz * self.yaw
        depth = nx * self.yaw + nz * cos_yaw
        self.u = a * u
        self.v = middle + b * (ny * cos_pitch - depth * self.pitch) + p["asymmetry"] * self.u
        self.side = np.abs(self.u)
        self.normal = (nx, ny, nz)

    def background(self) -> None:
        """A gradient of two muted colours, often with stripes, and a blob."""
        p = self.p
        slope = np.clip(
            0.5 + 0.4 * (self.image_x * p["back_angle"] + self.image_y * (1.0 - np.abs(p["back_angle"]))), 0.0, 1.0
        )
        stripes = np.maximum(p["back_stripes"], 0.0)
        slope = slope + 0.2 * (stripes > 0) * triangle(stripes * self.image_x * 0.5 + slope)
        for c, name in enumerate("rgb"):
            self.planes[c] = p[f"back_{name}"] + slope * (p[f"back_{name}2"] - p[f"back_{name}"])
        # Rooms and streets are greyer than random colours.
        grey = (self.planes[0] + self.planes[1] + self.planes[2]) / 3.0
        for c in range(3):
            self.planes[c] = grey + 0.55 * (self.planes[c] - grey)
        spot = ellipse(self.image_x - p["back_x"], self.image_y - p["back_y"], 0.35, 0.5, self.pixel * 6)
        paint(self.planes, spot * 0.6, (p["back_g2"], p["back_b"], p["back_r"]))

    def colours(self) -> None:
        """Skin and hair colour of this picture."""
        p = self.p
        r, g, b = ramp(p["skin_tone"] + p["tan"], SKIN)
        self.skin: Colour = (r + p["skin_red"], g, b - p["skin_yellow"])
        r, g, b = ramp(p["hair_tone"], HAIR)
        self.hair: Colour = (np.maximum(r + p["hair_red"], 0.02), g, np.maximum(b - p["hair_red"] * 0.5, 0.02))

    def behind(self) -> None:
        """Hair behind the head, neck, shirt, ears."""
        p, x, y, px = self.p, self.x, self.y, self.pixel
        volume = np.maximum(p["hair_volume"] + p["puff"], 0.0)
        streaks = 1.0 + p["hair_streak"] * triangle(x * 6.0 + y * 1.5)
        a, b = p["skull_width"] + volume * 1.1, p["skull_top"] + volume
        below = y - p["hair_length"]
        # Above its centre an ellipse, below it a curtain as wide, down to the hair's length.
        d_x, d_y = x / a, np.minimum(y + 0.05, 0.0) / b
        curtain = np.maximum((np.sqrt(d_x * d_x + d_y * d_y) - 1.0) * a, below * 0.7)
        shade: Colour = tuple(c * 0.8 * streaks for c in self.hair)  # type: ignore[assignment]
        paint(self.planes, inside(curtain + p["hair_wave"] * triangle(y * 3.0), px), shade)
        neck = inside(np.maximum(np.abs(x) - p["skull_width"] * 0.55, 0.5 - y), px)
        paint(self.planes, neck, scaled(self.skin, 0.72))
        paint(self.planes, inside(0.93 - y + 0.10 * np.abs(x), px), (p["shirt_r"], p["shirt_g"], p["shirt_b"]))
        ear_x = np.abs(x + 0.25 * self.yaw) - p["skull_width"] * 0.99
        ear_v = y - p["ear_y"]
        paint(
            self.planes, ellipse(ear_x, ear_v, p["ear_size"] * 0.6, p["ear_size"] * 1.25, px), scaled(self.skin, 0.85)
        )
        paint(self.planes, blob(ear_x, ear_v, p["ear_size"] * 0.4, p["ear_size"]), scaled(self.skin, 0.6))

    def head(self) -> None:
        """Skull and jaw: an ellipse tapered towards the chin, between round and square."""
        p = self.p
        x = self.x + 0.10 * self.yaw * np.maximum(self.y, 0.0)
        y = self.y + 0.03
        t = np.where(y < 0, y / p["skull_top"], y / p["chin"])
        low = np.maximum(t, 0.0)
        width = p["skull_width"] * (1.0 - p["jaw_taper"] * np.minimum(low * low, 1.3))
        x2, t2 = (x / width) * (x / width), t * t
        round_r, square_r = np.sqrt(x2 + t2), np.sqrt(np.sqrt(x2 * x2 + t2 * t2))
        mix = np.clip(p["jaw_square"], 0.0, 0.7) * np.minimum(low * 2.0, 1.0)
        self.head_mask = inside((round_r + mix * (square_r - round_r) - 1.0) * p["skull_width"], self.pixel)
        self.face: Planes = np.empty_like(self.planes)
        for c in range(3):
            self.face[c] = self.skin[c]

    def relief(self) -> None:
        """Light-independent modelling of the skin: sockets, cheeks, folds, chin, freckles, moles."""
        p, u, v, f = self.p, self.u, self.v, self.face
        eye_u = self.side - p["eye_x"]
        darken(f, np.maximum(p["socket"], 0.0) * blob(eye_u, v - p["eye_y"] + 0.05, 0.22, 0.20), 0.8, 1.0, 1.0)
        darken(f, np.maximum(p["cheek"], 0.0) * blob(self.side - 0.36, v - 0.24, 0.22, 0.20), 0.2, 1.0, 0.9)
        folds = np.maximum(p["folds"], 0.0)
        line = self.side - (p["nose_width"] + 0.03 + 0.55 * (v - p["nose_y"] + 0.04))
        darken(f, folds * 1.6 * blob(line, v - (p["nose_y"] + p["mouth_y"]) * 0.5, 0.035, 0.14))
        darken(f, folds * 1.2 * blob(eye_u, v - p["eye_y"] - 0.10, 0.12, 0.03))
        wrinkles = np.maximum(triangle(v * 9.0) - 0.4, 0.0) * blob(u, v + 0.42, 0.40, 0.16)
        darken(f, folds * wrinkles)
        darken(f, np.maximum(p["chin_cleft"], 0.0) * blob(u, v - 0.70, 0.03, 0.09))
        darken(f, 0.16 * blob(u, v - p["mouth_y"] - 0.135, 0.15, 0.05))
        phase = p["freckle_phase"]
        dots = np.maximum(triangle(u * 9.0 + phase + v * 3.0) * triangle(v * 10.0 - u * 2.0 + 3.0 * phase) - 0.35, 0.0)
        darken(f, 0.9 * np.maximum(p["freckles"], 0.0) * dots * blob(u, v - 0.14, 0.55, 0.26), 0.5, 0.9, 1.0)
        for k in (1, 2, 3):
            # The smaller the first mole, the fewer follow it.
            size = np.maximum(p["mole_size"] - 0.009 * (k - 1), 0.0)
            darken(f, 0.75 * inside(distance(u - p[f"mole{k}_u"], v - p[f"mole{k}_v"]) - size, self.pixel) * (size > 0))

    def beard(self) -> None:
        """Beard below a line that rises to the ears, and a moustache."""
        p, v, f = self.p, self.v, self.face
        line = p["beard_line"] - 0.5 * self.side
        soft = np.clip((v - line) * 8.0, 0.0, 1.0) * (
            1.0 - blob(self.u, v - p["mouth_y"], p["mouth_width"] * 1.15, 0.16)
        )
        paint(f, np.maximum(p["beard"], 0.0) * 0.9 * soft, self.hair)
        middle = (p["nose_y"] + 0.03) * 0.45 + p["mouth_y"] * 0.55
        lip = blob(self.u, v - middle - 0.6 * np.square(self.u), p["mouth_width"] * 1.5, 0.085)
        paint(f, np.clip(p["moustache"] * 1.8, 0.0, 0.9) * np.clip(lip * 2.5 - 0.5, 0.0, 1.0), self.hair)

    def eyes(self) -> None:
        """White, iris, pupil and gleam inside the lids, lid lines and crease, then the brows."""
        p, f, px = self.p, self.face, self.pixel
        du, v = self.side - p["eye_x"], self.v - p["eye_y"]
        dv = v + p["eye_slant"] * du
        a = p["eye_width"]
        t = du / a
        height = p["eye_height"] * np.clip(p["squint"], 0.25, 1.3)
        opening = height * (1.0 - t * t)
        alpha = inside(np.abs(dv) - opening, px)
        paint(f, alpha, (0.93, 0.91, 0.89))
        iris_u = self.u - np.where(self.u < 0, -1, 1).astype(np.float32) * p["eye_x"] - p["gaze"] * 0.05
        radius = distance(iris_u, dv + 0.005)
        iris = ramp(p["iris_tone"], IRIS)
        paint(f, alpha * inside(radius - p["iris"], px), iris)
        paint(f, alpha * inside(radius - p["iris"] * 0.45, px), (0.03, 0.03, 0.03))
        paint(f, alpha * inside(distance(iris_u + 0.018, dv + 0.022) - 0.012, px), (1.0, 1.0, 1.0))
        across = np.clip((1.08 - np.abs(t)) * 6.0, 0.0, 1.0)
        lid = np.maximum(p["lid"] + p["make_up"] * 0.05, 0.008)
        darken(f, 0.85 * across * inside(np.abs(dv + opening) - lid * 0.5, px), 0.9, 1.0, 1.0)
        darken(f, 0.30 * across * inside(np.abs(dv - opening) - 0.006, px))
        crease = np.abs(dv + opening * 1.1 + 0.045)
        darken(f, np.clip(p["crease"], 0.0, 0.7) * across * inside(crease - 0.006, px))
        self.brows(du, v)

    def brows(self, du: Grid, v: Grid) -> None:
        """Arched, tilted, thinner outwards; du, v from the eye's centre."""
        p = self.p
        t = (du - p["brow_inner"]) / p["brow_length"]
        line = v + p["brow_gap"] + p["brow_raise"] + p["brow_arch"] * (1.0 - t * t) + p["brow_tilt"] * du * 0.8
        thick = np.maximum(p["brow_thick"], 0.006) * (1.15 - 0.45 * t)
        cover = inside(np.maximum(np.abs(line) - thick, (np.abs(t) - 1.0) * 0.16), self.pixel * 1.4)
        colour = scaled(self.hair, 0.75)
        paint(self.face, np.clip(p["brow_dark"], 0.2, 1.0) * cover, colour)

    def nose(self) -> None:
        """Nostrils, wings and tip; the ridge only as the tilt of the normals that the light sees."""
        p, f, px = self.p, self.face, self.pixel
        tip = p["nose_y"]
        along = np.clip((self.v - p["eye_y"]) / (tip - p["eye_y"]), 0.0, 1.0)
        # What stands out of the face moves further when the head turns.
        u = self.u - 0.11 * self.yaw * along
        v = self.v - 0.10 * self.pitch * along
        half = p["nose_bridge"] + (p["nose_width"] - p["nose_bridge"]) * along * along
        q = np.clip(u / (half * 1.5), -1.0, 1.0)
        bump = 1.0 - q * q
        gate = np.clip(along * 4.0, 0.0, 1.0) * np.clip((tip + 0.05 - v) * 14.0, 0.0, 1.0)
        self.ridge = q * bump * gate * np.maximum(p["nose_relief"], 0.1) * 2.2
        flank = np.abs(q) * bump * gate
        darken(f, 0.22 * np.maximum(p["nose_relief"], 0.1) * flank, 0.8, 1.0, 1.0)
        side = np.abs(u)
        wing = distance(side - p["nose_width"] * 0.72, (v - tip) * 0.9) - p["nose_width"] * 0.36
        ring = inside(np.abs(wing) - 0.010, px * 1.5) * np.clip(
            (side - p["nose_width"] * 0.7) * 20.0 + (v - tip) * 14.0, 0.0, 1.0
        )
        darken(f, 0.32 * ring, 0.8, 1.0, 1.0)
        ball = distance(u, v - tip + 0.01) / p["nose_tip"]
        darken(
            f,
            0.25 * inside(np.abs(ball - 1.25) * p["nose_tip"] - 0.012, px * 2) * np.clip((v - tip) * 30.0, 0.0, 1.0),
            0.8,
            1.0,
            1.0,
        )
        paint(f, 0.22 * blob(u, v - tip + 0.03, p["nose_tip"] * 0.9, p["nose_tip"] * 0.9), (1.0, 0.97, 0.94))
        nostril = ellipse(side - p["nose_width"] * 0.42, v - tip - 0.035, p["nose_width"] * 0.23, 0.016, px)
        darken(f, 0.68 * nostril, 0.9, 1.0, 1.0)

    def mouth(self) -> None:
        """Two lips on a line that bends with the smile; open, it shows teeth."""
        p, f, px = self.p, self.face, self.pixel
        smile = p["smile"]
        t = self.u / (p["mouth_width"] * (1.0 + 0.12 * smile))
        t2 = np.minimum(t * t, 1.5)
        line = p["mouth_y"] + (p["mouth_bend"] - 0.035 * smile) * (t2 - 0.35)
        arc = 1.0 - t2
        gap = np.maximum(p["open"], 0.0) * arc
        bow = 1.0 - np.clip(p["cupid"], 0.0, 0.8) * np.square(np.clip(1.0 - np.abs(t) * 2.6, 0.0, 1.0))
        top = line - gap * 0.4 - np.maximum(p["lip_upper"], 0.010) * arc * bow
        bottom = line + gap * 0.6 + np.maximum(p["lip_lower"], 0.015) * arc
        lips = inside(np.maximum(top - self.v, self.v - bottom), px * 1.2)
        red = np.clip(p["lip_red"] + p["make_up"], 0.0, 0.9)
        r, g, b = self.skin
        paint(f, 0.9 * lips, (r * (0.92 - 0.08 * red), g * (0.72 - 0.35 * red), b * (0.76 - 0.30 * red)))
        inner = inside(np.maximum(line - gap * 0.4 - self.v, self.v - line - gap * 0.6), px) * (gap > 0.004)
        paint(f, inner, (0.16, 0.05, 0.06))
        teeth = inner * inside(self.v - line + gap * 0.4 - 0.045, px) * np.clip((0.85 - np.abs(t)) * 8.0, 0.0, 1.0)
        paint(f, teeth, (0.92, 0.90, 0.86))
        seam = inside(np.abs(self.v - line) - 0.006, px) * np.clip((1.04 - np.abs(t)) * 8.0, 0.0, 1.0)
        darken(f, 0.6 * seam * (gap <= 0.02), 0.8, 1.0, 1.0)

    def fringe(self) -> None:
        """The hair on the forehead and temples."""
        p = self.p
        wave = p["hair_wave"] * triangle(self.u * 2.7 + p["freckle_phase"])
        edge = (
            p["hairline"] + p["fringe"] + (p["hair_curve"] + 0.9) * np.square(self.u) + p["hair_side"] * self.u + wave
        )
        cover = inside(self.v - edge, self.pixel * 1.5)
        streaks = 1.0 + p["hair_streak"] * triangle(self.u * 7.0 + self.v * 2.0)
        shade: Colour = tuple(c * streaks for c in self.hair)  # type: ignore[assignment]
        paint(self.face, cover, shade)

    def light(self) -> None:
        """Ambient plus Lambert light on the ellipsoid and the nose; then the head goes over what is behind it."""
        p = self.p
        nx, ny, nz = self.normal
        lx, ly = p["light_x"], p["light_y"]
        strength = 1.0 / np.sqrt(1.0 + lx * lx + ly * ly)
        shade = (nx + self.ridge) * lx + ny * ly + nz
        shade = p["ambient"] + (1.25 - p["ambient"]) * np.maximum(shade * strength, 0.0)
        for c in range(3):
            self.face[c] *= shade
            self.planes[c] += self.head_mask * (self.face[c] - self.planes[c])

    def occlusion(self) -> None:
        """Glasses, sunglasses, mask, a hand-like bar, a hat: at most one per picture."""
        p = self.p
        tint: Colour = (p["occlusion_tone"], p["occlusion_hue"], 1.0 - 0.5 * (p["occlusion_tone"] + p["occlusion_hue"]))
        is_kind = [p["kind"] == k for k in range(len(OCCLUSIONS))]
        self.glasses(is_kind[1], is_kind[2], tint)
        self.mask(is_kind[3], tint)
        self.bar(is_kind[4])
        self.hat(is_kind[5], tint)

    def glasses(self, clear: Mask, dark: Mask, tint: Colour) -> None:
        """Square-round lenses; dark ones hide the eyes."""
        p, px = self.p, self.pixel
        du, dv = self.side - p["eye_x"] * 1.03, self.v - p["eye_y"] - 0.01
        x, y = du / 0.205, dv / (0.13 + 0.06 * p["occlusion_hue"])
        x2, y2 = x * x, y * y
        lens = (np.sqrt(np.sqrt(x2 * x2 + y2 * y2)) - 1.0) * 0.16
        bridge = inside(np.maximum(np.abs(dv + 0.02) - 0.012, self.side - 0.1), px)
        temples = inside(np.maximum(np.abs(dv + 0.03) - 0.012, 0.47 - self.side), px) * self.head_mask
        frame = np.maximum(np.maximum(inside(np.abs(lens) - 0.016, px), bridge), temples)
        colour: Colour = (0.05 + 0.25 * tint[0], 0.05 + 0.2 * tint[1], 0.05 + 0.2 * tint[2])
        paint(self.planes, frame * (clear | dark), colour)
        glass = inside(lens, px)
        paint(self.planes, 0.12 * glass * clear, (0.9, 0.95, 1.0))
        paint(self.planes, 0.94 * glass * dark, scaled(colour, 0.6))

    def mask(self, worn: Mask, tint: Colour) -> None:
        """From the bridge of the nose to the chin."""
        edge = np.maximum(self.p["nose_y"] - 0.14 + 0.25 * np.square(self.u) - self.v, self.v - 0.93)
        folds = 0.9 + 0.1 * triangle(self.v * 5.0)
        colour = (0.4 + 0.6 * tint[0], 0.4 + 0.6 * tint[1], 0.6 + 0.4 * tint[2])
        paint(self.planes, inside(edge, self.pixel) * self.head_mask * worn, scaled(colour, folds))

    def bar(self, held: Mask) -> None:
        """A hand-like bar from somewhere on the picture to its edge."""
        p = self.p
        slope = p["bar_angle"]
        norm = 1.0 / np.sqrt(1.0 + slope * slope)
        x, y = self.image_x - p["bar_x"], self.image_y - p["bar_y"]
        across, along = (x + slope * y) * norm, (y - slope * x) * norm
        bar = np.maximum(np.abs(across + 0.02 * triangle(along * 2.0)) - p["bar_width"], -0.3 - along)
        fingers = 0.85 + 0.15 * triangle(across / (p["bar_width"] * 0.67) + 0.25)
        paint(self.planes, inside(bar, self.pixel) * held, scaled(ramp(p["occlusion_tone"], SKIN), fingers))

    def hat(self, worn: Mask, tint: Colour) -> None:
        """Over hair and forehead, with a shadow under the rim."""
        rim = self.y + 0.42 - 0.12 * np.square(self.x)
        felt = np.maximum(rim, np.abs(self.x) - self.p["skull_width"] * 1.18)
        paint(self.planes, inside(felt, self.pixel) * worn, tint)
        darken(self.planes, 0.5 * inside(np.abs(rim) - 0.03, self.pixel) * self.head_mask * worn)

    def expose(self) -> None:
        """Exposure, colour cast and a quadratic tone curve, to grey levels in [0, 255]."""
        p = self.p
        for c, gain in enumerate((1.0 + p["warmth"], 1.0 + p["green"], 1.0 - p["warmth"])):
            plane = np.clip(self.planes[c] * (p["exposure"] * gain), 0.0, 1.0)
            self.planes[c] = 255.0 * plane * (1.0 + np.clip(p["contrast"], -0.6, 0.6) * (plane - 1.0))


def draw(draws: Draws, size: int) -> Planes:
    """Undegraded pictures: the draws of identity and picture, each (B,), to grey levels (3, B, S, S) in [0, 255]."""
    face = _Face(draws, size)
    face.background()
    face.colours()
    face.behind()
    face.head()
    face.relief()
    face.beard()
    face.mouth()
    face.eyes()
    face.nose()
    face.fringe()
    face.light()
    face.occlusion()
    face.expose()
    return face.planes
