"""The model: VideoMAE's vision transformer, the masked autoencoder around it, and TGM's contrastive head.

    video [B,3,T,H,W] -patchify-> cubes -drop the masked-> encoder -> visible tokens -+-> mean -> InfoNCE <- text [B,D]
              normalised pixels of the masked cubes <-MSE- decoder <- [visible | mask tokens]

A library that imports nothing of ours.  Architecture, initialisation and state-dict keys are VideoMAE's
(arXiv:2203.12602), so published checkpoints load with no renaming; Hugging Face's layout is one key map away.

    python model.py    # seconds: parameters of each size, and tokens and GFLOPs a clip at each mask's ratio

Letters: B batch, T frames, H W pixels, (t, h, w) token grid, N = t*h*w tokens, V visible tokens, M decoded ones,
D width, P = 3 * tubelet * patch^2 numbers in one cube.  Everywhere, mask is bool [B,N], True = masked.
"""
import argparse
import json
import math
import sys
from collections import OrderedDict, namedtuple
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as VideoMAE
EPS = 1e-6  # every LayerNorm, and the target's deviation
CUBES = dict(frames=16, stride=4, image_size=224, tubelet=2, patch=16)  # stride: a habit of the data, not of the model
SIZES = {  # decoders as in VideoMAE's pretraining scripts; tiny is the toy world's: 4 x 4 x 4 tokens
    "tiny": dict(CUBES, frames=8, stride=2, image_size=32, patch=8, width=96, depth=3, heads=3,
                 decoder_width=96, decoder_depth=1, decoder_heads=3),
    "small": dict(CUBES, width=384, depth=12, heads=6, decoder_width=192, decoder_depth=4, decoder_heads=3),
    "base": dict(CUBES, width=768, depth=12, heads=12, decoder_width=384, decoder_depth=4, decoder_heads=6),
    "large": dict(CUBES, width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=12, decoder_heads=8),
    "huge": dict(CUBES, width=1280, depth=32, heads=16, decoder_width=640, decoder_depth=12, decoder_heads=8),
}

def normalize(video):
    """uint8 [B,3,T,H,W] -> float32 less ImageNet's mean over its deviation, on the video's own device."""
    out = torch.empty_like(video, dtype=torch.float32)
    for c in range(3):  # by Python scalars: a tensor of constants would be copied to the GPU, and waited for, each step
        out[:, c] = (video[:, c] / 255 - MEAN[c]) / STD[c]
    return out

def patchify(video, tubelet=2, patch=16):
    """[B,3,T,H,W] -> cubes [B,N,P]: tokens in (t, h, w) order, a cube's numbers in (frame, row, column, colour)."""
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // tubelet, tubelet, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, tubelet * patch * patch * C)

def unpatchify(cubes, grid, tubelet=2, patch=16):
    """The inverse of `patchify`: cubes [B,N,P] and their grid (t, h, w) -> [B,3,T,H,W]."""
    (t, h, w), B = grid, len(cubes)
    x = cubes.reshape(B, t, h, w, tubelet, patch, patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, -1, t * tubelet, h * patch, w * patch)

def split_mask(mask, visible=None):
    """mask [B,N] -> indices of the visible tokens [B,V,1] and of the masked ones [B,N-V,1], in token order.
    All rows must keep equally many.  Giving that number as `visible` spares reading it from the device, which stalls
    a GPU and breaks torch.compile's graph; the device itself then asserts it (RuntimeError)."""
    kept = mask.shape[1] - mask.sum(dim=1)
    visible = int(kept[0]) if visible is None else visible
    torch._assert_async((kept == visible).all(), f"mask: not every row keeps {visible} tokens")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1)  # False sorts before True
    return order[:, :visible], order[:, visible:]

def take(x, index):
    """Tokens of x [B or 1,N,D] by index [B,M,1] -> [B,M,D].  (take_along_dim makes an index of every number, 15 times slower.)"""
    return x[torch.arange(len(x), device=x.device)[:, None], index.squeeze(-1)]

def sincos_table(n, width):
    """[1,n,width] float32: "Attention is all you need" §3.5 over the index of a token in the flattened grid."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[None, :, None] / 10000 ** (j // 2 * 2 / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()

class Linear(nn.Linear):
    def reset_parameters(self):  # VideoMAE's initialisation; its Conv3d and LayerNorm keep PyTorch's defaults
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

class Attention(nn.Module):
    """Joint space-time attention.  Keys need no bias: it would shift all scores of a query alike."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width, bias=False), Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B,heads,N,D/heads]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))

