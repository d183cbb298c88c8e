"""Lines about the epochs of a run for the terminal, at most 100 columns wide."""

from collections.abc import Sequence

RECALLS = tuple(f"{direction}_R@{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10))
LEAST_PATIENCE = 3  # the smallest --patience that describe_best suggests


def format_header(epochs: int, main_term: tuple[str, str]) -> str:
    """Format the two lines above those of the epochs, which alone begin with "epoch".

    main_term: its key in the records, and its label.
    """
    first = len(_position(epochs, epochs))
    headings = ["loss", _heading(main_term), "triplet"]
    top = " " * first + " " * sum(map(_width, headings)) + f"{'image → text':>18}{'text → image':>18}"
    columns = [heading.rjust(_width(heading)) for heading in headings]
    return f"{top}\n{' ' * first}{''.join(columns)}{'   R@1   R@5  R@10' * 2}   rsum       img/s    left"


def format_epoch(record: dict, epochs: int, main_term: tuple[str, str], *, best: bool, time_left: str = "") -> str:
    """Format the line of an epoch under `format_header`: losses, validation recall in percent, speed and time left.

    best: whether it is the best epoch so far.
    """
    losses = [("loss", record["loss"]), (_heading(main_term), record[main_term[0]]), ("triplet", record["triplet"])]
    columns = [
        f"{_position(record['epoch'], epochs)}",
        *(f"{value:{_width(heading)}.{3 if abs(value) < 100 else 1}f}" for heading, value in losses),
        *(f"{record[key]:6.1f}" for key in RECALLS),
        f"{record['rsum']:7.1f}{' best' if best else '':5}",
        f"{record['images_per_s']:7.0f}{time_left:>8}",
    ]
    return "".join(columns).rstrip()


def _position(epoch, epochs):
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"


def _heading(main_term):
    key, label = main_term
    return label if len(label) < 8 else key


def _width(heading):
    return max(7, len(heading)) + (heading != "loss")


def describe_best(log: Sequence[dict], *, epochs: int, patience: int, unfreeze_epoch: int = 0) -> str:
    """Name the best epoch of a finished run, and whether training beyond it was of use."""
    best = max(log, key=lambda record: record["rsum"])
    line = f"best: epoch {best['epoch']}, rsum {best['rsum']:.1f}"
    after = len(log) - best["epoch"]
    if len(log) < epochs:
        return f"{line}; stopped after epoch {len(log)} of {epochs}: --patience {patience}"
    if not after:
        return f"{line}, the last one: more --epochs may find more"
    suggested = _suggest_patience([record["rsum"] for record in log], best["epoch"], unfreeze_epoch)
    stop = "" if suggested is None else ": --patience {} would have stopped after epoch {}".format(*suggested)
    later = "later epochs were no better" if after > 1 else "the last epoch was no better"
    return f"{line}; {later}{stop}"


def _suggest_patience(rsums, best_epoch, unfreeze_epoch):
    """Return the smallest patience that ends training after the best epoch but before the last, and its last epoch."""
    longest, highest, highest_epoch = 0, -1.0, 0  # longest wait for a higher rsum until the best epoch
    for epoch, rsum in enumerate(rsums[:best_epoch], start=1):
        if rsum > highest:
            highest, highest_epoch = rsum, epoch
        longest = max(longest, epoch - max(highest_epoch, unfreeze_epoch))
    patience = max(LEAST_PATIENCE, longest + 1)
    stop = max(best_epoch, unfreeze_epoch) + patience
    return (patience, stop) if stop < len(rsums) else None


def describe_floor(record: dict) -> str | None:
    """Say how low InfoNCE can fall if photos and captions have several positives; None if it can reach 0."""
    floor = record.get("info_nce_floor", 0.0)
    if floor < 0.01:
        return None
    return (
        f"InfoNCE is {record['info_nce'] - floor:.3f} above {floor:.3f}, the lowest value that it can have here: "
        "a photo has several captions, and equal captions belong to several photos"
    )
