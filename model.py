"""The model: VideoMAE's vision transformer, the masked autoencoder around it, and TGM's contrastive
head.

    video [B,3,T,H,W] -patchify-> cubes -drop the masked-> encoder -> visible tokens [B,V,D]
    visible tokens and mask tokens -> decoder -> predicted cubes <-MSE-> their normalised pixels
    mean of the visible tokens -> projection <-InfoNCE-> text [B,text_dim]

A library that imports nothing of ours. Architecture, initialisation and state-dict keys are
VideoMAE's (arXiv:2203.12602), so published checkpoints load with no renaming; Hugging Face's layout
is one key map away.

    # parameters of each size, and each mask's tokens and GFLOPs
    python model.py
    # a checkpoint as a folder for Hugging Face's transformers
    python model.py --export runs/finetune/best.pt --out hf

Shapes: B batch, T frames, H W pixels, (t, h, w) token grid, N = t*h*w tokens, V visible tokens, M
decoded ones, D width, P = 3 * tubelet * patch^2 numbers in one cube. Everywhere, mask is bool
[B,N], True = masked.
"""

import argparse
import json
import math
from collections import Counter, OrderedDict, namedtuple
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as VideoMAE
EPS = 1e-6  # every LayerNorm, and the target's deviation
# stride: a habit of the data, not of the model
CUBES = dict(frames=16, stride=4, image_size=224, tubelet=2, patch=16)
# decoders as in VideoMAE's pretraining scripts; tiny is the toy world's: 4 x 6 x 6 tokens
SIZES = {
    "tiny": dict(
        CUBES,
        frames=8,
        stride=2,
        image_size=48,
        patch=8,
        width=96,
        depth=3,
        heads=3,
        decoder_width=96,
        decoder_depth=1,
        decoder_heads=3,
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


def normalize(video):
    """uint8 [B,3,T,H,W] -> float32 less ImageNet's mean over its deviation, on the video's own
    device.
    """
    out = torch.empty_like(video, dtype=torch.float32)
    for c in range(3):
        # by Python scalars: a tensor of constants would be copied to the GPU, and waited for, each
        # step
        out[:, c] = (video[:, c] / 255 - MEAN[c]) / STD[c]
    return out


def patchify(video, tubelet=2, patch=16):
    """[B,3,T,H,W] -> cubes [B,N,P]: tokens in (t, h, w) order, a cube's numbers in (frame, row,
    column, colour).
    """
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // tubelet, tubelet, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, tubelet * patch * patch * C)


def unpatchify(cubes, grid, tubelet=2, patch=16):
    """The inverse of `patchify`: cubes [B,N,P] and their grid (t, h, w) -> [B,3,T,H,W]."""
    (t, h, w), B = grid, len(cubes)
    x = cubes.reshape(B, t, h, w, tubelet, patch, patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, -1, t * tubelet, h * patch, w * patch)


def split_mask(mask, visible=None):
    """mask [B,N] -> indices of the visible tokens [B,V,1] and of the masked ones [B,N-V,1], in
    token order.

    All rows must keep equally many. Giving that number as `visible` spares reading it from the
    device, which stalls a GPU and breaks torch.compile's graph; the device itself then asserts it
    (RuntimeError)."""
    kept = mask.shape[1] - mask.sum(dim=1)
    visible = int(kept[0]) if visible is None else visible
    torch._assert_async((kept == visible).all(), f"mask: not every row keeps {visible} tokens")
    # False sorts before True
    order = mask.to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1)
    return order[:, :visible], order[:, visible:]


def take(x, index):
    """Tokens of x [B or 1,N,D] by index [B,M,1] -> [B,M,D]. (take_along_dim makes an index of
    every number, 15 times slower.)
    """
    return x[torch.arange(len(x), device=x.device)[:, None], index.squeeze(-1)]


def sincos_table(n, width):
    """[1,n,width] float32: "Attention is all you need" §3.5 over the index of a token in the
    flattened grid.
    """
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[None, :, None] / 10000 ** (j // 2 * 2 / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


class Linear(nn.Linear):
    def reset_parameters(self):
        # VideoMAE's initialisation; its Conv3d and LayerNorm keep PyTorch's defaults
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Joint space-time attention. Keys need no bias: it would shift all scores of a query
    alike.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width, bias=False), Linear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B,heads,N,D/heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm attention and MLP; in training each residual branch of a sample is dropped at the
    rate drop_path.
    """

    def __init__(self, width, heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.rate = Attention(width, heads), drop_path
        self.mlp = nn.Sequential(
            OrderedDict(fc1=Linear(width, 4 * width), act=nn.GELU(), fc2=Linear(4 * width, width))
        )

    def drop_path(self, x):
        return (
            x * F.dropout(x.new_ones(len(x), 1, 1), self.rate) if self.training and self.rate else x
        )

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Blocks and a final norm; drop path grows linearly from 0 to its full rate at the last
    block.
    """

    def __init__(self, width, depth, heads, drop_path=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm, self.checkpointing = nn.LayerNorm(width, eps=EPS), False

    def set_checkpointing(self, on=True):
        self.checkpointing = (
            on  # keep only each block's input, recompute the rest in the backward pass
        )

    def run_blocks(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


class Encoder(Transformer):
    """Cubes in, tokens out. frames and image_size default to the size's own; positions are
    computed for any.
    """

    def __init__(self, size, frames=None, image_size=None, drop_path=0.0):
        c = dict(SIZES[size])
        c["frames"], c["image_size"] = frames or c["frames"], image_size or c["image_size"]
        if c["frames"] % c["tubelet"] or c["image_size"] % c["patch"]:
            raise ValueError(
                f"{c['frames']} x {c['image_size']}: not multiples of {c['tubelet']} x {c['patch']}"
            )
        super().__init__(c["width"], c["depth"], c["heads"], drop_path)
        self.config = c
        self.grid = (c["frames"] // c["tubelet"], *[c["image_size"] // c["patch"]] * 2)
        self.num_tokens, cube = math.prod(self.grid), (c["tubelet"], c["patch"], c["patch"])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c["width"], cube, stride=cube)})
        self.register_buffer(
            "pos_embed", sincos_table(self.num_tokens, c["width"]), persistent=False
        )

    def cubes(self, video):
        shape = [3, self.config["frames"], self.config["image_size"], self.config["image_size"]]
        if list(video.shape[1:]) != shape:
            raise ValueError(f"video {list(video.shape)}: expected a batch of {shape}")
        return patchify(video, self.config["tubelet"], self.config["patch"])

    def encode(self, cubes, index=None):
        """cubes [B,N,P], index [B,V,1] of the visible ones (None: all) -> [B,V,D]; the others
        are never read.
        """
        position = self.pos_embed
        if index is not None:
            cubes, position = take(cubes, index), take(position, index)
        # a convolution whose stride is its kernel is one matrix product per cube: [D,3,2,16,16] ->
        # [D,P]
        weight = self.patch_embed["proj"].weight.permute(0, 2, 3, 4, 1).flatten(1)
        return self.norm(
            self.run_blocks(F.linear(cubes, weight, self.patch_embed["proj"].bias) + position)
        )


class AllGather(torch.autograd.Function):
    """The rows of all ranks, [2,B,D] -> [2,ranks*B,D]; gradients come back summed over ranks."""

    @staticmethod
    def forward(ctx, own):
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own.contiguous())
        return torch.cat(every, dim=1)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.contiguous())
        return grad.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def gather_rows(own):
    """The rows of all ranks, [B] -> [ranks*B], without a gradient."""
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own.contiguous())
    return torch.cat(every)


