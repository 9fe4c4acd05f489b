"""CLIP models of open_clip, with all their weights and the activation they were trained with.

Needs run.py.

    model, tokenizer = load_clip("ViT-B-16", "openai", None, device)
    embedded = embed_texts(model, tokenizer, ["a dog runs"], device)    # {text: float32 [D]}
"""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from tgm.run import RunError, quiet_libraries, reason_of

NOT_PLAIN = (
    "patch maps need an open_clip model whose image tower is a plain vision transformer, without "
    "attentional pooling"
)


def load_clip(
    name: str, pretrained: str | None, image_size: int | None, device: torch.device | str
) -> tuple[torch.nn.Module, Callable]:
    """An open_clip model with its published weights, in evaluation mode, and its tokenizer.

    name: one of open_clip's, or local-dir:FOLDER or hf-hub:NAME, which bring their own weights
    pretrained: open_clip's tag of the weights, or a file
    image_size: pixels, None for the model's own; others interpolate the position table

    The activation is the one that the weights were trained with. RunError where open_clip's tables
    contradict each other about it, where the image tower is not a plain vision transformer, and
    where weights are missing: open_clip would warn at most, and draw them at random.
    """
    import open_clip

    flags = f"--clip {name}"
    tag = {}
    if ":" in name:
        pretrained = None  # these bring their own
    else:
        name = name.replace("/", "-")  # as create_model does, but get_tokenizer does not
        flags += f" --pretrained {pretrained}"
        tag = open_clip.get_pretrained_cfg(name, pretrained or "")
    try:
        with quiet_libraries():
            config = open_clip.get_model_config(name)
            check_configuration(name, pretrained, config, tag, flags)
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                force_quick_gelu=tag.get("quick_gelu", False),
                require_pretrained=True,
                device=device,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except (RunError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # missing or damaged files, no network, other weights, anything
        raise RunError(
            f"{flags}: cannot load it: {reason_of(error)} (for the toy world: "
            "--clip local-dir:data/toy/clip)"
        ) from None
    kinds = {type(block) for block in model.visual.transformer.resblocks}
    if kinds != {open_clip.transformer.ResidualAttentionBlock}:
        raise RunError(f"{flags}: {NOT_PLAIN}")
    if image_size is not None:
        change_image_size(model, image_size)
    return model.eval(), tokenizer


def check_configuration(
    name: str, pretrained: str | None, config: dict | None, tag: dict, flags: str
) -> None:
    """RunError for what can be told before weights are downloaded.

    config: open_clip's for the model, None if there is none
    tag: its entry for the weights, empty if there is none
    flags: the command line's words, for the message
    """
    import open_clip

    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), cutoff=0.4)
        raise RunError(
            f"{flags}: cannot load it: no such model in open_clip; near to it are "
            f"{', '.join(near) or 'none'}"
        )
    vision = config["vision_cfg"]
    convolutional = isinstance(vision.get("layers"), list)
    if vision.get("timm_model_name") or convolutional or vision.get("attentional_pool"):
        raise RunError(f"{flags}: {NOT_PLAIN}")
    if ":" not in name and not tag and not Path(pretrained or "").is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise RunError(
            f"{flags}: neither a file nor one of open_clip's tags for this model: "
            f"{tags or 'it has none'}"
        )
    if tag and config.get("quick_gelu") and not tag.get("quick_gelu"):
        hub = tag["hf_hub"].strip("/")
        raise RunError(
            f"{flags}: open_clip's configuration has QuickGELU, its table of weights GELU; "
            f"--clip hf-hub:{hub} takes the configuration published with the weights"
        )


def change_image_size(model: torch.nn.Module, pixels: int) -> None:
    """Gives a plain vision transformer square images of another size, as open_clip does while it
    loads weights: by interpolating the position table. But in float32, whatever the weights' file
    holds: float16 has no such interpolation on a CPU."""
    import open_clip

    visual = model.visual
    patch = visual.patch_size[0]
    if pixels % patch:
        raise RunError(
            f"--image-size {pixels}: expected a multiple of the model's patch size, {patch}"
        )
    visual.image_size = (pixels, pixels)
    visual.grid_size = (pixels // patch, pixels // patch)
    table = visual.positional_embedding.detach()
    state = {"visual.positional_embedding": table.cpu()}
    open_clip.model.resize_pos_embed(state, model)
    table = state["visual.positional_embedding"].to(table.device)
    visual.positional_embedding = torch.nn.Parameter(table, requires_grad=False)


def activation_of(model: torch.nn.Module) -> str:
    """The activation of a plain vision transformer of open_clip, "QuickGELU" or "GELU"."""
    return type(model.visual.transformer.resblocks[0].mlp.gelu).__name__


def embed_texts(
    model: torch.nn.Module,
    tokenizer: Callable,
    texts: Iterable[str],
    device: torch.device | str,
    batch: int = 256,
    quiet: bool = False,
) -> dict[str, torch.Tensor]:
    """Unit-length embeddings of distinct texts: {text: float32 [D] on the CPU}. A text that is too
    long is cut by the tokenizer. quiet: without a progress bar."""
    texts = sorted(set(texts))
    embedded = {}
    for start in tqdm(range(0, len(texts), batch), "texts", unit="batch", delay=5, disable=quiet):
        part = texts[start : start + batch]
        # in float32: under bf16 autocast lengths would be off by 0.25 %
        features = model.encode_text(tokenizer(part).to(device)).float()
        embedded.update(zip(part, F.normalize(features, dim=-1).cpu(), strict=True))
    return embedded
