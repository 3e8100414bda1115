"""Which adapters a run corrects, and where each goes below the output folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

from csulora.batch.journal import FILE as JOURNAL
from csulora.errors import UsageError
from csulora.files.peft_config import FILE as CONFIG
from csulora.output import WEIGHTS

_MAGIC = re.compile(r"[*?\[]")


class Item(NamedTuple):
    """One adapter of a run: a folder or hub id, and its output relative to the output folder.

    local: it was there when the arguments were read, so if it vanishes it is not sought on a hub.
    """

    source: str
    target: str
    local: bool = True


class PassedOver(NamedTuple):
    """What a walk does not take for an adapter, and somebody may have meant as one."""

    links: list[str]  # to folders
    bare: list[str]  # folders with weights and no configuration

    def told(self) -> Iterator[str]:
        """One line for each kind."""
        if self.links:
            yield f"not followed: {_first(self.links, 'link')} to folders; name it to correct it"
        if self.bare:
            yield f"passed over: {_first(self.bare, 'folder')} with {WEIGHTS} and no {CONFIG}"


def _first(paths: Sequence[str], kind: str) -> str:
    return f"{len(paths)} {kind}{'s' * (len(paths) > 1)} (the first: {paths[0]})"


def find(
    arguments: Iterable[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str] | None = None,
    passed_over: PassedOver | None = None,
) -> list[Item]:
    """The adapters that the arguments name, in order.

    An adapter folder or a hub id goes to `<its name>`. A folder that is no adapter but holds some
    further down stands for all of them, and a pattern (`*`, `?`, `[...]` within a name, `**` for any
    number of folders) for those that match; they keep their path below that folder, or below the part
    of the pattern without wildcards. Links to folders are not followed, hidden folders not entered,
    and an adapter inside another one is not an adapter of its own. Nor is what lies in `out_dir`, where
    that is below such a folder.

    passed_over: to be filled with what was met on the way.

    Raises UsageError for a pattern without a match and where there are no adapters at all.
    """
    items: list[Item] = []
    for given in arguments:
        argument = os.fspath(given)
        if not argument or "\0" in argument:
            raise UsageError(f"{argument!r}: cannot be the name of an adapter")
        items.extend(_expand(argument, partial(folders_with, but=out_dir, passed=passed_over)))
    if not items:
        raise UsageError("no adapters given")
    return items


def check_targets(items: Iterable[Item], out_dir: Path) -> None:
    """Raise UsageError if two outputs, or an output and a source, would be in each other's way."""
    there = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"{there}: exists and is not a folder")
    origins: dict[str, str] = {}
    targets: dict[str, str] = {}
    for source, target, _ in items:
        if target == JOURNAL:
            raise UsageError(f"{source}: {JOURNAL} is the name of the journal; rename the adapter")
        if target in targets:
            raise UsageError(
                f"two adapters would be written to {out_dir / target}: {targets[target]} and {source}; "
                "rename one, or name a folder above both"
            )
        targets[target] = source
        origins[os.path.realpath(source)] = source
    for target, source in targets.items():
        for parent in _parents(target):
            if parent in targets:
                raise UsageError(
                    f"{out_dir / target}: the output of {source} would lie within that of "
                    f"{targets[parent]}; correct them into two folders"
                )
    _check_within(targets, out_dir)
    _check_apart(targets, origins, out_dir)


def _check_within(targets: Iterable[str], out_dir: Path) -> None:
    """A link below the output folder must not lead an output out of it."""
    root = os.path.realpath(out_dir)
    for parent in dict.fromkeys(os.path.dirname(target) for target in targets):
        folder = os.path.join(root, parent) if parent else root
        if os.path.realpath(folder) != folder:
            raise UsageError(
                f"{out_dir / parent}: a link; outputs are not written through links, remove it"
            )


def _check_apart(targets: Iterable[str], origins: dict[str, str], out_dir: Path) -> None:
    """Replacing an output must never replace, or write into, a folder that adapters come from."""
    around = {parent: source for origin, source in origins.items() for parent in _parents(origin)}
    root = os.path.realpath(out_dir)
    for target in targets:
        output = os.path.realpath(os.path.join(root, target))
        hit = around.get(output) or next(
            (origins[p] for p in (output, *_parents(output)) if p in origins), None
        )
        if hit is not None:
            raise UsageError(
                f"{out_dir / target}: the output folder is, holds or lies within the adapter {hit}; "
                "choose another output folder"
            )


