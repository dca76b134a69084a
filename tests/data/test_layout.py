"""Tests of what names of folders, pictures and arrays say."""

import string
from pathlib import PurePath

import pytest
from helpers import fuzz, rejected
from hypothesis import given
from hypothesis import strategies as st

from dae.data.layout import CLEAN, NOISY, ROLES, SPLITS, TEST, TRAIN, VALIDATION, divide, parse, parse_paths
from dae.errors import UsageError

# Names of images without a word for a split or a role, such as 0017 and img_3.
KEYS = st.builds("{}{}".format, st.sampled_from(["", "img_", "IMG-", "a.", "photo of "]), st.integers(0, 9999))
SEPARATORS = st.sampled_from(["_", "-", " ", ".", "__"])
SPELLINGS = st.sampled_from([str.lower, str.upper, str.title])
SUFFIXES = st.sampled_from([".png", ".jpg", ".TIF"])


def divided(*names: str) -> dict[str, list[tuple[str, str | None]]]:
    """Return the division of files with these paths, as text."""
    splits = divide(parse_paths(map(PurePath, names)))
    return {
        split: [(str(clean), None if noisy is None else str(noisy)) for clean, noisy in images]
        for split, images in splits.items()
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x_train", (TRAIN, None, "x")),
        ("train2017", (TRAIN, None, "2017")),
        ("dev-set", (VALIDATION, None, "set")),
        ("trainNoisy", (TRAIN, NOISY, "")),
        ("CleanTest", (TEST, CLEAN, "")),
        ("GTTrain", (TRAIN, CLEAN, "")),
        ("trainHQ", (TRAIN, CLEAN, "")),
        ("ground_truth", (None, CLEAN, "ground")),
        ("0001_NOISY_SRGB_010", (None, NOISY, "0001__srgb_010")),
        # Parts of other words, and several words, say nothing.
        ("trainers", (None, None, "trainers")),
        ("contest_1", (None, None, "contest_1")),
        ("cleaning", (None, None, "cleaning")),
        ("train_and_test", (None, None, "train_and_test")),
        ("noisy-clean", (None, None, "noisy-clean")),
        ("", (None, None, "")),
    ],
)
def test_a_name_says_part_role_and_key(name, expected):
    assert parse(name) == expected


@fuzz
@given(st.text(max_size=30) | st.text(string.ascii_letters + "_- 1", max_size=30))
def test_any_text_is_a_name(name):
    meaning = parse(name)
    assert meaning.split in (None, TRAIN, VALIDATION, TEST)
    assert meaning.role in (None, CLEAN, NOISY)
    if name.isascii():  # or else the lower case of a split may not be the split of the lower case
        left = iter(name.lower())
        assert all(character in left for character in meaning.key.lower())  # the others, in their order
        if (meaning.split, meaning.role) == (None, None):
            assert meaning.key.lower() in (name.lower(), name.lower().strip(" _-."))


@given(st.data(), st.lists(KEYS, min_size=1, max_size=6, unique_by=str.lower))
def test_pairs_are_found_in_all_layouts_of_folders(data, keys):
    """The same pairs, with the folders of roles inside or outside of those of splits, or both words in one name."""
    train = [word for word in SPLITS if SPLITS[word] == TRAIN]
    split_words = data.draw(st.sampled_from([None, *train])), data.draw(st.sampled_from(["test", "Testing"]))
    role_words = [
        data.draw(SPELLINGS)(data.draw(st.sampled_from([word for word in ROLES if ROLES[word] == role])))
        for role in (CLEAN, NOISY)
    ]
    below = data.draw(st.sampled_from(["", "class 1/", "a/b/"]))
    layout = data.draw(st.sampled_from(["{split}/{role}/", "{role}/{split}/", "{split}_{role}/", "{role} {split}/"]))
    splits = [TRAIN] if split_words[0] is None else [TRAIN, TEST]
    expected = {}
    for split, word in zip(splits, split_words, strict=False):
        folders = [layout.format(split=word, role=role) if word else f"{role}/" for role in role_words]
        suffixes = [data.draw(SUFFIXES) for _ in folders]
        expected[split] = sorted(
            tuple(f"{folder}{below}{key}{suffix}" for folder, suffix in zip(folders, suffixes, strict=True))
            for key in keys
        )
    names = [name for pairs in expected.values() for pair in pairs for name in pair]
    found = divided(*data.draw(st.permutations(names)))
    assert {split: sorted(pairs) for split, pairs in found.items()} == expected


