"""One encoded image to pixels: a short list of formats, and a limit before anything is decoded."""

from __future__ import annotations

import io
import re

import numpy as np

from frostline.data.catalogue import optional
from frostline.types import Array, DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})

#: What Pillow may take the bytes for. Others hand them to a program (EPS to Ghostscript), open
#: further files, or exist only as targets of attacks.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")

#: Width times height of the largest image that is decoded: 192 MiB as RGB.
MOST_PIXELS = 1 << 26


def decode_image(data: bytes, where: str) -> Array:
    """Decode one encoded image to RGB, uint8 ``(h, w, 3)``.

    Raises:
        DataError: The bytes are no image of a known format, are cut short, declare more than
            `MOST_PIXELS`, or hold more than 8 bits per channel.
    """
    image_module = optional("PIL.Image", "Reading images")
    try:
        with image_module.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"{where}: an image has at most {MOST_PIXELS:,} pixels. "
                    f"Received: {width} x {height}"
                )
            if image.mode.startswith(("I", "F")):
                # convert("RGB") would clip these to white without a word.
                raise DataError(f"{where}: only 8-bit images are read. Received: {image.mode}")
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        reason = re.sub(r" <_io\.BytesIO.*>", "", str(error)) or type(error).__name__
        raise DataError(f"{where}: not a readable image ({reason})") from error
