"""Pictures of what a masked autoencoder does. Needs the repository's model.py."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from model import VideoMAE, normalize


@torch.no_grad()
def draw_reconstruction(path: Path, model: VideoMAE, clips, mask, autocast):
    """Three lines for the first clip: as it is, masked, reconstructed. Masked cubes keep their true
    mean and deviation, which flatters the picture.

    clips: uint8 [B, 3, T, H, W]; mask: bool [B, N]"""
    with autocast:
        made = model.reconstruct(normalize(clips), mask)[:1]  # [1, 3, T, H, W], 0 to 1
    true = clips[:1] / 255
    hidden = F.interpolate(mask[:1].view(1, 1, *model.grid).float(), true.shape[2:])
    masked = torch.where(hidden > 0, 0.5, true)
    lines = torch.cat([true, masked, made])[:, :, :: model.config["tubelet"]]  # [3, 3, t, H, W]
    tiles = lines.transpose(1, 2).flatten(0, 1)  # [3 * t, 3, H, W]
    tiles = F.interpolate(tiles, scale_factor=max(1, 128 // true.shape[-1]))
    save_image(tiles, path, nrow=lines.shape[2], padding=4, pad_value=1.0)
