"""Where a data set and its split come from: a folder, Kaggle, the Hugging Face Hub, or a random split on demand."""

import json
import sys
import types

import pandas as pd
import pytest
from helpers import write_image_folder

from config import Config, preset_name
from data import published_split as module
from data.download import find_source, refuse_address
from data.loading import open_data, open_dataset, open_run_data
from runtime.run_dir import write_config

NAMES = [f"photo_{k:02d}.png" for k in range(12)]
SPLIT_OF = {name: ["train", "train", "val", "test"][k % 4] for k, name in enumerate(NAMES)}
SIZES = {"train": 6, "val": 3, "test": 3}


def karpathy(names=NAMES):
    return {
        "images": [{"filename": n, "split": SPLIT_OF[n], "sentences": [{"raw": f"published {n}"}]} for n in names],
        "dataset": "flickr8k",
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Work in an empty folder, and let Kaggle and the Hub fail until a test replaces them."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    answer(monkeypatch, kaggle=no_network, hub=no_network)


def no_network(*_, **__):
    raise OSError("no network")


def answer(monkeypatch, *, kaggle=None, hub=None):
    """Replace the functions of kagglehub and huggingface_hub that download a file."""
    if kaggle is not None:
        monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=kaggle))
    if hub is not None:
        monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)


@pytest.fixture
def photos(tmp_path):
    return write_image_folder(tmp_path / "photos", 12)


def load(dataset, folder=None, **options):
    return open_dataset(dataset, data_dir=folder, cache_dir="cache", split_seed=0, **options)


def splits_of(data):
    return {path.name: split for split in ("train", "val", "test") for path in data.split(split).paths}


def test_published_split_of_kaggle_is_kept_and_used_without_a_network_afterwards(monkeypatch, photos, tmp_path):
    (tmp_path / "download.json").write_text(json.dumps(karpathy()))
    answer(monkeypatch, kaggle=lambda handle, path: str(tmp_path / "download.json"))
    data = load("flickr8k", photos)
    assert splits_of(data) == SPLIT_OF and "published split from Kaggle" in data.describe()
    answer(monkeypatch, kaggle=no_network)
    assert splits_of(load("flickr8k", photos)) == SPLIT_OF
    cached = tmp_path / "work" / "cache" / "splits" / "dataset_flickr8k.json"
    cached.write_text(cached.read_text()[:-9])
    with pytest.raises(ConnectionError):
        load("flickr8k", photos)


def test_a_file_that_the_user_puts_into_the_cache_is_used(photos, tmp_path):
    file = tmp_path / "work" / "cache" / "splits" / "dataset_flickr8k.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"image": NAMES[0], "caption": "no split"}]))
    with pytest.raises(ValueError, match="expected Karpathy's file with train, val and test"):
        load("flickr8k", photos)
    file.write_text(json.dumps(karpathy()))
    data = load("flickr8k", photos)
    assert splits_of(data) == SPLIT_OF and "put there by hand" in data.describe()


def hub_tables(dataset, folder):
    rows = [(name, split, f"a photo {name}") for name, split in SPLIT_OF.items()]
    for file in module.HUB_SPLITS[dataset].files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        words = {"dev": "val", "validation": "val", "restval": None}
        part = file.split("/")[-2] if "/" in file else None
        own = [row for row in rows if part is None or row[1] == words.get(part, part)]
        if dataset == "flickr8k":
            table = pd.DataFrame([(n, t, t) for n, _, t in own], columns=["file_name", "caption_0", "caption_1"])
        elif dataset == "flickr30k":
            table = pd.DataFrame([(json.dumps([t, t]), s, n) for n, s, t in own], columns=["raw", "split", "filename"])
        else:
            columns = ["filepath", "filename", "split", "sentences", "imgid"]
            table = pd.DataFrame([("val2014", n, s, [t], k) for k, (n, s, t) in enumerate(own)], columns=columns)
        table.to_parquet(folder / file) if file.endswith("parquet") else table.to_csv(folder / file, index=False)


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_published_split_comes_from_the_hub_if_kaggle_does_not_answer(monkeypatch, photos, tmp_path, dataset):
    hub_tables(dataset, tmp_path / "hub")
    monkeypatch.setitem(module.HUB_SPLITS, dataset, module.HUB_SPLITS[dataset]._replace(sizes=SIZES))
    requests = []

    def hub(repository, file, *, repo_type, revision):
        requests.append((repository, repo_type))
        return str(tmp_path / "hub" / file)

    answer(monkeypatch, hub=hub)
    data = load(dataset, photos)
    assert splits_of(data) == SPLIT_OF and "Hugging Face Hub" in data.describe()
    assert set(requests) == {(module.HUB_SPLITS[dataset].repository, "dataset")}
    for caption_file in photos.glob("*.txt"):
        caption_file.unlink()
    assert set(load(dataset, photos).table.caption) == {f"a photo {name}" for name in NAMES}


def test_a_hub_split_of_other_sizes_is_not_used(monkeypatch, photos, tmp_path):
    hub_tables("flickr8k", tmp_path / "hub")
    answer(monkeypatch, hub=lambda repository, file, **_: str(tmp_path / "hub" / file))
    with pytest.raises(ConnectionError, match=r"expected train 6,000 / val 1,000 / te"):
        load("flickr8k", photos)


def test_without_any_answer_one_line_names_the_file_and_the_random_split(photos):
    with pytest.raises(
        ConnectionError, match=r"put dataset_flickr30k\.json next to.*HF_ENDPOINT.*--split random"
    ) as error:
        load("flickr30k", photos)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k", "coco"])
