"""Say in words what a report's figures suggest. Every sentence names the figures that it rests on."""

GAP = 25  # points of R@1 between training and validation photos, above which a model has memorised
RANDOM_FACTOR = 3  # a recall below this many times chance is close to guessing


def findings(report: dict, log: list[dict]) -> list[str]:
    """Return the findings of a report, one sentence or two each, the most important first."""
    return [
        text
        for find in (_chance, _gap, _epochs, _pairs, _duplicates, _repeats, _hubs, _groups)
        for text in find(report, log)
    ]


def _chance(report, log):
    row = report["recall"]["rows"][0]
    value, chance = row["t2i"][1].value, row["chance"][1]
    text = (
        f"A sentence finds its photo among the first five of {row['images']:,} in {value:.1f} % of the cases "
        f"({_interval(row['t2i'][1])}); guessing finds it in {chance:.1f} %."
    )
    if value < RANDOM_FACTOR * chance:
        text += " That is close to guessing: check that captions and photos belong together, and train longer."
    return [text]


def _gap(report, log):
    rows = {row["split"]: row for row in report["recall"]["rows"][1:]}
    train, val = rows["train"]["t2i"][0].value, rows["val"]["t2i"][0].value
    figures = (
        f"among {report['recall']['size']:,} photos, R@1 of sentences is {train:.1f} on training photos "
        f"and {val:.1f} on validation photos"
    )
    if train - val > GAP:
        remedies = "train fewer epochs, raise --dropout, or freeze the towers (--freeze-image --freeze-text)"
        if report["frozen"]:
            remedies = "train fewer epochs, or raise --dropout and --image-feature-dropout"
        return [f"The model remembers its training pairs: {figures}. More photos help most; otherwise {remedies}."]
    if train - val < GAP / 3 and train < 60:
        return [f"The model has room to learn: {figures}. Train longer, or train more of the towers."]
    return [f"Training and validation are in balance: {figures}."]


def _epochs(report, log):
    epochs = [entry for entry in log if "rsum" in entry and "epoch" in entry]
    if len(epochs) < 3:
        return []
    best, last = max(epochs, key=lambda entry: entry["rsum"]), epochs[-1]
    if best is last:
        return [f"The last of {len(epochs)} epochs was the best (rsum {best['rsum']:.1f}): more epochs may help."]
    if last["rsum"] < best["rsum"] - 5 and best["epoch"] < 0.75 * last["epoch"]:
        return [
            f"Epoch {best['epoch']} of {last['epoch']} was the best (rsum {best['rsum']:.1f}); later epochs fell to "
            f"{last['rsum']:.1f}: fewer epochs would have done."
        ]
    return []


def _pairs(report, log):
    pairs = report["pairs"]
    if not pairs["clear"]:
        return []
    names = list(dict.fromkeys(name for name, _, _ in pairs["listed"][: pairs["clear"]]))[:3]
    share = 100 * pairs["clear"] / report["n_captions"]
    if pairs["clear"] == 1:
        return [
            f"One caption ({share:.1f} %) fits its photo far worse than the others do, that of {names[0]}: look at it "
            "below, it may belong to another photo."
        ]
    return [
        f"{pairs['clear']:,} captions ({share:.1f} %) fit their photo far worse than the others do, those of "
        f"{', '.join(names)} worst of all: look at them below, some may belong to another photo."
    ]


def _duplicates(report, log):
    if not report["duplicates"]:
        return []
    pair = report["duplicates"][0]
    count = len(report["duplicates"])
    many = "One photo has" if count == 1 else f"{count} photos have"
    if count == report["max_listed"]:
        many = f"At least {many}"
    return [
        f"{many} a near-duplicate in another split, for example {pair['first']['name']} and {pair['second']['name']}: "
        f"recall on such photos shows memory, not understanding."
    ]


def _repeats(report, log):
    if not report["repeated"]:
        return []
    caption, photos = report["repeated"][0]
    count = len(report["repeated"])
    found = f"{count:,} captions belong to several photos, “{caption}” to {photos}"
    if count == 1:
        found = f"One caption belongs to several photos: “{caption}” to {photos}"
    return [f"{found}. No model can tell which of these photos is meant."]


def _hubs(report, log):
    if not report["hubs"]["photos"]:
        return []
    photo = report["hubs"]["photos"][0]
    return [
        f"{photo['name']} crowds many answers: it is {photo['text']}, {report['hubs']['expected']:.1f} % would be its "
        "share. Search with the hubness correction lowers such photos."
    ]


def _groups(report, log):
    result = []
    for title, groups in report["groups"]:
        if len(groups) < 2:
            continue
        best, worst = (
            max(groups, key=lambda group: group.recall.value),
            min(groups, key=lambda group: group.recall.value),
        )
        if worst.recall.high < best.recall.low:
            result.append(
                f"{title}: R@5 is {worst.recall.value:.1f} for “{worst.name}”, {best.recall.value:.1f} for "
                f"“{best.name}”."
            )
    return result


def _interval(recall):
    return f"95 % interval {recall.low:.1f} to {recall.high:.1f}"
