"""Split and role (noisy or clean) of an image: read from the names of folders, pictures and arrays.

Known layouts are understood and others are rejected, because nobody would notice that test images are trained on, or
that noisy images are taken for clean ones.
"""

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple, TypeVar

from dae.errors import UsageError

Name = TypeVar("Name", str, PurePath)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
CLEAN, NOISY = "clean", "noisy"
# The words that say so, in lower case.
SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "testset"), TEST),
}
ROLES = {
    **dict.fromkeys(("clean", "cleaned", "gt", "groundtruth", "truth", "target", "targets", "hq", "hr"), CLEAN),
    **dict.fromkeys(("noisy", "noised", "noise", "input", "inputs", "degraded", "corrupted", "lq", "lr"), NOISY),
}
# These say so only where they are all of a name besides the split, as in CARE's `low` and `GT` and KAIR's `trainL`.
LONE_ROLES = {
    **dict.fromkeys(("h", "high", "sharp", "original", "originals", "reference"), CLEAN),
    **dict.fromkeys(("l", "low", "blur", "blurred", "blurry"), NOISY),
}


class Meaning(NamedTuple):
    """The meaning of a name."""

    split: str | None
    """TRAIN, VALIDATION or TEST."""
    role: str | None
    """CLEAN or NOISY."""
    key: str
    """The rest of the name, which is equal for the noisy and the clean version of an image."""


def parse(name: str) -> Meaning:
    """Return the meaning of the name of an array or a folder: (TEST, NOISY, "") for `noisy_test` or `Testing noisy`."""
    # Capitals begin words too, as in `trainNoisy` and `GTTrain`.
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+", name)]
    splits, roles = ({table[word] for word in words if word in table} for table in (SPLITS, ROLES))
    if len(splits) > 1 or len(roles) > 1:  # such as `train_and_test`
        return Meaning(None, None, name)
    key = "".join(word for word in words if word not in SPLITS and word not in ROLES).strip(" _-.")
    if not roles and key in LONE_ROLES:
        roles, key = {LONE_ROLES[key]}, ""
    return Meaning(next(iter(splits), None), next(iter(roles), None), key)


def parse_paths(paths: Iterable[PurePath], role: str | None = None) -> dict[PurePath, Meaning]:
    """Return the meaning of the paths of files, relative to the folder of the data; all have `role` if it is given.

    The outermost folders say split and role, in either order, or in one name such as `train_noisy`. If no folder says a
    role, the names of the files can, such as 1_noisy.png beside 1_clean.png or 1.png. Raises UsageError if a word for a
    split or a role stands elsewhere, or if two folders look like pairs but do not say their roles.
    """
    meanings = {path: _parse_folders(path, role) for path in paths}
    by_name = {path: parse(path.stem) for path in meanings}
    if {meaning.role for meaning in meanings.values()} == {None}:
        named = {
            path: Meaning(split, by_name[path].role, str(PurePath(key).parent / by_name[path].key))
            for path, (split, _, key) in meanings.items()
        }
        # One such word, as in `target practice.jpg`, need not say a role, unless there is a partner.
        has_partners = len({meaning._replace(role=None) for meaning in named.values()}) < len(set(named.values()))
        if has_partners or None not in {meaning.role for meaning in named.values()}:
            meanings = named
        else:
            _check_equal_names(meanings)
    splits = {meaning.split for meaning in by_name.values()}
    if len(splits) > 1 and None not in splits and not any(meaning.split for meaning in meanings.values()):
        raise UsageError(
            f"the names of the pictures say {' and '.join(sorted(filter(None, splits)))}; put them into folders instead"
        )
    return meanings


def _parse_folders(path: PurePath, role: str | None) -> Meaning:
    folders = [parse(name) for name in path.parts[:-1]]
    if role is not None:
        folders = [folder._replace(role=None) for folder in folders]
    outer = [*itertools.takewhile(lambda folder: folder.split or folder.role, folders)]
    splits = [folder.split for folder in outer if folder.split]
    roles = [role, *(folder.role for folder in outer if folder.role)]
    names = zip(path.parts[len(outer) :], folders[len(outer) :], strict=False)
    is_inside = any(folder.split or (folder.role and name.lower() not in LONE_ROLES) for name, folder in names)
    if is_inside or len(splits) > 1 or len(roles) > 2:
        raise UsageError(
            f"{path.parent} is named like a split, or like noisy or clean images, but lies in another folder; choose "
            "the folder that contains it, or rename it"
        )
    return Meaning(next(iter(splits), None), roles[-1], str(PurePath(*path.parts[len(outer) :]).with_suffix("")))