def _parents(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) not in ("", path):
        yield parent
        path = parent


def _expand(argument: str, walk: Callable[..., Iterable[str]]) -> Iterable[Item]:
    if _MAGIC.search(argument) and not os.path.lexists(argument):
        return _matches(argument, walk)
    if os.path.isdir(argument) and not os.path.lexists(os.path.join(argument, CONFIG)):
        below = [Item(path, os.path.relpath(path, argument)) for path in walk(argument, [CONFIG])]
        if below:
            return below
    name = Path(os.path.abspath(argument)).name
    return [Item(argument, name, local=os.path.lexists(argument))]


def _matches(pattern: str, walk: Callable[..., Iterable[str]]) -> list[Item]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    base = os.path.join(*parts[:fixed]) if fixed else "."
    if _fits((), parts[fixed:]) and os.path.lexists(os.path.join(base, CONFIG)):
        return [*_expand(base, walk)]  # as if it had been named
    deepest = None if "**" in parts else len(parts) - fixed
    items = [
        Item(path if fixed else relative, relative)
        for path in (walk(base, [CONFIG], deepest) if os.path.isdir(base) else ())
        if _fits((relative := os.path.relpath(path, base)).split(os.sep), parts[fixed:])
    ]
    if not items:
        raise UsageError(f"{pattern}: matches no folder that holds {CONFIG}")
    return items


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, in names times parts steps."""
    reached = _with_skips({0}, pattern)  # how many parts of the pattern may be used up
    for name in names:
        used = {i if pattern[i] == "**" else i + 1 for i in reached if _takes(pattern, i, name)}
        reached = _with_skips(used, pattern)
    return len(pattern) in reached


def _takes(pattern: Sequence[str], i: int, name: str) -> bool:
    return i < len(pattern) and (pattern[i] == "**" or fnmatchcase(name, pattern[i]))


def _with_skips(reached: set[int], pattern: Sequence[str]) -> set[int]:
    """`**` may stand for no folder at all."""
    for i, part in enumerate(pattern):
        if i in reached and part == "**":
            reached.add(i + 1)
    return reached


def folders_with(
    base: str,
    files: Collection[str],
    depth: int | None = None,
    *,
    but: str | os.PathLike[str] | None = None,
    passed: PassedOver | None = None,
) -> Iterator[str]:
    """Folders below `base` that hold any of these files, sorted, at most `depth` levels down.

    Without a depth the walk does not go on below such a folder. Links to folders are not followed,
    hidden folders not entered. Raises UsageError for a folder that cannot be listed: what it holds would
    be passed over in silence.

    but: a folder that is not entered, nor taken. passed: to be filled on the way.
    """
    apart = None if but is None else _as_below(base, but)
    left = [(path, 1) for path in reversed(_folders(base, passed))]
    while left:  # no recursion: folders may be deeper than Python's stack
        path, level = left.pop()
        if path == apart:
            continue
        found = holds(path, files)
        if found:
            yield path
        elif passed is not None and holds(path, [WEIGHTS]):
            passed.bare.append(path)
        if level < depth if depth is not None else not found:
            left += [(below, level + 1) for below in reversed(_folders(path, passed))]


def holds(folder: str, files: Iterable[str]) -> bool:
    """Whether a folder has any of these files."""
    return any(os.path.lexists(os.path.join(folder, file)) for file in files)


def _as_below(base: str, folder: str | os.PathLike[str]) -> str:
    """The path by which a walk from `base` comes to a folder, if it does."""
    return os.path.join(base, os.path.relpath(os.path.realpath(folder), os.path.realpath(base)))


def _folders(base: str, passed: PassedOver | None) -> list[str]:
    folders, links = subfolders(base)
    if passed is not None:
        passed.links.extend(links)
    return folders


def subfolders(base: str) -> tuple[list[str], list[str]]:
    """The folders in a folder without hidden ones, and the links to folders, both sorted.

    Raises UsageError for a folder that cannot be listed.
    """
    folders, links = [], []
    try:
        with os.scandir(base) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink() and os.path.isdir(entry.path):  # and not in a circle
                    links.append(entry.path)
    except OSError as error:
        raise UsageError(f"{base}: cannot be listed ({error.strerror})") from None
    return sorted(folders), sorted(links)
