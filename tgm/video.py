"""Videos: the only file of the project that reads one. Needs PyAV and numpy.

    with VideoReader("a.mp4") as reader:
        times = segment_midpoints(0, reader.duration, 8)
        frames = reader.read(times, size=256)    # uint8 [8, H, W, 3]: times, height, width, RGB

`python -m tgm.prepare data/train.csv` checks every file of a manifest, or re-encodes it.

`VideoReader.read` decodes as little as it can:

    1. It seeks to the key frame before the first wanted time.
    2. It reads packets until they pass the last wanted time. Packets carry their presentation time
       (pts), so which frames are wanted is known before any is decoded.
    3. It decodes these packets. H.264 and HEVC skip the pictures that no other refers to, unless
       they are wanted.
    4. Only wanted frames are converted and resized, in one swscale call each, on one thread.

On ordinary H.264 clips this is about 1.5 times faster than decord (experiments/BENCHMARKS.md).
Where it cannot work, the file is decoded from its start: AVI has no pts, small frames of an MPEG
program stream share one, an index may be damaged, and a packet may give no frame. Both ways give
the same frames, bit for bit; motion vectors of B pictures are left out then.

What comes out is what FFmpeg shows: turned and mirrored as the file says, edit lists honoured, YUV
converted by the matrix (BT.601, 709, 2020) and range that the stream declares; where it declares
none, BT.601 and limited range. Not done: pixels are taken as square, HDR is not tone-mapped, and
interlaced frames stay as they are.

The words of video coding in this file:

    packet      the compressed data of one frame; to demux is to read packets without decoding them
    key frame   can be decoded without any other
    pts, dts    when a frame is shown, and when it is decoded
    reference   a frame that others are predicted from
    B picture   predicted from frames before and after it, so it is decoded later than it is shown
    edit list   tells the player to skip a part of the stream
    drain       ask the decoder, at the end of the file, for its last frames
"""

import bisect
import contextlib
import itertools
import logging
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

# For the whole process: what matters of libav's log is in its exceptions. Older versions of
# torchvision set another level when they are imported, so Python's logger is silenced, too.
av.logging.set_level(av.logging.PANIC)
logging.getLogger("libav").setLevel(logging.CRITICAL + 1)

TIMEOUT = 60.0  # seconds that reading one video may take, unless told otherwise
SEEK_GAP = 1.0  # seconds: if two wanted frames are further apart, look for a key frame in between


def unnamed_type(types, number):
    """The member for a type of side data that PyAV has no name for, such as EXIF. Without this, the
    side data of a frame that has it cannot be read at all, and so not the frame's orientation."""
    member = object.__new__(types)
    member._name_ = f"TYPE_{number}"
    member._value_ = number
    return member


SideData._missing_ = classmethod(unnamed_type)  # what an Enum calls for an unknown value


class VideoError(Exception):
    """A video that cannot be read: one line, "path: reason"."""


class QuickWayFails(Exception):
    """The file has to be decoded from its start."""


class Orientation(NamedTuple):
    """How a player shows a stored frame: these three steps, in this order."""

    transposed: bool  # rows and columns swapped
    mirror_x: bool  # left to right
    mirror_y: bool  # upside down


class Distances(NamedTuple):
    """A frame is predicted from a picture shown before it, one shown after it, or both. These are
    the seconds to the nearest of each that it can have been predicted from; None if there is none,
    or none is known."""

    past: float | None = None
    future: float | None = None


class Vectors(NamedTuple):
    """The motion vectors of one frame: each says that what is in a block moves by `shift` within
    `seconds`.
    """

    # Seconds since the first displayed frame. `read_vectors` gives the time that was asked for,
    # moved into the video where it lay outside.
    time: float
    # float32 [n, 4]: x0, y0, x1, y1 as fractions of the displayed frame; they may overlap and leave
    # gaps
    blocks: np.ndarray
    shift: np.ndarray  # float32 [n, 2]: dx to the right, dy down, in frame widths and heights
    # float32 [n]: between this picture and the one that the block was predicted from, above 0
    seconds: np.ndarray


