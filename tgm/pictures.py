"""Pictures of clips, still or moving: maps as colours over the frames, masked tokens in grey.

    tiles = draw_tiles(clip, {"text 0.6": mask}, grid, saliency=maps)
    draw_strip(tiles, slices=8, title="a title").save("mask.png")
    write_video("mask.mp4", draw_frames(tiles), fps=5)

A tile is what one row of the still picture shows: the frames of a clip with one map or one mask
drawn over them, float [T, H, W, 3] in [0, 1]. Pictures of tiles are for square frames, H = W.

Shapes: T frames, H W pixels, (t, h, w) token grid, N = t*h*w tokens.
"""

import contextlib
import math
import os
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model import VideoMAE, normalize
from tgm.run import RunError

# what names of files may end in
STILL = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
MOVING = (".mp4", ".gif", ".mov", ".mkv")
# the most pixels of a side that a format can hold; a .pdf holds a JPEG
MOST_PIXELS = {".jpg": 65500, ".jpeg": 65500, ".pdf": 65500, ".webp": 16383}
GREY = 0.55  # brightness of masked tokens in tiles
GAP = 4  # pixels between tiles
SMALLEST = 14  # size of the smallest letters, in pixels
COLUMNS = 3  # tiles in a line of a moving picture

Tiles = dict[str, Tensor]


# ---- tiles ---------------------------------------------------------------------------------------


def draw_tiles(
    clip: Tensor,
    masks: dict[str, Tensor],
    grid: tuple[int, int, int],
    saliency: Tensor | None = None,
    motion: Tensor | None = None,
) -> Tiles:
    """Draws a clip, its maps and its masks: {name: tile}.

    clip float [3, T, H, W] in [0, 1]
    masks {name: bool [N]}
    saliency [t, h, w]
    motion [t, 2, h, w], drawn in the colours of Baker et al.: the hue shows the direction"""
    frames = clip.permute(1, 2, 3, 0)  # [T, H, W, 3]
    shape = frames.shape[:3]
    tiles = {"clip": frames}
    if saliency is not None:
        tiles["saliency"] = tint(frames, heat(enlarge(saliency, shape)))
    if motion is not None:
        from torchvision.utils import flow_to_image  # here: importing it takes a second

        colours = flow_to_image(motion.float()) / 255  # [t, 3, h, w]
        colours = [enlarge(colour, shape) for colour in colours.unbind(1)]
        tiles["motion"] = tint(frames, torch.stack(colours, dim=-1))
    grey = torch.full_like(frames, GREY)
    for name, mask in masks.items():
        hidden = enlarge(mask.view(grid), shape)[..., None] > 0
        tiles[name] = torch.where(hidden, grey, frames)
    return tiles


