"""Which files of a folder belong to which split and subset. Read `sources.py` first.

Only names and the YAML header of README.md are read, in this order:

1. `configs:` in the YAML header of README.md, as in data sets on the hub.
2. Otherwise names: a folder or file name with train, validation (valid, val, dev) or test (testing, eval, evaluation),
   with or without other words, such as `data/train-00000-of-00002.parquet`, `test/a.jsonl` or `sst2_dev.tsv`. Folders
   above that part of the name are subsets: `en/train.jsonl` and `de/train.jsonl`.
3. A folder without such names has no splits: all its files are read.

A file whose name contains a split is read for that split only. If there is a held-out split, a file without a split in
its
name is an error. Several subsets are an error unless `subset` is set. `split: all` reads every split of the subset.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from luthier.core.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
KEYWORDS = {**dict.fromkeys(("train", "training"), TRAIN),
            **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
            **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST)}
DEFAULTS = {"train": TRAIN, "eval": VALIDATION, "test": TEST}  # part of a recipe -> the split that it reads
ALL = "all"
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
HEAD = re.compile(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
ROOT = "default"  # the subset of files outside any subset folder
Layout = dict[str, dict[str, list[Path]]]  # subset -> split -> files


def choose_files(folder: Path, files: Sequence[Path], split: str | None, subset: str | None, part: str) -> list[Path]:
    """The files of `folder` that belong to a split of a subset. Raises `DataError` if that is ambiguous.

    Args:
        files: all data files of the folder, at any depth.
        split: of the source; None: the split that `part` of a recipe (train, eval, test) reads.
        subset: of the source; None: the only one, or the default one.
    """
    described = _read_card_configs(folder, files, subset)
    layout, unnamed = (described, []) if described is not None else _read_layout(folder, files)
    if not layout:
        if subset is not None:
            raise DataError(f"{folder} has no subset {subset!r}: it has no subsets", "omit subset")
        if split not in (None, TRAIN, ALL):
            raise DataError(f"{folder} has no split {split!r}: no file or folder name in it contains a split",
                            "omit split, or give the file")
        return list(files)
    chosen = next(iter(layout)) if described is not None else _choose_subset(folder, list(layout), subset)
    found = layout[chosen]
    mine = [file for file in unnamed if len(layout) == 1 or _is_below(folder, file, chosen)]
    if split == ALL:
        return sorted({*(file for named in found.values() for file in named), *mine})
    if mine and set(found) <= {TRAIN}:
        found = {TRAIN: sorted([*found[TRAIN], *mine])}
    elif mine:
        raise DataError(f"{folder} has the splits {', '.join(found)}, and {mine[0].relative_to(folder)}, whose name "
                        f"contains no split", "list the files one by one, or set split to all to read every file for "
                                              "this part")
    return found[resolve_split(split, part, found, str(folder))]


def resolve_split(split: str | None, part: str, there: Collection[str], where: str) -> str:
    """The name in `there` of the requested split. Raises `DataError` if there is none."""
    wanted = split or DEFAULTS[part]
    same = [name for name in there if name == wanted] or [
        name for name in there if KEYWORDS.get(name.lower(), name) == KEYWORDS.get(wanted.lower(), wanted)]
    if same:
        return same[0]
    raise DataError(f"{where} has no split {wanted!r}" + ("" if split else f", which data.{part} reads"),
                    f"it has: {', '.join(map(str, there))}; set split to one of them, as in "
                    f"{{path: FOLDER, split: NAME}}")


def _choose_subset(folder: Path, there: Sequence[str], subset: str | None) -> str:
    if subset in there:
        return str(subset)
    if subset is None and len(there) == 1:
        return there[0]
    what = f"has no subset {subset!r}" if subset else "has several subsets, which are not mixed"
    raise DataError(f"{folder} {what}", f"it has: {', '.join(there)}; set subset to one of them")


# ---------------------------------------------------------------- by README.md


def _read_card_configs(folder: Path, files: Sequence[Path], subset: str | None) -> Layout | None:
    """The subset's config in the YAML header of README.md; None if there is none."""
    readme = next((file for file in sorted(folder.iterdir()) if file.name.lower() == "readme.md"), None)
    head = HEAD.match(readme.read_text(encoding="utf-8", errors="replace")) if readme else None
    if readme is None or head is None:
        return None
    try:
        told = yaml.safe_load(head[1])
    except yaml.YAMLError as fault:
        raise DataError(f"{readme}: its YAML header cannot be read: {fault}",
                        "fix it, or list the files one by one") from fault
    configs = told.get("configs") if isinstance(told, Mapping) else None
    if not configs:
        return None
    if not isinstance(configs, list) or not all(isinstance(one, Mapping) for one in configs):
        raise DataError(f"{readme}: configs is not a list of mappings", "fix it, or list the files one by one")
    named = {str(one.get("config_name", ROOT)): one for one in configs}
    default = next((name for name, one in named.items() if one.get("default") is True or name == ROOT), None)
    chosen = _choose_subset(folder, list(named), subset or default)
    return {chosen: _read_config(folder, files, named[chosen], f"{readme}: config {chosen!r}")}


