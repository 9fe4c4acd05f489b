"""Augmentation of the training clips of a classifier. Needs model.py, for the mean colour and
its deviation.

`Augmentation` changes one clip: a random crop, mirroring, RandAugment (arXiv 1909.13719) and random
erasing (arXiv 1708.04896), with the same operations and boxes in every frame. `make_mix` mixes the
clips of a batch: mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899). The operations are
torchvision's. They follow VideoMAE's fine-tuning; docs/method.md says what differs.

Shapes: B batch, R repeats, T frames, H W pixels, C classes.
"""

import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from model import MEAN, STD

GREY = [124, 116, 104]  # the mean colour, 0 once normalised: what RandAugment fills in


class Augmentation:
    """A clip uint8 [T, 3, H, W] and a seed -> one augmented sample, uint8 [3, T, size, size].

    flip: whether half of the samples are mirrored; crop_scale: the least and the largest share of
    the frame's area in a crop; rand_augment: how many operations, and their magnitude from 0 to 30;
    erase: the probability of random erasing"""

    def __init__(self, size, flip, crop_scale, rand_augment, erase):
        self.size = size
        self.flip = flip
        self.crop_scale = tuple(crop_scale)
        operations, magnitude = rand_augment
        bilinear = TF.InterpolationMode.BILINEAR
        # VideoMAE's rand-m7-n4 is four times one random operation, each with probability 0.5, of
        # magnitude 7/10 = 21/30. One object may stand in the list several times: it has no state.
        operation = v2.RandAugment(1, magnitude, interpolation=bilinear, fill=GREY)
        self.rand_augment = [v2.RandomApply([operation], p=0.5)] * operations
        self.erase = EraseWithNoise(erase)

    def __call__(self, frames, seed):
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed GPUs, too, which costs time
            torch.default_generator.manual_seed(seed)
            box = v2.RandomResizedCrop.get_params(
                frames, scale=self.crop_scale, ratio=(3 / 4, 4 / 3)
            )
            clip = TF.resized_crop(frames, *box, [self.size, self.size], antialias=True)
            if self.flip and torch.rand(()) < 0.5:
                clip = clip.flip(-1)
            for operation in self.rand_augment:
                clip = operation(clip)
            return self.erase(clip).transpose(0, 1).contiguous()


class EraseWithNoise(v2.RandomErasing):
    """torchvision's random erasing with value="random", whose normal noise is meant for normalised
    pixels; here it is scaled to those of uint8."""

    def __init__(self, probability):
        super().__init__(probability, value="random")

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:  # the noise; None where nothing is erased
            mean = torch.tensor(MEAN)[:, None, None]
            deviation = torch.tensor(STD)[:, None, None]
            noise = 255 * (mean + deviation * params["v"])  # [3, h, w]
            params["v"] = noise.round().clamp(0, 255)
        return params


def make_mix(mixup, cutmix, classes):
    """torchvision's mixup or cutmix of a batch, each with probability 0.5 if both have an alpha
    above 0: clips [R*B, 3, T, H, W] float, labels [R*B] -> clips, targets [R*B, C]. Each sample is
    mixed with the one before it in the batch; finetune.py orders the batch so that this is another
    video's. The share, or the box, is the same for the whole batch."""
    kinds = []
    if mixup > 0:
        kinds.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix > 0:
        kinds.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    mixer = v2.RandomChoice(kinds) if kinds else None

    def mix(clips, labels):
        if mixer is None:
            return clips, F.one_hot(labels, classes).float()
        # torchvision takes five dimensions only as a Video, [R*B, T, 3, H, W]
        videos, targets = mixer(tv_tensors.Video(clips.transpose(1, 2)), labels)
        return videos.as_subclass(torch.Tensor).transpose(1, 2), targets.float()

    return mix
