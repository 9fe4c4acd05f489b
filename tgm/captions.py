"""The file of captions while caption.py writes it. When it is done, saliency.py reads it by
tgm.arrays.read_captions.

Needs arrays.py, manifest.py and run.py.

    train.captions.jsonl           the captions of all videos, line i for row i: written in one go,
                                   once every video has been tried
    train.captions.jsonl.part-R    what rank R has done so far, each line with its row; removed
                                   when they are joined
    train.captions.json            what made them
"""

import glob
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tgm.arrays import (
    hold,
    is_about,
    label_flags,
    origin,
    read_about,
    refuse_foreign,
    refuse_other_origin,
    rows_of_before,
    write_about,
    written_aside,
)
from tgm.manifest import ManifestError, Video, Videos, renewed_sizes
from tgm.run import RunError, make_folder

LABELS = "labels"  # in the place of the model, where captions are labels


def make_entry(video: Video, captions: list[str], error: str | None = None) -> dict:
    """What the file says of one video; error: why it has no captions.

    captions: one per frame, or a single one that is the label. An empty text is kept, because it is
    the model's answer, and the model would give it again. `join` prints how many videos have
    nothing but empty texts."""
    entry = {"row": video.row, "path": video.name, "captions": captions}
    if error is not None:
        entry["error"] = error
    return entry


def has_captions(entry: dict) -> bool:
    """Whether the video was captioned. The captions may be empty texts."""
    return len(entry["captions"]) > 0


def is_captions(path: Path) -> bool:
    """Whether this is a file of captions: by the .json of a .jsonl, or by its first line, which may
    be damaged."""
    with suppress(OSError, ValueError):
        if path.suffix == ".jsonl" and is_about_captions(path.with_suffix(".json")):
            return True
    with open(path, encoding="utf-8-sig") as file:
        entry = json.loads(file.readline(1 << 20))  # at most 1 MB: it may be any file
    return isinstance(entry, dict) and "captions" in entry


def is_about_captions(path: Path) -> bool:
    """Whether this is a .json that tells what captions were made of; an array's has a shape."""
    return is_about(path) and "shape" not in json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(row, entry) of every line of a file. Skips lines that are no JSON: empty ones, and those
    that a kill cut off. ManifestError where a line is JSON, but no video's captions."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not is_entry(entry):
                raise ManifestError(
                    f"{path}: line {number + 1} is not a video's captions; "
                    "--resume none makes the file again"
                )
            # only the parts say the row: line i of the joined file is row i
            row = entry.pop("row", number)
            yield row, entry


def is_entry(value: object) -> bool:
    """Whether this is what `make_entry` makes, with or without its row."""
    if not isinstance(value, dict):
        return False
    captions = value.get("captions")
    row = value.get("row", 0)
    return (
        isinstance(value.get("path"), str)
        and isinstance(captions, list)
        and all(isinstance(caption, str) for caption in captions)
        and isinstance(row, int)
        and row >= 0
    )


