"""Examples of a study as figures and pages take them."""

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.study import StudyExample
from vlmscope.data.images import png_bytes
from vlmscope.features.study.records import StudyFolder


def study_example(study: StudyFolder, example: StudyExample) -> FeatureExample:
    """An example with its picture, as figures take it."""
    view = study.view(example)
    pictures = study.pictures(view.item)
    tokens, activations = view.window()
    first = view.item.pictures == 0
    boxes = [box for box, own in zip(view.item.patch_boxes, first.tolist(), strict=True) if own]
    return FeatureExample(
        activation=example.activation,
        caption=view.item.caption,
        image_png=png_bytes(pictures[0], 512) if pictures else None,
        patch_boxes=tuple(boxes),
        patch_activations=tuple(view.patch_activations[first].tolist()),
        tokens=tokens,
        token_activations=tuple(activations.tolist()),
    )
