"""Part of the data set, and noisy or clean: read from the names of folders, pictures and arrays.

Known layouts are understood and others are refused, because nobody would notice that test images are trained on, or
that noisy images are taken for clean ones.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple, TypeVar

from dae.errors import UsageError

Name = TypeVar("Name", str, PurePath)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
CLEAN, NOISY = "clean", "noisy"
# The words that say so, in lower case.
PARTS = {
    **dict.fromkeys(("train", "training", "trainset"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "testset"), TEST),
}
ROLES = {
    **dict.fromkeys(("clean", "cleaned", "gt", "groundtruth", "truth", "target", "targets", "hq"), CLEAN),
    **dict.fromkeys(("noisy", "noised", "noise", "input", "inputs", "degraded", "corrupted", "lq"), NOISY),
}


class Place(NamedTuple):
    """The meaning of a name."""

    part: str | None
    """TRAIN, VALIDATION or TEST."""
    role: str | None
    """CLEAN or NOISY."""
    key: str
    """The rest of the name, which is equal for the noisy and the clean version of an image."""


def of_name(name: str) -> Place:
    """Return the meaning of the name of an array or a folder: (TEST, NOISY, "") for `noisy_test` or `Testing noisy`."""
    # Capitals begin words too, as in `trainNoisy` and `GTTrain`.
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+", name)]
    parts, roles = ({table[word] for word in words if word in table} for table in (PARTS, ROLES))
    if len(parts) > 1 or len(roles) > 1:  # such as `train_and_test`
        return Place(None, None, name)
    key = "".join(word for word in words if word not in PARTS and word not in ROLES).strip(" _-.")
    return Place(next(iter(parts), None), next(iter(roles), None), key)


def of_files(files: Iterable[PurePath]) -> dict[PurePath, Place]:
    """Return what the paths of files say, relative to the folder of the data.

    The outermost folders say the part and the role, in either order, or in one name such as `train_noisy`. If no folder
    says a role, the names of the files can, such as 1_noisy.png beside 1_clean.png or 1.png. Raises UsageError if a
    word for a part or a role stands at another place.
    """
    places = {path: _of_folders(path) for path in files}
    by_name = {path: of_name(path.stem) for path in places}
    if {place.role for place in places.values()} == {None}:
        named = {
            path: Place(place.part, by_name[path].role, str(PurePath(place.key).parent / by_name[path].key))
            for path, place in places.items()
        }
        # One such word, as in `target practice.jpg`, need not say a role, unless there is a partner.
        roles = {place.role for place in named.values()}
        partners = len({place._replace(role=None) for place in named.values()}) < len(set(named.values()))
        if roles in ({NOISY}, {NOISY, CLEAN}) or (roles != {None} and partners):
            places = named
    if not any(place.part for place in places.values()):
        parts = {place.part for place in by_name.values()}
        if len(parts) > 1 and None not in parts:
            raise UsageError(
                f"the names of the pictures say {' and '.join(sorted(filter(None, parts)))}; put them into folders "
                "with these names"
            )
    return places


def _of_folders(path: PurePath) -> Place:
    part = role = None
    *folders, _ = path.parts
    understood = 0
    for place in map(of_name, folders):
        if not (place.part or place.role) or (place.part and part) or (place.role and role):
            break
        part, role = place.part or part, place.role or role
        understood += 1
    for place in map(of_name, folders[understood:]):
        if place.part or place.role:
            raise UsageError(
                f"{PurePath(*folders)} is named like a part of a data set, or like noisy or clean images, but lies in "
                "another folder; choose the folder that contains it, or rename it"
            )
    return Place(part, role, str(PurePath(*path.parts[understood:]).with_suffix("")))


def divide(places: Mapping[Name, Place]) -> dict[str, list[tuple[Name, Name | None]]]:
    """Return the images of each part, sorted: clean ones and None, or pairs of a clean and a noisy one.

    Without any word for a part, all images are of TRAIN. In pairs, all images of one role can have names without a word
    for it, such as `train` beside `train_cleaned`. Raises UsageError if some images have a part and others have none,
    or if a partner is missing.
    """
    parts: dict[str, dict[Name, Place]] = {}
    for name, place in places.items():
        parts.setdefault(place.part or TRAIN, {})[name] = place
    without = next((name for name, place in places.items() if not place.part), None)
    if without is not None and any(place.part for place in places.values()):
        raise UsageError(
            f"{without} is in none of the parts {', '.join(sorted(parts))}, which others are in; move or remove it"
        )
    roles = {place.role for place in places.values()}
    if roles in ({None}, {CLEAN}):
        return {part: [(name, None) for name in sorted(names)] for part, names in parts.items()}
    if len(roles) != 2:
        example = next(name for name, place in places.items() if place.role == NOISY)
        raise UsageError(
            f"{example} is noisy by its name; expected a clean image for each noisy one, and no others, such as in two "
            "folders clean and noisy"
        )
    clean_role = CLEAN if CLEAN in roles else None
    return {part: _pairs(names, clean_role) for part, names in parts.items()}


def doubts(places: Mapping[PurePath, Place]) -> list[str]:
    """Return a note for the user if images that are all taken for clean ones may be pairs."""
    if {place.role for place in places.values()} != {None}:
        return []
    names: dict[PurePath, set[str]] = {}
    siblings: dict[tuple[str | None, PurePath], set[PurePath]] = {}
    for path, place in places.items():
        names.setdefault(path.parent, set()).add(path.stem)
        siblings.setdefault((place.part, path.parent.parent), set()).add(path.parent)
    for folders in siblings.values():
        if len(folders) == 2:
            one, other = sorted(folders)
            if names[one] == names[other] and len(names[one]) > 1:
                return [
                    f"{one} and {other} hold pictures of equal names, all taken for clean images; if they are pairs, "
                    "name the folders noisy and clean"
                ]
    return []


def _pairs(places: Mapping[Name, Place], clean_role: str | None) -> list[tuple[Name, Name | None]]:
    clean: dict[str, Name] = {}
    noisy: dict[str, Name] = {}
    for name, place in places.items():
        images = clean if place.role == clean_role else noisy
        if images.setdefault(place.key, name) != name:
            raise UsageError(f"{images[place.key]} and {name} have the same partner; rename or remove one")
    for images, others, missing in ((noisy, clean, "clean"), (clean, noisy, "noisy")):
        alone = [name for key, name in images.items() if key not in others]
        if alone:
            raise UsageError(f"{len(alone)} images have no {missing} partner, such as {alone[0]}; expected equal names")
    return sorted((name, noisy[key]) for key, name in clean.items())
