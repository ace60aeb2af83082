"""COCO's category names, and where Pascal VOC's classes lie in them."""

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

COCO_LABELS: dict[int, str] = {
    index: name
    for index, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name not in ("__background__", "N/A")
}
"""The 80 categories by COCO id: 1 to 90 with gaps."""

VOC_TO_COCO = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
"""COCO id of each class of torchvision's segmentation networks (Pascal VOC's, background first)."""


def label_of(category_id: int) -> str:
    """The category's name; ids that COCO does not use keep their number."""
    return COCO_LABELS.get(category_id, f"category {category_id}")
