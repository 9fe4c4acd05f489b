"""The model: VideoMAE's vision transformer, the masked autoencoder around it, and TGM's contrastive
head.

    video [B,3,T,H,W] -patchify-> cubes -drop the masked-> encoder -> visible tokens [B,V,D]
    visible tokens and mask tokens -> decoder -> predicted cubes <-MSE-> their normalised pixels
    mean of the visible tokens -> projection <-InfoNCE-> text [B,text_dim]

A library that needs nothing but PyTorch. Architecture, initialisation and state-dict keys are
VideoMAE's (arXiv:2203.12602), so published checkpoints load with no renaming; tgm/checkpoints.py
reads and writes them.

    # parameters of each size, and each mask's tokens and GFLOPs
    python model.py

Shapes: B batch, T frames, H W pixels, (t, h, w) token grid, N = t*h*w tokens, V visible tokens, M
decoded ones, D width, P = 3 * tubelet * patch^2 numbers in one cube. Everywhere, mask is bool
[B,N], True = masked.
"""

import argparse
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as VideoMAE
STD = (0.229, 0.224, 0.225)
EPS = 1e-6  # every LayerNorm, and the target's deviation
# stride: a habit of the data, not of the model
CUBES = dict(frames=16, stride=4, image_size=224, tubelet=2, patch=16)
TOY_CUBES = dict(frames=8, stride=2, image_size=48, tubelet=2, patch=8)  # 4 x 6 x 6 tokens
# decoders as in VideoMAE's pretraining scripts
SIZES = {
    "tiny": dict(
        TOY_CUBES, width=96, depth=3, heads=3, decoder_width=96, decoder_depth=1, decoder_heads=3
    ),
    "small": dict(
        CUBES, width=384, depth=12, heads=6, decoder_width=192, decoder_depth=4, decoder_heads=3
    ),
    "base": dict(
        CUBES, width=768, depth=12, heads=12, decoder_width=384, decoder_depth=4, decoder_heads=6
    ),
    "large": dict(
        CUBES, width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=12, decoder_heads=8
    ),
    "huge": dict(
        CUBES, width=1280, depth=32, heads=16, decoder_width=640, decoder_depth=12, decoder_heads=8
    ),
}


# ---- pixels, cubes and tokens --------------------------------------------------------------------


def normalize(video: Tensor) -> Tensor:
    """uint8 [B,3,T,H,W] -> float32 less ImageNet's mean over its deviation, on the video's own
    device."""
    out = torch.empty_like(video, dtype=torch.float32)
    for c in range(3):
        # Python numbers, since a tensor of constants would be copied to the GPU, and waited for, in
        # each step
        out[:, c] = (video[:, c] / 255 - MEAN[c]) / STD[c]
    return out


def patchify(video: Tensor, tubelet: int = 2, patch: int = 16) -> Tensor:
    """[B,3,T,H,W] -> cubes [B,N,P]: tokens in (t, h, w) order, a cube's numbers in (frame, row,
    column, colour)."""
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // tubelet, tubelet, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, tubelet * patch * patch * C)


def unpatchify(
    cubes: Tensor, grid: tuple[int, int, int], tubelet: int = 2, patch: int = 16
) -> Tensor:
    """The inverse of `patchify`: cubes [B,N,P] and their grid (t, h, w) -> [B,3,T,H,W]."""
    B = len(cubes)
    t, h, w = grid
    x = cubes.reshape(B, t, h, w, tubelet, patch, patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, -1, t * tubelet, h * patch, w * patch)


def split_mask(mask: Tensor, visible: int | None = None) -> tuple[Tensor, Tensor]:
    """mask [B,N] -> indices of the visible tokens [B,V,1] and of the masked ones [B,N-V,1], in
    token order.

    All rows must keep equally many. Giving that number as `visible` spares reading it from the
    device, which stalls a GPU and breaks torch.compile's graph; the device itself then asserts it
    (RuntimeError)."""
    kept = mask.shape[1] - mask.sum(dim=1)
    if visible is None:
        visible = int(kept[0])
    torch._assert_async((kept == visible).all(), f"mask: not every row keeps {visible} tokens")
    # False sorts before True
    order = mask.to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1)
    return order[:, :visible], order[:, visible:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x [B or 1,N,D] by index [B,M,1] -> [B,M,D]. (take_along_dim makes an index of
    every number, 15 times slower.)"""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index.squeeze(-1)]


def sincos_table(n: int, width: int) -> Tensor:
    """[1,n,width] float32: "Attention is all you need" §3.5 over the index of a token in the
    flattened grid."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[None, :, None] / 10000 ** (j // 2 * 2 / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


# ---- the transformer -----------------------------------------------------------------------------


class Linear(nn.Linear):
    def reset_parameters(self):
        # VideoMAE's initialisation; its Conv3d and LayerNorm keep PyTorch's defaults
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Joint space-time attention. Keys need no bias: it would shift all scores of a query alike."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B,heads,N,D/heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm attention and MLP. In training each residual branch of a sample is dropped at the
    rate drop_path."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.rate = drop_path
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=Linear(width, 4 * width), act=nn.GELU(), fc2=Linear(4 * width, width))
        )

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Blocks and a final norm; drop path grows linearly from 0 to its full rate at the last
    block."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.checkpointing = False

    def set_checkpointing(self, on: bool = True) -> None:
        """Keep only each block's input, and compute the rest again in the backward pass."""
        self.checkpointing = on

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


