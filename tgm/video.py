"""Videos: the only file of the project that opens one. Needs PyAV and numpy.

    videos = read_manifest("data/train.csv")
    with VideoReader(videos[0].path) as reader:
        start, end = reader.span(videos[0])
        frames = reader.read(segment_midpoints(start, end, 3), size=256)    # uint8 [3, H, W, 3]

`python -m tgm.prepare data/train.csv` checks every file of a manifest, or re-encodes it.

`VideoReader.read` decodes as little as it can. It seeks to the key frame before the first wanted
time and demuxes until packets pass the last one; packets carry their presentation time (pts), so
which frames are wanted is known before any is decoded. H.264 and HEVC then skip the pictures that
no other refers to, unless wanted. Only wanted frames are converted and resized, in one swscale call
each, on one thread: about 1.5 times faster than decord on ordinary H.264 clips
(experiments/BENCHMARKS.md). Where that cannot work (AVI has no pts, a damaged index, hidden
frames), the file is decoded plainly from its start. Both ways give the same frames, bit for bit.

What comes out is what a player shows: turned and mirrored as the file says, edit lists honoured,
YUV converted by the matrix (BT.601, 709, 2020) and range the stream declares; where it declares
none, BT.601 and limited range, as FFmpeg has it. Not done: pixels are taken as square, HDR is not
tone-mapped."""

import bisect
import contextlib
import itertools
import math
import os
import stat
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter

av.logging.set_level(av.logging.PANIC)  # what matters of libav's log is in its exceptions

TIMEOUT = 60.0  # seconds that reading one video may take, unless told otherwise
# seconds between wanted frames from which looking for a key frame in between costs less than it
# saves
SEEK_GAP = 1.0


class VideoError(Exception):
    """A video that cannot be read: one line, "path: reason"."""


class Orientation(NamedTuple):
    """How a player shows a stored frame: these three steps, in this order."""

    turned: bool  # rows and columns swapped
    mirror_x: bool  # left to right
    mirror_y: bool  # upside down


class Distances(NamedTuple):
    """Seconds from a frame to the nearest picture displayed before and after it that it can have
    been predicted from; None if there is none, or none is known."""

    past: float | None = None
    future: float | None = None


class Vectors(NamedTuple):
    """The motion vectors of one frame: each says that what is in a block moves by `shift` within
    `seconds`.
    """

    time: float  # seconds since the first displayed frame
    # float32 [n, 4]: x0, y0, x1, y1 as fractions of the displayed frame; they may overlap and leave
    # gaps
    blocks: np.ndarray
    shift: np.ndarray  # float32 [n, 2]: dx to the right, dy down, in frame widths and heights
    # float32 [n], above 0: from the picture that it was predicted from to this one, or the reverse
    seconds: np.ndarray


def side_data(frame):
    """A decoded frame's side data. In PyAV they and their frame hold each other until Python looks
    for cycles; a thumbnail has the same ones, and leaves the picture's memory free to go at
    once."""
    return (
        VideoReformatter()
        .reformat(frame, 16, 16, "gray", threads=1, interpolation=Interpolation.POINT)
        .side_data
    )


def orientation(data) -> Orientation:
    """How a player shows a frame of this side data."""
    matrix = data.get(SideData.DISPLAYMATRIX)
    if not matrix:
        return Orientation(False, False, False)
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def displayed_vectors(time, frame, data, distances) -> Vectors:
    """The motion vectors in a frame's side data, of the frame as it is displayed. Those that refer
    to a picture of unknown distance are left out."""
    v = data.get(SideData.MOTION_VECTORS).to_ndarray()
    has_past = distances.past is not None
    has_future = distances.future is not None
    v = v[np.where(v["source"] < 0, has_past, has_future)]
    from_past = v["source"] < 0
    seconds = np.where(from_past, distances.past or 0, distances.future or 0)
    # a block came from where its vector points, or goes there
    sign = np.where(from_past, -1.0, 1.0)
    dx = sign * v["motion_x"] / v["motion_scale"]
    dy = sign * v["motion_y"] / v["motion_scale"]
    w = v["w"]
    h = v["h"]
    x = v["dst_x"] - w / 2
    y = v["dst_y"] - h / 2
    width = frame.width
    height = frame.height
    turned, mirror_x, mirror_y = orientation(data)
    if turned:
        x, y = y, x
        w, h = h, w
        dx, dy = dy, dx
        width, height = height, width
    if mirror_x:
        x = width - x - w
        dx = -dx
    if mirror_y:
        y = height - y - h
        dy = -dy
    corners = [x / width, y / height, (x + w) / width, (y + h) / height]
    blocks = np.stack(corners, 1, dtype=np.float32)
    shift = np.stack([dx / width, dy / height], 1, dtype=np.float32)
    return Vectors(time, blocks, shift, seconds.astype(np.float32))