class CaptionFile:
    """The captions of a manifest's videos, while they are made. Call in this order:

    claim     on rank 0: refuses what must not be overwritten, and takes the lock
    done      on every rank: the rows that need no work
    begin     on rank 0, after `done` on all: removes what is not kept, writes the .json
    append    on every rank, after each batch
    join      on rank 0, after the last `append` on all: writes the joined file

    Between `claim` and `begin` nothing changes the files, so each of these steps reads them again.
    Labels take no work that could be continued: for them, `refuse_to_replace` is called in place of
    `done`.

    path: the joined file; its name ends in .jsonl, or in anything but .json
    settings: how the captions are made, for the .json
    """

    def __init__(self, path: Path, videos: Videos, settings: dict):
        if path.name == "" or path.suffix == ".json":  # the name of "." is empty
            raise RunError(
                f"--out {path}: expected a name that ends in .jsonl, or in anything but .json: "
                "what made the captions is written to the same name with .json"
            )
        self.path = path
        self.about_path = path.with_suffix(".json")
        self.videos = videos
        self.settings = settings

    def claim(self, resume: str, extend: bool) -> None:
        """For rank 0, before any work. Takes the lock until the process ends. Refuses

        * to overwrite a file that is not ours,
        * to write where another process writes,
        * to go on with captions of other settings or videos.

        resume: "none" keeps nothing; extend: the captions may be of the manifest's first rows"""
        make_folder(self.path.parent)
        refuse_foreign(self.path, is_captions)
        refuse_foreign(self.about_path, is_about_captions)
        hold(self.path)
        if self.keeps_old(resume):
            self.check_origin(extend)

    def refuse_to_replace(self) -> None:
        """ManifestError where there are captions that another model made. Captions without a .json
        may be anybody's."""
        about = read_about(self.about_path) or {}
        if self.keeps_old("auto") and about.get("model") != self.settings["model"]:
            raise ManifestError(
                f"{self.path}: has captions of another origin; --resume none replaces them"
            )

    def parts(self) -> list[Path]:
        """The files that hold what the ranks have done so far."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))

    def lines(self) -> Iterator[tuple[int, dict]]:
        """(row, entry) of every line of the joined file and the parts."""
        for path in (self.path, *self.parts()):
            if path.exists():
                yield from read_lines(path)

    def keeps_old(self, resume: str) -> bool:
        """Whether the captions that are in the files already are kept. If no video has any, there
        is nothing to keep: then the files are begun again, perhaps with other settings."""
        return resume != "none" and any(has_captions(entry) for _, entry in self.lines())

    def entries(self) -> dict[int, dict]:
        """{row: entry} of this manifest. If a row was tried several times, its last entry with
        captions counts; if all tries failed, the last of them."""
        entries = {}
        for row, entry in self.lines():
            if row >= len(self.videos) or entry["path"] != self.videos[row].name:
                continue
            old = entries.get(row)
            if old is not None and has_captions(old) and not has_captions(entry):
                continue
            entries[row] = entry
        return entries

    def done(self, resume: str, extend: bool) -> set[int]:
        """The rows that need no work: those with captions; with `extend` also the failed ones."""
        if not self.keeps_old(resume):
            return set()
        return {row for row, entry in self.entries().items() if has_captions(entry) or extend}

    def check_origin(self, extend: bool) -> None:
        """ManifestError unless the captions that are there can be continued: they were made for
        this manifest, or for its first rows (`extend`), with the same settings, and of the same
        videos."""
        entries = self.entries()  # reads every line: a line that is no entry is refused here
        about = read_about(self.about_path)
        if about is None:  # somebody else's captions: only the paths can be compared
            for row, entry in self.lines():
                if has_captions(entry) and row not in entries:
                    raise ManifestError(
                        f"{self.path}: has captions of {entry['path']}, which is not row {row} "
                        f"(from 0) of the manifest: --out writes elsewhere; --resume none "
                        "replaces them"
                    )
            return
        if about.get("model") == LABELS:
            raise ManifestError(
                f"{self.path}: these captions are labels: make them again with "
                f"{label_flags(about)}, in seconds, or replace them by a model's with --resume none"
            )
        count = rows_of_before(self.path, self.videos, about, extend)

        def is_made(row):
            return row in entries and has_captions(entries[row])

        expected = origin(self.videos, count, self.settings)
        refuse_other_origin(self.path, self.videos, about, expected, is_made)

    def begin(self, resume: str, note_sizes: bool = True) -> None:
        """Removes captions that are not kept, and writes the .json. For rank 0, when all ranks have
        asked what is `done`.

        note_sizes: for captions of the pictures. The .json then holds the sizes of the videos'
        files, by which a replaced video is noticed later.
        If captions without a .json are kept, none is written: nobody knows what made them."""
        old = {}
        if self.keeps_old(resume):
            old = read_about(self.about_path)
            if old is None:
                return
        else:
            for file in (self.path, *self.parts()):
                file.unlink(missing_ok=True)
        about = origin(self.videos, len(self.videos), self.settings)
        if note_sizes:
            about["files"] = renewed_sizes(self.videos, old)
        write_about(self.about_path, about)

    def append(self, rank: int, entries: list[dict]) -> None:
        """Adds entries to the part of a rank."""
        part = Path(f"{self.path}.part-{rank}")
        lines = [""]  # begin with a newline: it ends a line that a kill may have cut off
        lines += [json.dumps(entry) for entry in entries]
        try:
            with open(part, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise RunError(
                f"{part}: cannot be written ({error.strerror}): the captions up to here are kept"
            ) from None

    def join(self) -> None:
        """If every row has been tried, writes the joined file, removes the parts, and prints the
        numbers of captioned and failed videos; RunError if all have failed. Otherwise prints how
        many rows have been tried."""
        entries = self.entries()
        count = len(self.videos)
        if len(entries) < count:
            print(
                f"{len(entries)} of {count} videos tried: run it again to go on (not with "
                "--resume none, which throws them away)"
            )
            return
        self._write([entries[row] for row in range(count)])
        for path in self.parts():
            path.unlink()
        failed = count - sum(map(has_captions, entries.values()))
        if failed == count:
            raise RunError(
                f"{self.path}: none of the videos could be captioned; the reasons are in it"
            )
        print(f"{self.path}: {count - failed} videos captioned, {failed} failed")
        empty = count - failed - sum(any(entry["captions"]) for entry in entries.values())
        if empty > 0:
            print(
                f"note: of {empty} videos all captions are empty, and an empty caption cannot "
                "guide a mask: try another --prompt or --model, with --resume none"
            )

    def _write(self, entries):
        try:
            with written_aside(self.path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except ManifestError as error:
            raise RunError(
                f"{error}: the new captions are kept in {self.path.name}.part-*"
            ) from None
