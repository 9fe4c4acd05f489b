"""The model: VideoMAE's vision transformer, the masked autoencoder around it, and TGM's contrastive
head.

    video [B,3,T,H,W] -patchify-> cubes -drop the masked-> encoder -> visible tokens [B,V,D]
    visible tokens and mask tokens -> decoder -> predicted cubes <-MSE-> their normalised pixels
    mean of the visible tokens -> projection <-InfoNCE-> text [B,E]

The classes need nothing but PyTorch. Architecture and state-dict keys are those of VideoMAE's
published files (arXiv:2203.12602), except the contrastive head, which is ours. `VideoMAE` has the
keys of the pretraining files, `VideoViT` those of the fine-tuning files. tgm/checkpoints.py reads
and writes checkpoints.

    import torch, masking
    from model import VideoMAE, normalize
    clips = torch.randint(0, 256, (2, 3, 16, 224, 224), dtype=torch.uint8)
    model = VideoMAE("base")
    mask = masking.make_mask("tube", 0.9, batch=2, grid=model.grid)  # bool [2,1568]
    loss, _ = model(normalize(clips), mask)      # any mask with equally many True in every row
    features = model.encode(normalize(clips))    # [2,N,D]

    # parameters of each size, and each mask's tokens and GFLOPs; needs masking.py
    python model.py

Shapes: B batch, T frames, H W pixels, (t, h, w) token grid, N = t*h*w tokens, V visible tokens, M
decoded tokens, D width of the encoder, E width of the text embeddings, P = 3 * tubelet * patch^2
numbers in one cube. Everywhere, mask is bool [B,N], True = masked.
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

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as in VideoMAE
STD = (0.229, 0.224, 0.225)
EPS = 1e-6  # of every LayerNorm
TARGET_EPS = 1e-6  # added to the deviation of a cube's pixels, which may be 0
# `stride` (take every stride-th frame) is not used here: it is the default of --stride in
# pretrain.py and the scripts that follow it.
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
    """uint8 [B,3,T,H,W] -> float32 on the same device: scaled to [0,1], minus ImageNet's mean,
    divided by its standard deviation. ValueError for any other type, which may be normalised
    already."""
    if video.dtype != torch.uint8:
        raise ValueError(f"normalize: expected uint8, got {video.dtype}")
    out = torch.empty_like(video, dtype=torch.float32)
    for c in range(3):
        # Python numbers: a tensor of constants would be copied to the GPU in each step, and the
        # host would wait for the copy.
        out[:, c] = (video[:, c] / 255 - MEAN[c]) / STD[c]
    return out


def patchify(video: Tensor, tubelet: int = 2, patch: int = 16) -> Tensor:
    """[B,3,T,H,W] -> cubes [B,N,P]: tokens in (t, h, w) order, the numbers of a cube in (frame,
    row, column, colour) order."""
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


def split_mask(mask: Tensor, num_visible: int | None = None) -> tuple[Tensor, Tensor]:
    """mask [B,N] -> indices of the visible tokens [B,V] and of the masked tokens [B,N-V], in token
    order.

    num_visible: how many tokens every row keeps. If it is not given, it is read from the device.
        That read makes the host wait for a GPU and breaks the graph of torch.compile.

    ValueError if num_visible is 0 or all of the tokens. RuntimeError if a row keeps another number;
    on a GPU the error appears at a later call, as the host does not wait for the check."""
    kept = mask.shape[1] - mask.sum(dim=1)
    if num_visible is None:
        num_visible = int(kept[0])
    if not 0 < num_visible < mask.shape[1]:
        raise ValueError(
            f"mask: {num_visible} of {mask.shape[1]} tokens visible: "
            "some must be masked and some not"
        )
    # on a GPU this does not wait for the answer
    torch._assert_async(
        (kept == num_visible).all(), f"mask: not every row keeps {num_visible} tokens"
    )
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # False sorts before True
    return order[:, :num_visible], order[:, num_visible:]


def pick_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x [B,N,D] at index [B,M]: [B,M,D]. x may also be [1,N,D], one table for all
    rows."""
    # torch.take_along_dim would need an index for every number, [B,M,D], and be slower: this needs
    # one for every token.
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index]


