"""Programs in torch: models of nine libraries, and plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .program import Program, entry
from .torchvision_operators import load as torchvision

CLASSES = 4


def images(count: int = 8, side: int = 64, channels: int = 3) -> Any:
    """Images whose statistics differ from one sample to the next."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, side, side, generator=generator)
    return x * (0.5 + torch.arange(count).view(-1, 1, 1, 1) / count) + 0.3


def labels(count: int = 8) -> Any:
    return torch.arange(count) % CLASSES


def warmed(model: Any, step: Callable[[Any], Any], batches: Sequence[Any], times: int = 2) -> Any:
    """Let the statistics move a little, as a short training does; parameters stay."""
    model.train()
    with torch.no_grad():
        for _ in range(times):
            for batch in batches:
                step(batch)
    return model


def classifier(
    model: Any, *, side: int = 64, channels: int = 3, logits: Callable[[Any], Any] | None = None
) -> Program:
    """(x, y) batches and cross-entropy; ``logits`` picks them from what the model returns."""
    pick = logits or (lambda out: out)
    x, y = images(8, side, channels), labels(8)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    warmed(model, lambda batch: model(batch[0]), batches)

    def loss(out: Any, target: Any) -> Any:
        return F.cross_entropy(pick(out), target)

    return Program(
        model=model,
        batches=batches,
        ask=lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss if logits else F.cross_entropy},
        sample=x[:4],
    )


def mapped(model: Any, batches: Sequence[Any], *, sample: Any = None) -> Program:
    """Hugging Face: mappings with the labels inside, the loss among the outputs."""
    warmed(model, lambda batch: model(**batch), batches)
    return Program(
        model=model,
        batches=batches,
        ask=lambda m, b: m(**b).loss,
        call=lambda m, b: m(**{k: v for k, v in b.items() if k not in ("labels", "future_values")}),
        sample=sample
        or {k: batches[0][k] for k in ("pixel_values", "past_values") if k in batches[0]},
    )


# --- torchvision ------------------------------------------------------------------------------


def _vision(name: str, **options: Any) -> None:
    @entry(f"torchvision {name}", "torchvision", "classification")
    def build() -> Program:
        make = getattr(torchvision().models, name)
        return classifier(make(weights=None, num_classes=CLASSES, **options))


for _name in (
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "efficientnet_b0",
    "regnet_y_400mf", "mnasnet0_5",
):  # fmt: skip
    _vision(_name)


@entry("torchvision googlenet (auxiliary heads)", "torchvision", "classification")
def _googlenet() -> Program:
    model = torchvision().models.googlenet(weights=None, num_classes=CLASSES, init_weights=False)
    return classifier(model, logits=lambda out: getattr(out, "logits", out))


def _segmenter(name: str, **options: Any) -> None:
    @entry(f"torchvision {name}", "torchvision", "segmentation")
    def build() -> Program:
        make = getattr(torchvision().models.segmentation, name)
        model = make(weights=None, weights_backbone=None, num_classes=CLASSES, **options)
        x = images(8)
        y = (x.mean(1) * 3).long().clamp(0, CLASSES - 1)
        batches = [(x[:4], y[:4]), (x[4:], y[4:])]
        warmed(model, lambda batch: model(batch[0]), batches)

        def loss(out: Any, target: Any) -> Any:
            return F.cross_entropy(out["out"], target)

        return Program(
            model=model, batches=batches, ask=lambda m, b: loss(m(b[0]), b[1]),
            options={"loss": loss}, sample=x[:4],
        )  # fmt: skip


_segmenter("lraspp_mobilenet_v3_large")
_segmenter("deeplabv3_mobilenet_v3_large", aux_loss=True)
_segmenter("fcn_resnet50")


def _heads(model: Any) -> Any:
    """What a detector says of each of its boxes, before it picks some."""
    images = torch.rand(2, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    return model.head(list(model.backbone(images).values()))


def _detector(name: str, **options: Any) -> None:
    @entry(f"torchvision {name}", "torchvision", "detection")
    def build() -> Program:
        make = getattr(torchvision().models.detection, name)
        model = make(weights=None, weights_backbone=None, num_classes=CLASSES, **options)
        x = images(4, 96)
        boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [20.0, 30.0, 80.0, 90.0]])
        target = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(4)]
        batches = [(list(x[:2]), target[:2]), (list(x[2:]), target[2:])]
        warmed(model, lambda batch: model(*batch), batches)
        return Program(
            model=model,
            batches=batches,
            ask=lambda m, b: sum(m(*b).values()),
            call=lambda m, b: m(b[0]),
            sample=(list(x[:2]), target[:2]),
            in_training_mode=True,
            seen=_heads if name.startswith("ssd") else None,
        )