def test_random_split_that_is_asked_for_needs_no_network_and_keeps_the_recipe(photos, dataset):
    data = load(dataset, photos, split="random")
    assert len(data.split("test").paths) == 2 and "4:1" in data.split_source
    assert "not comparable with published results" in data.describe()
    assert preset_name("flickr8k") is None and Config(dataset=dataset, split="random").split == "random"


def test_random_split_replaces_a_split_of_the_folder_and_says_so(photos):
    (photos / "dataset_flickr8k.json").write_text(json.dumps(karpathy()))
    data = load(str(photos), split="random")
    assert splits_of(data) != SPLIT_OF and "the split of the data set is not used" in data.describe()


def test_split_files_of_the_folder_are_used_without_a_download(photos):
    rows = (photos / "captions.txt").read_text().splitlines()[1:]
    (photos / "captions.txt").unlink()
    for split in ("train", "val", "test"):
        lines = [row.partition(",") for row in rows if SPLIT_OF[row.partition(",")[0]] == split]
        (photos / f"en_{split}.json").write_text(json.dumps([{"image": n, "caption": t} for n, _, t in lines]))
    data = load("flickr8k", photos)
    assert splits_of(data) == SPLIT_OF and "split from the caption files" in data.describe()


def test_name_of_a_data_set_beside_a_folder_of_that_name_is_explained(monkeypatch, photos, tmp_path, capsys):
    (tmp_path / "work" / "flickr30k").mkdir()
    answer(monkeypatch, kaggle=lambda handle: str(photos))
    assert find_source("flickr30k", None, "cache").path == photos
    message = capsys.readouterr().err
    assert "downloaded from Kaggle" in message and "./flickr30k" in message and "--data-dir flickr30k" in message
    assert find_source("./flickr30k", None, "cache").path.name == "flickr30k"
    find_source("flickr30k", "flickr30k", "cache")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("https://example.org/photos.zip", "download the data and pass its folder or archive"),
        ("s3://bucket/shard-{000..099}.tar", "download the data"),
        ("gs://bucket/x", "download"),
        ("file:///home/me/photos", "download"),
        ("hf://datasets/owner/name/data", "--dataset owner/name"),
        ("https://huggingface.co/datasets/owner/name", "--dataset owner/name"),
        ("https://hf-mirror.com/datasets/owner/name/tree/main", "--dataset owner/name"),
        ("https://www.kaggle.com/datasets/adityajn105/flickr8k", "--dataset flickr8k"),
    ],
)
def test_addresses_are_refused_in_one_line(address, advice):
    with pytest.raises(ValueError, match=r"addresses .* are not fetched") as error:
        find_source(address, None, "cache")
    assert advice in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--image"):
        refuse_address(address.replace("://", ":/"), "--image")


def test_names_and_paths_are_no_addresses(photos):
    for value in ("owner/name", "C:/photos", "C:\\photos", str(photos), "a:b", None, "./x"):
        refuse_address(value, "--dataset")


def coco(folder, parts, present):
    """Write COCO's annotations of `parts` {split: photos}, and the photos of the splits in `present` only."""
    source, number = write_image_folder(folder / "all", sum(parts.values())), 0
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split, count in parts.items():
        images, annotations = [], []
        for _ in range(count):
            name = f"{number:012d}.png"
            if split in present:
                (folder / "coco" / f"{split}2017").mkdir(exist_ok=True)
                (source / "Images" / f"photo_{number:02d}.png").rename(folder / "coco" / f"{split}2017" / name)
            images.append({"id": number, "file_name": name})
            annotations += [{"image_id": number, "caption": f"{split} {number} {k}"} for k in range(2)]
            number += 1
        content = json.dumps({"images": images, "annotations": annotations})
        (folder / "coco" / "annotations" / f"captions_{split}2017.json").write_text(content)
    return folder / "coco"


def test_a_part_of_coco_without_photos_is_not_downloaded_and_the_rest_is_split(tmp_path):
    folder = coco(tmp_path, {"train": 20, "val": 10}, ["val"])
    data = load(str(folder))
    assert data.absent == ["train"] and data.missing == []
    assert "of val only: no photo of train is here (not downloaded)" in data.describe()
    assert sum(len(data.split(split).paths) for split in ("train", "val", "test")) == 10
    assert len(data.split("test").paths) == 2


def test_evaluation_needs_only_the_photos_of_its_split(tmp_path):
    folder = coco(tmp_path, {"train": 20, "val": 10}, ["val"])
    config = Config(dataset=str(folder), cache_dir="cache")
    assert len(open_data(config, needed="test").split("test").paths) == 10
    with pytest.raises(ValueError, match="no images left for train"):
        open_data(config, needed="train")


def test_a_run_is_evaluated_on_the_split_that_it_was_trained_with(tmp_path):
    folder = coco(tmp_path, {"train": 20, "val": 10}, ["val"])
    config, run = Config(dataset=str(folder), cache_dir="cache"), tmp_path / "run"
    run.mkdir()
    write_config(run, config, {"data": "trained with all photos elsewhere"})
    assert len(open_run_data(run, config, None, "test").split("test").paths) == 10
    write_config(run, config, {"data": open_data(config).fingerprint()})
    data = open_run_data(run, config, None, "test")
    assert len(data.split("test").paths) == 2  # the other eight were trained on
    assert len(open_run_data(run, config, None, "all").split("all").paths) == 10


def test_only_the_test_photos_of_published_lists_are_enough_to_evaluate_but_not_to_train(photos):
    (photos / "dataset_flickr8k.json").write_text(json.dumps(karpathy()))
    for name, split in SPLIT_OF.items():
        if split != "test":
            (photos / "Images" / name).unlink()
    data = load("flickr8k", photos, needed="test")
    assert len(data.split("test").paths) == 3 and data.missing == [] and data.absent == ["train", "val"]
    with pytest.raises(ValueError, match=r"no photos of train and val; pass --split random"):
        load("flickr8k", photos)