class Block(nn.Module):
    """Pre-norm attention and MLP; in training each residual branch of a sample is dropped at the rate drop_path."""
    def __init__(self, width, heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.rate = Attention(width, heads), drop_path
        self.mlp = nn.Sequential(OrderedDict(fc1=Linear(width, 4 * width), act=nn.GELU(), fc2=Linear(4 * width, width)))

    def drop_path(self, x):
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.rate) if self.training and self.rate else x

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

class Transformer(nn.Module):
    """Blocks and a final norm; drop path grows linearly from 0 to its full rate at the last block."""
    def __init__(self, width, depth, heads, drop_path=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm, self.checkpointing = nn.LayerNorm(width, eps=EPS), False

    def set_checkpointing(self, on=True):
        self.checkpointing = on  # keep only each block's input, recompute the rest in the backward pass

    def run_blocks(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x

class Encoder(Transformer):
    """Cubes in, tokens out.  frames and image_size default to the size's own; positions are computed for any."""
    def __init__(self, size, frames=None, image_size=None, drop_path=0.0):
        c = dict(SIZES[size])
        c["frames"], c["image_size"] = frames or c["frames"], image_size or c["image_size"]
        if c["frames"] % c["tubelet"] or c["image_size"] % c["patch"]:
            raise ValueError(f"{c['frames']} x {c['image_size']}: not multiples of {c['tubelet']} x {c['patch']}")
        super().__init__(c["width"], c["depth"], c["heads"], drop_path)
        self.config, self.grid = c, (c["frames"] // c["tubelet"], *[c["image_size"] // c["patch"]] * 2)
        self.num_tokens, cube = math.prod(self.grid), (c["tubelet"], c["patch"], c["patch"])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c["width"], cube, stride=cube)})
        self.register_buffer("pos_embed", sincos_table(self.num_tokens, c["width"]), persistent=False)

    def cubes(self, video):
        shape = [3, self.config["frames"], self.config["image_size"], self.config["image_size"]]
        if list(video.shape[1:]) != shape:
            raise ValueError(f"video {list(video.shape)}: expected a batch of {shape}")
        return patchify(video, self.config["tubelet"], self.config["patch"])

    def encode(self, cubes, index=None):
        """cubes [B,N,P], index [B,V,1] of the visible ones (None: all) -> [B,V,D]; the others are never read."""
        position = self.pos_embed
        if index is not None:
            cubes, position = take(cubes, index), take(position, index)
        # a convolution whose stride is its kernel is one matrix product per cube: [D,3,2,16,16] -> [D,P]
        weight = self.patch_embed["proj"].weight.permute(0, 2, 3, 4, 1).flatten(1)
        return self.norm(self.run_blocks(F.linear(cubes, weight, self.patch_embed["proj"].bias) + position))

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

def info_nce(video_emb, text_emb, scale):
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020, fig. 3) of [B,D] and [B,D], any length; scale is 1 / temperature.
    Texts of cosine above 0.999 are one caption, hence positives of each other, the target uniform over them.
    Under torch.distributed a collective, with equal B: a rank's loss is the mean over its own rows against everyone's
    columns; gathering passes gradients back, so DistributedDataParallel averages to the whole batch's gradient."""
    own = torch.stack([F.normalize(video_emb.float(), dim=-1), F.normalize(text_emb.float(), dim=-1)])  # [2,B,D]
    every = AllGather.apply(own) if dist.is_available() and dist.is_initialized() else own  # [2,ranks*B,D]
    same = (own[1] @ every[1].T > 0.999).float()
    target = same / same.sum(dim=1, keepdim=True)
    to_text, to_video = scale * own[0] @ every[1].T, scale * own[1] @ every[0].T
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_video, target)) / 2

class ContrastiveHead(nn.Module):
    """tokens [B,V,D], text [B,text_dim] -> InfoNCE of the tokens' projected mean and the text, in float32."""
    def __init__(self, width, text_dim):
        super().__init__()
        self.proj = Linear(width, text_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, tokens, text):
        with torch.autocast(tokens.device.type, enabled=False):
            return info_nce(self.proj(tokens.float().mean(1)), text, self.logit_scale.clamp(max=math.log(100)).exp())

MAEOutput = namedtuple("MAEOutput", "loss_mae loss_nce")

