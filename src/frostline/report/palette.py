"""Every colour of the report: of pictures, of the page in light, dark and print, of the terminal.

The page and its pictures use Okabe and Ito's colours, told apart with any colour vision. A colour
never stands alone: a word, a mark or an axis beside it says the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """One colour in every medium.

    Attributes:
        variable: CSS variable of the page.
        light: On a light ground, in pictures too.
        dark: On a dark ground.
        paper: In print.
    """

    variable: str
    light: str
    dark: str
    paper: str


COLOURS = (
    Colour("--fl-ink", "#1b2733", "#e3e9ef", "#000"),
    Colour("--fl-quiet", "#5b6873", "#9aa8b4", "#444"),
    Colour("--fl-rule", "#dbe1e6", "#2c3843", "#ccc"),
    Colour("--fl-band", "#f3f6f8", "#19222b", "#f3f3f3"),
    Colour("--fl-ground", "#fefefe", "#10171e", "#fff"),
    Colour("--fl-frozen", "#0072b2", "#5cb3e6", "#0072b2"),
    Colour("--fl-trains", "#b84e00", "#f0945a", "#b84e00"),
    Colour("--fl-good", "#00795c", "#45c49c", "#00795c"),
    Colour("--fl-bad", "#a8324a", "#f28b9f", "#a8324a"),
)
INK, QUIET, RULE, BAND, GROUND, FROZEN, TRAINS, GOOD, BAD = (colour.light for colour in COLOURS)

#: Severity -> colour of its word in a terminal.
TERMINAL = {"error": "red", "warning": "yellow", "info": "cyan"}


def stylesheet() -> str:
    """Return the CSS that gives the variables their colours in each medium."""
    light, dark, paper = (
        "; ".join(f"{colour.variable}: {getattr(colour, medium)}" for colour in COLOURS)
        for medium in ("light", "dark", "paper")
    )
    return (
        f".frostline {{ {light}; }}\n"
        f"@media (prefers-color-scheme: dark) {{ .frostline {{ {dark}; }} }}\n"
        f"@media print {{ .frostline {{ {paper}; }} }}\n"
    )