class Encoder(Transformer):
    """Cubes in, tokens out. frames and image_size default to the size's own; positions are
    computed for any. ValueError if tokens do not fill the clip."""

    def __init__(
        self,
        size: str,
        frames: int | None = None,
        image_size: int | None = None,
        drop_path: float = 0.0,
    ):
        c = dict(SIZES[size])
        c["frames"] = frames or c["frames"]
        c["image_size"] = image_size or c["image_size"]
        if c["frames"] % c["tubelet"] or c["image_size"] % c["patch"]:
            raise ValueError(
                f"{c['frames']} x {c['image_size']}: not multiples of {c['tubelet']} x {c['patch']}"
            )
        super().__init__(c["width"], c["depth"], c["heads"], drop_path)
        self.config = c
        side = c["image_size"] // c["patch"]
        self.grid = (c["frames"] // c["tubelet"], side, side)
        self.num_tokens = math.prod(self.grid)
        cube = (c["tubelet"], c["patch"], c["patch"])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c["width"], cube, stride=cube)})
        positions = sincos_table(self.num_tokens, c["width"])
        self.register_buffer("pos_embed", positions, persistent=False)

    def cubes(self, video: Tensor) -> Tensor:
        shape = [3, self.config["frames"], self.config["image_size"], self.config["image_size"]]
        if list(video.shape[1:]) != shape:
            raise ValueError(f"video {list(video.shape)}: expected a batch of {shape}")
        return patchify(video, self.config["tubelet"], self.config["patch"])

    def encode(self, cubes: Tensor, index: Tensor | None = None) -> Tensor:
        """cubes [B,N,P], index [B,V,1] of the visible ones (None: all) -> [B,V,D]; the others
        are never read."""
        position = self.pos_embed
        if index is not None:
            cubes = take(cubes, index)
            position = take(position, index)
        # a convolution whose stride is its kernel is one matrix product per cube: [D,3,2,16,16] ->
        # [D,P]
        proj = self.patch_embed["proj"]
        weight = proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        x = F.linear(cubes, weight, proj.bias) + position
        return self.norm(self.run_blocks(x))


# ---- the contrastive loss ------------------------------------------------------------------------


