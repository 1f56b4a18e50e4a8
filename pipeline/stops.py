"""What stops a preparation: every kind of problem with the policy `error`, and how a job goes on in spite of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from pipeline.coco import CocoFile
from pipeline.config import PolicySettings
from pipeline.problems import Problem

NUM_TOLD = 3  # examples and files that an error names


@dataclass(frozen=True)
class Stop:
    """A kind of problem that stops the job."""

    kind: str
    count: int
    files: list[str]
    """Annotation files that it is in."""
    first: str
    """One of them, without its file."""
    text: str
    """Where they are, and the first of them."""
    folder_is_wrong: bool = False
    """Whether so many images are missing that they most likely lie in another folder."""


def find_stops(problems: Sequence[tuple[CocoFile, Problem]], num_images: Mapping[tuple[str, str], int]) -> list[Stop]:
    """The kinds of problem with the policy `error`, wrong folders first.

    Args:
        problems: all that was found, each with the file that it is in.
        num_images: that each annotation file lists, by images folder and path.
    """
    by_kind: dict[str, list[tuple[CocoFile, Problem]]] = {}
    for file, problem in problems:
        if problem.policy == "error":
            by_kind.setdefault(problem.kind, []).append((file, problem))
    stops = []
    for kind, found in by_kind.items():
        if kind == "missing_file":
            stops.append(_missing_files(found, num_images))
            continue
        files = list(dict.fromkeys(file.path for file, _ in found))
        stops.append(Stop(kind, len(found), files, found[0][1].reason, _first([_example(*entry) for entry in found])))
    return sorted(stops, key=lambda stop: not stop.folder_is_wrong)


def _missing_files(found: Sequence[tuple[CocoFile, Problem]], num_images: Mapping[tuple[str, str], int]) -> Stop:
    """Of each annotation file how many images lack; first those files that lack most."""
    names: dict[tuple[str, str], list[str]] = {}
    for file, problem in found:
        names.setdefault((file.images_folder, file.path), []).append(str(problem.file_name))
    lacking = {place: len(names[place]) / num_images[place] for place in names}
    ordered = sorted(names, key=lambda place: -lacking[place])
    texts = [
        f"{folder}: {len(names[folder, path])} of {num_images[folder, path]} images of {path} are not there "
        f"({_first(names[folder, path], ', ')})"
        for folder, path in ordered
    ]
    files, first = [path for _, path in ordered], names[ordered[0]][0]
    return Stop("missing_file", len(found), files, first, _first(texts), max(lacking.values()) > 0.5 and len(found) > 1)


def _example(file: CocoFile, problem: Problem) -> str:
    """A problem with the file that it is in: what the images told names that of the image itself."""
    if problem.reason.startswith(f"{file.images_folder}/"):
        return problem.reason
    image = f"{problem.file_name}: " if problem.level == "annotation" and problem.file_name else ""
    return f"{file.path}: {image}{problem.reason}"


def _first(texts: Sequence[str], separator: str = "; ") -> str:
    """The first ones, and how many more there are."""
    more = len(texts) - NUM_TOLD
    return separator.join(texts[:NUM_TOLD]) + (f"{separator}and {more} more" if more > 0 else "")


def explain_stops(stops: Sequence[Stop]) -> str:
    """What stops the job and what to do about it, in one line.

    Args:
        stops: from `find_stops`, at least one.
    """
    begin, rest = "", list(stops)
    if stops[0].folder_is_wrong:  # to leave out most images is no way to go on
        begin = f"{stops[0].text}; most likely data.root or the source's images folder is wrong"
        rest = list(stops[1:])
        if not rest:
            return begin
        begin += "; besides "
    cure = "mend the data"
    if len(stops) == 1:
        told = rest[0].text
        if rest[0].kind == "missing_file":
            cure = "set data.root or the source's images folder"
    else:
        told = ", ".join(f"{stop.count} {stop.kind} ({stop.first})" for stop in rest)
        files = _first(list(dict.fromkeys(path for stop in rest for path in stop.files)), ", ")
        if begin:
            told, cure = f"{told} in {files}", "for these mend the data"
        else:
            begin = f"{len(stops)} kinds of problem in {files} stop the job: "
    return f"{begin}{told}; {cure}, or add {_ways_on([stop.kind for stop in rest])}"


def _ways_on(kinds: Sequence[str]) -> str:
    """Arguments with which a job goes on in spite of these kinds of problem."""
    allowed = {kind: _other_policies(kind) for kind in kinds}
    arguments = " ".join(f"--data.policies.{kind} {policies[0]}" for kind, policies in allowed.items())
    others = [f"{kind}: {' or '.join(policies[1:])}" for kind, policies in allowed.items() if policies[1:]]
    return arguments + (f" (also possible: {', '.join(others)})" if others else "")


def _other_policies(kind: str) -> list[str]:
    """What a kind's policy may be instead of `error`: what it is by default, or else what loses least, first."""
    field = PolicySettings.model_fields[kind]
    ways = [policy for policy in ("fix", "drop", "keep") if policy in get_args(field.annotation)]
    return sorted(ways, key=lambda policy: policy != field.default)
