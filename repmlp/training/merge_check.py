"""Evaluate a network before and after merging, and say how far the two are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from repmlp.compare import Comparer
from repmlp.models.build import merged_copy
from repmlp.training.classifier import PartAccuracy, accuracy_metrics


@torch.no_grad()
def compare_merged(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    parts: Mapping[str, Tensor] | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Merge a copy of `net` and run both over the same images.

    net: any model whose parts merge by reparameterize(), timm's too; left as it is, but for evaluation mode.
    loader: images and labels. One process alone: nothing is shared with others. watch: is given the merged copy's
    logits (B, K) and the labels (B,) of each batch.
    Returns the merged copy and: top1_pct, top5_pct (of more than five classes), <part>_pct of the net as trained; the
    same with `_merged`; merge_error, the norm of the difference of all logits over the norm of the logits;
    merge_disagreements, the number of images whose first guess differs.
    """
    net.eval()
    merged = merged_copy(net)
    device = next(net.parameters()).device
    both = [
        (accuracy_metrics(num_classes, sync_on_compute=False).to(device), PartAccuracy(parts or {}, False).to(device))
        for _ in (net, merged)
    ]
    comparer = Comparer()
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = [model(images).float() for model in (net, merged)]
        for (metrics, answers), output in zip(both, logits, strict=True):
            metrics.update(output, labels)
            answers.update(output, labels)
        comparer.update(*logits)
        if watch is not None:
            watch(logits[1], labels)
    result: dict[str, float] = {}
    for suffix, (metrics, answers) in zip(("", "_merged"), both, strict=True):
        values = {**metrics.compute(), **answers.compute()}
        result |= {f"{name}{suffix}_pct": 100 * float(value) for name, value in values.items()}
    apart = comparer.result()
    result |= {"merge_error": apart.relative, "merge_disagreements": apart.changed}
    return merged, result