class VideoMAE(nn.Module):
    """The masked autoencoder.  nce_detach stops the contrastive gradient at the encoder's output: the head trains, the
    encoder is untouched (the paper's monitored contrastive loss)."""
    def __init__(self, size="base", frames=None, image_size=None, text_dim=512, nce_detach=False):
        super().__init__()
        self.encoder, self.nce_detach = Encoder(size, frames, image_size), nce_detach
        c, self.grid, self.num_tokens = self.encoder.config, self.encoder.grid, self.encoder.num_tokens
        self.config = c
        self.encoder_to_decoder = nn.Linear(c["width"], c["decoder_width"], bias=False)  # PyTorch's init, as VideoMAE
        self.mask_token = nn.Parameter(torch.empty(1, 1, c["decoder_width"]))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = Transformer(c["decoder_width"], c["decoder_depth"], c["decoder_heads"])
        self.decoder.head = Linear(c["decoder_width"], 3 * c["tubelet"] * c["patch"] ** 2)
        self.contrastive = ContrastiveHead(c["width"], text_dim)
        self.register_buffer("pos_embed", sincos_table(self.num_tokens, c["decoder_width"]), persistent=False)
        self.register_buffer("rgb", torch.tensor([MEAN, STD]), persistent=False)

    def set_checkpointing(self, on=True):
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def forward(self, video, mask, text=None, visible=None, decoded=None):
        """video [B,3,T,H,W] normalised, mask [B,N], text [B,text_dim] or None -> MAEOutput of float32 scalars.
        visible: how many tokens a row of the mask keeps, if the caller knows (see `split_mask`).  decoded: indices
        [B,M] of the masked tokens that the decoder sees and the loss is over (VideoMAE V2, arXiv:2303.16727; None: all)."""
        cubes, (seen, hidden) = self.encoder.cubes(video), split_mask(mask, visible)
        if decoded is not None:
            torch._assert_async(mask.gather(1, decoded).all(), "decoded: not every token is masked")
            hidden = decoded.unsqueeze(-1)
        tokens = self.encoder.encode(cubes, seen)
        prediction = self.decode(tokens, seen, hidden)
        with torch.autocast(video.device.type, enabled=False):
            loss_mae = F.mse_loss(prediction.float(), self.target(take(cubes, hidden))[0])
        tokens = tokens.detach() if self.nce_detach else tokens
        return MAEOutput(loss_mae, None if text is None else self.contrastive(tokens, text))

    def encode(self, video, mask=None, visible=None):
        """-> the visible tokens (without a mask, all) after the final norm, [B,V,D], in (t, h, w) order."""
        return self.encoder.encode(self.encoder.cubes(video), None if mask is None else split_mask(mask, visible)[0])

    def decode(self, tokens, seen, hidden):
        """tokens [B,V,D] -> [B,M,P], M hidden ones; mask tokens go last and positions follow: nothing is reordered."""
        x = torch.cat([self.encoder_to_decoder(tokens) + take(self.pos_embed, seen),
                       self.mask_token + take(self.pos_embed, hidden)], dim=1)  # [B,V+M,decoder width]
        return self.decoder.head(self.decoder.norm(self.decoder.run_blocks(x)[:, seen.shape[1]:]))

    def target(self, cubes):
        """cubes [B,M,P] -> (target [B,M,P], mean, deviation [B,M,1,3]), float32: pixels in [0,1] again, then each
        colour of each cube brought to mean 0 and deviation 1.  Predicting 0 therefore costs about 1."""
        x = cubes.float().unflatten(-1, (-1, 3)) * self.rgb[1] + self.rgb[0]  # [B,M,P/3,3]
        mean, deviation = x.mean(dim=-2, keepdim=True), x.var(dim=-2, keepdim=True).sqrt() + EPS
        return ((x - mean) / deviation).flatten(-2), mean, deviation

    @torch.no_grad()
    def reconstruct(self, video, mask, visible=None):
        """-> [B,3,T,H,W] float32 in [0,1]: the video, its masked cubes replaced by predictions.  Their mean and
        deviation are borrowed from the truth, which flatters the picture: say so in its caption."""
        cubes, (seen, hidden) = self.encoder.cubes(video), split_mask(mask, visible)
        target, mean, deviation = self.target(cubes)
        prediction = self.decode(self.encoder.encode(cubes, seen), seen, hidden).float()
        target = target.scatter(1, hidden.expand_as(prediction), prediction)
        pixels = (target.unflatten(-1, (-1, 3)) * deviation + mean).flatten(-2)
        return unpatchify(pixels, self.grid, self.config["tubelet"], self.config["patch"]).clamp(0, 1)