def side_data(frame):
    """A decoded frame's side data, read from a copy of 16 x 16 pixels: in PyAV a frame and its side
    data refer to each other, so that only the garbage collector frees them, and a frame of full
    size would stay in memory until then."""
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
    # The matrix is a b u, c d v, x y w: x' = a x + c y, y' = b x + d y. Angles other than multiples
    # of 90 degrees are rounded to one. Where b outweighs a, the frame is transposed: x' = c y and
    # y' = b x, so that a negative c mirrors left to right, a negative b upside down.
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
    # A vector points from the block to its place in the other picture: in the past, where the block
    # came from, or in the future, where it goes to.
    sign = np.where(from_past, -1.0, 1.0)
    dx = sign * v["motion_x"] / v["motion_scale"]
    dy = sign * v["motion_y"] / v["motion_scale"]
    w = v["w"]
    h = v["h"]
    # libav gives the block's centre
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

    duration: seconds from the first frame to the end of the last. The header says it, of the
    picture's stream or of a file without other streams. If it does not, and for FLV and MPEG
    program streams, all packets are read. fps: average frame rate. Times everywhere are seconds
    since the first displayed frame.
    vectors: the decoder keeps the codec's motion vectors, for `read_vectors`. timeout: seconds from
    opening to the last frame read; past them, a VideoError. libav looks at the clock while it waits
    for the disk, and this class between packets; a decoder that never returns is not ended."""

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

    def close(self) -> None:
        if self._demuxer is not None:
            # left to itself, PyAV's generator leaks a quarter of a kilobyte each time
            self._demuxer.close()
        if self._container is not None:
            self._container.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

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
        its support widened when scaling down, so that nothing aliases.

        ValueError for no times, or for another size. VideoError also if the decoder reports damage,
        or the file ends too long before a wanted time that its header promises: more than a second,
        or than a tenth of its duration, whichever is less."""
        if size is not None and (np.shape(size) not in ((), (2,)) or np.min(size) < 1):
            raise ValueError(f"size: expected pixels, (height, width) or None, got {size}")
        times = self._inside(times)
        images = self._decode(times, lambda frames: self._convert(frames, size))
        return np.stack([images[time] for time in times])

    def _inside(self, times):
        """Times as a list, those outside of the video moved to its ends. One second is added at its
        end, since the duration in a header may be a few frames too short."""
        times = np.asarray(times, np.float64)
        if times.ndim != 1 or not len(times) or np.isnan(times).any():
            raise ValueError(f"times: expected a list of one or more seconds, got {times}")
        return times.clip(0, self.duration + 1).tolist()

    def read_vectors(self, times: Sequence[float]) -> list[Vectors]:
        """The codec's motion vectors of the frames on screen at each time -> list of Vectors, in
        order of time. Of times with the same frame on screen the first counts.

        Frames without any, such as key frames, are left out. Errors as for `read`, and VideoError
        if no frame has any: libav exports those of H.264, MPEG-1, -2 and -4, and their older kin,
        not of HEVC, VP9, AV1, or MJPEG. ValueError unless opened with vectors=True."""
        if not self._vectors:
            raise ValueError("motion vectors: open the file with VideoReader(path, vectors=True)")
        frames = self._decode(self._inside(times), self._vectors_of)
        if not frames:
            raise VideoError(
                f"{self.path}: no motion vectors in its {self.codec} stream; "
                "--flow raft measures motion from the pictures"
            )
        return frames

    def _decode(self, times, use):
        """What use(frames) makes of the frames on screen at these times, frames being (time, frame,
        Distances) in order of time. Where the quick way fails half-way, `use` is called a second
        time, with all frames again."""
        wanted = sorted(set(times))
        with self.errors():
            try:
                return use(self._decode_quickly(wanted))
            except av.error.ExitError:  # the time is up
                raise
            except (QuickWayFails, av.FFmpegError):
                return use(self._decode_plainly(wanted))

    def _vectors_of(self, frames):
        """(time, frame, Distances) -> a list of Vectors."""
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
            timeout=min(self._timeout, 1e9),  # libav's clock does not take infinity
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
        """The stream's packets from here on. Ends the packets asked for before.

        drain: at the end also the empty packet that makes the decoder give its last frames."""
        if self._demuxer is not None:
            self._demuxer.close()
        self._demuxer = self._container.demux(self._stream)
        return (packet for packet in self._in_time(self._demuxer) if packet.size or drain)

    def _in_time(self, items):
        """Yields the items; once the time is up, raises the error that libav raises then."""
        for item in items:
            if monotonic() - self._began > self._timeout:
                raise av.error.ExitError(0, "")
            yield item

    def _first_pts(self):
        """The pts of the first frame displayed, or None if packets carry no pts.

        Frames that an edit list cuts off are not displayed; nor are those before the first key
        frame, which refer to what the file lacks."""
        key = None
        first = None
        for packet in self._packets():
            if packet.pts is None or self._container.format.name in ("avi", "mpeg"):
                # libav makes their pts up: badly for AVI, and for the program streams of MPEG
                # (.mpg, .vob), where small frames share one pts, others after a seek
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
        if self._container.format.name == "mpeg":  # libav would derive it from pts
            return self._count_packets() / self.fps
        if self._stream.duration:
            # It counts the frames before the first that is displayed, too.
            start = self._stream.start_time or 0
            before = 0 if self._first is None else max(0, self._first - start)
            return (self._stream.duration - before) * self._tick
        # what follows are ends, not durations
        offset = (self._first or 0) * self._tick
        # Matroska: "00:00:10.333000000", when the stream ends
        tag = self._stream.metadata.get("DURATION")
        if tag:
            parts = zip(tag.split(":"), (3600, 60, 1), strict=False)
            return sum(float(part) * unit for part, unit in parts) - offset
        # The container's duration is that of its longest stream, which may be the sound. FLV's
        # leaves out what comes before the first frame.
        alone = len(self._container.streams) == 1 and self._container.format.name != "flv"
        if self._container.duration and alone:
            return self._container.duration / av.time_base - offset
        # no header says it: the end of the last packet
        if self._first is None:
            return self._count_packets() / self.fps
        self._open()
        ends = [(packet.pts or 0) + (packet.duration or 0) for packet in self._packets()]
        return max(ends) * self._tick - offset

    def _count_packets(self):
        self._open()
        return sum(1 for _ in self._packets())

    def _pts(self, time):
        return self._first + (time + self._tolerance) / self._tick

    def _seek(self, time):
        """-> (a key frame's packet, displayed at or before `time`; the packets that follow it)."""
        # MPEG-TS and FLV seek by decoding time, so they may land after `time`, and any index may be
        # wrong: then seek 1, 2, 4, ... seconds further back, up to about twice the time itself.
        back = 0
        while back <= 2 * max(time, 1):
            self._container.seek(math.floor(self._pts(time - back)), stream=self._stream)
            packets = self._packets()
            keys = (packet for packet in packets if packet.is_keyframe and packet.pts is not None)
            key = next(keys, None)
            if key is not None and key.pts <= self._pts(time):
                return key, packets
            back = 1 if back == 0 else 2 * back
        raise QuickWayFails("no key frame")

    def _runs(self, times):
        """Split sorted times into runs: a run is decoded in one go, and a new one starts where a
        key frame lies between two times, so that seeking saves decoding.
        """
        runs = [[times[0]]]
        for last, time in itertools.pairwise(times):
            if time - last > SEEK_GAP:
                key, _ = self._seek(time)
                if key.pts > self._pts(last):
                    runs.append([])
            runs[-1].append(time)
        return runs

    def _decode_quickly(self, times):
        """Yields (time, frame, Distances) for sorted times, as `_decode_plainly` does.
        QuickWayFails, perhaps after some frames, where the file has to be decoded from its start.
        """
        if self._first is None:
            raise QuickWayFails("no pts")
        codec = self._stream.codec_context
        for run in self._runs(times):
            packets = self._packets_for(run)
            wanted = self._frames_for(run, packets)  # {pts: times}
            while packets[-1].pts not in wanted:  # what follows the last wanted one is not needed
                packets.pop()
            distances = self._distances(packets) if self._vectors else {}
            for packet in self._in_time([*packets, None]):  # None drains the decoder
                if packet is not None and codec.name in ("h264", "hevc"):
                    codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                for frame in codec.decode(packet):
                    for time in wanted.pop(frame.pts, ()):
                        yield time, frame, distances.get(frame.pts, Distances())
            if wanted:
                raise QuickWayFails("a packet without a frame")

    def _packets_for(self, run):
        """The packets, from a key frame on, that decoding the frames at these times takes."""
        key, following = self._seek(run[0])
        packets = [key]
        for packet in following:
            if packet.pts is None:
                raise QuickWayFails("a packet without pts")
            if packet.dts is not None and packet.dts > self._pts(run[-1]):
                return packets  # every later pts is past the last time, too
            packets.append(packet)
        # the file ended first: is that where its header says?
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
        displayed.sort()
        wanted = {}
        for time in run:
            place = bisect.bisect_right(displayed, self._pts(time))
            if place == 0:
                raise QuickWayFails("no frame at or before a time")
            wanted.setdefault(displayed[place - 1], []).append(time)
        return wanted

    def frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yields (seconds, frame) of every frame displayed, decoding from the file's start.
        VideoError at the end, if the file ends too early, as for `read`. What else goes wrong is
        libav's error: `with reader.errors():` makes it a VideoError."""
        end = None
        for seconds, frame in self._all_frames():
            if seconds >= 0:
                # The frame that was decoded last may be the long one, though not displayed last.
                end = max(end or 0.0, seconds + self._shown_for(frame))
                yield seconds, frame
        if end is not None:
            self._check_end(self.duration, end)

    def _shown_for(self, frame):
        """How long a frame is displayed, in seconds; by the frame rate where it does not say."""
        if frame.duration:
            return frame.duration * self._tick
        return 1 / self.fps

    def _all_frames(self):
        """Yields (seconds, frame), also of the frames before the first that is displayed, at
        seconds below 0.
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
        """Yields (time, frame, Distances) for sorted times, decoding from the file's start. A frame
        is on screen until the next begins."""
        times = list(times)
        frame = None
        distances = None
        begins = 0.0
        end = 0.0
        last_reference = None  # when the latest frame began that is no B picture
        for begins, upcoming in self._all_frames():
            while times and frame is not None and times[0] + self._tolerance < begins:
                yield times.pop(0), frame, distances
            if not times:
                return
            frame = upcoming
            end = max(end, begins + self._shown_for(frame))
            distances = Distances()
            if frame.pict_type != PictureType.B:
                # what B pictures refer to cannot be known without pts
                if last_reference is not None:
                    distances = Distances(past=begins - last_reference)
                last_reference = begins
        if frame is None:
            raise VideoError(f"{self.path}: no frame could be decoded")
        self._check_end(times[-1], end)
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
        # Units follow each other in one of two formats: each after its length, in `prefix` bytes,
        # or, where prefix is 0, each after a start code 0 0 1.
        prefix = 0
        if extra[:1] == b"\x01" and len(extra) > 4:
            prefix = (extra[4] & 3) + 1
        place = 0
        while place + prefix < len(data):
            if prefix == 0:
                place = data.find(b"\0\0\1", place) + 3
                if place < 3 or place >= len(data):  # none was found, or nothing after it
                    break
            header = data[place + prefix]
            unit_type = header & 0x1F
            if unit_type in (1, 2, 5):  # a slice
                return (header & 0x60) != 0
            # on to the next unit; with start codes, the next search finds it
            place += prefix + int.from_bytes(data[place : place + prefix], "big")
        return True

    def _check_end(self, wanted, end):
        """VideoError if the file ends, at `end`, too long before a time that its header promises:
        by more than a second, or than a tenth of the duration, whichever is less."""
        if min(wanted, self.duration) - end > min(1, self.duration / 10):
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
                    height, width = stored_size(frame, shown_as.transposed, size)
                image = to_image(reformatter, frame, height, width, shown_as)
                latest = frame
            images[time] = image
        return images

    def picture(
        self, frame: av.VideoFrame, size: int | tuple[int, int] | None = None
    ) -> np.ndarray:
        """One of `frames` as `read` gives it, uint8 [H, W, 3]."""
        image = self._convert([(0.0, frame, None)], size)[0.0]
        return np.ascontiguousarray(image)  # a mirrored one is a view that torch refuses

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever goes wrong with the file becomes a VideoError of one line."""
        try:
            yield
        except av.error.ExitError as error:  # libav's own, when a call took too long
            raise VideoError(
                f"{self.path}: reading it takes more than {self._timeout:g} s "
                "(the stages' --video-timeout allows more)"
            ) from error
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
            log = getattr(error, "log", None)
            if log:
                reason += f" ({log[2].strip()})"
            raise VideoError(" ".join(f"{self.path}: {reason}".split())) from error


def stored_size(frame, transposed, size):
    """The (height, width) to resize a stored frame to, so that it is displayed in `size`."""
    height, width = frame.height, frame.width
    if transposed:  # from here on as displayed
        height, width = width, height
    if np.ndim(size) == 1:
        height, width = map(int, size)
    elif size is not None:
        short_side = min(height, width)
        height = round(height * size / short_side)
        width = round(width * size / short_side)
    if transposed:
        height, width = width, height
    return height, width


def to_image(reformatter, frame, height, width, shown_as):
    """A stored frame as uint8 RGB, resized and then turned."""
    # in the frame's own size swscale only enlarges the planes of colour: bilinear, as players do
    same = (height, width) == (frame.height, frame.width)
    interpolation = Interpolation.BILINEAR if same else Interpolation.BICUBIC
    image = reformatter.reformat(
        frame, width, height, "rgb24", threads=1, interpolation=interpolation
    ).to_ndarray()
    if shown_as.transposed:
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