def info_nce(video_emb, text_emb, scale, group=None):
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, fig. 3) of [B,D] and [B,D], any length; scale is 1
    / temperature. Positives of each other, the target uniform over them, are samples of one video,
    that is of one number in group ([B] integers; None: all differ), and samples of one caption,
    that is texts of cosine above 0.999. Under torch.distributed a collective, with equal B: a
    rank's loss is the mean over its own rows against everyone's columns; gathering passes gradients
    back, so DistributedDataParallel averages to the whole batch's gradient."""
    own = torch.stack(
        [F.normalize(video_emb.float(), dim=-1), F.normalize(text_emb.float(), dim=-1)]
    )  # [2,B,D]
    together = dist.is_available() and dist.is_initialized()
    every = AllGather.apply(own) if together else own  # [2,ranks*B,D]
    if group is None:
        first = dist.get_rank() * len(own[0]) if together else 0
        group = first + torch.arange(len(own[0]), device=own.device)
    every_group = gather_rows(group) if together else group  # [ranks*B]
    # A sample is its own positive by its group: the product alone may be below 0.999 with itself
    # (TF32), and 0 / 0 follow.
    same = (group[:, None] == every_group) | (own[1] @ every[1].T > 0.999)
    target = same / same.sum(dim=1, keepdim=True)
    to_text, to_video = scale * own[0] @ every[1].T, scale * own[1] @ every[0].T
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_video, target)) / 2