def _check_equal_names(meanings: Mapping[PurePath, Meaning]) -> None:
    """Raise UsageError if the pictures of a split lie in two folders, with equal names."""
    for split in {meaning.split for meaning in meanings.values()}:
        paths = [path for path, meaning in meanings.items() if meaning.split == split]
        base = os.path.commonpath([path.parent for path in paths])
        names: dict[PurePath, set[PurePath]] = {}
        for path in paths:
            folder, *rest = path.with_suffix("").relative_to(base).parts
            names.setdefault(base / PurePath(folder), set()).add(PurePath(*rest))
        first, second = min(names), max(names)
        if len(names) == 2 and names[first] == names[second] and len(names[first]) > 1:
            raise UsageError(
                f"{first} and {second} hold pictures of equal names, but say neither noisy nor clean; rename them, or "
                "state --noisy and --clean, or only --clean if all are clean"
            )


def divide(meanings: Mapping[Name, Meaning], only_noisy: bool = False) -> dict[str, list[tuple[Name, Name | None]]]:
    """Return the images of each split, sorted: clean ones and None, or pairs of a clean and a noisy one.

    With `only_noisy`, images without a word for a role are noisy; only those to test on can have clean partners.

    Without any word for a split, all images are of TRAIN. In pairs, all images of one role can have names without a
    word for it, such as `train` beside `train_cleaned`. Raises UsageError if some images have a split and others have
    none, or if a partner is missing.
    """
    splits: dict[str, dict[Name, Meaning]] = {}
    for name, meaning in meanings.items():
        splits.setdefault(meaning.split or TRAIN, {})[name] = meaning
    without = [name for name, meaning in meanings.items() if not meaning.split]
    if 0 < len(without) < len(meanings):
        raise UsageError(
            f"{without[0]} is in none of the splits {', '.join(sorted(splits))}, which others are in; move or remove it"
        )
    if only_noisy:
        with_clean = {split for split, names in splits.items() if CLEAN in {name.role for name in names.values()}}
        if not with_clean <= {TEST}:
            raise UsageError(f"{min(with_clean - {TEST})} has clean images too; train on pairs, with --data or --clean")
        divided: dict[str, list[tuple[Name, Name | None]]] = {}
        for split, names in splits.items():
            alone: list[tuple[Name, Name | None]] = [(name, None) for name in sorted(names)]
            divided[split] = _pairs(names, CLEAN, NOISY) if split in with_clean else alone
        return divided
    roles = {meaning.role for meaning in meanings.values()}
    if roles in ({None}, {CLEAN}):
        return {split: [(name, None) for name in sorted(names)] for split, names in splits.items()}
    if len(roles) != 2:
        example = next(name for name, meaning in meanings.items() if meaning.role == NOISY)
        raise UsageError(
            f"{example} is noisy by its name; expected a clean image for each noisy one, and no others, such as in two "
            "folders clean and noisy; noisy images alone are trained on with --noisy FOLDER"
        )
    order = (CLEAN, NOISY) if None not in roles else (CLEAN, None) if CLEAN in roles else (None, NOISY)
    return {split: _pairs(names, *order) for split, names in splits.items()}


def _pairs(meanings: Mapping[Name, Meaning], clean: str | None, noisy: str | None) -> list[tuple[Name, Name | None]]:
    """Return the images with these roles, paired by their keys."""
    pairs: dict[str, dict[str | None, Name]] = {}
    for name, (_, role, key) in meanings.items():
        pair = pairs.setdefault(key, {})
        if pair.setdefault(role, name) != name:
            raise UsageError(f"{pair[role]} and {name} have the same partner; rename or remove one")
    for role, missing in ((noisy, "clean"), (clean, "noisy")):
        alone = [pair[role] for pair in pairs.values() if set(pair) == {role}]
        if alone:
            unknown = {PurePath(key).parts[0] for key, pair in pairs.items() if None in pair and "/" in key}
            hint = f"; {min(unknown)} says neither noisy nor clean, as --noisy and --clean do" if unknown else ""
            raise UsageError(
                f"{len(alone)} images have no {missing} partner, such as {alone[0]}; expected equal names{hint}"
            )
    return sorted((pair[clean], pair[noisy]) for pair in pairs.values())