def _read_config(folder: Path, files: Sequence[Path], config: Mapping[str, Any], where: str) -> dict[str, list[Path]]:
    """Split -> files of one config."""
    inside = folder / str(config.get("data_dir") or "")
    given = config.get("data_files")
    if given is None:
        mine = [file for file in files if file.is_relative_to(inside)]
        layout, unnamed = _read_layout(inside, mine)
        if not layout and mine:
            return {TRAIN: mine}
        if len(layout) != 1 or unnamed:
            raise DataError(f"{where} does not assign files to splits", "list the files one by one")
        return next(iter(layout.values()))
    found: dict[str, list[Path]] = {}
    owner: dict[Path, str] = {}
    for split, patterns in _read_patterns(given, where):
        for pattern in patterns:
            matched = _match_files(inside, pattern, files)
            if not matched:
                raise DataError(f"{where}: {pattern!r} of the split {split!r} matches no data file in {inside}",
                                "download the files, or list the existing ones one by one")
            for file in matched:
                if owner.setdefault(file, split) != split:
                    raise DataError(f"{where}: {file} belongs to the splits {owner[file]!r} and {split!r}",
                                    "fix it, or list the files one by one")
            found[split] = sorted({*found.get(split, ()), *matched})
    return found


def _read_patterns(given: Any, where: str) -> Iterator[tuple[str, list[str]]]:
    """Split, and the patterns of its files, in each of the forms that the hub knows."""
    if isinstance(given, Mapping):
        given = [{"split": split, "path": path} for split, path in given.items()]
    for one in given if isinstance(given, list) else [given]:
        split, path = (one.get("split", TRAIN), one.get("path")) if isinstance(one, Mapping) else (TRAIN, one)
        listed: list[Any] = path if isinstance(path, list) else [path]
        if not listed or not all(isinstance(pattern, str) for pattern in listed):
            raise DataError(f"{where}: data_files has no path", "fix it, or list the files one by one")
        yield str(split), listed


def _match_files(folder: Path, pattern: str, files: Sequence[Path]) -> list[Path]:
    if "://" in pattern or PurePosixPath(pattern).is_absolute():
        return []
    if pattern.endswith("**"):  # which is folders alone before Python 3.13
        pattern += "/*"
    return sorted(set(folder.glob(pattern)) & set(files))


# ---------------------------------------------------------------- by names


def _read_layout(folder: Path, files: Sequence[Path]) -> tuple[Layout, list[Path]]:
    """The splits found in names, and the files without a split in their names."""
    layout: Layout = {}
    unnamed = []
    for file in files:
        *above, name = file.relative_to(folder).parts
        place = next((i for i, part in enumerate(above) if _parse_split(part)), len(above))
        split = _find_split([*above, name.split(".")[0]])
        if split is None:
            unnamed.append(file)
        else:
            layout.setdefault(_join_parts(above[:place]), {}).setdefault(split, []).append(file)
    shards = [(file, shard[1]) for file in unnamed if (shard := SHARD.match(file.name))]
    for file, split in shards if layout else ():  # a split with another name than the known ones
        layout.setdefault(_join_parts(file.relative_to(folder).parts[:-1]), {}).setdefault(split, []).append(file)
        unnamed.remove(file)
    return layout, unnamed


def _join_parts(parts: Sequence[str]) -> str:
    return "/".join(parts[1:] if parts and parts[0].lower() == "data" else parts) or ROOT


def _is_below(folder: Path, file: Path, subset: str) -> bool:
    own = _join_parts(file.relative_to(folder).parts[:-1])
    return own == subset or own.startswith(f"{subset}/")


def _find_split(parts: Sequence[str]) -> str | None:
    """The split in the parts of a path: the first held-out split, otherwise train; None if there is none."""
    named = [split for split in map(_parse_split, parts) if split]
    return next((split for split in named if split != TRAIN), TRAIN if named else None)


def _parse_split(part: str) -> str | None:
    """The split in one part of a path. For shards of another split, such as `test_sft-00000-of-00001`, and for a name
    with two splits, the name itself."""
    shard = SHARD.match(part)
    words = (shard[1] if shard else part).lower()
    named = {KEYWORDS[word] for word in re.split(r"[^a-z]+", words) if word in KEYWORDS}
    if not named:
        return None
    return named.pop() if len(named) == 1 and not (shard and words not in KEYWORDS) else words