_detector(  # few proposals: without compiled operators their pooling takes seconds
    "fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, max_size=96,
    rpn_post_nms_top_n_train=32, rpn_post_nms_top_n_test=32, box_detections_per_img=10,
)  # fmt: skip
_detector("retinanet_resnet50_fpn", min_size=96, max_size=96)
_detector("ssdlite320_mobilenet_v3_large")


# --- timm -------------------------------------------------------------------------------------


def _timm(name: str, **options: Any) -> None:
    @entry(f"timm {name}", "timm", "classification")
    def build() -> Program:
        torchvision()
        import timm

        return classifier(timm.create_model(name, num_classes=CLASSES, **options))


for _name in (
    "resnet18", "efficientnet_lite0", "ghostnet_100", "mobilenetv3_small_050", "repvgg_a0",
    "hrnet_w18_small", "regnetx_002", "vovnet39a", "levit_128s",
):  # fmt: skip
    _timm(_name, **({"img_size": 64} if _name.startswith("levit") else {}))


@entry("timm features_only (embedding, triplet loss)", "timm", "embedding")
def _triplet() -> Program:
    torchvision()
    import timm

    model = timm.create_model("resnet10t", num_classes=0)
    x, y = images(12), labels(12)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    warmed(model, lambda batch: model(batch[0]), batches)

    def loss(out: Any, target: Any) -> Any:
        """Triplets of neighbours in the batch: no sample has a loss of its own."""
        distance = torch.cdist(out, out)
        alike = target[:, None] == target[None]
        far = (distance + 1e6 * alike).amin(1)
        near = (distance * alike).amax(1)
        return (near - far + 1).clamp_min(0).mean()

    return Program(
        model=model, batches=batches, ask=lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=x[:4],
    )  # fmt: skip


# --- transformers -----------------------------------------------------------------------------


def _pixels() -> list[dict[str, Any]]:
    x, y = images(8), labels(8)
    return [
        {"pixel_values": x[:4], "labels": y[:4]},
        {"pixel_values": x[4:], "labels": y[4:]},
    ]


def _hugging_face(name: str, config: Callable[[Any], Any], model: str) -> None:
    @entry(f"transformers {name}", "transformers", "classification")
    def build() -> Program:
        torchvision()
        import transformers

        made = getattr(transformers, model)(config(transformers))
        return mapped(made, _pixels(), sample={"pixel_values": _pixels()[0]["pixel_values"]})


_hugging_face(
    "ResNet",
    lambda t: t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=CLASSES,
        layer_type="basic",
    ),
    "ResNetForImageClassification",
)  # fmt: skip
_hugging_face(
    "RegNet",
    lambda t: t.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, num_labels=CLASSES
    ),
    "RegNetForImageClassification",
)
_hugging_face(
    "MobileNetV2",
    lambda t: t.MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=CLASSES),
    "MobileNetV2ForImageClassification",
)
_hugging_face(
    "EfficientNet",
    lambda t: t.EfficientNetConfig(
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        num_labels=CLASSES,
    ),
    "EfficientNetForImageClassification",
)
_hugging_face(
    "MobileViT",
    lambda t: t.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
        num_labels=CLASSES,
    ),
    "MobileViTForImageClassification",
)  # fmt: skip


@entry("transformers SegFormer", "transformers", "segmentation")
def _segformer() -> Program:
    torchvision()
    import transformers as t

    config = t.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        decoder_hidden_size=16,
        num_labels=CLASSES,
    )
    x = images(8)
    y = (x.mean(1) * 3).long().clamp(0, CLASSES - 1)
    batches = [{"pixel_values": x[i : i + 4], "labels": y[i : i + 4]} for i in (0, 4)]
    return mapped(
        t.SegformerForSemanticSegmentation(config), batches, sample={"pixel_values": x[:4]}
    )


@entry("transformers Wav2Vec2-Conformer (audio)", "transformers", "audio")
def _conformer() -> Program:
    torchvision()
    import transformers as t

    config = t.Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, num_labels=CLASSES,
        conv_depthwise_kernel_size=7, classifier_proj_size=16, mask_time_prob=0.0,
        apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    model = t.Wav2Vec2ConformerForSequenceClassification(config)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 800, generator=generator), labels(8)
    batches = [{"input_values": x[i : i + 4], "labels": y[i : i + 4]} for i in (0, 4)]
    return mapped(model, batches, sample={"input_values": x[:4]})


@entry("transformers PatchTST (time series)", "transformers", "time series")
def _patch() -> Program:
    torchvision()
    import transformers as t

    config = t.PatchTSTConfig(
        num_input_channels=2, context_length=32, prediction_length=8, patch_length=8,
        patch_stride=8, num_hidden_layers=2, d_model=16, num_attention_heads=2, ffn_dim=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 40, 2, generator=generator)
    batches = [
        {"past_values": x[i : i + 4, :32], "future_values": x[i : i + 4, 32:]} for i in (0, 4)
    ]
    return mapped(t.PatchTSTForPrediction(config), batches)