class VideoViT(Encoder):
    """The classifier in VideoMAE's fine-tuning layout: mean over tokens, fc_norm in place of norm, dropout, head."""
    def __init__(self, size="base", classes=400, frames=None, image_size=None, drop_path=0.0, head_dropout=0.0):
        super().__init__(size, frames, image_size, drop_path)
        self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(self.config["width"], eps=EPS)
        self.dropout, self.head = nn.Dropout(head_dropout), Linear(self.config["width"], classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # VideoMAE's 0.02 * 0.001: starts from uniform predictions

    def forward(self, video):
        """video [B,3,T,H,W] normalised -> logits [B,classes]."""
        return self.head(self.dropout(self.fc_norm(self.encode(self.cubes(video)).mean(dim=1))))

HF_KEYS = [  # (ours, Hugging Face's); VideoViT's keys with "encoder." before them
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."), ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."), ("encoder.fc_norm.", "fc_norm."), ("encoder.head.", "classifier."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."), (".attn.", ".attention.attention."),
]
SPLIT = ("query", "key", "value")  # Hugging Face cuts attn.qkv in these

def rename(key, pairs):
    return reduce(lambda key, pair: key.replace(*pair), pairs, key)

def read_checkpoint(path):
    """File or folder -> {key: tensor} under VideoMAE's names, those of VideoViT with "encoder." before them."""
    file = next((f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()), path)
    if not file.is_file():
        raise ValueError(f"{file}: no checkpoint there")
    try:  # official files carry their argparse.Namespace, which is inert; beyond it only plain tensors are let in
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        state = {k: v.detach() for k, v in state.get("model", state.get("module", state)).items()}
    except Exception as error:  # garbage makes the parsers raise anything
        raise ValueError(f"{file}: no checkpoint that can be read safely ({type(error).__name__})") from None
    prefix = "videomae." if "embeddings.patch_embeddings.projection.weight" in state else ""  # a bare VideoMAEModel
    # transformers 5 calls the biases query.bias and value.bias in memory, but writes q_bias and v_bias as ever
    pairs = [pair[::-1] for pair in HF_KEYS] + [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]
    state = {rename(prefix + k, pairs): v for k, v in state.items()}
    for key in [k for k in state if k.endswith(".query.weight")]:
        parts = [state.pop(key.replace("query", part), torch.empty(0)) for part in SPLIT]
        state[key.replace("query", "qkv")] = torch.cat(parts)
    bare = ("patch_embed.", "blocks.", "norm.", "head.")  # the fine-tuning layout
    return {"encoder." + k if k.startswith(bare) else k: v for k, v in state.items()}

def head_classes(path):
    """How many classes the classifier in `path` has; ValueError if there is none, or no checkpoint."""
    head = read_checkpoint(Path(path)).get("encoder.head.weight")
    if head is None:
        raise ValueError(f"{path}: holds no classifier")
    return len(head)

def saved_args(path):
    """The flags that pretrain.py or finetune.py kept in their checkpoint; {} for anybody else's, or none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return saved["args"] if isinstance(saved["args"], dict) else {}
    except Exception:  # other people's files are load_pretrained's to judge
        return {}

def load_pretrained(model, path, new_head=False):
    """Load `path` into a VideoMAE or VideoViT; returns what was tolerated, such as ["unused norm.weight", ...].
    path: our checkpoint.pt, an official VideoMAE .pth, or a Hugging Face VideoMAE folder, for any frames and image
    size.  What does not fit raises ValueError with keys and shapes, and nothing is loaded; but a file may lack, as a
    whole: for VideoMAE, contrastive.*, the decoder, or the final norm (Hugging Face's bare encoders may); for VideoViT,
    fc_norm.* and head.*, being then a pretrained one whose decoder, contrastive head and final norm (fc_norm replaces
    it) stay unused.  Of a fine-tuned file VideoMAE takes fc_norm for its final norm, and leaves the head; new_head:
    VideoViT leaves it too, for other classes."""
    path, own, decoder = Path(path), model.state_dict(), ("decoder.", "encoder_to_decoder.", "mask_token")
    state, spare, optional = read_checkpoint(path), (), [("contrastive.",), decoder, ("encoder.norm.",)]
    if isinstance(model, VideoViT):
        state, optional = {k.removeprefix("encoder."): v for k, v in state.items()}, [("fc_norm.", "head.")]
        spare = () if any(k.startswith(optional[0]) for k in state) else ("norm.", "contrastive.", *decoder)
        if new_head and "head.weight" in state:
            state, optional, spare = {k: v for k, v in state.items() if not k.startswith("head.")}, [("head.",)], ()
    elif "encoder.head.weight" in state and "encoder.norm.weight" not in state:
        state, spare = {k.replace("fc_norm", "norm"): v for k, v in state.items()}, ("encoder.head.",)
    lacked = sum((group for group in optional if not any(k.startswith(group) for k in state)), ())
    missing, unused = [k for k in own if k not in state], [k for k in state if k not in own]
    problems = [f"{k}: file {list(v.shape)}, model {list(own[k].shape)}"
                for k, v in state.items() if k in own and v.shape != own[k].shape]
    problems += [f"missing {k}" for k in missing if not k.startswith(lacked)]
    problems += [f"unexpected {k}" for k in unused if not k.startswith(spare)]
    if (path / "config.json").is_file():  # a number of heads leaves no trace in the shapes
        heads = json.loads((path / "config.json").read_text()).get("num_attention_heads")
        problems += [f"num_attention_heads: file {heads}"] if heads not in (None, model.config["heads"]) else []
    if problems:
        raise ValueError(f"{path} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state, strict=False)
    return [f"missing {k}" for k in missing] + [f"unused {k}" for k in unused]

def save_checkpoint(path, **content):
    """Written aside and renamed: whatever happens, `path` is a whole checkpoint, this or the last; exits if it cannot be."""
    temporary = path.with_name(path.name + ".new")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch
        temporary.unlink(missing_ok=True)
        sys.exit(f"{path}: cannot be written, the last checkpoint is kept ({str(error).splitlines()[0]})")

def save_huggingface(model, folder):
    """Write config.json and model.safetensors, which transformers' from_pretrained opens: VideoMAE (but its
    contrastive head) as VideoMAEForPreTraining, VideoViT as VideoMAEForVideoClassification.  transformers fixes the
    epsilon of decoder.norm and fc_norm at 1e-5, ours is 1e-6: equal outputs need those two set by hand."""
    folder, c, state, classifier = Path(folder), model.config, {}, isinstance(model, VideoViT)
    folder.mkdir(parents=True, exist_ok=True)
    for key, tensor in model.state_dict(prefix="encoder." if classifier else "").items():
        for part, x in zip(SPLIT, tensor.chunk(3) if ".qkv." in key else [tensor]):
            state[rename(key, HF_KEYS).replace("qkv", part)] = x.detach().cpu().contiguous()
    state = {k: v for k, v in state.items() if not k.startswith("contrastive.")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(model_type="videomae", layer_norm_eps=EPS, use_mean_pooling=classifier, num_frames=c["frames"],
                  image_size=c["image_size"], tubelet_size=c["tubelet"], patch_size=c["patch"], hidden_size=c["width"],
                  num_hidden_layers=c["depth"], num_attention_heads=c["heads"], intermediate_size=4 * c["width"],
                  decoder_hidden_size=c["decoder_width"], decoder_intermediate_size=4 * c["decoder_width"],
                  decoder_num_hidden_layers=c["decoder_depth"], decoder_num_attention_heads=c["decoder_heads"],
                  architectures=["VideoMAEForVideoClassification" if classifier else "VideoMAEForPreTraining"],
                  id2label={i: str(i) for i in range(model.head.out_features if classifier else 2)})
    (folder / "config.json").write_text(json.dumps(config, indent=2))

def count_flops(model, visible, decoded=None):
    """Multiply-adds (the literature's FLOPs) of one clip's forward pass with `visible` tokens encoded and `decoded` (all)
    others decoded, (encoder, decoder), in matrix products: ViT-B's encoder on all 1568 tokens, 180 G."""
    c, M = model.config, model.num_tokens - visible if decoded is None else decoded
    P, D, E = 3 * c["tubelet"] * c["patch"] ** 2, c["width"], c["decoder_width"]
    encoder, decoder = (depth * (12 * n * width**2 + 2 * n**2 * width)  # qkv, proj and MLP; attention's two products
                        for n, width, depth in ((visible, D, c["depth"]), (visible + M, E, c["decoder_depth"])))
    return visible * P * D + encoder, visible * D * E + decoder + M * E * P

def main():
    print("GFLOPs: multiply-adds of a clip's forward pass in pretraining, encoder + decoder (tokens kept)\n"
          f"size  encoder  whole   tokens{'random, tube, flow 0.9':>25}{'motion 0.75':>25}{'text 0.6':>25}")
    for size in SIZES:
        with torch.device("meta"):
            model = VideoMAE(size)
        encoder, whole = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model))
        row, (t, h, w) = f"{size:5}{encoder:7.1f}M{whole:7.1f}M{model.num_tokens:7}", model.grid
        for kept in (t * (h * w - math.floor(ratio * h * w)) for ratio in (0.9, 0.75, 0.6)):
            row += f"{' + '.join(f'{f / 1e9:.3g}' for f in count_flops(model, kept)) + f' ({kept})':>25}"
        print(row)

if __name__ == "__main__":
    main()