def sincos_table(n: int, width: int) -> Tensor:
    """Positions [1,n,width] float32: the sines and cosines of "Attention is all you need" §3.5, of
    the index of a token in the flattened grid."""
    j = torch.arange(width, dtype=torch.float64)
    pair = j // 2  # a sine and a cosine share a frequency
    token = torch.arange(n, dtype=torch.float64)[None, :, None]
    angle = token / 10000 ** (2 * pair / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


# ---- the transformer -----------------------------------------------------------------------------


class XavierLinear(nn.Linear):
    """A linear layer with the initialisation of VideoMAE's pretraining. Conv3d and LayerNorm keep
    PyTorch's, as they do there."""

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Attention between all tokens of a clip. Keys have no bias: it would add the same number to
    all scores of a query, which softmax ignores."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = XavierLinear(width, 3 * width, bias=False)
        self.proj = XavierLinear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, D // self.heads)
        # Each [B,heads,N,D/heads]. First unbound, then transposed: so the backward pass writes one
        # contiguous gradient of qkv, without a copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm attention and MLP. In training each residual branch of a sample is dropped with the
    probability drop_path (stochastic depth)."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=XavierLinear(width, 4 * width),
                act=nn.GELU(),
                fc2=XavierLinear(4 * width, width),
            )
        )

    def drop_branch(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        # A factor per sample: 0, or 1 / (1 - drop_path), so that the mean stays the same. In
        # float32: rounded to bf16 it would not.
        return x * F.dropout(x.new_ones(len(x), 1, 1, dtype=torch.float32), self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_branch(self.attn(self.norm1(x)))
        return x + self.drop_branch(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Blocks, and a final norm, which the caller applies. The blocks' drop_path grows linearly from
    0 in the first to the given value in the last."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.checkpointing = False

    def set_checkpointing(self, on: bool = True) -> None:
        """If on, keep only each block's input, and compute the rest again in the backward pass."""
        self.checkpointing = on

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Encoder(Transformer):
    """Cubes in, tokens out.

    frames, image_size: of the clips (None: the size's own); ValueError unless they are multiples of
        the tubelet and of the patch. Any such size works, since positions are computed. But a
        position is the index of a token in the flattened grid: in another grid the same index lies
        elsewhere, and weights that were trained on one grid have to adapt to another.
    drop_path: see `Transformer`"""

    def __init__(
        self,
        size: str,
        frames: int | None = None,
        image_size: int | None = None,
        drop_path: float = 0.0,
    ):
        c = dict(SIZES[size])
        if frames is not None:
            c["frames"] = frames
        if image_size is not None:
            c["image_size"] = image_size
        for name, unit in (("frames", "tubelet"), ("image_size", "patch")):
            if c[name] < c[unit] or c[name] % c[unit]:
                raise ValueError(f"{name} {c[name]}: expected a positive multiple of {c[unit]}")
        super().__init__(c["width"], c["depth"], c["heads"], drop_path)
        self.config = c
        side = c["image_size"] // c["patch"]
        self.grid = (c["frames"] // c["tubelet"], side, side)
        self.num_tokens = math.prod(self.grid)
        cube = (c["tubelet"], c["patch"], c["patch"])
        # The weights are here under VideoMAE's key; `encode_cubes` applies them as one product.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c["width"], cube, stride=cube)})
        positions = sincos_table(self.num_tokens, c["width"])
        self.register_buffer("pos_embed", positions, persistent=False)

    def to_cubes(self, video: Tensor) -> Tensor:
        shape = [3, self.config["frames"], self.config["image_size"], self.config["image_size"]]
        if list(video.shape[1:]) != shape:
            raise ValueError(
                f"video {list(video.shape)}: expected a batch of {shape} "
                "(colours, frames, image_size, image_size)"
            )
        return patchify(video, self.config["tubelet"], self.config["patch"])

    def encode_cubes(self, cubes: Tensor, index: Tensor | None = None) -> Tensor:
        """cubes [B,N,P], index [B,V] of the visible ones (None: all) -> [B,V,D]. Nothing is
        computed from the other cubes."""
        position = self.pos_embed
        if index is not None:
            cubes = pick_tokens(cubes, index)
            position = pick_tokens(position, index)
        # A convolution whose stride is its kernel is one matrix product per cube.
        proj = self.patch_embed["proj"]
        # [D,3,tubelet,patch,patch] -> [D,P]
        weight = proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        x = F.linear(cubes, weight, proj.bias) + position
        return self.norm(self.run_blocks(x))


# ---- the contrastive loss ------------------------------------------------------------------------


class GatherWithGradient(torch.autograd.Function):
    """Collects the rows of all ranks, [2,B,E] -> [2,ranks*B,E], and passes gradients back."""

    @staticmethod
    def forward(ctx, own):
        return torch.cat(gather_ranks(own), dim=1)

    @staticmethod
    def backward(ctx, grad):
        # The losses of the other ranks used our rows too: add up the gradients of all ranks and
        # keep the part of our rows.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def gather_ranks(own: Tensor) -> list[Tensor]:
    """This tensor of every rank, without a gradient. It has the same shape on all ranks."""
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own.contiguous())
    return every


SAME_TEXT = 0.999  # texts of a higher cosine count as one


def info_nce(
    video_emb: Tensor, text_emb: Tensor, scale: Tensor | float, group: Tensor | None = None
) -> Tensor:
    """The symmetric InfoNCE loss (CLIP, arXiv:2103.00020, fig. 3) of B videos and their texts.

    video_emb, text_emb [B,E]: of any length; they are normalised here
    scale: 1 / temperature
    group [B] integers: equal for samples of one video (None: all differ)

    Two samples are positives of each other if they have the same group or nearly the same text (a
    cosine above 0.999). The target is spread equally over the positives of a row. These positives
    are our choice.

    Under torch.distributed every rank must call this, with the same B. The loss of a rank compares
    its own rows with the columns of all ranks. So the embeddings of a rank are in the losses of the
    others, too: with two ranks, the text of rank 0 is a negative in the loss of rank 1. The
    gathering's backward pass adds up these gradients. DistributedDataParallel then divides by the
    number of ranks, which gives the gradient of the mean over the whole batch."""
    together = dist.is_available() and dist.is_initialized()
    # [2,B,E]: both in one tensor, so that they are gathered at once
    own = torch.stack(
        [F.normalize(video_emb.float(), dim=-1), F.normalize(text_emb.float(), dim=-1)]
    )
    if group is None:  # each sample is a group of its own, numbered over all ranks
        first = dist.get_rank() * len(video_emb) if together else 0
        group = first + torch.arange(len(video_emb), device=own.device)
    every = GatherWithGradient.apply(own) if together else own  # [2,ranks*B,E]
    every_group = torch.cat(gather_ranks(group)) if together else group  # [ranks*B]
    video, text = own
    every_video, every_text = every
    # Positives are samples of the same video (group) or of the same text. In TF32 the cosine of
    # equal texts may come out below 0.999, so it is computed in float64.
    same_text = text.double() @ every_text.double().T > SAME_TEXT
    positive = (group[:, None] == every_group) | same_text
    target = positive / positive.sum(dim=1, keepdim=True)
    to_text = F.cross_entropy(scale * video @ every_text.T, target)
    to_video = F.cross_entropy(scale * text @ every_video.T, target)
    return (to_text + to_video) / 2


class ContrastiveHead(nn.Module):
    """tokens [B,V,D], text [B,E], group [B] -> the InfoNCE loss between the projected mean
    of the tokens and the text, in float32 under autocast, too."""

    def __init__(self, width: int, text_dim: int):
        super().__init__()
        self.proj = XavierLinear(width, text_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens: Tensor, text: Tensor, group: Tensor | None = None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            video = self.proj(tokens.float().mean(1))
            return info_nce(video, text, self.logit_scale.exp(), group)

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Keeps 1 / temperature between 1 and 100. Call it after each step of the optimiser, as
        open_clip does. A limit in the forward pass would have no gradient outside its range, so
        that the temperature could never return."""
        self.logit_scale.clamp_(0, math.log(100))


# ---- the masked autoencoder ----------------------------------------------------------------------


class MAEOutput(NamedTuple):
    loss_mae: Tensor  # float32 scalar
    loss_nce: Tensor | None  # float32 scalar; None without text


class VideoMAE(nn.Module):
    """The masked autoencoder.

    frames, image_size: of the clips (None: the size's own; see `Encoder`)
    text_dim: width of the text embeddings of the contrastive loss
    nce_detach: stops the contrastive gradient at the encoder's output. Then this loss trains the
        contrastive head alone, and the encoder learns from the reconstruction alone (for runs in
        which the contrastive loss is only monitored)."""

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
        # with PyTorch's initialisation, as in VideoMAE
        self.encoder_to_decoder = nn.Linear(c["width"], c["decoder_width"], bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c["decoder_width"]))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = Transformer(c["decoder_width"], c["decoder_depth"], c["decoder_heads"])
        # part of the decoder, as its key in VideoMAE's files is decoder.head
        self.decoder.head = XavierLinear(c["decoder_width"], 3 * c["tubelet"] * c["patch"] ** 2)
        self.contrastive = ContrastiveHead(c["width"], text_dim)
        positions = sincos_table(self.num_tokens, c["decoder_width"])
        self.register_buffer("pos_embed", positions, persistent=False)
        self.register_buffer("mean_and_std", torch.tensor([MEAN, STD]), persistent=False)

    def set_checkpointing(self, on: bool = True) -> None:
        self.encoder.set_checkpointing(on)
        self.decoder.set_checkpointing(on)

    def forward(
        self,
        video: Tensor,
        mask: Tensor,
        text: Tensor | None = None,
        num_visible: int | None = None,
        decoded: Tensor | None = None,
        group: Tensor | None = None,
    ) -> MAEOutput:
        """video [B,3,T,H,W] normalised, mask [B,N], text [B,E] or None -> the two losses.

        num_visible: how many tokens each row of the mask keeps (see `split_mask`)
        decoded [B,M]: indices of the masked tokens that the decoder sees and predicts (VideoMAE V2,
            arXiv:2303.16727; None: all masked tokens). RuntimeError if one is not masked; on a GPU
            it comes only at a later call.
        group [B] integers: equal for samples of one video, which are positives of each other in the
            contrastive loss (None: all differ)"""
        cubes = self.encoder.to_cubes(video)
        visible, masked = self.split(video, mask, num_visible)
        if decoded is None:
            decoded = masked
        else:
            torch._assert_async(
                mask.gather(1, decoded).all(), "decoded: some of these tokens are not masked"
            )
        tokens = self.encoder.encode_cubes(cubes, visible)
        prediction = self.decode(tokens, visible, decoded)
        with torch.autocast(video.device.type, enabled=False):
            target, _, _ = self.pixel_targets(pick_tokens(cubes, decoded))
            loss_mae = F.mse_loss(prediction.float(), target)
        if text is None:
            return MAEOutput(loss_mae, None)
        if self.nce_detach:
            tokens = tokens.detach()
        return MAEOutput(loss_mae, self.contrastive(tokens, text, group))

    def encode(
        self, video: Tensor, mask: Tensor | None = None, num_visible: int | None = None
    ) -> Tensor:
        """The visible tokens (without a mask, all) after the final norm: [B,V,D], in (t, h, w)
        order."""
        cubes = self.encoder.to_cubes(video)
        if mask is None:
            return self.encoder.encode_cubes(cubes)
        visible, _ = self.split(video, mask, num_visible)
        return self.encoder.encode_cubes(cubes, visible)

    def split(self, video: Tensor, mask: Tensor, num_visible: int | None) -> tuple[Tensor, Tensor]:
        """`split_mask`; ValueError unless the mask has a row per clip and a value per token."""
        expected = [len(video), self.num_tokens]
        if list(mask.shape) != expected:
            raise ValueError(f"mask {list(mask.shape)}: expected {expected} (clips, tokens)")
        return split_mask(mask, num_visible)

    def decode(self, tokens: Tensor, visible: Tensor, decoded: Tensor) -> Tensor:
        """tokens [B,V,D], indices of the visible tokens [B,V] and of those to predict [B,M] ->
        predicted cubes [B,M,P]. The mask tokens come after the visible ones: each token carries its
        own position, so that order does not matter."""
        visible_tokens = self.encoder_to_decoder(tokens) + pick_tokens(self.pos_embed, visible)
        mask_tokens = self.mask_token + pick_tokens(self.pos_embed, decoded)
        x = torch.cat([visible_tokens, mask_tokens], dim=1)
        x = self.decoder.run_blocks(x)  # [B,V+M,decoder width]
        x = x[:, visible.shape[1] :]
        return self.decoder.head(self.decoder.norm(x))

    def pixel_targets(self, cubes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder should predict: cubes [B,M,P] -> (target [B,M,P], mean and standard
        deviation of the pixels [B,M,1,3]), float32.

        First `normalize` is undone, so that pixels are in [0,1]: VideoMAE computes its targets from
        such pixels, and `reconstruct` needs their mean and deviation. Then each colour of each cube
        gets mean 0 and standard deviation 1 (unbiased, as in VideoMAE). So the loss of predicting 0
        everywhere is about 1, and less where cubes are of one colour."""
        mean_of_data, std_of_data = self.mean_and_std
        pixels = cubes.float().unflatten(-1, (-1, 3)) * std_of_data + mean_of_data  # [B,M,P/3,3]
        mean = pixels.mean(dim=-2, keepdim=True)
        deviation = pixels.var(dim=-2, keepdim=True).sqrt() + TARGET_EPS
        return ((pixels - mean) / deviation).flatten(-2), mean, deviation

    @torch.no_grad()
    def reconstruct(self, video: Tensor, mask: Tensor, num_visible: int | None = None) -> Tensor:
        """The video with its masked cubes replaced by predictions: [B,3,T,H,W] float32 in [0,1].

        The predictions get the mean and the deviation of the true cubes, which flatters the
        picture: say so where you show it."""
        cubes = self.encoder.to_cubes(video)
        visible, masked = self.split(video, mask, num_visible)
        tokens = self.encoder.encode_cubes(cubes, visible)
        prediction = self.decode(tokens, visible, masked).float()
        normalised, mean, deviation = self.pixel_targets(cubes)
        index = masked.unsqueeze(-1).expand_as(prediction)
        normalised = normalised.scatter(1, index, prediction)
        pixels = (normalised.unflatten(-1, (-1, 3)) * deviation + mean).flatten(-2)
        video = unpatchify(pixels, self.grid, self.config["tubelet"], self.config["patch"])
        return video.clamp(0, 1)


# ---- the classifier ------------------------------------------------------------------------------


class VideoViT(Encoder):
    """The classifier in the layout of VideoMAE's fine-tuning files: encoder without its final norm,
    mean over tokens, fc_norm, dropout, head.

    All initial weights but the head's are drawn as in pretraining. VideoMAE's fine-tuning draws all
    linear weights from a normal distribution of standard deviation 0.02 instead, which makes a
    difference only where a classifier is trained from scratch.

    The arguments are those of `Encoder`, and:

    classes: number of outputs
    head_dropout: probability of dropout before the head"""

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
        self.norm = nn.Identity()  # `encode_cubes` gives the tokens before a norm
        self.fc_norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(head_dropout)
        self.head = XavierLinear(width, classes)
        # VideoMAE's 0.02 * 0.001: training starts from almost uniform predictions.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] normalised -> logits [B,classes], in float32 under autocast, too: in
        bf16 the best two of hundreds of classes are sometimes equal."""
        tokens = self.encode_cubes(self.to_cubes(video))
        with torch.autocast(video.device.type, enabled=False):
            return self.head(self.dropout(self.fc_norm(tokens.float().mean(dim=1))))


# ---- what it costs -------------------------------------------------------------------------------


def count_flops(
    model: VideoMAE | Encoder, num_visible: int, num_decoded: int | None = None
) -> tuple[int, int]:
    """The cost of one clip's forward pass, (encoder, decoder), if `num_visible` tokens are encoded
    and `num_decoded` others are decoded (None: all others).

    It counts the multiply-adds of matrix products, which papers on vision often call FLOPs, without
    the contrastive head's. Of an `Encoder` only the first number means anything. The encoder of
    ViT-B costs 180 G on all 1568 tokens."""
    c = model.config
    if num_decoded is None:
        num_decoded = model.num_tokens - num_visible
    values_per_cube = 3 * c["tubelet"] * c["patch"] ** 2
    embedding = num_visible * values_per_cube * c["width"]
    encoder = block_flops(num_visible, c["width"]) * c["depth"]
    to_decoder = num_visible * c["width"] * c["decoder_width"]
    decoder = block_flops(num_visible + num_decoded, c["decoder_width"]) * c["decoder_depth"]
    head = num_decoded * c["decoder_width"] * values_per_cube
    return embedding + encoder, to_decoder + decoder + head


def block_flops(tokens: int, width: int) -> int:
    """Multiply-adds of one block: of qkv, proj and MLP, and of the two products of attention."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def print_sizes() -> None:
    from masking import RATIOS, masked_count

    names_of_ratio = {}  # {0.9: ["random", "tube", "flow"], ...}
    for name, ratio in RATIOS.items():
        names_of_ratio.setdefault(ratio, []).append(name)
    columns = [f"{', '.join(names)} {ratio}" for ratio, names in names_of_ratio.items()]
    print(
        "GFLOPs: multiply-adds of a clip's forward pass in pretraining, encoder + decoder "
        "(tokens kept)"
    )
    print("size  encoder   whole tokens" + "".join(f"{column:>25}" for column in columns))
    for size in SIZES:
        with torch.device("meta"):
            model = VideoMAE(size)
        row = f"{size:5}{millions(model.encoder):7.1f}M{millions(model):7.1f}M{model.num_tokens:7}"
        for ratio in names_of_ratio:
            kept = model.num_tokens - masked_count(ratio, model.grid)
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