class AllGather(torch.autograd.Function):
    """The rows of all ranks, [2,B,D] -> [2,ranks*B,D]; gradients come back summed over ranks."""

    @staticmethod
    def forward(ctx, own):
        return torch.cat(gather(own), dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def gather(own: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which are of one shape, without a gradient."""
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own.contiguous())
    return every


def info_nce(
    video_emb: Tensor, text_emb: Tensor, scale: Tensor | float, group: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, fig. 3) of [B,D] and [B,D], of any length; scale
    is 1 / temperature.

    Positives of each other, the target uniform over them, are samples of one video (equal numbers
    in group, [B] integers; None: all differ) and samples of one caption (texts of cosine above
    0.999).

    Under torch.distributed a collective, with equal B: a rank's loss is the mean over its own rows
    against everyone's columns. Gathering passes gradients back, so DistributedDataParallel averages
    to the whole batch's gradient."""
    together = dist.is_available() and dist.is_initialized()
    own = torch.stack(
        [F.normalize(video_emb.float(), dim=-1), F.normalize(text_emb.float(), dim=-1)]
    )  # [2,B,D]
    if group is None:
        first = dist.get_rank() * len(video_emb) if together else 0
        group = first + torch.arange(len(video_emb), device=own.device)
    every = AllGather.apply(own) if together else own  # [2,ranks*B,D]
    every_group = torch.cat(gather(group)) if together else group  # [ranks*B]
    video, text = own
    every_video, every_text = every
    # A sample is its own positive by its group: the product alone may be below 0.999 with itself
    # (TF32), and 0 / 0 would follow.
    same = (group[:, None] == every_group) | (text @ every_text.T > 0.999)
    target = same / same.sum(dim=1, keepdim=True)
    to_text = F.cross_entropy(scale * video @ every_text.T, target)
    to_video = F.cross_entropy(scale * text @ every_video.T, target)
    return (to_text + to_video) / 2


class ContrastiveHead(nn.Module):
    """tokens [B,V,D], text [B,text_dim], group [B] -> InfoNCE of the tokens' projected mean and
    the text, in float32."""

    def __init__(self, width: int, text_dim: int):
        super().__init__()
        self.proj = Linear(width, text_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens: Tensor, text: Tensor, group: Tensor | None = None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            video = self.proj(tokens.float().mean(1))
            return info_nce(video, text, self.logit_scale.exp(), group)

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """After each step of the optimiser, as open_clip: 1 / temperature stays between 1 and 100.
        In the forward pass the limit would have no gradient, and the temperature could never come
        back."""
        self.logit_scale.clamp_(0, math.log(100))


# ---- the masked autoencoder ----------------------------------------------------------------------


class MAEOutput(NamedTuple):
    loss_mae: Tensor  # float32 scalar
    loss_nce: Tensor | None  # float32 scalar; None without text


class VideoMAE(nn.Module):
    """The masked autoencoder.

    frames, image_size: of the clips (None: the size's own)
    text_dim: width of the text embeddings of the contrastive loss
    nce_detach: stops the contrastive gradient at the encoder's output: the head trains, the encoder
        is untouched (the paper's monitored contrastive loss)"""

    def __init__(
        self,
        size: str = "base",
        frames: int | None = None,
        image_size: int | None = None,
        text_dim: int = 512,
        nce_detach: bool = False,
    ):
        super().__init__()
        self.nce_detach = nce_detach
        self.encoder = Encoder(size, frames, image_size)
        self.config = self.encoder.config
        c = self.config
        self.grid = self.encoder.grid
        self.num_tokens = self.encoder.num_tokens
        # PyTorch's initialisation, as VideoMAE
        self.encoder_to_decoder = nn.Linear(c["width"], c["decoder_width"], bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c["decoder_width"]))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = Transformer(c["decoder_width"], c["decoder_depth"], c["decoder_heads"])
        self.decoder.head = Linear(c["decoder_width"], 3 * c["tubelet"] * c["patch"] ** 2)
        self.contrastive = ContrastiveHead(c["width"], text_dim)
        positions = sincos_table(self.num_tokens, c["decoder_width"])
        self.register_buffer("pos_embed", positions, persistent=False)
        self.register_buffer("rgb", torch.tensor([MEAN, STD]), persistent=False)

    def set_checkpointing(self, on: bool = True) -> None:
        self.encoder.set_checkpointing(on)
        self.decoder.set_checkpointing(on)

    def forward(
        self,
        video: Tensor,
        mask: Tensor,
        text: Tensor | None = None,
        visible: int | None = None,
        decoded: Tensor | None = None,
        group: Tensor | None = None,
    ) -> MAEOutput:
        """video [B,3,T,H,W] normalised, mask [B,N], text [B,text_dim] or None -> the two losses.

        visible: how many tokens a row of the mask keeps, if the caller knows (see `split_mask`).
        decoded: indices [B,M] of the masked tokens that the decoder sees and the loss is over
            (VideoMAE V2, arXiv:2303.16727; None: all).
        group: [B] integers, equal for samples of one video, which the contrastive loss takes for
            one (None: all differ)."""
        cubes = self.encoder.cubes(video)
        seen, hidden = split_mask(mask, visible)
        if decoded is not None:
            torch._assert_async(mask.gather(1, decoded).all(), "decoded: not every token is masked")
            hidden = decoded.unsqueeze(-1)
        tokens = self.encoder.encode(cubes, seen)
        prediction = self.decode(tokens, seen, hidden)
        with torch.autocast(video.device.type, enabled=False):
            target, _, _ = self.target(take(cubes, hidden))
            loss_mae = F.mse_loss(prediction.float(), target)
        if text is None:
            return MAEOutput(loss_mae, None)
        if self.nce_detach:
            tokens = tokens.detach()
        return MAEOutput(loss_mae, self.contrastive(tokens, text, group))

    def encode(
        self, video: Tensor, mask: Tensor | None = None, visible: int | None = None
    ) -> Tensor:
        """-> the visible tokens (without a mask, all) after the final norm, [B,V,D], in (t, h, w)
        order."""
        cubes = self.encoder.cubes(video)
        if mask is None:
            return self.encoder.encode(cubes)
        seen, _ = split_mask(mask, visible)
        return self.encoder.encode(cubes, seen)

    def decode(self, tokens: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """tokens [B,V,D] -> [B,M,P], M hidden ones; mask tokens go last and positions follow:
        nothing is reordered."""
        visible = self.encoder_to_decoder(tokens) + take(self.pos_embed, seen)
        masked = self.mask_token + take(self.pos_embed, hidden)
        x = self.decoder.run_blocks(torch.cat([visible, masked], dim=1))  # [B,V+M,decoder width]
        x = x[:, seen.shape[1] :]
        return self.decoder.head(self.decoder.norm(x))

    def target(self, cubes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cubes [B,M,P] -> (target [B,M,P], mean, deviation [B,M,1,3]), float32: pixels in [0,1]
        again, then each colour of each cube brought to mean 0 and deviation 1. Predicting 0
        therefore costs about 1."""
        x = cubes.float().unflatten(-1, (-1, 3)) * self.rgb[1] + self.rgb[0]  # [B,M,P/3,3]
        mean = x.mean(dim=-2, keepdim=True)
        deviation = x.var(dim=-2, keepdim=True).sqrt() + EPS
        return ((x - mean) / deviation).flatten(-2), mean, deviation

    @torch.no_grad()
    def reconstruct(self, video: Tensor, mask: Tensor, visible: int | None = None) -> Tensor:
        """-> [B,3,T,H,W] float32 in [0,1]: the video, its masked cubes replaced by predictions.

        Their mean and deviation are borrowed from the truth, which flatters the picture: say so in
        its caption."""
        cubes = self.encoder.cubes(video)
        seen, hidden = split_mask(mask, visible)
        target, mean, deviation = self.target(cubes)
        prediction = self.decode(self.encoder.encode(cubes, seen), seen, hidden).float()
        target = target.scatter(1, hidden.expand_as(prediction), prediction)
        pixels = (target.unflatten(-1, (-1, 3)) * deviation + mean).flatten(-2)
        video = unpatchify(pixels, self.grid, self.config["tubelet"], self.config["patch"])
        return video.clamp(0, 1)


# ---- the classifier ------------------------------------------------------------------------------


class VideoViT(Encoder):
    """The classifier in VideoMAE's fine-tuning layout: mean over tokens, fc_norm in place of
    norm, dropout, head."""

    def __init__(
        self,
        size: str = "base",
        classes: int = 400,
        frames: int | None = None,
        image_size: int | None = None,
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
    ):
        super().__init__(size, frames, image_size, drop_path)
        width = self.config["width"]
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(head_dropout)
        self.head = Linear(width, classes)
        # VideoMAE's 0.02 * 0.001: starts from uniform predictions
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] normalised -> logits [B,classes]."""
        tokens = self.encode(self.cubes(video))
        return self.head(self.dropout(self.fc_norm(tokens.mean(dim=1))))


# ---- what it costs -------------------------------------------------------------------------------


def count_flops(model: VideoMAE, visible: int, decoded: int | None = None) -> tuple[int, int]:
    """Multiply-adds (the literature's FLOPs) of one clip's forward pass with `visible` tokens
    encoded and `decoded` others decoded (None: all others), (encoder, decoder), in matrix products:
    ViT-B's encoder on all 1568 tokens, 180 G."""
    c = model.config
    if decoded is None:
        decoded = model.num_tokens - visible
    cube = 3 * c["tubelet"] * c["patch"] ** 2
    embedding = visible * cube * c["width"]
    encoder = block_flops(visible, c["width"]) * c["depth"]
    to_decoder = visible * c["width"] * c["decoder_width"]
    decoder = block_flops(visible + decoded, c["decoder_width"]) * c["decoder_depth"]
    head = decoded * c["decoder_width"] * cube
    return embedding + encoder, to_decoder + decoder + head


def block_flops(tokens: int, width: int) -> int:
    """Multiply-adds of one block: qkv, proj and MLP, and attention's two products."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def print_sizes() -> None:
    print(
        "GFLOPs: multiply-adds of a clip's forward pass in pretraining, encoder + decoder "
        "(tokens kept)"
    )
    ratios = {"random, tube, flow 0.9": 0.9, "motion 0.75": 0.75, "text 0.6": 0.6}
    print("size  encoder  whole   tokens" + "".join(f"{masks:>25}" for masks in ratios))
    for size in SIZES:
        with torch.device("meta"):
            model = VideoMAE(size)
        row = f"{size:5}{millions(model.encoder):7.1f}M{millions(model):7.1f}M{model.num_tokens:7}"
        t, h, w = model.grid
        for ratio in ratios.values():
            kept = t * (h * w - math.floor(ratio * h * w))
            encoder, decoder = count_flops(model, kept)
            cost = f"{encoder / 1e9:.3g} + {decoder / 1e9:.3g} ({kept})"
            row += f"{cost:>25}"
        print(row)


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def main(argv: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(argv)
    print_sizes()


if __name__ == "__main__":
    main()