class VideoReader:
    """An open video: `with VideoReader(path) as reader: frames = reader.read(times)`. VideoError if
    it cannot be read.

    duration: seconds from the first frame to the end of the last, by the file's header; only if
    that does not say is the whole file demuxed. fps: average frame rate. Times everywhere are
    seconds since the first displayed frame.
    vectors: the decoder keeps the codec's motion vectors, for `read_vectors`. timeout: seconds from
    opening to the last frame read; past them, a VideoError. It is looked at between packets: one
    call into libav that never returns is not ended by it."""

    def __init__(self, path: str | os.PathLike, vectors: bool = False, timeout: float = TIMEOUT):
        self.path = os.fspath(path)
        self._vectors = vectors
        self._timeout = timeout
        self._began = monotonic()
        self._container = None
        self._demuxer = None
        try:
            with self.errors():
                self._open()
                self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 25)
                self._tick = float(self._stream.time_base)  # seconds
                # A pts is rounded to ticks: frame k of an mkv may come up to half a millisecond
                # after k / fps.
                self._tolerance = min(0.499 * self._tick, 0.0005)
                self._first = self._first_pts()
                self.duration = self._find_duration()
        except BaseException:
            self.close()
            raise

    @property
    def codec(self) -> str:
        """The name of the video stream's codec, such as h264."""
        return self._stream.codec_context.name

    def close(self, *_) -> None:
        if self._demuxer is not None:
            # left to itself, PyAV's generator leaks a quarter of a kilobyte each time
            self._demuxer.close()
        if self._container is not None:
            self._container.close()

    def __enter__(self):
        return self

    __exit__ = close

    def span(self, video) -> tuple[float, float]:
        """The (start, end) of a manifest row in this file, in seconds, 0 <= start < end <=
        duration.
        """
        start = video.start or 0.0
        if start >= self.duration:
            raise VideoError(
                f"{self.path}: starts at {start:g} s in the manifest, but lasts {self.duration:g} s"
            )
        if video.end is None:
            return start, self.duration
        return start, min(video.end, self.duration)

    def read(self, times: Sequence[float], size: int | tuple[int, int] | None = None) -> np.ndarray:
        """The frame on screen at each time: the last that starts at or before it -> uint8 [T, H, W,
        3], RGB.

        times: seconds, T >= 1 of them in any order, repeats allowed; before 0 is the first frame,
        past the end the last. A time may fall short of its frame by half a tick of the stream's
        clock (at most 0.5 ms), for rounding.
        size: None as displayed; an int scales the short side to it; (H, W) squashes to it. Bicubic,
        its support widened when scaling down, so that nothing aliases. VideoError also if the
        decoder reports damage, or the file ends more than a second, or a tenth of its duration,
        before a wanted time that its header promises."""
        times = np.asarray(times, np.float64)
        if times.ndim != 1 or not len(times) or np.isnan(times).any():
            raise ValueError(f"times: expected a list of one or more seconds, got {times}")
        times = self._inside(times)
        wanted = sorted(set(times))
        with self.errors():
            try:
                images = self._convert(self._decode_quickly(wanted), size)
            except (LookupError, av.FFmpegError):
                # the quick way does not work for this file; the plain one may
                images = self._convert(self._decode_plainly(wanted), size)
        return np.stack([images[time] for time in times])

    def _inside(self, times):
        """Times as a list, those outside of the video moved to its ends; a header may fall a few
        frames short of the last."""
        return np.asarray(times, np.float64).clip(0, self.duration + 1).tolist()

    def read_vectors(self, times: Sequence[float]) -> list[Vectors]:
        """The codec's motion vectors of the frames on screen at each time -> list of Vectors, in
        order of time.

        Frames without any, such as key frames, are left out. Errors as for `read`, and VideoError
        if no frame has any: libav exports those of H.264, MPEG-1, -2 and -4, and their older kin,
        not of HEVC, VP9, AV1, or MJPEG."""
        wanted = sorted(set(self._inside(times)))
        with self.errors():
            try:
                frames = self._read_vectors(self._decode_quickly(wanted))
            except (LookupError, av.FFmpegError):
                frames = self._read_vectors(self._decode_plainly(wanted))
        if not frames:
            raise VideoError(
                f"{self.path}: no motion vectors in its {self.codec} stream; "
                "--flow raft measures motion from the pictures"
            )
        return frames

    def _read_vectors(self, frames):
        found = []
        latest = None
        for time, frame, distances in frames:
            data = side_data(frame)
            # libav's MPEG-4 decoder leaves the vectors of B pictures at zero
            empty = self.codec == "mpeg4" and frame.pict_type == PictureType.B
            if data.get(SideData.MOTION_VECTORS) is None or empty or frame is latest:
                continue
            latest = frame
            vectors = displayed_vectors(time, frame, data, distances)
            if len(vectors.blocks):
                found.append(vectors)
        return found

    def _open(self):
        self.close()
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe would be waited for
            raise VideoError(f"{self.path}: a directory, a pipe or a device, not a file")
        # "file:" and the whitelist: a name is never a URL, and a playlist that poses as a video
        # reaches no network.
        self._container = av.open(
            f"file:{self.path}",
            options={"protocol_whitelist": "file"},
            timeout=min(self._timeout, 1e9),
        )
        if not self._container.streams.video:
            raise VideoError(f"{self.path}: no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise VideoError(f"{self.path}: of a codec that cannot be decoded here")
        # one thread, so that skip_frame applies to the very packet being decoded
        self._stream.codec_context.thread_count = 1
        # Damage is an error, not a grey picture; a header that claims more than 16384 x 8192 pixels
        # gets no memory for them.
        options = {"err_detect": "explode", "max_pixels": str(2**27)}
        if self._vectors:
            options["flags2"] = "+export_mvs"
        self._stream.codec_context.options = options

    def _packets(self, drain=False):
        """The stream's packets from here on, at its end one that drains the decoder, if asked
        for. Ends those asked for before.
        """
        if self._demuxer is not None:
            self._demuxer.close()
        self._demuxer = self._container.demux(self._stream)
        return (packet for packet in self._in_time(self._demuxer) if packet.size or drain)

    def _in_time(self, items):
        for item in items:
            if monotonic() - self._began > self._timeout:
                raise av.error.ExitError(0, "")
            yield item

    def _first_pts(self):
        """The pts of the first frame displayed, or None if packets carry no pts.

        Frames an edit list cuts are not displayed, and those before the first key frame refer to
        what the file lacks."""
        key = None
        first = None
        for packet in self._packets():
            if packet.pts is None or self._container.format.name == "avi":
                # for AVI, libav makes pts up, and badly
                return None
            if key is None and packet.is_keyframe:
                key = packet.pts
            if key is not None and packet.pts >= key and not packet.is_discard:
                if first is None or packet.pts < first:
                    first = packet.pts
            if first is not None and packet.dts is not None and packet.dts >= first:
                break
        return first

    def _find_duration(self):
        offset = (self._first or 0) * self._tick
        if self._stream.duration:
            return self._stream.duration * self._tick
        tag = self._stream.metadata.get("DURATION")
        if tag:
            # Matroska: "00:00:10.333000000", when the stream ends
            parts = zip(tag.split(":"), (3600, 60, 1), strict=False)
            return sum(float(part) * unit for part, unit in parts) - offset
        if self._container.duration:
            return self._container.duration / av.time_base - offset
        self._open()
        ends = [(packet.pts or 0) + (packet.duration or 0) for packet in self._packets()]
        if self._first is None:
            return len(ends) / self.fps
        return max(ends) * self._tick - offset

    def _pts(self, time):
        return self._first + (time + self._tolerance) / self._tick

    def _seek(self, time):
        """-> (a key frame's packet, displayed at or before `time`; the packets that follow it)."""
        # MPEG-TS and FLV seek by decoding time, so may land after `time`; other indices may be
        # wrong
        back = 0
        while back <= 2 * max(time, 1):
            self._container.seek(math.floor(self._pts(time - back)), stream=self._stream)
            packets = self._packets()
            keys = (packet for packet in packets if packet.is_keyframe and packet.pts is not None)
            key = next(keys, None)
            if key is not None and key.pts <= self._pts(time):
                return key, packets
            back = 1 if back == 0 else 2 * back
        raise LookupError("no key frame")

    def _runs(self, times):
        """Split sorted times into runs: a run is decoded in one go, and a new one starts where
        seeking saves decoding.
        """
        runs = [[times[0]]]
        for last, time in itertools.pairwise(times):
            if time - last > SEEK_GAP and self._seek(time)[0].pts > self._pts(last):
                runs.append([])
            runs[-1].append(time)
        return runs

    def _decode_quickly(self, times):
        """Yields (time, frame, Distances) for sorted times; so does _decode_plainly."""
        if self._first is None:
            raise LookupError("no pts")
        codec = self._stream.codec_context
        for run in self._runs(times):
            packets = self._packets_for(run)
            wanted = self._frames_for(run, packets)  # pts -> times
            while packets[-1].pts not in wanted:
                packets.pop()
            distances = self._distances(packets) if self._vectors else {}
            for packet in self._in_time([*packets, None]):  # None drains the decoder
                if packet is not None and codec.name in ("h264", "hevc"):
                    codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                for frame in codec.decode(packet):
                    for time in wanted.pop(frame.pts, ()):
                        yield time, frame, distances.get(frame.pts, Distances())
            if wanted:
                raise LookupError("a packet without a frame")

    def _packets_for(self, run):
        """The packets, from a key frame on, that decoding the frames at these times takes."""
        key, following = self._seek(run[0])
        packets = [key]
        for packet in following:
            if packet.pts is None:
                raise LookupError("a packet without pts")
            if packet.dts is not None and packet.dts > self._pts(run[-1]):
                return packets  # so is every later pts
            packets.append(packet)
        end = max(packet.pts + (packet.duration or 0) - self._first for packet in packets)
        self._check_end(run[-1], end * self._tick)
        return packets

    def _frames_for(self, run, packets):
        """{pts: times} of the frames on screen at the times of a run."""
        key = packets[0]
        displayed = []
        for packet in packets:
            if packet.pts >= key.pts and not packet.is_discard:
                displayed.append(packet.pts)
        wanted = {}
        for time in run:
            latest = max((pts for pts in displayed if pts <= self._pts(time)), default=None)
            wanted.setdefault(latest, []).append(time)
        return wanted

    def frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield (seconds, frame) of every frame displayed, decoding plainly from the file's
        start.
        """
        self._open()
        index = 0
        for packet in self._packets(drain=True):
            for frame in packet.decode():
                if self._first is None or frame.pts is None:
                    yield index / self.fps, frame
                else:
                    yield (frame.pts - self._first) * self._tick, frame
                index += 1

    def _decode_plainly(self, times):
        times = list(times)
        frame = None
        distances = None
        shown = 0.0
        anchor = None  # when the latest frame was shown that is no B picture
        for shown, new in self.frames():
            while times and frame is not None and times[0] + self._tolerance < shown:
                yield times.pop(0), frame, distances
            if not times:
                return
            frame = new
            distances = Distances()
            if frame.pict_type != PictureType.B:
                # what B pictures refer to cannot be known without pts
                if anchor is not None:
                    distances = Distances(past=shown - anchor)
                anchor = shown
        if frame is None:
            raise VideoError(f"{self.path}: no frame could be decoded")
        self._check_end(times[-1], shown + 1 / self.fps)
        for time in times:
            yield time, frame, distances

    def _distances(self, packets):
        """{pts: Distances}. A stream does not tell which of several references a vector means; the
        nearest is the encoder's usual choice. packets: in decoding order."""
        references = []  # their pts so far, sorted
        found = {}
        for packet in packets:
            place = bisect.bisect_left(references, packet.pts)
            past = None
            future = None
            if place > 0:
                past = (packet.pts - references[place - 1]) * self._tick
            if place < len(references):
                future = (references[place] - packet.pts) * self._tick
            found[packet.pts] = Distances(past, future)
            if self.codec == "h264":
                is_reference = self._is_reference(packet)
            else:
                # B pictures, which are displayed before one decoded earlier, are never referred to
                is_reference = place == len(references)
            if is_reference:
                references.insert(place, packet.pts)
        return found

    def _is_reference(self, packet):
        """Whether other pictures of an H.264 stream may refer to this one: nal_ref_idc of its
        first slice (ITU-T H.264, 7.4.1).
        """
        data = bytes(packet)
        extra = self._stream.codec_context.extradata or b""
        prefix = 0  # bytes of a length before each unit; 0: start codes
        if extra[:1] == b"\x01" and len(extra) > 4:
            prefix = (extra[4] & 3) + 1
        place = 0
        while place + prefix < len(data):
            if prefix == 0:
                place = data.find(b"\0\0\1", place) + 3
                if place < 3 or place >= len(data):
                    break
            header = data[place + prefix]
            if header & 31 in (1, 2, 5):  # a slice
                return header & 96 > 0
            place += prefix + int.from_bytes(data[place : place + prefix], "big")
        return True

    def _check_end(self, time, end):
        if min(time, self.duration) - end > min(1, self.duration / 10):
            raise VideoError(
                f"{self.path}: truncated: {end:.2f} s of the {self.duration:.2f} s in its header"
            )

    def _convert(self, frames, size):
        """(time, frame, _) -> {time: uint8 [H, W, 3]}, turned as a player would and resized."""
        reformatter = VideoReformatter()
        images = {}
        latest = None
        for time, frame, _ in frames:
            if frame is not latest:
                if frame.is_corrupt:
                    raise VideoError(f"{self.path}: damaged frame near {time:.2f} s")
                if latest is None:  # the first frame decides, should a stream change its size
                    shown_as = orientation(side_data(frame))
                    height, width = stored_size(frame, shown_as.turned, size)
                image = to_image(reformatter, frame, height, width, shown_as)
                latest = frame
            images[time] = image
        return images

    def picture(
        self, frame: av.VideoFrame, size: int | tuple[int, int] | None = None
    ) -> np.ndarray:
        """One of `frames` as `read` gives it, uint8 [H, W, 3]."""
        return self._convert([(0.0, frame, None)], size)[0.0]

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever goes wrong with the file becomes a VideoError of one line."""
        try:
            yield
        except av.error.ExitError as error:  # libav's own, when a call took too long
            raise VideoError(
                f"{self.path}: reading it takes more than {self._timeout:g} s (--video-timeout)"
            ) from error
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
            log = getattr(error, "log", None)
            if log:
                reason += f" ({log[2].strip()})"
            raise VideoError(" ".join(f"{self.path}: {reason}".split())) from error


def stored_size(frame, turned, size):
    """The (height, width) to resize a stored frame to, so that it is displayed in `size`."""
    shape = np.array([frame.height, frame.width])
    if turned:
        shape = shape[::-1]
    if size is not None and np.ndim(size) == 0:
        shape = np.rint(shape * size / shape.min())
    elif size is not None:
        shape = np.array(size)
    height, width = map(int, shape[::-1] if turned else shape)
    return height, width


def to_image(reformatter, frame, height, width, shown_as):
    """A stored frame as uint8 RGB, resized and then turned."""
    # in its own size only chroma is scaled, as players do
    same = (height, width) == (frame.height, frame.width)
    interpolation = Interpolation.BILINEAR if same else Interpolation.BICUBIC
    image = reformatter.reformat(
        frame, width, height, "rgb24", threads=1, interpolation=interpolation
    ).to_ndarray()
    if shown_as.turned:
        image = image.swapaxes(0, 1)
    if shown_as.mirror_x:
        image = image[:, ::-1]
    if shown_as.mirror_y:
        image = image[::-1]
    return image


def read_frames(
    path: str | os.PathLike, times: Sequence[float], size: int | tuple[int, int] | None = None
) -> np.ndarray:
    """`VideoReader(path).read(times, size)`, and the file closed again."""
    with VideoReader(path) as reader:
        return reader.read(times, size)


def segment_midpoints(start: float, end: float, count: int) -> np.ndarray:
    """The mid-points of `count` equal parts of [start, end] -> float64 [count]."""
    return start + (np.arange(count) + 0.5) * (end - start) / count
