"""Text output in the terminal."""


def format_epoch(record: dict, epochs: int, main_term: tuple[str, str]) -> str:
    """Format one line about an epoch: loss, validation recall, speed.

    main_term: its key in the record, and its label.
    """
    key, label = main_term
    terms = f"{label} {record[key]:.3f} + {record['alpha']:.3g} × triplet {record['triplet']:.3f}"
    recalls = [
        f"{d} R@1/5/10 {record[f'{d}_R@1']:5.1f} {record[f'{d}_R@5']:5.1f} {record[f'{d}_R@10']:5.1f}"
        for d in ("i2t", "t2i")
    ]
    columns = [
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
        f"loss {record['loss']:.3f} ({terms})",
        *recalls,
        f"rsum {record['rsum']:5.1f}",
        f"{record['images_per_s']:.0f} images/s",
    ]
    return "   ".join(columns)


def describe_floor(record: dict) -> str | None:
    """Say how low InfoNCE can fall if photos and captions have several positives; None if it can reach 0."""
    floor = record.get("info_nce_floor", 0.0)
    if floor < 0.01:
        return None
    return (
        f"InfoNCE is {record['info_nce'] - floor:.3f} above {floor:.3f}, the lowest value that it can have here: "
        "a photo has several captions, and equal captions belong to several photos"
    )