@given(st.data(), st.lists(KEYS, min_size=1, max_size=6, unique_by=str.lower), SEPARATORS)
def test_pairs_are_found_by_names_of_files(data, keys, separator):
    clean_word = data.draw(st.sampled_from(["clean", "GT", "Target", ""]))  # "": 1.png beside 1_noisy.png
    noisy_word = data.draw(st.sampled_from(["noisy", "Input"]))
    in_front = data.draw(st.booleans())
    folder = data.draw(st.sampled_from(["", "scene 1/", "train/"]))

    def name(key: str, word: str) -> str:
        words = [word, key] if in_front else [key, word]
        return f"{folder}{separator.join(filter(None, words))}.png"

    expected = sorted((name(key, clean_word), name(key, noisy_word)) for key in keys)
    found = divided(*data.draw(st.permutations([path for pair in expected for path in pair])))
    assert {split: sorted(pairs) for split, pairs in found.items()} == {TRAIN: expected}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b.png", "a/c.png"], {TRAIN: [("a/c.png", None), ("b.png", None)]}),
        (["clean/1.png", "clean/2.png"], {TRAIN: [("clean/1.png", None), ("clean/2.png", None)]}),
        (
            ["train/1.png", "val/1.png", "test/1.png"],
            {TRAIN: [("train/1.png", None)], VALIDATION: [("val/1.png", None)], TEST: [("test/1.png", None)]},
        ),
        (["train/1.png", "train_cleaned/1.png"], {TRAIN: [("train_cleaned/1.png", "train/1.png")]}),
        (["noisy/1.jpg", "clean/1.PNG"], {TRAIN: [("clean/1.PNG", "noisy/1.jpg")]}),
        (
            ["a/1_noisy.png", "a/1_clean.png", "b/1_noisy.png", "b/1_clean.png"],
            {TRAIN: [("a/1_clean.png", "a/1_noisy.png"), ("b/1_clean.png", "b/1_noisy.png")]},
        ),
        (["clean/noisy street.jpg"], {TRAIN: [("clean/noisy street.jpg", None)]}),
        # A word in one of many photos says nothing.
        (["target practice.jpg", "tree.jpg"], {TRAIN: [("target practice.jpg", None), ("tree.jpg", None)]}),
        (["crash test.jpg", "tree.jpg"], {TRAIN: [("crash test.jpg", None), ("tree.jpg", None)]}),
    ],
)
def test_layouts_are_divided_into_parts_and_pairs(names, expected):
    assert divided(*names) == expected
    assert divided(*reversed(names)) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["noisy/1.png", "noisy/2.png"], r"noisy/1\.png is noisy by its name; expected a clean"),
        (["1_noisy.png", "2_noisy.png"], r"1_noisy\.png is noisy by its name"),
        (["noisy/1.png", "noisy/2.png", "clean/1.png"], r"^1 images have no clean partner, such as noisy/2\.png"),
        (["noisy/1.png", "clean/1.png", "clean/2.png"], r"^1 images have no noisy partner, such as clean/2\.png"),
        (["1_noisy.png", "1.png", "2_noisy.png"], r"no clean partner, such as 2_noisy\.png"),
        (["noisy/1.png", "images/1.png"], r"no clean partner, such as noisy/1\.png; .*images says neither"),
        (["noisy/1.png", "clean/1.png", "3.png"], r"noisy/1\.png is noisy .* and no others"),
        (["1_noisy.png", "1_clean.png", "a.png"], r"1_noisy\.png is noisy .* and no others"),
        (["noisy/1.png", "clean/1.png", "clean/1.jpg"], r"clean/1\.png and clean/1\.jpg have the same partner"),
        (["train/1.png", "test/1.png", "1.png"], r"^1\.png is in none of the splits test, train"),
        (["car/1.png", "bus/1.png", "train/1.png"], r"car/1\.png is in none of the splits train"),
        (["train_1.png", "test_1.png"], r"names of the pictures say test and train; put them into folders instead"),
        (["BSDS/train/1.png"], "^BSDS/train is named like a split, .* but lies in another folder; .*, or rename it$"),
        (["train/images/noisy/1.png"], "^train/images/noisy is named like .* but lies in another folder"),
        (["train/test/1.png"], "^train/test is named like .* but lies in another folder"),
        (["noisy/clean/1.png"], "^noisy/clean is named like .* but lies in another folder"),
    ],
)
def test_ambiguous_layouts_are_refused_in_one_line(names, message):
    for order in (names, names[::-1]):
        with rejected("", "; ", match=message if order is names else None):  # what is wrong; what is expected
            divided(*order)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["before/1.png", "before/2.png", "after/1.jpg", "after/2.jpg"], "^after and before hold pictures of equal"),
        (["train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png"], "^train/a and train/b hold"),
        (["trainA/1.png", "trainA/2.png", "trainB/1.png", "trainB/2.png"], "^trainA and trainB hold"),
        (["cats/1.png", "cats/2.png", "dogs/1.png", "dogs/3.png"], None),
        (["0/1.png", "0/2.png", "1/1.png", "1/2.png", "2/1.png", "2/2.png"], None),
    ],
)
def test_two_folders_of_equal_names_that_do_not_say_their_roles_are_rejected(names, message):
    if message is None:
        divided(*names)
        return
    with pytest.raises(UsageError, match=message) as caught:
        divided(*names)
    assert "--noisy and --clean, or only --clean if all are clean" in str(caught.value)
    stated = parse_paths(map(PurePath, names), CLEAN)
    assert {meaning.role for meaning in stated.values()} == {CLEAN}


@pytest.mark.parametrize("word", ["noisy", "low", "input"])
def test_a_stated_role_stands_whatever_the_names_say(word):
    paths = [PurePath("train") / "sky" / f"{word} 1.png", PurePath("test") / word / "test.png"]
    meanings = parse_paths(paths, CLEAN)
    assert list(meanings.values()) == [(TRAIN, CLEAN, f"sky/{word} 1"), (TEST, CLEAN, f"{word}/test")]


@pytest.mark.parametrize(
    ("noisy", "clean"),
    [
        ("low", "GT"),  # CARE
        ("trainL", "trainH"),  # KAIR
        ("train/lq", "train/gt"),  # BasicSR
        ("train/LR", "train/HR"),
        ("train/blur", "train/sharp"),  # GoPro
        ("train/input", "train/groundtruth"),
        ("low", "high"),
        ("noisy_images", "clean_images"),
    ],
)
def test_folders_of_common_tools_are_pairs(noisy, clean):
    expected = sorted((f"{clean}/{key}.tif", f"{noisy}/{key}.tif") for key in ("a", "b"))
    assert divided(*(path for pair in expected for path in pair)) == {TRAIN: expected}


def test_short_words_say_a_role_only_alone():
    for name in ("high mountains", "low light", "L1", "blur_2"):
        assert parse(name).role is None
    assert divided("2019/low/1.png", "2019/2.png") == {TRAIN: [("2019/2.png", None), ("2019/low/1.png", None)]}