class ContrastiveHead(nn.Module):
    """tokens [B,V,D], text [B,text_dim], group [B] -> InfoNCE of the tokens' projected mean and
    the text, in float32.
    """

    def __init__(self, width, text_dim):
        super().__init__()
        self.proj = Linear(width, text_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens, text, group=None):
        with torch.autocast(tokens.device.type, enabled=False):
            return info_nce(self.proj(tokens.float().mean(1)), text, self.logit_scale.exp(), group)

    @torch.no_grad()
    def limit_temperature(self):
        """After each step of the optimiser, as open_clip: 1 / temperature stays between 1 and 100.
        In the forward pass the limit would have no gradient, and the temperature could never come
        back."""
        self.logit_scale.clamp_(0, math.log(100))


MAEOutput = namedtuple("MAEOutput", "loss_mae loss_nce")


class VideoMAE(nn.Module):
    """The masked autoencoder.

    nce_detach: stops the contrastive gradient at the encoder's output: the head trains, the encoder
        is untouched (the paper's monitored contrastive loss)."""

    def __init__(self, size="base", frames=None, image_size=None, text_dim=512, nce_detach=False):
        super().__init__()
        self.encoder, self.nce_detach = Encoder(size, frames, image_size), nce_detach
        c = self.encoder.config
        self.grid = self.encoder.grid
        self.num_tokens = self.encoder.num_tokens
        self.config = c
        # PyTorch's init, as VideoMAE
        self.encoder_to_decoder = nn.Linear(c["width"], c["decoder_width"], bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c["decoder_width"]))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = Transformer(c["decoder_width"], c["decoder_depth"], c["decoder_heads"])
        self.decoder.head = Linear(c["decoder_width"], 3 * c["tubelet"] * c["patch"] ** 2)
        self.contrastive = ContrastiveHead(c["width"], text_dim)
        self.register_buffer(
            "pos_embed", sincos_table(self.num_tokens, c["decoder_width"]), persistent=False
        )
        self.register_buffer("rgb", torch.tensor([MEAN, STD]), persistent=False)

    def set_checkpointing(self, on=True):
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def forward(self, video, mask, text=None, visible=None, decoded=None, group=None):
        """video [B,3,T,H,W] normalised, mask [B,N], text [B,text_dim] or None -> MAEOutput of
        float32 scalars.
        group: [B] integers, equal for samples of one video, which the contrastive loss takes for
            one (None: all differ).
        visible: how many tokens a row of the mask keeps, if the caller knows (see `split_mask`).
        decoded: indices [B,M] of the masked tokens that the decoder sees and the loss is over
            (VideoMAE V2, arXiv:2303.16727; None: all)."""
        cubes, (seen, hidden) = self.encoder.cubes(video), split_mask(mask, visible)
        if decoded is not None:
            torch._assert_async(mask.gather(1, decoded).all(), "decoded: not every token is masked")
            hidden = decoded.unsqueeze(-1)
        tokens = self.encoder.encode(cubes, seen)
        prediction = self.decode(tokens, seen, hidden)
        with torch.autocast(video.device.type, enabled=False):
            loss_mae = F.mse_loss(prediction.float(), self.target(take(cubes, hidden))[0])
        tokens = tokens.detach() if self.nce_detach else tokens
        return MAEOutput(loss_mae, None if text is None else self.contrastive(tokens, text, group))

    def encode(self, video, mask=None, visible=None):
        """-> the visible tokens (without a mask, all) after the final norm, [B,V,D], in (t, h,
        w) order.
        """
        return self.encoder.encode(
            self.encoder.cubes(video), None if mask is None else split_mask(mask, visible)[0]
        )

    def decode(self, tokens, seen, hidden):
        """tokens [B,V,D] -> [B,M,P], M hidden ones; mask tokens go last and positions follow:
        nothing is reordered.
        """
        x = torch.cat(
            [
                self.encoder_to_decoder(tokens) + take(self.pos_embed, seen),
                self.mask_token + take(self.pos_embed, hidden),
            ],
            dim=1,
        )  # [B,V+M,decoder width]
        return self.decoder.head(self.decoder.norm(self.decoder.run_blocks(x)[:, seen.shape[1] :]))

    def target(self, cubes):
        """cubes [B,M,P] -> (target [B,M,P], mean, deviation [B,M,1,3]), float32: pixels in [0,1]
        again, then each colour of each cube brought to mean 0 and deviation 1. Predicting 0
        therefore costs about 1."""
        x = cubes.float().unflatten(-1, (-1, 3)) * self.rgb[1] + self.rgb[0]  # [B,M,P/3,3]
        mean, deviation = x.mean(dim=-2, keepdim=True), x.var(dim=-2, keepdim=True).sqrt() + EPS
        return ((x - mean) / deviation).flatten(-2), mean, deviation

    @torch.no_grad()
    def reconstruct(self, video, mask, visible=None):
        """-> [B,3,T,H,W] float32 in [0,1]: the video, its masked cubes replaced by predictions.

        Their mean and deviation are borrowed from the truth, which flatters the picture: say so in
        its caption."""
        cubes, (seen, hidden) = self.encoder.cubes(video), split_mask(mask, visible)
        target, mean, deviation = self.target(cubes)
        prediction = self.decode(self.encoder.encode(cubes, seen), seen, hidden).float()
        target = target.scatter(1, hidden.expand_as(prediction), prediction)
        pixels = (target.unflatten(-1, (-1, 3)) * deviation + mean).flatten(-2)
        return unpatchify(pixels, self.grid, self.config["tubelet"], self.config["patch"]).clamp(
            0, 1
        )


