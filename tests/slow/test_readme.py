"""The examples of README and docs run as they stand; those of the guide on smaller networks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import fill_examples
import numpy as np
import pytest

from frostline.data import image_sets
from frostline.experiments import backbones

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
native = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "torch", reason="torch has a process of its own"
)


def shown(file: str) -> fill_examples.Example:
    """The README's example on the network of ``file``."""
    found = {example.file: example for example in fill_examples.examples(README.read_text())}
    return found[file]


def guide(*, torch: bool) -> str:
    """The Python blocks of the guide as one program: those of native PyTorch, or the others."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide.md").read_text(), re.DOTALL)
    return "\n".join(block for block in blocks if ("import torch" in block) is torch)


def test_the_readme_fits_on_a_few_screens() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    # Each block of Python shows its output, so none is left that no test runs.
    assert text.count("```python") == len(list(fill_examples.examples(text))) == 2


@native
def test_the_readme_shows_what_pytorch_users_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import frostline as fl

    seen: list[float] = []
    recalibrate = fl.recalibrate

    def accuracy(net: Any, x: Any) -> float:  # torch's own, not ours; labels alternate
        with torch.no_grad():
            return float((net(x).argmax(1) == torch.arange(len(x)) % 2).float().mean())

    def noted(net: Any, x: Any) -> Any:
        seen.extend([accuracy(net.train(), x), accuracy(net.eval(), x)])
        change = recalibrate(net, x)
        seen.append(accuracy(net, x))
        return change

    example = shown("examples/symptom_torch.py")
    assert example.code.count("\n") == 6
    monkeypatch.setattr(fl, "recalibrate", noted)
    assert fill_examples.words(example.run()) == fill_examples.words(example.shown)
    assert seen == [1.0, 0.5, 1.0]


def test_the_readme_shows_what_keras_users_see() -> None:
    example = shown("examples/symptom_keras.py")
    assert example.code.count("\n") <= 6
    assert fill_examples.words(example.run()) == fill_examples.words(example.shown)


def test_an_output_typed_by_hand_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text("value = 3\n")
    text = (
        "```python\nprint('two', value, 'a  b')\n```\n\n<!-- output names.py -->\n"
        "```text\n```\n<!-- end output -->\n"
    )
    made = fill_examples.filled(text, tmp_path)
    assert "```text\ntwo 3 a  b\n```\n" in made
    assert fill_examples.filled(made.replace("two 3", "typed 3"), tmp_path) == made
    machine = made.replace("two 3", "two 4")  # numbers may be another machine's
    assert fill_examples.filled(machine, tmp_path) == machine


def test_the_keras_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "cache"))
    data = image_sets.load("digits", classes=["3", "8"], per_class=16, image_size=16)
    model = backbones.build("tiny", image_size=16, classes=2, weights=None)
    names: dict[str, Any] = {
        "model": model,
        "x": backbones.preprocess("tiny", data.images),
        "y": data.labels,
    }
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = model.get_weights()
    code = guide(torch=False)
    code = code.replace("block12_expand_conv", "block2a_conv").replace("epochs=10", "epochs=1")
    exec(code, names)
    assert "froze" in str(names["change"])
    assert (tmp_path / "report.html").is_file()
    moved = {
        weight.path
        for weight, old in zip(model.weights, before, strict=True)
        if not np.array_equal(weight, old)
    }
    assert not any("stem" in path or "block1" in path for path in moved)
    assert {"head/kernel", "block2a_bn/moving_mean"} <= moved


@native
def test_the_torch_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 3, 8, 8, generator=generator) * 2 + 1
    y = (x.mean(dim=(1, 2, 3)) > 1).long()

    def block(inputs: int, outputs: int) -> Any:
        return torch.nn.Sequential(
            torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(outputs),
            torch.nn.ReLU(),
        )

    net = torch.nn.Sequential()
    net.add_module("layer1", block(3, 8))
    net.add_module("layer2", block(8, 8))
    net.add_module("pool", torch.nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", torch.nn.Flatten())
    net.add_module("head", torch.nn.Linear(8, 2))

    def train(module: Any) -> None:
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), 0.05)
        for start in range(0, 48, 16):
            optimizer.zero_grad()
            part = slice(start, start + 16)
            torch.nn.functional.cross_entropy(module(x[part]), y[part]).backward()
            optimizer.step()

    before = {name: value.clone() for name, value in net.state_dict().items()}
    exec(guide(torch=True), {"net": net, "x": x, "y": y, "train": train})
    moved = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    assert not any(name.startswith("layer1") for name in moved)
    assert {"layer2.1.running_mean", "head.weight"} <= moved
    assert "1 checks of 2 BN layers" in capsys.readouterr().out


def recipe(page: str, title: str = "") -> str:
    """The block of a page behind a title: at most five lines of code, as promised, and imports."""
    text = (DOCS / page).read_text()
    found = re.search(r"```python\n(.*?)```", text[text.index(title) :], re.DOTALL)
    assert found is not None
    code = [line for line in found[1].splitlines() if line and "import" not in line]
    assert len(code) <= 5
    return found[1]


@native
@pytest.mark.filterwarnings("ignore")
def test_the_lightning_recipe_runs(tmp_path: Path) -> None:
    import torch

    lightning = pytest.importorskip("pytorch_lightning")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 5, generator=generator) * 2 + 1
    y = (x.mean(dim=1) > 1).long()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4),
                torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2),
            )  # fmt: skip
            self.seen: list[Any] = []

        def training_step(self, batch: Any, _: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, *_: Any) -> None:
            self.seen.append([self.net[index].running_mean.clone() for index in (1, 3)])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.1)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    settings = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    ) | {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    names: dict[str, Any] = {
        "module": module, "x": x, "y": y, "loss": torch.nn.functional.cross_entropy,
        "loader": loader, "validation_loader": loader,
        "settings": {**settings, "default_root_dir": tmp_path},
    }  # fmt: skip
    exec(recipe("lightning.md"), names)
    assert "bn/gap" in names["trainer"].callback_metrics
    with torch.no_grad():
        inside = module.net.eval()[:3](x)
    frozen, thawed = module.seen[-1]
    assert torch.equal(frozen, torch.zeros(4))
    np.testing.assert_allclose(thawed, inside.mean(0), atol=1e-5)
    assert not torch.allclose(module.net[3].running_mean, thawed, atol=1e-3)  # back after


def test_every_code_of_the_pages_is_one() -> None:
    from frostline.rules import all_rules
    from frostline.types.codes import CauseCode

    known = {rule.code for rule in all_rules()} | {code.value for code in CauseCode}
    for page in ("symptoms.md", "faq.md"):
        text = (DOCS / page).read_text()
        codes = set(re.findall(r"FL\d{3}|(?<=`)[A-Z]{5,}(?:_[A-Z]+)*(?=`)", text))
        assert len(codes) >= 2, page
        assert codes <= known, page


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in fill_examples.documents():
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
