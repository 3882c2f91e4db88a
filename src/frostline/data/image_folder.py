"""A folder of images: one sub-folder per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from frostline.data.catalogue import Catalogue, Split, split_of_name
from frostline.data.decoding import SUFFIXES, decode_image
from frostline.types import Array, DataError

#: No image of at most `MOST_PIXELS` has a larger file.
_MOST_BYTES = 1 << 29


def image_folder(root: Path, source: str, split: Split) -> Catalogue:
    """One sub-folder per class, below ``train``/``test`` folders where there are such."""
    splits = {child.name: split_of_name(child.name) for child in _subfolders(root)}
    has_splits = bool(splits) and "all" not in splits.values()
    tops = [root / n for n, s in splits.items() if split in ("all", s)] if has_splits else [root]
    if not tops:
        raise DataError(
            f"{source}: no folder of the split {split!r}. Received: {', '.join(splits)}"
        )
    tops = tops if split == "all" else tops[:1]
    found = [
        (child.name, file)
        for top in tops
        for child in _subfolders(top)
        for file in sorted(child.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not found:
        loose = any(file.suffix.lower() in SUFFIXES for file in root.iterdir())
        reason = "its images are not in one sub-folder per class" if loose else "no images in it"
        raise DataError(f"{reason}; expected FOLDER/CLASS/*.jpg|png|... Received: {source}")
    names = tuple(sorted({name for name, _ in found}))
    numbers = {name: number for number, name in enumerate(names)}

    def decode(rows: Sequence[int], prepare: Callable[[Array], Array]) -> list[Array]:
        images = []
        for row in rows:
            file = found[row][1]
            shown = str(Path(source) / file.relative_to(root))
            try:
                if file.stat().st_size > _MOST_BYTES:
                    raise DataError(f"{shown}: larger than any image, {file.stat().st_size} bytes")
                data = file.read_bytes()
            except OSError as error:
                raise DataError(f"{shown}: cannot be read ({error.strerror})") from error
            images.append(prepare(decode_image(data, shown)))
        return images

    return Catalogue(
        labels=np.array([numbers[name] for name, _ in found], dtype=np.int64),
        class_names=names,
        decode=decode,
        has_splits=has_splits and split != "all",
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