@entry("transformers RT-DETR (detection)", "transformers", "detection")
def _rt_detr() -> Program:
    torchvision()
    import transformers as t

    backbone = t.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"], layer_type="basic",
    )  # fmt: skip
    config = t.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[32, 48, 64], feat_strides=[8, 16, 32],
        encoder_hidden_dim=32, encoder_ffn_dim=32, d_model=32, decoder_in_channels=[32, 32, 32],
        decoder_layers=1, decoder_ffn_dim=32, num_queries=8, num_denoising=0, num_labels=CLASSES,
        encoder_attention_heads=2, decoder_attention_heads=2, eval_size=None,
    )  # fmt: skip
    x = images(4)
    target = [
        {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2)}
        for _ in range(4)
    ]
    batches = [{"pixel_values": x[i : i + 2], "labels": target[i : i + 2]} for i in (0, 2)]
    return mapped(t.RTDetrForObjectDetection(config), batches)


# --- segmentation-models-pytorch, MONAI -------------------------------------------------------


def _smp(name: str) -> None:
    @entry(f"smp {name} with its DiceLoss", "segmentation-models-pytorch", "segmentation")
    def build() -> Program:
        torchvision()
        import segmentation_models_pytorch as smp

        model = getattr(smp, name)("resnet18", encoder_weights=None, classes=CLASSES)
        x = images(8)
        y = (x.mean(1) * 3).long().clamp(0, CLASSES - 1)
        batches = [(x[:4], y[:4]), (x[4:], y[4:])]
        warmed(model, lambda batch: model(batch[0]), batches)
        loss = smp.losses.DiceLoss("multiclass")
        return Program(
            model=model, batches=batches, ask=lambda m, b: loss(m(b[0]), b[1]),
            options={"loss": loss}, sample=x[:4],
        )  # fmt: skip


for _name in ("Unet", "FPN", "DeepLabV3Plus", "Linknet"):
    _smp(_name)


@entry("MONAI UNet with mappings of images", "monai", "segmentation")
def _monai() -> Program:
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=2, in_channels=3, out_channels=CLASSES, channels=(8, 16, 32), strides=(2, 2),
        num_res_units=1, norm="batch",
    )  # fmt: skip
    x = images(8)
    y = (x.mean(1, keepdim=True) * 3).long().clamp(0, CLASSES - 1)
    batches = [{"image": x[i : i + 4], "label": y[i : i + 4]} for i in (0, 4)]
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    warmed(model, lambda batch: model(batch["image"]), batches)
    return Program(
        model=model,
        batches=batches,
        ask=lambda m, b: loss(m(b["image"]), b["label"]),
        options={"step": lambda m, b: loss(m(b["image"]), b["label"])},
        call=lambda m, b: m(b["image"]),
        sample=x[:4],
    )


@entry("MONAI DenseNet121 on volumes", "monai", "classification")
def _monai_volume() -> Program:
    from monai.networks.nets import DenseNet121

    model = DenseNet121(spatial_dims=3, in_channels=1, out_channels=CLASSES)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 1, 32, 32, 32, generator=generator), labels(8)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    warmed(model, lambda batch: model(batch[0]), batches)
    return Program(
        model=model, batches=batches, ask=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


# --- Ultralytics ------------------------------------------------------------------------------


@entry("Ultralytics YOLOv8n, its own loss", "ultralytics", "detection")
def _yolo() -> Program:
    torchvision()
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", nc=CLASSES, verbose=False)
    model.args = get_cfg()
    x = images(8)
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])

    def batch(rows: slice) -> dict[str, Any]:
        count = len(x[rows])
        return {
            "img": x[rows],
            "batch_idx": torch.arange(count).float(),
            "cls": labels(count).float().view(-1, 1),
            "bboxes": box.repeat(count, 1),
        }

    batches = [batch(slice(0, 4)), batch(slice(4, 8))]
    warmed(model, lambda b: model(b["img"]), batches)
    return Program(
        model=model,
        batches=batches,
        ask=lambda m, b: m.loss(b)[0].sum(),
        options={"step": lambda m, b: m.loss(b)[0].sum()},
        call=lambda m, b: m(b["img"]),
        sample=x[:4],
    )


# --- graphs -----------------------------------------------------------------------------------


