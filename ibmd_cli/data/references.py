"""What `--data` names: folders of pictures or pairs, files, `builtin:NAME`, `dataset:NAME`, and data sets of the Hub.

A folder means the same in every command: with `source/` and `target/` inside, it holds pairs of equal names; with a
layout, each of its pictures is a pair or a source; else its pictures are sources, or, if they are to be degraded,
targets. Folders inside may be classes.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ibmd_cli.data.datasets import SIDES, SOURCE, TARGET, DataSet, Embedded, Files, Rows, within
from ibmd_cli.data.degradations import check_name, is_slow
from ibmd_cli.data.download import data_folder, data_sets, to_fetch
from ibmd_cli.data.labels import check_classes, folder_classes, label_of, read_labels
from ibmd_cli.data.preprocessing import Preprocessing
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError, nearest
from ibmd_cli.images.decode import shown
from ibmd_cli.images.find import find_images, named_data, passed_over
from ibmd_cli.reporting import Reporter

HF_DATA = re.compile(r"hf://datasets/(?P<repo>[^\s/@]+/[^\s/@#]+)(@(?P<revision>[^\s/#]+))?(/(?P<split>[^\s/#]+))?"
                     r"(#(?P<column>.+))?")  # fmt: skip
LOOKED_AT = 16
"""Pictures of a data set that are looked at before the work, to tell whether they are pairs."""
NO_LAYOUT = Preprocessing(1)


def check_sources(
    references: Sequence[str],
    teacher: Mapping[str, Any],
    degradation: str,
    reporter: Reporter,
    layout: str = "",
    labels: str = "",
) -> None:
    """Refuse training data that are not there, and settings that do not go with the teacher or the data.

    Arguments and errors are those of `SourceImages`.
    """
    if not references:
        raise NotAvailable("no source images: give a folder of them with --data")
    for reference in references:
        _check_reference(reference, degradation)
    name, own = teacher.get("name", "the teacher"), teacher.get("degradation") or ""
    if degradation:
        check_name(degradation)
        if layout:
            raise UsageError(
                f"--degrade {degradation}: --layout {layout} has sources already: --degrade none keeps them"
            )
    if labels and not teacher.get("classes"):
        raise UsageError(f"--labels {labels}: {name} has no classes: leave it out")
    check_holes(teacher, degradation)
    if degradation and own and degradation != own:
        reporter.warn(f"--degrade {degradation}: {name} was trained with {own}; leave --degrade out to use that")


def _check_reference(reference: str, degradation: str) -> None:
    kind, _, name = reference.partition(":")
    if kind == "dataset" and name not in data_sets():
        raise NotAvailable(f"no data set {reference}: {nearest(name, data_sets())}")
    if kind == "hf":
        parse_hf_data(reference)
    elif kind not in ("builtin", "dataset") and not Path(reference).exists():
        named_data(reference)
        raise NotAvailable(f"--data {reference}: no such folder")
    if degradation and has_sources(reference):
        raise UsageError(f"--degrade {degradation}: --data {reference} are sources already: --degrade none keeps them")


def has_sources(reference: str) -> bool:
    """Tell whether data are sources by their name alone: those of the package, and published pairs."""
    kind, _, name = reference.partition(":")
    return kind == "builtin" or (kind == "dataset" and bool(data_sets().get(name, {}).get("layout")))


def check_holes(model: Mapping[str, Any], degradation: str) -> None:
    """Raise a UsageError unless a model that fills holes, and no other one, is given images with holes."""
    name, own = model.get("name", "the teacher"), model.get("degradation")
    inpaints, masked = bool(model.get("mask")), degradation.startswith("inpaint-")
    if inpaints and not masked:
        given = f"--degrade {degradation}" if degradation else "no --degrade"
        raise UsageError(f"{given}: {name} fills holes: give clean images and --degrade {own or 'inpaint-center'}")
    if masked and not inpaints:
        raise UsageError(f"--degrade {degradation}: {name} does not fill holes" + (f": expected {own}" if own else ""))


def open_data(
    references: Sequence[str],
    teacher: Mapping[str, Any],
    degradation: str = "",
    layout: str = "",
    labels: str = "",
    fit: str = "published",
    targets: bool = False,
) -> list[DataSet]:
    """Find the images of each reference, without reading them; arguments and errors are those of `SourceImages`."""
    image = teacher.get("image") or {"size": teacher["image_size"]}  # of a published one that is not here
    scale = 1 if degradation else image.get("source_scale", 1)
    how = Preprocessing(int(image["size"]), layout, degradation, scale, fit)
    return [open_data_set(reference, how, teacher.get("classes"), labels, targets) for reference in references]


def usual_fit(layout: str, degradation: str) -> str:
    """Return what becomes of images that are not square where `--fit` does not say it.

    They are padded, as by `ibmd sample`; photos that are degraded, and normal maps, become what the published teachers
    were trained with.
    """
    degraded = degradation not in ("", "none") and not is_slow(degradation)
    return "published" if degraded or layout == "normals" else "pad"


def look_up_data(
    references: Sequence[str],
    teacher: Mapping[str, Any],
    degradation: str,
    layout: str,
    labels: str,
    targets: bool = False,
) -> list[str]:
    """Say of each reference what would be taken of it, for `--dry-run`; nothing is fetched."""
    lines = []
    for reference in references:
        if reference.startswith("hf://") or to_fetch([reference]):
            lines.append(f"{reference}: counted when it has been fetched")
        else:
            parts = open_data([reference], teacher, degradation, layout, labels, targets=targets)
            lines += [*describe(parts, degradation, targets), *(hint for part in parts if (hint := side_by_side(part)))]
    return lines


def describe(parts: Sequence[DataSet], degradation: str = "", targets: bool = False) -> list[str]:
    """Say of each data set what is taken for students, or with `targets` for teachers, and what is not used."""
    used = [TARGET] if degradation else [SOURCE, TARGET] if targets else [SOURCE]
    return [part.describe(used, degradation) for part in parts]


def side_by_side(part: DataSet) -> str:
    """Say that pictures taken for sources look like pairs side by side: all are twice as wide as high; else ""."""
    if isinstance(part, Embedded) or part.preprocess.get(SOURCE, NO_LAYOUT).layout or TARGET in part.preprocess:
        return ""
    for row in range(0, len(part), max(1, len(part) // LOOKED_AT)):
        try:
            width, height = part.picture(row, SOURCE)[0].size
        except IbmdError:  # told when it is read
            continue
        if width != 2 * height:
            return ""
    return f"--data {part.name}: all pictures are twice as wide as high: of pairs side by side? Then give --layout ab"


def open_data_set(
    reference: str,
    how: Preprocessing,
    classes: int | None,
    labels: str = "",
    targets: bool = False,
    held_out: bool = False,
) -> DataSet:
    """Find the images that a reference names, without reading them.

    Args:
        reference: a folder (searched recursively), a file, `builtin:NAME`, `dataset:NAME`, or
            `hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]`.
        how: what becomes of a source, or of the targets that sources are made of.
        classes: of the teacher, or None if it takes none. The class of a file is what `labels` says, or the folder
            that holds it (`folder_classes`); that of a row of a data set stands in its column of classes.
        labels: CSV file of classes (`read_labels`); "": none.
        targets: whether targets will be read, too.
        held_out: take the test pairs of `builtin:NAME` in place of its training sources.

    Raises:
        UsageError: the classes cannot be told, or the data have no such images.
        NotAvailable: the data are not there, or have no targets.
        IbmdError: they cannot be listed, are of another size, or an item of a pair has no partner.
    """
    kind, _, name = reference.partition(":")
    if kind == "builtin":
        if classes:
            raise UsageError(f"--data {reference}: has no classes, and the teacher needs them: give a folder")
        found: DataSet = Embedded(name, how, held_out)
    elif kind == "hf":
        found = _open_rows(reference, how, classes)
    elif kind == "dataset" and name in data_sets():
        own = replace(how, layout=data_sets()[name]["layout"])
        return _open_files(reference, data_folder(name), own, classes, labels, targets)
    else:
        return _open_files(reference, Path(reference), how, classes, labels, targets)
    if targets and TARGET not in found.preprocess:
        raise NotAvailable(f"--data {reference}: has sources alone: give a folder with source/ and target/ in it")
    return found


def _open_files(
    reference: str, path: Path, how: Preprocessing, classes: int | None, labels: str, targets: bool
) -> Files:
    inside = [side for side in SIDES if (path / side).is_dir()]
    paired = len(inside) == 2
    if paired and how.layout:
        raise UsageError(f"--data {reference}: holds source/ and target/: leave out --layout {how.layout}")
    if inside == [TARGET] and not (how.degradation or how.layout):
        raise NotAvailable(f"--data {reference}: no folder {path / SOURCE}; expected source/ and target/ in it")
    passed = Counter[str]()
    if paired:
        listed = {side: _images(path / side, how.layout, passed) for side in SIDES}
    else:
        listed = dict.fromkeys(SIDES, _images(path, how.layout, passed))
        _refuse_pairs_below(reference, path, listed[SOURCE])
    preprocess = _by_side(how, paired)
    if targets and TARGET not in preprocess:
        missing = path / (TARGET if inside else SOURCE)
        raise NotAvailable(f"--data {reference}: no folder {missing}; expected source/ and target/ in it")
    unused = {side: len(listed[side]) for side in (SIDES if paired else preprocess)}
    if not targets and SOURCE in preprocess:
        preprocess = {SOURCE: preprocess[SOURCE]}
    read = {side: TARGET if how.degradation else side for side in preprocess}
    if paired and len(set(read.values())) == 2:
        listed = _partners(reference, path, listed)
    files = {side: listed[read[side]] for side in preprocess}
    roots = {side: path / read[side] if paired else path for side in preprocess}
    base = next(iter(preprocess))
    if not files[base]:
        kind = "surface normals (*_normal.npy, *_normal.png)" if how.layout == "normals" else "images"
        told = f"; {text}" if (text := passed_over(passed)) else ""
        raise NotAvailable(f"--data {reference}: no {kind} in {'it' if roots[base] == path else roots[base]}{told}")
    unused = {side: count for side, count in unused.items() if side not in read.values()}
    numbers = list[int]()
    if classes and labels:
        table = read_labels(labels, "--labels")
        numbers = [label_of(table, file, within(file, roots[base]), labels) for file in files[base]]
        check_classes(f"--labels {labels}", numbers, classes)
    elif classes:
        numbers = folder_classes(roots[base], files[base], classes)
    return Files(reference, preprocess, files, roots, numbers, unused, passed_over(passed))


def _by_side(how: Preprocessing, paired: bool) -> dict[str, Preprocessing]:
    """Return the sides that the pictures of a folder have, and what becomes of each."""
    if how.degradation and not is_slow(how.degradation):
        return {TARGET: how}
    if not (paired or how.degradation or how.layout in ("ab", "ba")):
        return {SOURCE: how}
    other = {"ab": "ba", "ba": "ab"}.get(how.layout, "")
    return {SOURCE: how, TARGET: replace(how, layout=other, degradation="", scale=1)}


def _images(folder: Path, layout: str, passed: Counter[str]) -> list[Path]:
    """List the images of a folder; of two normal maps of one name, the numbers rather than the picture."""
    files = find_images(folder, passed=passed)
    if layout != "normals" or not folder.is_dir():
        return files
    del passed[".npy"]
    pictures = [file for file in files if file.stem.endswith("_normal")]
    return sorted({file.with_suffix(""): file for file in (*pictures, *folder.rglob("*_normal.npy"))}.values())


def _refuse_pairs_below(reference: str, path: Path, files: Sequence[Path]) -> None:
    """Raise a UsageError if a folder further down holds pairs: their targets are no sources."""
    for here in sorted({os.path.dirname(file) for file in files}):
        for folder in (Path(here), *Path(here).parents):
            if folder == path or path not in folder.parents:
                break
            if folder.name in SIDES and all((folder.parent / side).is_dir() for side in SIDES):
                raise UsageError(f"--data {reference}: holds pairs in {folder.parent}: give --data {folder.parent}")


def _partners(reference: str, path: Path, listed: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
    """Sort the files of source/ and target/ by their names: equal ones, or such as differ in the ending alone."""
    if empty := [path / side for side in SIDES if not listed[side]]:
        raise NotAvailable(f"--data {reference}: no images in {' and '.join(map(str, empty))}")
    files = {side: {within(file, path / side): file for file in listed[side]} for side in SIDES}
    stems = {side: defaultdict[str, list[str]](list) for side in SIDES}
    for side in SIDES:
        for name in files[side]:
            stems[side][os.path.splitext(name)[0]].append(name)
    partner = {name: name for name in files[SOURCE].keys() & files[TARGET].keys()}
    for stem, names in stems[SOURCE].items():
        if len(names) == len(stems[TARGET].get(stem, ())) == 1:
            partner[names[0]] = stems[TARGET][stem][0]
    left = {SOURCE: files[SOURCE].keys() - partner.keys(), TARGET: files[TARGET].keys() - set(partner.values())}
    lone = [f"{side}/{shown(name)}" for side in SIDES for name in sorted(left[side])]
    if lone:
        more = f" and {len(lone) - 5} more" if len(lone) > 5 else ""
        raise IbmdError(f"--data {reference}: no partner of equal name for {', '.join(lone[:5])}{more}")
    sources = sorted(partner)
    return {SOURCE: [files[SOURCE][n] for n in sources], TARGET: [files[TARGET][partner[n]] for n in sources]}


def parse_hf_data(reference: str) -> dict[str, str | None]:
    """Split `hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]` into repo, revision, split and column.

    Raises:
        UsageError: it is not of this form.
        NotAvailable: the library `datasets` is not installed.
    """
    match = HF_DATA.fullmatch(reference)
    if match is None:
        raise UsageError(f"--data {reference}: expected hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]")
    if find_spec("datasets") is None:
        raise NotAvailable(f"--data {reference}: needs the library datasets: pip install 'ibmd-cli[datasets]'")
    return match.groupdict()


def _open_rows(reference: str, how: Preprocessing, classes: int | None) -> Rows:
    """Load a data set of the Hugging Face Hub into the cache of the library `datasets`, or find it there."""
    parts = parse_hf_data(reference)
    import datasets

    if Path(str(parts["repo"])).exists():
        raise UsageError(
            f"--data {reference}: the folder {parts['repo']} is here, and would be read instead: start in another one"
        )
    try:
        table = datasets.load_dataset(parts["repo"], revision=parts["revision"], split=parts["split"] or "train")
    except Exception as error:  # of many libraries: of the network, of files, of Parquet
        said = next(iter(str(error).strip().splitlines()), "")
        raise NotAvailable(f"--data {reference}: cannot be loaded ({type(error).__name__}: {said})") from error
    return rows_of(reference, table, parts["column"], how, classes)


def rows_of(reference: str, table: Any, column: str | None, how: Preprocessing, classes: int | None) -> Rows:
    """Choose the columns of a data set.

    Images are those of `column`, or of "image", or of the only column that holds images; "A,B" names the column of the
    sources and that of the targets. Other arguments and errors are those of `open_data_set`.
    """
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    column = column or ("image" if "image" in pictures else pictures[0] if len(pictures) == 1 else "")
    chosen = [column] if column in pictures else column.split(",")
    if not set(chosen) <= set(pictures) or len(chosen) > 2:
        raise UsageError(
            f"--data {reference}: choose its column of images by #COLUMN: it has {', '.join(pictures) or 'none'} "
            "(#SOURCE,TARGET for pairs)"
        )
    labels = list[int]()
    if classes:
        named = [name for name, kind in kinds.items() if kind == "ClassLabel" or name == "label"]
        if len(named) != 1:
            raise UsageError(f"--data {reference}: expected one column of classes, found {', '.join(named) or 'none'}")
        labels = [int(label) for label in table[named[0]]]
        check_classes(f"--data {reference}", labels, classes)
    preprocess = _by_side(how, len(chosen) == 2)
    last = {SOURCE: chosen[0], TARGET: chosen[-1]}
    columns = {side: last[TARGET if how.degradation else side] for side in preprocess}
    return Rows(reference, table, columns, preprocess, labels)