class VideoViT(Encoder):
    """The classifier in VideoMAE's fine-tuning layout: mean over tokens, fc_norm in place of
    norm, dropout, head.
    """

    def __init__(
        self,
        size="base",
        classes=400,
        frames=None,
        image_size=None,
        drop_path=0.0,
        head_dropout=0.0,
    ):
        super().__init__(size, frames, image_size, drop_path)
        self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(self.config["width"], eps=EPS)
        self.dropout, self.head = nn.Dropout(head_dropout), Linear(self.config["width"], classes)
        # VideoMAE's 0.02 * 0.001: starts from uniform predictions
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, video):
        """video [B,3,T,H,W] normalised -> logits [B,classes]."""
        return self.head(self.dropout(self.fc_norm(self.encode(self.cubes(video)).mean(dim=1))))


HF_KEYS = [  # (ours, Hugging Face's); VideoViT's keys with "encoder." before them
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."),
    ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    ("encoder.fc_norm.", "fc_norm."),
    ("encoder.head.", "classifier."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attn.", ".attention.attention."),
]
SPLIT = ("query", "key", "value")  # Hugging Face cuts attn.qkv in these
DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")
CLASSIFIER = ("fc_norm.", "head.")


class Ignored:
    """Stands for numpy's scalars while a checkpoint is opened. VideoMAE's optimiser state holds its
    learning rates as such; nobody here reads them, so nothing of numpy's has to be let in."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


SAFE = [  # what torch.load lets in beside tensors: all of it inert
    argparse.Namespace,  # VideoMAE's flags
    (Ignored, "numpy.dtype"),
    (Ignored, "numpy.core.multiarray.scalar"),  # as numpy 1 calls it
    (Ignored, "numpy._core.multiarray.scalar"),  # as numpy 2 calls it
]


def rename(key, pairs):
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def weights_file(path):
    """The file with the weights: `path` itself, or the one in a Hugging Face folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    return path


def read_checkpoint(path):
    """File or folder -> {key: tensor} under VideoMAE's names, those of VideoViT with "encoder."
    before them. ValueError, one line with the file, where there is none that can be read safely."""
    file = weights_file(Path(path))
    if not file.is_file():
        raise ValueError(f"{file}: no checkpoint there")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            with torch.serialization.safe_globals(SAFE):
                state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("model", state.get("module", state))  # DeepSpeed says "module"
        state = {key: tensor.detach() for key, tensor in state.items()}
    except Exception as error:  # garbage makes the parsers raise anything
        reason = type(error).__name__
        raise ValueError(f"{file}: no checkpoint that can be read safely ({reason})") from None
    return join_qkv(official_names(state), file)


def official_names(state):
    """The tensors of any layout under VideoMAE's names, but query, key and value still apart."""
    if "embeddings.patch_embeddings.projection.weight" in state:  # a bare VideoMAEModel
        state = {"videomae." + key: tensor for key, tensor in state.items()}
    pairs = [(theirs, ours) for ours, theirs in HF_KEYS]
    # transformers 5 calls these query.bias and value.bias in memory, but writes q_bias and v_bias
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]
    named = {}
    for key, tensor in state.items():
        key = rename(key, pairs)
        if key.startswith(("patch_embed.", "blocks.", "norm.", "head.")):  # the fine-tuning layout
            key = "encoder." + key
        named[key] = tensor
    return named


