"""The file of captions while caption.py writes it. arrays.py reads it when it is done.

Needs arrays.py, manifest.py and run.py.

    train.captions.jsonl           the captions of all videos, line i for row i: written in one go,
                                   once every video has been tried
    train.captions.jsonl.part-R    what rank R has done so far, each line with its row; removed
                                   when they are joined
    train.captions.json            what made them
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from tgm.arrays import (
    hold,
    is_about,
    origin,
    read_about,
    refuse_foreign,
    refuse_other_origin,
    rows_of_before,
    write_about,
)
from tgm.manifest import Video, Videos, renewed_sizes
from tgm.run import RunError, make_folder


def make_entry(video: Video, captions: list[str], error: str | None = None) -> dict:
    """What the file says of one video; error: why it has no captions."""
    entry = {"row": video.row, "path": video.name, "captions": captions}
    if error is not None:
        entry["error"] = error
    return entry


def is_captions(path: Path) -> bool:
    """Whether this is a file of captions, by its first line."""
    with open(path, encoding="utf-8") as file:
        entry = json.loads(file.readline(1 << 20))
    return isinstance(entry, dict) and "captions" in entry


def read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(row, entry) of every line of a file, but not of one that a kill cut off."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            # only the parts say it: line i of the joined file is row i
            row = entry.pop("row", number)
            yield row, entry


class CaptionFile:
    """The captions of a manifest's videos, in the making.

    path: the joined file, which ends in .jsonl; settings: what the .json says of how they are made
    """

    def __init__(self, path: Path, videos: Videos, settings: dict):
        self.path = path
        self.about_path = path.with_suffix(".json")
        self.videos = videos
        self.settings = settings
        if self.about_path == path:
            raise RunError(
                f"--out {path}: expected a name that ends in .jsonl, as {path.name} holds what "
                "made the captions"
            )

    def claim(self, resume: str, extend: bool) -> None:
        """Refuses to write where something that is not ours stands, or another process writes, and
        to go on with captions of other settings or videos. For rank 0, before any work.

        resume: "none" keeps nothing; extend: the captions may be of the manifest's first rows"""
        make_folder(self.path.parent)
        refuse_foreign(self.path, is_captions)
        refuse_foreign(self.about_path, is_about)
        hold(self.path)
        if self.are_kept(resume):
            self.check_origin(extend)

    def parts(self) -> list[Path]:
        """The files that hold what the ranks have done so far."""
        return sorted(self.path.parent.glob(self.path.name + ".part-*"))

    def lines(self) -> Iterator[tuple[int, dict]]:
        """(row, entry) of every line of the joined file and the parts."""
        for path in (self.path, *self.parts()):
            if path.exists():
                yield from read_lines(path)

    def are_kept(self, resume: str) -> bool:
        """Whether the captions that are there stay: unless asked otherwise, or where no video has
        one yet."""
        return resume != "none" and any(entry["captions"] for _, entry in self.lines())

    def entries(self) -> dict[int, dict]:
        """The entries that are of this manifest, by row. Captions of any attempt win over a
        failure, and a later failure over an earlier one.
        """
        entries = {}
        for row, entry in self.lines():
            if row >= len(self.videos) or entry["path"] != self.videos[row].name:
                continue
            known = entries.get(row)
            if known is None or entry["captions"] or not known["captions"]:
                entries[row] = entry
        return entries

    def done(self, resume: str, extend: bool) -> set[int]:
        """The rows to leave alone: those with captions, and with `extend` the failed ones, too."""
        if not self.are_kept(resume):
            return set()
        return {row for row, entry in self.entries().items() if entry["captions"] or extend}

    def check_origin(self, extend: bool) -> None:
        """ManifestError unless the captions that are there may be gone on with: they were made of
        this manifest, or of its first rows (`extend`), with the same settings, and of the same
        videos."""
        about = read_about(self.about_path)
        if about is None:  # captions of other origin: rows are told by their paths alone
            return
        count = rows_of_before(self.path, self.videos, about, extend)
        entries = self.entries()

        def is_made(row):
            return row in entries and bool(entries[row]["captions"])

        expected = origin(self.videos, count, self.settings)
        refuse_other_origin(self.path, self.videos, about, expected, is_made)

    def begin(self, resume: str, of_videos: bool = True) -> None:
        """Writes the .json, and removes captions that are not kept. of_videos: captions depend on
        what the videos show, so that the sizes of files are noted. For rank 0, when all ranks have
        asked what is `done`."""
        old = {}
        if self.are_kept(resume):
            old = read_about(self.about_path) or {}
        else:
            for file in (self.path, *self.parts()):
                file.unlink(missing_ok=True)
        about = origin(self.videos, len(self.videos), self.settings)
        if of_videos:
            about["files"] = renewed_sizes(self.videos, old)
        write_about(self.about_path, about)

    def append(self, rank: int, entries: list[dict]) -> None:
        """Adds entries to the part of a rank."""
        part = Path(f"{self.path}.part-{rank}")
        lines = [""]  # ends the line that a kill may have cut off
        lines += [json.dumps(entry) for entry in entries]
        try:
            with open(part, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise RunError(
                f"{part}: cannot be written ({error.strerror}): the captions up to here are kept"
            ) from None

    def join(self, entries: dict[int, dict]) -> None:
        """Writes the joined file once every row has been tried, removes the parts, and prints the
        numbers of captioned and failed videos.
        """
        count = len(self.videos)
        if len(entries) < count:
            print(f"{len(entries)} of {count} videos tried: run it again to go on")
            return
        self._write([entries[row] for row in range(count)])
        for path in self.parts():
            path.unlink()
        failed = sum(not entry["captions"] for entry in entries.values())
        if failed == count:
            raise RunError(
                f"{self.path}: none of the videos could be captioned; the reasons are in it"
            )
        print(f"{self.path}: {count - failed} videos captioned, {failed} failed")

    def _write(self, entries):
        lines = []
        for entry in entries:
            without_row = {key: value for key, value in entry.items() if key != "row"}
            lines.append(json.dumps(without_row) + "\n")
        aside = self.path.with_name(self.path.name + ".new")
        try:
            aside.write_text("".join(lines), encoding="utf-8")
            aside.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}): what it would hold is in "
                f"{self.path.name}.part-*"
            ) from None
