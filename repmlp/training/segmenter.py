"""The LightningModule that trains UperNet or PSPNet, and the measures of a segmentation before and after merging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from repmlp.compare import Comparer
from repmlp.data.scaled_crop import IGNORED
from repmlp.models.build import merged_copy
from repmlp.models.pspnet import PSPNet
from repmlp.models.upernet import UperNet, predict
from repmlp.training.base import RecipeModule


def pixel_metrics(num_classes: int, **kwargs: Any) -> MetricCollection:
    """Return IoU of each class (NaN where it is neither there nor guessed) and pixel accuracy over all pixels.

    kwargs: of torchmetrics' Metric. Pixels labelled 255 do not count, whatever is guessed there.
    """
    options = {"num_classes": num_classes, "ignore_index": IGNORED, "validate_args": False, **kwargs}
    return MetricCollection(
        {
            "iou": MulticlassJaccardIndex(average="none", zero_division=float("nan"), **options),
            "pixel_accuracy": MulticlassAccuracy(average="micro", **options),
        }
    )


def summarise(metrics: MetricCollection, classes: Sequence[str]) -> dict[str, float]:
    """Return miou, pixel_accuracy and iou_<class> in percent; classes that occur nowhere are left out of the mean."""
    values = metrics.compute()
    iou = 100 * values["iou"]
    if iou.isnan().all():
        raise ValueError("no pixel of the images to evaluate on has a label: nothing can be measured")
    return {
        "miou": float(iou.nanmean()),
        "pixel_accuracy": 100 * float(values["pixel_accuracy"]),
        **{f"iou_{name}": float(each) for name, each in zip(classes, iou, strict=True) if not each.isnan()},
    }


class Segmenter(RecipeModule):
    """Cross-entropy over labelled pixels, and the auxiliary head's with its weight (0.4 in mmsegmentation's UperNet).

    Paper: RepMLPNet Section 5.3. The mean is over the labelled pixels of a process, so that with several processes it
    depends a little on how the images are dealt out.

    net: a UperNet or PSPNet. recipe, steps_per_epoch, seed: see RecipeModule; the recipe also has label_smoothing,
    auxiliary_weight, and window: see `repmlp.models.upernet.predict`. classes: their names.
    """

    def __init__(
        self,
        net: UperNet | PSPNet,
        recipe: Mapping[str, Any],
        steps_per_epoch: int,
        classes: Sequence[str],
        seed: int = 0,
    ):
        super().__init__(net, recipe, steps_per_epoch, seed)
        self.classes = tuple(classes)
        self.val_metrics = pixel_metrics(len(self.classes))

    def forward(self, images: Tensor) -> Tensor:
        return predict(self.net, images, self.recipe["window"])

    def training_loss(self, images: Tensor, masks: Tensor) -> Tensor:
        logits, auxiliary = self.net.with_auxiliary(images)
        loss = self._loss(logits, masks)
        if auxiliary is not None:
            # (N, K, h, w) -> (N, K, H, W)
            auxiliary = F.interpolate(auxiliary, size=masks.shape[1:], mode="bilinear", align_corners=False)
            loss = loss + self.recipe["auxiliary_weight"] * self._loss(auxiliary, masks)
        return loss

    def _loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the mean over labelled pixels, 0 where there is none: (N, K, H, W), (N, H, W) -> ()."""
        total = F.cross_entropy(
            logits, masks, ignore_index=IGNORED, label_smoothing=self.recipe["label_smoothing"], reduction="sum"
        )
        return total / (masks != IGNORED).sum().clamp(min=1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        self.val_metrics.update(self(images).argmax(dim=1), masks)

    def validation_results(self) -> dict[str, float]:
        if not self.val_metrics["iou"].update_called:
            return {}
        results = summarise(self.val_metrics, self.classes)
        self.val_metrics.reset()
        return {name: results[name] for name in ("miou", "pixel_accuracy")}


@torch.no_grad()
def compare_merged_masks(
    net: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str], window: Sequence[int] | None = None
) -> dict[str, Any]:
    """Merge a copy of `net` and run both over the same images.

    net: left as it is, but for evaluation mode. loader: images and masks. One process alone.
    Returns miou_pct, pixel_accuracy_pct, class_iou_pct (by class) of the net as trained, miou_merged_pct;
    merge_error, the norm of the difference of all logits over the norm of the logits; merge_disagreements, the number
    of pixels whose first guess differs, void ones too; eval_pixels, how many there are.
    """
    net.eval()
    merged = merged_copy(net)
    device = next(net.parameters()).device
    before, after = (pixel_metrics(len(classes), sync_on_compute=False).to(device) for _ in (net, merged))
    comparer = Comparer()
    for images, masks in loader:
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        logits = [predict(model, images, window).float() for model in (net, merged)]
        for metrics, each in zip((before, after), logits, strict=True):
            metrics.update(each.argmax(dim=1), masks)
        comparer.update(*logits)
    results, apart = summarise(before, classes), comparer.result()
    return {
        "miou_pct": results["miou"],
        "pixel_accuracy_pct": results["pixel_accuracy"],
        "class_iou_pct": {name: results.get(f"iou_{name}") for name in classes},
        "miou_merged_pct": summarise(after, classes)["miou"],
        "merge_error": apart.relative,
        "merge_disagreements": apart.changed,
        "eval_pixels": apart.guesses,
    }