def _graph(name: str, norm: str) -> None:
    @entry(f"PyG {name}", "torch_geometric", "graphs")
    def build() -> Program:
        import torch_geometric.nn as g
        from torch_geometric.data import Data
        from torch_geometric.loader import DataLoader

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = getattr(g, name)(3, 16, num_layers=3, norm=norm)
                self.head = nn.Linear(16, CLASSES)

            def forward(self, data: Any) -> Any:
                nodes = self.layer(data.x, data.edge_index)
                return self.head(g.global_mean_pool(nodes, data.batch))

        generator = torch.Generator().manual_seed(0)
        graphs = []
        for index in range(12):
            nodes = 5 + index % 4
            edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
            x = torch.randn(nodes, 3, generator=generator) + index % CLASSES
            graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([index % CLASSES])))
        loader = list(DataLoader(graphs, batch_size=6))
        model = Net()
        warmed(model, model, loader)
        return Program(
            model=model,
            batches=loader,
            ask=lambda m, b: F.cross_entropy(m(b), b.y),
            options={"step": lambda m, b: F.cross_entropy(m(b), b.y)},
            call=lambda m, b: m(b),
            sample=loader[0],
        )


_graph("GCN", "batch_norm")
_graph("GIN", "batch_norm")


# --- Lightning, fastai ------------------------------------------------------------------------


@entry("Lightning module with training_step", "lightning", "loop")
def _lightning() -> Program:
    torchvision()
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision().models.resnet18(weights=None, num_classes=CLASSES)

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int = 0) -> Any:
            return F.cross_entropy(self(batch["image"]), batch["label"])

    x, y = images(8), labels(8)
    batches = [{"image": x[i : i + 4], "label": y[i : i + 4]} for i in (0, 4)]
    model = Module()
    warmed(model, lambda b: model(b["image"]), batches)
    return Program(
        model=model,
        batches=batches,
        ask=lambda m, b: m.training_step(b),
        options={"step": lambda m, b: m.training_step(b)},
        call=lambda m, b: m(b["image"]),
        sample=x[:4],
    )


@entry("fastai xresnet18", "fastai", "classification")
def _fastai() -> Program:
    torchvision()
    from fastai.vision.models.xresnet import xresnet18

    return classifier(xresnet18(n_out=CLASSES))


@entry("fastai DynamicUnet", "fastai", "segmentation")
def _fastai_unet() -> Program:
    torchvision()
    from fastai.vision.learner import create_unet_model
    from fastai.vision.models import resnet18

    model = create_unet_model(resnet18, CLASSES, (64, 64), pretrained=False)
    x = images(8)
    y = (x.mean(1) * 3).long().clamp(0, CLASSES - 1)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    warmed(model, lambda batch: model(batch[0]), batches)
    return Program(
        model=model, batches=batches, ask=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


# --- plain loops ------------------------------------------------------------------------------


@entry("plain GAN generator (no labels, no loss)", "torch", "loop")
def _generator() -> Program:
    model = nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    z = images(8, 1, 8)
    batches = [(z[:4],), (z[4:],)]
    warmed(model, lambda batch: model(batch[0]), batches)
    return Program(model=model, batches=batches, sample=z[:4])


@entry("plain contrastive loop (two views, NT-Xent)", "torch", "loop")
def _contrastive() -> Program:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16),
    )  # fmt: skip
    x = images(8)
    batches = [((x[i : i + 4], x[i : i + 4].flip(-1)), labels(4)) for i in (0, 4)]

    def loss(m: Any, batch: Any) -> Any:
        (one, two), _ = batch
        z = F.normalize(torch.cat([m(one), m(two)]), dim=1)
        near = z @ z.T / 0.5 - 1e9 * torch.eye(len(z))
        return F.cross_entropy(near, torch.arange(len(z)).roll(len(z) // 2))

    warmed(model, lambda batch: loss(model, batch), batches)
    return Program(
        model=model, batches=batches, ask=loss, options={"step": loss},
        call=lambda m, b: m(b[0][0]), sample=x[:4],
    )  # fmt: skip


@entry("plain auto-encoder, (x, index) batches", "torch", "loop")
def _encoder() -> Program:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)
    )
    x = images(8)
    batches = [(x[i : i + 4], torch.arange(i, i + 4)) for i in (0, 4)]

    def step(m: Any, batch: Any) -> Any:
        return F.mse_loss(m(batch[0]), batch[0])

    warmed(model, lambda batch: step(model, batch), batches)
    return Program(model=model, batches=batches, ask=step, options={"step": step}, sample=x[:4])


@entry("exported program", "torch", "deployment")
def _exported() -> Program:
    def plain() -> Any:
        return torchvision().models.resnet18(weights=None, num_classes=CLASSES)

    program = classifier(plain())
    model = torch.export.export(program.model.eval(), (program.batches[0][0],)).module()
    return Program(
        model=model, batches=program.batches, ask=program.ask, options=program.options,
        sample=program.sample, plain=plain, fixed=True,
    )  # fmt: skip
