"""Make docs/images/report.png: the page of a real diagnosis, as a browser shows it.

    python scripts/picture_report.py                   # train, diagnose, draw: minutes
    python scripts/picture_report.py --report r.json   # draw a report that is there

The network is the row ``batch`` of ``frostline experiment overfit``: a pretrained
EfficientNet-Lite0 fine-tuned on 200 images of cats and dogs (CIFAR-10) at 128², whose frozen BN
layers use batch statistics in training, as Keras 2.1.3 to 2.2.4 did. Needs Chromium and the extra
``experiments``.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import chromium
import numpy as np
from PIL import Image

import frostline as fl
from frostline.data import image_sets
from frostline.experiments import backbones
from frostline.experiments.overfit import default_boundary

BACKBONE, SIDE, PER_CLASS, BATCH, EPOCHS, SEED = "efficientnet-lite0", 128, 100, 32, 10, 0
WIDTH, HEIGHT, SCALE = 800, 1240, 1.5


def main() -> int:
    """Parse, diagnose unless a report is given, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="../shared/data", help="CIFAR-10 as parquet files")
    parser.add_argument("--report", type=Path, help="report.json of a diagnosis")
    parser.add_argument("--folder", type=Path, default=Path("runs/report"), help="for its files")
    parser.add_argument("--output", type=Path, default=Path("docs/images/report.png"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.report is not None:
        report = fl.Report.from_dict(json.loads(options.report.read_text(encoding="utf-8")))
    else:
        report = diagnosed(options.data)
        report.save(options.folder / "report.json")
        report.save(options.folder / "report.txt")
    page = report.save(options.folder / "report.html")
    picture(page).save(options.output, optimize=True)
    print(f"{options.output}: {report.verdict}")
    return 0


def diagnosed(source: str) -> fl.Report:
    """Train the row ``batch`` with public functions alone, and diagnose it."""
    import keras

    images = image_sets.load(
        source, classes=["cat", "dog"], per_class=PER_CLASS, image_size=SIDE, seed=SEED
    )
    x = np.asarray(backbones.preprocess(BACKBONE, images.images), dtype=np.float32)
    y = images.labels.astype(np.int32)
    keras.utils.set_random_seed(SEED)
    model = backbones.build(BACKBONE, image_size=SIDE, classes=2)
    model = fl.convert(model, policy="batch")
    fl.freeze(model, until=default_boundary(BACKBONE))
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=2)
    return fl.diagnose(model, (x, y), history=history, batch_size=BATCH, seed=SEED, verbose=2)


def picture(page: Path) -> Any:
    """Return two columns: the top of the page, and from "Where" on, in the dark theme."""
    columns = []
    with chromium.Browser() as browser:
        for dark in (False, True):
            visit = browser.open(page, width=WIDTH, dark=dark)
            where = "[...document.querySelectorAll('h2')].find(e => e.innerText === 'Where')"
            top = f"{where}.getBoundingClientRect().top + scrollY - 60" if dark else "0"
            top = browser.evaluate(visit, top)
            shot = browser.screenshot(visit, top=max(0, top), height=HEIGHT, scale=SCALE)
            columns.append(Image.open(io.BytesIO(shot)).convert("RGB"))
    wide, high = columns[0].size
    both = Image.new("RGB", (2 * wide, high))
    for position, column in enumerate(columns):
        both.paste(column, (position * wide, 0))
    return both.quantize(128)


if __name__ == "__main__":
    raise SystemExit(main())
