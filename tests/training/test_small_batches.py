"""Batches without negatives are refused before anything is written, and a small validation split is pointed out."""

import pytest
from helpers import open_data_of, write_image_folder

from config import Config
from training.dataloader import EpochSampler, check_images_per_step
from training.trainer import train


def images_per_batch(images, batch_size, processes):
    return EpochSampler(
        images, batch_size, 0, micro_batch_size=batch_size, process=0, processes=processes
    ).images_per_batch


def test_batch_size_1_is_refused():
    with pytest.raises(ValueError, match=r"--batch-size must be from 2 to .*, got 1"):
        Config(batch_size=1)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_no_batch_contains_a_single_photo_or_fewer_than_one_per_process(processes):
    least = max(2, processes)
    for images in range(least, 40):
        for batch_size in range(processes * -(-2 // processes), 41, processes):
            is_usable = images_per_batch(images, batch_size, processes) >= least
            if is_usable:
                check_images_per_step(images, batch_size, processes)
                continue
            with pytest.raises(ValueError, match=f"--batch-size {batch_size} divides {images} training") as error:
                check_images_per_step(images, batch_size, processes)
            advice = int(str(error.value).rpartition("use --batch-size ")[2].split()[0])
            assert advice % processes == 0 and images_per_batch(images, advice, processes) >= least


def test_two_photos_on_two_processes_are_a_batch():
    check_images_per_step(8, 2, 2)  # embeddings are gathered: each process has the other's photo as a negative


def test_training_with_single_photo_steps_writes_nothing(tiny_config, tmp_path):
    folder = write_image_folder(tmp_path / "five", 5)  # 3 train, 1 val, 1 test
    config = tiny_config(dataset=str(folder), batch_size=2)
    data = open_data_of(config)
    with pytest.raises(ValueError, match="--batch-size 2 divides 3 training photos into 2 steps of 1"):
        train(config, data, None)
    assert not (tmp_path / "runs").exists()


def test_a_small_validation_split_is_pointed_out_once(tiny_config, capsys):
    config = tiny_config()
    train(config, open_data_of(config), None)
    steps = "recall there moves in steps of 50.0 points for photos and 25.0 for captions as queries"
    assert " ".join(capsys.readouterr().out.split()).count(f"the val split has only 2 photos: {steps}") == 1