def join_qkv(state, file):
    """Joins Hugging Face's query, key and value weights; ValueError where one of them is
    missing.
    """
    for query in [key for key in state if key.endswith(".query.weight")]:
        parts = []
        for part in SPLIT:
            key = query.replace("query", part)
            if key not in state:
                raise ValueError(f"{file}: has {query} but no {key}")
            parts.append(state.pop(key))
        state[query.replace("query", "qkv")] = torch.cat(parts)
    return state


def head_classes(path):
    """How many classes the classifier in `path` has; ValueError if there is none, or no
    checkpoint.
    """
    head = read_checkpoint(path).get("encoder.head.weight")
    if head is None:
        raise ValueError(f"{path}: holds no classifier")
    return len(head)


def saved_args(path):
    """The flags that pretrain.py or finetune.py kept in their checkpoint; {} for anybody else's, or
    none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["args"]
    except Exception:  # other people's files are load_pretrained's to judge
        return {}
    return saved if isinstance(saved, dict) else {}


def load_pretrained(model, path, new_head=False):
    """Load `path` into a VideoMAE or VideoViT, of any frames and image size.

    path: our checkpoint.pt, an official VideoMAE .pth, or a Hugging Face VideoMAE folder
    new_head: a VideoViT leaves the head of a fine-tuned file, for other classes

    Returns what was tolerated, such as ["missing head.bias", "unused norm.weight"]; `summary_of`
    says it in words. Which parts a file may lack as a whole, or have too many, `for_autoencoder`
    and `for_classifier` say. Whatever else does not fit raises ValueError, one line with keys and
    shapes, and nothing is loaded.
    """
    path = Path(path)
    state = read_checkpoint(path)
    if isinstance(model, VideoViT):
        state, may_lack, may_spare = for_classifier(state, new_head)
    else:
        state, may_lack, may_spare = for_autoencoder(state)
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unused = [key for key in state if key not in own]
    tolerated = ()
    for part in may_lack:
        if not any(key.startswith(part) for key in state):
            tolerated += part

    problems = wrong_heads(model, path)
    for key, tensor in state.items():
        if key in own and tensor.shape != own[key].shape:
            problems.append(f"{key}: file {list(tensor.shape)}, model {list(own[key].shape)}")
    problems += [f"missing {key}" for key in missing if not key.startswith(tolerated)]
    problems += [f"unexpected {key}" for key in unused if not key.startswith(may_spare)]
    if problems:
        if len(problems) > 8:  # a file of another size: every key
            problems[8:] = [f"and {len(problems) - 8} more"]
        raise ValueError(f"{path} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state, strict=False)
    return [f"missing {key}" for key in missing] + [f"unused {key}" for key in unused]


def for_autoencoder(state):
    """How VideoMAE takes a file -> (its tensors under the model's names, parts that it may lack as
    a whole, beginnings of keys that stay unused)."""
    may_lack = [("contrastive.",), DECODER, ("encoder.norm.",)]  # a bare encoder may lack its norm
    fine_tuned = "encoder.head.weight" in state and "encoder.norm.weight" not in state
    if fine_tuned:  # fc_norm becomes the final norm
        state = {key.replace("fc_norm", "norm"): tensor for key, tensor in state.items()}
        return state, may_lack, ("encoder.head.",)
    return state, may_lack, ()


def for_classifier(state, new_head):
    """The same for VideoViT."""
    state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    if not any(key.startswith(CLASSIFIER) for key in state):  # pretrained: fc_norm replaces norm
        return state, [CLASSIFIER], ("norm.", "contrastive.", *DECODER)
    if new_head and "head.weight" in state:  # fine-tuned, for other classes
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
        return state, [("head.",)], ()
    return state, [], ()  # fine-tuned


def wrong_heads(model, folder):
    """[what is wrong] if a Hugging Face folder's model has another number of heads, which leaves no
    trace in the shapes; else []."""
    file = folder / "config.json"
    if not file.is_file():
        return []
    try:
        heads = json.loads(file.read_text()).get("num_attention_heads")
    except (ValueError, AttributeError):
        return ["its config.json cannot be read"]
    if heads in (None, model.config["heads"]):
        return []
    return [f"num_attention_heads: file {heads}, model {model.config['heads']}"]


def summary_of(notes):
    """What `load_pretrained` returned, in words: "encoder loaded; not used: decoder (63 keys)"."""
    if not notes:
        return "every key loaded"
    parts = {
        "decoder": DECODER,
        "contrastive head": ("contrastive.",),
        "final norm": ("norm.", "fc_norm."),
        "classifier": ("head.",),
    }
    counts = {"unused": Counter(), "missing": Counter()}
    for note in notes:
        kind, key = note.split(" ", 1)
        key = key.removeprefix("encoder.")
        part = next(name for name, beginnings in parts.items() if key.startswith(beginnings))
        counts[kind][part] += 1
    sentences = ["encoder loaded"]
    for kind, words in (("unused", "not used"), ("missing", "new, as the file has none")):
        listed = [f"{part} ({number} keys)" for part, number in counts[kind].items()]
        if listed:
            sentences.append(f"{words}: {', '.join(listed)}")
    return "; ".join(sentences)


def save_checkpoint(path, **content):
    """torch.save(content, path), written aside and renamed: whatever happens, `path` is a whole
    checkpoint, this one or the last. OSError, with the path and the reason, if it cannot be."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(
            temporary, "wb"
        ) as file:  # given the name alone, torch keeps the reason to itself
            torch.save(content, file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch's own hides it
        if not isinstance(cause, OSError):
            raise
        message = f"cannot be written, the last checkpoint is kept ({cause.strerror})"
        raise OSError(cause.errno, message, str(path)) from None


def save_huggingface(model, folder, classes=None):
    """Write a folder that transformers' from_pretrained opens: config.json, model.safetensors and
    preprocessor_config.json, which AutoImageProcessor and pipelines want.

    VideoMAE (but its contrastive head) becomes VideoMAEForPreTraining, VideoViT becomes
    VideoMAEForVideoClassification. classes: the names of a VideoViT's classes, in the order of its
    outputs (None: their numbers); ValueError unless there is one for each.

    transformers fixes the epsilon of decoder.norm and fc_norm at 1e-5, ours is 1e-6: equal outputs
    need those two set by hand.
    """
    folder = Path(folder)
    classifier = isinstance(model, VideoViT)
    c = model.config
    config = {
        "model_type": "videomae",
        "architectures": ["VideoMAEForPreTraining"],
        "layer_norm_eps": EPS,
        "use_mean_pooling": classifier,
        "num_frames": c["frames"],
        "image_size": c["image_size"],
        "tubelet_size": c["tubelet"],
        "patch_size": c["patch"],
        "hidden_size": c["width"],
        "num_hidden_layers": c["depth"],
        "num_attention_heads": c["heads"],
        "intermediate_size": 4 * c["width"],
        "decoder_hidden_size": c["decoder_width"],
        "decoder_intermediate_size": 4 * c["decoder_width"],
        "decoder_num_hidden_layers": c["decoder_depth"],
        "decoder_num_attention_heads": c["decoder_heads"],
    }
    if classifier:
        outputs = model.head.out_features
        names = [str(name) for name in (range(outputs) if classes is None else classes)]
        if len(set(names)) != outputs or len(names) != outputs:
            raise ValueError(f"classes: expected {outputs} different names, found {len(names)}")
        config["architectures"] = ["VideoMAEForVideoClassification"]
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: number for number, name in enumerate(names)}
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": c["image_size"]},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": c["image_size"], "width": c["image_size"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    state = {}
    for key, tensor in model.state_dict(prefix="encoder." if classifier else "").items():
        if key.startswith("contrastive."):
            continue
        pieces = tensor.chunk(3) if ".qkv." in key else [tensor]
        for part, piece in zip(SPLIT, pieces):
            name = rename(key, HF_KEYS).replace("qkv", part)
            state[name] = piece.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def export(path, folder):
    """Write the checkpoint `path`, pretrain.py's or finetune.py's, as a Hugging Face folder, and
    return the model. ValueError, one line with the file, if it is neither's."""
    state = read_checkpoint(path)
    saved = saved_args(path)
    if not {"size", "frames", "image_size"} <= saved.keys():
        raise ValueError(f"{path}: not a checkpoint of pretrain.py or finetune.py")
    shape = {"frames": saved["frames"], "image_size": saved["image_size"]}
    classes = None
    if "encoder.head.weight" in state:
        classes = saved["classes"]
        model = VideoViT(saved["size"], len(classes), **shape)
    else:
        model = VideoMAE(saved["size"], text_dim=saved["text_dim"], **shape)
    load_pretrained(model, path)
    save_huggingface(model, folder, classes)
    return model


def count_flops(model, visible, decoded=None):
    """Multiply-adds (the literature's FLOPs) of one clip's forward pass with `visible` tokens
    encoded and `decoded` (all) others decoded, (encoder, decoder), in matrix products: ViT-B's
    encoder on all 1568 tokens, 180 G."""
    c, M = model.config, model.num_tokens - visible if decoded is None else decoded
    P, D, E = 3 * c["tubelet"] * c["patch"] ** 2, c["width"], c["decoder_width"]
    encoder, decoder = (
        depth
        * (12 * n * width**2 + 2 * n**2 * width)  # qkv, proj and MLP; attention's two products
        for n, width, depth in ((visible, D, c["depth"]), (visible + M, E, c["decoder_depth"]))
    )
    return visible * P * D + encoder, visible * D * E + decoder + M * E * P


def print_sizes():
    print(
        "GFLOPs: multiply-adds of a clip's forward pass in pretraining, encoder + decoder (tokens kept)\n"
        f"size  encoder  whole   tokens{'random, tube, flow 0.9':>25}{'motion 0.75':>25}{'text 0.6':>25}"
    )
    for size in SIZES:
        with torch.device("meta"):
            model = VideoMAE(size)
        encoder, whole = (
            sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model)
        )
        row, (t, h, w) = f"{size:5}{encoder:7.1f}M{whole:7.1f}M{model.num_tokens:7}", model.grid
        for kept in (t * (h * w - math.floor(ratio * h * w)) for ratio in (0.9, 0.75, 0.6)):
            row += f"{' + '.join(f'{f / 1e9:.3g}' for f in count_flops(model, kept)) + f' ({kept})':>25}"
        print(row)


def run(argv=None):
    from tgm.flags import Parser
    from tgm.run import RunError

    parser = Parser(description=__doc__)
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="our checkpoint, for transformers"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where --export writes")
    args = parser.parse_args(argv)
    if (args.export is None) != (args.out is None):
        parser.error("--export FILE and --out FOLDER go together")
    if args.export is None:
        print_sizes()
        return
    if args.out.is_file() or weights_file(args.out).is_file():
        raise RunError(f"--out {args.out}: is there already; remove it, or write elsewhere")
    try:
        model = export(args.export, args.out)
    except ValueError as error:
        raise RunError(f"--export {error}") from None
    opened = "VideoMAEForPreTraining.from_pretrained"
    if isinstance(model, VideoViT):
        opened = 'pipeline("video-classification", model=...)'
    print(f"{args.out}: transformers opens it with {opened}")


def main(argv=None):
    from tgm.run import one_line_errors  # here alone: the model needs nothing of ours

    one_line_errors(run)(argv)


if __name__ == "__main__":
    main()
