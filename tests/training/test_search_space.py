"""The ranges of --search: what they draw, and one line for every mistake."""

import pytest

from config import Config
from training.search_space import NOT_SEARCHED, as_flags, parse_search


class Drawn:
    """Stands for a trial of Optuna; draws `share` of a range, or the last value of a list."""

    def __init__(self, share):
        self.share = share

    def suggest_float(self, name, low, high, *, log):
        return low * (high / low) ** self.share if log else low + self.share * (high - low)

    def suggest_int(self, name, low, high, *, log):
        return round(self.suggest_float(name, low, high, log=log))

    def suggest_categorical(self, name, values):
        return values[-1]


def draw(text, share=0.5):
    (setting,) = parse_search([text])
    return setting.draw(Drawn(share))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha=0:2", 1.0),
        ("lr_heads=1e-5:1e-3:log", 1e-4),
        ("lr-heads=1e-5:1e-3:log", 1e-4),
        ("batch_size=32:64", 48),
        ("batch_size=16:64:log", 32),
        ("batch_size=32,64,128", 128),
        ("margin=0.1,0.4", 0.4),
        ("augment=true,False", False),
        ("negatives=hardest,all", "all"),
        ("unfreeze_image_stages=1,2,none", None),
        ("unfreeze_image_stages=1:3", 2),
        ("text_encoder=a/b,C:\\models\\x", "C:\\models\\x"),
    ],
)
def test_values_have_the_type_of_their_setting(text, expected):
    value = draw(text)
    assert value == expected and type(value) is type(expected)


def test_numbers_are_short_and_stay_within_their_range():
    assert draw("alpha=0:1", 1 / 3) == 0.3333
    assert draw("dropout=0:0.99999", 1.0) == 0.99999  # rounded, it would be 1
    assert draw("margin=0.12344:0.2", 0.0) == 0.12344  # rounded, it would be below


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha", "write NAME=LOW:HIGH"),
        ("alpha=", "alpha= has no values"),
        ("=1:2", "write NAME=LOW:HIGH"),
        ("alhpa=0:1", "no such setting; did you mean alpha"),
        ("learning_rate=1:2", "did you mean lr_image, lr_text, lr_heads"),
        ("search_scale=1:2", "did you mean eval_image_scale"),
        ("xyzzy=1:2", "train.py --help"),
        ("alpha=2:0", "alpha=2:0 is empty: .* write alpha=0.0:2.0"),
        ("alpha=1:1", "single value: pass --alpha 1"),
        ("alpha=1", "single value: pass --alpha 1"),
        ("augment=false", "single value: pass --no-augment"),
        ("alpha=1,1.0", "lists a value twice"),
        ("alpha=0:1:log", "a logarithmic range begins above 0"),
        ("alpha=0:1:lin", "write NAME=LOW:HIGH"),
        ("alpha=0:1:2:3", "write NAME=LOW:HIGH"),
        ("alpha=0:1,2", "write NAME=LOW:HIGH"),
        ("alpha=a:b", "expected a number, got 'a'"),
        ("alpha=nan:1", "expected a number, got 'nan'"),
        ("alpha=0:inf", "expected a number, got 'inf'"),
        ("alpha=-1:1", "alpha must be from 0 to 1e6, got -1"),
        ("dropout=0:1", "dropout must be at least 0 and below 1, got 1"),
        ("batch_size=2.5:8", "expected a whole number, got '2.5'"),
        ("batch_size=32,", "expected a whole number, got ''"),
        ("batch_size=1,8", "batch_size must be from 2"),
        ("augment=0:1", "augment is true or false"),
        ("augment=true,maybe", "expected true or false, got 'maybe'"),
        ("negatives=hardest,foo", "expected one of hardest, semi-hard, all, got 'foo'"),
        ("seed=0:3", "luckiest seed"),
        ("split_seed=0:3", "scores on other photos cannot be compared"),
        ("num_workers=0:3", "not what it learns"),
        ("text_encoder=a,,b", "a value of the list is empty"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_search([text])
    assert "\n" not in str(error.value)


def test_a_setting_has_one_range():
    with pytest.raises(ValueError, match="names alpha twice"):
        parse_search(["alpha=0:1", "margin=0:1", "alpha=1,2"])


def test_every_excluded_name_is_a_setting():
    assert all(hasattr(Config, name) for names in NOT_SEARCHED.values() for name in names)


@pytest.mark.parametrize(
    ("name", "value", "flags"),
    [
        ("lr_heads", 1e-05, ["--lr-heads", "1e-05"]),
        ("augment", False, ["--no-augment"]),
        ("tta_flip", True, ["--tta-flip"]),
        ("unfreeze_image_stages", None, ["--unfreeze-image-stages", "None"]),
    ],
)
def test_flags_are_those_of_train(name, value, flags):
    assert as_flags(name, value) == flags