def enlarge(maps: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """One number per token [t, h, w] -> one number per pixel: float32 of shape (T, H, W)."""
    return F.interpolate(maps.float()[None, None], shape, mode="nearest")[0, 0]


def heat(values: Tensor) -> Tensor:
    """Numbers [..., H, W] -> colours float [..., H, W, 3]: blue for the lowest number of them all,
    white for the middle of the range, red for the highest."""
    low = values.min()
    high = values.max()
    scaled = (values - low) / (high - low).clamp(min=1e-6)
    red = (2 * scaled).clamp(max=1)
    green = 1 - (2 * scaled - 1).abs()
    blue = (2 - 2 * scaled).clamp(max=1)
    return torch.stack([red, green, blue], -1)


def tint(frames: Tensor, colours: Tensor) -> Tensor:
    """Lays transparent colours over the frames."""
    return 0.35 * frames + 0.65 * colours


# ---- pictures of tiles ---------------------------------------------------------------------------


def draw_strip(tiles: Tiles, slices: int, title: str) -> Image.Image:
    """Draws tiles as one picture: below the title one row per tile, with its name on the left, and
    one column per token slice, which shows its first frame. `slices` divides the frames."""
    frames, size = tiles["clip"].shape[:2]
    side = tile_side(size)
    step = side + GAP
    # The letters grow with the picture, so that they can be read when it is shrunk to a page.
    letters = min(max(SMALLEST, slices * step // 55), max(SMALLEST, side // 4))
    font = ImageFont.load_default(size=letters)
    names = {name: wrap(name, font, side, lines=3) for name in tiles}
    margin = 12 + max(text_size(name, font)[0] for name in names.values())
    width = margin + slices * step
    title = wrap(title, font, width - 8, lines=3)
    top = 12 + text_size(title, font)[1]

    picture = Image.new("RGB", (width, top + len(tiles) * step), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((4, 4), title, "black", font)
    for i, (name, tile) in enumerate(tiles.items()):
        y = top + i * step
        draw.multiline_text((4, y + side // 2), names[name], "black", font, anchor="lm")
        for j, frame in enumerate(tile[:: frames // slices]):
            picture.paste(to_picture(frame, side), (margin + j * step, y))
    return picture


def draw_frames(tiles: Tiles) -> list[Image.Image]:
    """Draws tiles as the pictures of a video, one per frame: three tiles in a line, each under its
    name."""
    frames, size = tiles["clip"].shape[:2]
    side = tile_side(size)
    step = side + GAP
    font = ImageFont.load_default(size=max(SMALLEST, side // 9))
    head = math.ceil(1.4 * font.size)
    lines = math.ceil(len(tiles) / COLUMNS)
    width = COLUMNS * step // 2 * 2  # H.264 needs even sides
    height = lines * (step + head) // 2 * 2
    names = {name: wrap(name, font, side, lines=1) for name in tiles}
    pictures = []
    for t in range(frames):
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        for i, (name, tile) in enumerate(tiles.items()):
            x = i % COLUMNS * step
            y = i // COLUMNS * (step + head)
            draw.text((x + 2, y + head // 2), names[name], "black", font, anchor="lm")
            picture.paste(to_picture(tile[t], side), (x, y + head))
        pictures.append(picture)
    return pictures


def draw_lines(lines: list[tuple[list[Tensor], list[str]]], columns: int, size: int) -> Image.Image:
    """Draws a contact sheet: per line up to `columns` tiles, and text on their right.

    lines: [(tiles float [size, size, 3] in [0, 1], texts), ...]; a text may take two lines of
    letters, and is cut where it is longer"""
    side = tile_side(size)
    step = side + GAP
    font, width = text_column(size)
    left = columns * step + GAP
    blocks = []
    heights = []
    for tiles, texts in lines:
        block, height = text_block(texts, font, width)
        blocks.append(block)
        heights.append(max(step, height) if tiles else height)

    picture = Image.new("RGB", (left + width, sum(heights)), "white")
    draw = ImageDraw.Draw(picture)
    y = 0
    for (tiles, _), block, height in zip(lines, blocks, heights, strict=True):
        for column, tile in enumerate(tiles):
            picture.paste(to_picture(tile, side), (column * step, y))
        draw.multiline_text((left, y), block, "black", font)
        y += height
    return picture


def sheet_size(texts: list[list[str]], columns: int, size: int) -> tuple[int, int]:
    """The (width, height) of a contact sheet, in pixels, if all of its lines have tiles. texts: of
    each line; columns and size as for `draw_lines`."""
    step = tile_side(size) + GAP
    font, width = text_column(size)
    heights = [max(step, text_block(of_line, font, width)[1]) for of_line in texts]
    return columns * step + GAP + width, sum(heights)


def text_column(size: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """The font of a contact sheet, and the width of the text on the right of its tiles."""
    side = tile_side(size)
    font = ImageFont.load_default(size=max(SMALLEST, side // 12))
    return font, max(3 * side, math.ceil(28 * font.size))


def text_block(texts: list[str], font: ImageFont.FreeTypeFont, width: int) -> tuple[str, int]:
    """The texts of one line of a contact sheet, wrapped; and the height that they take."""
    block = "\n".join(wrap(text, font, width - GAP, lines=2) for text in texts)
    return block, text_size(block, font)[1] + 2 * GAP


def tile_side(size: int) -> int:
    """The side at which tiles of `size` pixels are drawn: the largest whole multiple up to 128
    pixels, so that pixels stay sharp, or `size` itself if that is more."""
    return size * max(1, 128 // size)


def to_picture(frame: Tensor, side: int) -> Image.Image:
    """float [H, W, 3] in [0, 1] -> a picture of side x side pixels."""
    picture = Image.fromarray((frame * 255).round().byte().numpy())
    return picture.resize((side, side), Image.NEAREST)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> str:
    """Breaks `text` into at most `lines` lines of at most `width` pixels. A text that is too long
    is cut and ends in dots; where not a letter fits, "" is returned."""
    text = " ".join(text.split())[:1000]
    # letters per line: the most first, then fewer, until each line fits
    for letters in range(min(len(text), int(width)), 0, -1):
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder="…")
        if max(font.getlength(line) for line in wrapped) <= width:
            return "\n".join(wrapped)
    return ""


def text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Where text that begins at (0, 0) ends, in pixels: (x, y)."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font)
    return math.ceil(right), math.ceil(bottom)


def drawing_bytes(tiles: int, frames: int, slices: int, size: int) -> int:
    """The memory that it takes to draw so many tiles, both as a strip and as a video."""
    floats = 4 * frames * size**2
    pixels = (frames + slices) * tile_side(size) ** 2
    return 3 * tiles * (floats + pixels)


def sheet_bytes(rows: int, columns: int, size: int) -> int:
    """The memory that a contact sheet takes: its tiles, and the picture, half of which is text."""
    return rows * columns * 3 * (4 * size**2 + 2 * tile_side(size) ** 2)


# ---- files ---------------------------------------------------------------------------------------


def require_writable(
    flag: str, path: Path, endings: tuple[str, ...], source: str | None = None
) -> None:
    """RunError, naming the flag, unless `path` ends in one of `endings`, can be written, and is not
    `source`, the file that is to be drawn."""
    if path.suffix.lower() not in endings:
        raise RunError(f"{flag} {path}: expected a name that ends in {', '.join(endings)}")
    exists = os.path.lexists(path)  # also a link that leads nowhere, which must not be removed
    both_exist = path.exists() and source is not None and Path(source).exists()
    if both_exist and path.samefile(source):
        raise RunError(f"{flag} {path}: is the video that is to be drawn")
    try:
        with open(path, "ab"):
            pass
        if not exists:
            path.unlink()
    except OSError as error:
        raise RunError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def require_size(flag: str, path: Path, size: tuple[int, int]) -> None:
    """RunError, naming the flag, if a file of the ending of `path` cannot hold a picture of this
    size, (width, height)."""
    ending = path.suffix.lower()
    most = MOST_PIXELS.get(ending, math.inf)
    width, height = size
    if max(width, height) > most:
        raise RunError(
            f"{flag} {path}: the picture has {width} x {height} pixels, and a {ending} at most "
            f"{most} per side: write a .png, or draw fewer rows or frames"
        )


@contextlib.contextmanager
def saving(flag: str, path: Path) -> Iterator[None]:
    """Turns errors of the code inside, which draws and writes `path`, into a RunError that names
    the flag."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        raise RunError(f"{flag} {path}: cannot be written ({error})") from None


def write_video(path: Path, pictures: list[Image.Image], fps: float) -> None:
    """Writes pictures as a GIF if the name ends in .gif, else as H.264 video."""
    if Path(path).suffix.lower() == ".gif":
        first, *others = pictures
        # A GIF counts time in hundredths of a second. Where a picture has less than two of them,
        # players show it for ten.
        duration = max(20, round(1000 / fps, -1))
        first.save(path, save_all=True, append_images=others, loop=0, duration=duration)
        return
    # "file:", since a name such as 10:30.mp4 would be taken for a protocol
    with av.open(f"file:{path}", "w") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


# ---- what a masked autoencoder does --------------------------------------------------------------


@torch.no_grad()
def draw_reconstruction(path: Path, model: VideoMAE, clips, mask, autocast):
    """Three rows for the first clip: as it is, masked, reconstructed. Predicted cubes get the mean
    and the deviation of the true ones, which flatters the picture.

    clips: uint8 [B, 3, T, H, W]; mask: bool [B, N]; autocast: the context of the forward pass"""
    clips = clips[:1]
    mask = mask[:1]
    from torchvision.utils import save_image  # here: importing it takes a second

    with autocast:
        made = model.reconstruct(normalize(clips), mask)  # [1, 3, T, H, W], 0 to 1
    true = clips / 255
    hidden = F.interpolate(mask.view(1, 1, *model.grid).float(), true.shape[2:])
    masked = torch.where(hidden > 0, 0.5, true)
    rows = torch.cat([true, masked, made])[:, :, :: model.config["tubelet"]]  # [3, 3, t, H, W]
    tiles = rows.transpose(1, 2).flatten(0, 1)  # [3 * t, 3, H, W]
    tiles = F.interpolate(tiles, scale_factor=max(1, 128 // true.shape[-1]))
    save_image(tiles, path, nrow=rows.shape[2], padding=4, pad_value=1.0)
