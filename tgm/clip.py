"""CLIP models of open_clip, with all their weights and the activation they were trained with.

Needs arrays.py, quiet.py and run.py.

    model, tokenizer = load_clip("ViT-B-16", "openai", None, device)
    embedded = embed_texts(model, tokenizer, ["a dog runs"], device)    # {text: float32 [D]}
"""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from tgm.arrays import file_hash
from tgm.quiet import quiet_libraries
from tgm.run import RunError, reason_of

FOLDER = "local-dir:"  # how open_clip's name of a folder begins
NOT_PLAIN = (
    "expected an open_clip model whose image tower is a plain vision transformer, without "
    "attentional pooling"
)


def load_clip(
    name: str, pretrained: str | None, image_size: int | None, device: torch.device | str
) -> tuple[torch.nn.Module, Callable]:
    """An open_clip model with its published weights, in evaluation mode, and its tokenizer.

    name: one of open_clip's, or local-dir:FOLDER or hf-hub:NAME, which bring their own weights
    pretrained: open_clip's tag of the weights, or a file
    image_size: pixels; None for the model's own. For another size the position table is
        interpolated.

    The activation is the one that the weights were trained with. It is taken from

    * open_clip's table of weights, for a tag,
    * open_clip's configuration of the model `name`, for a file of weights,
    * the folder's own configuration, for local-dir: and hf-hub:.

    RunError if

    * open_clip's tables contradict each other about the activation,
    * the image tower is not a plain vision transformer,
    * image_size is no multiple of its patch size,
    * weights are missing: open_clip would draw them at random, and warn at most.
    """
    import open_clip

    asked_for = f"--clip {name}"
    # The entry of open_clip's table of weights, such as {"hf_hub": ..., "quick_gelu": True}: where
    # they are, and what their training differed in. {} for weights that are not in the table.
    weights = {}
    if ":" in name:
        pretrained = None  # local-dir: and hf-hub: bring their own weights
    else:
        name = plain_name(name)  # create_model does this, but get_tokenizer does not
        asked_for += f" --pretrained {pretrained}"
        weights = open_clip.get_pretrained_cfg(name, pretrained or "")
    try:
        with quiet_libraries():
            config = open_clip.get_model_config(name)
            check_configuration(name, pretrained, config, weights, asked_for)
            # before the download, if the configuration tells the patch size
            if image_size is not None and "patch_size" in config["vision_cfg"]:
                check_image_size(image_size, config["vision_cfg"]["patch_size"])
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                # create_model takes the activation from the model's configuration. For 19 weights
                # of vision transformers it says GELU, but they were trained with QuickGELU, as the
                # table of weights says.
                force_quick_gelu=weights.get("quick_gelu", False),
                require_pretrained=True,
                device=device,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except (RunError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # missing or damaged files, no network, another model's weights
        hint = ""
        if not name.startswith(FOLDER):
            hint = " (for the toy world: --clip local-dir:data/toy/clip)"
        raise RunError(f"{asked_for}: cannot load it: {reason_of(error)}{hint}") from None
    # saliency.py reads the projections of these blocks; others name them differently
    kinds = {type(block) for block in model.visual.transformer.resblocks}
    if kinds != {open_clip.transformer.ResidualAttentionBlock}:
        raise RunError(f"{asked_for}: {NOT_PLAIN}")
    if image_size is not None:
        change_image_size(model, image_size)
    return model.eval(), tokenizer


def plain_name(name: str) -> str:
    """ViT-B/16 -> ViT-B-16, which open_clip takes for the same. A folder's name stays, and one of
    the hub."""
    return name if ":" in name else name.replace("/", "-")


def local_weights(name: str, pretrained: str | None) -> str | None:
    """The file from which `load_clip` takes the weights, if it was given a file or a folder; None
    for published weights, whose name tells what they are."""
    import open_clip

    if name.startswith(FOLDER):
        return open_clip.factory._find_checkpoint_in_dir(Path(name.removeprefix(FOLDER)))
    if ":" in name or open_clip.get_pretrained_cfg(plain_name(name), pretrained or ""):
        return None
    return pretrained


def check_configuration(
    name: str, pretrained: str | None, config: dict | None, weights: dict, asked_for: str
) -> None:
    """RunError for faults that can be seen before weights are downloaded.

    config: open_clip's for the model, None if it has none
    weights: open_clip's table entry for the weights, empty if it has none
    asked_for: the flags of the command line, for the message
    """
    import open_clip

    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), cutoff=0.4)
        similar = f"names near to it are {', '.join(near)}" if near else "no name is near to it"
        raise RunError(f"{asked_for}: cannot load it: no such model in open_clip; {similar}")
    vision = config["vision_cfg"]
    convolutional = isinstance(vision.get("layers"), list)  # a ResNet lists the blocks per stage
    if vision.get("timm_model_name") or convolutional or vision.get("attentional_pool"):
        raise RunError(f"{asked_for}: {NOT_PLAIN}")
    if ":" not in name and not weights and not Path(pretrained or "").is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise RunError(
            f"{asked_for}: neither a file nor one of open_clip's tags for this model: "
            f"{tags or 'it has none'}"
        )
    # open_clip can force QuickGELU on, but not off. In version 3.3 this is roberta-ViT-B-32 alone.
    if weights and config.get("quick_gelu") and not weights.get("quick_gelu"):
        hub = weights["hf_hub"].strip("/")
        raise RunError(
            f"{asked_for}: open_clip's configuration has QuickGELU, its table of weights GELU; "
            f"--clip hf-hub:{hub} takes the configuration published with the weights"
        )


def check_image_size(pixels: int, patch: int) -> None:
    """RunError unless square images of this size have a whole number of patches."""
    if pixels % patch:
        raise RunError(
            f"--image-size {pixels}: expected a multiple of the model's patch size, {patch}"
        )


def change_image_size(model: torch.nn.Module, pixels: int) -> None:
    """Gives a plain vision transformer square images of another size, by interpolating its position
    table.

    create_model(force_image_size=...) does the same, but in the number type of the weights' file:
    that fails for float16 on a CPU. The model's weights are float32 here."""
    import open_clip

    visual = model.visual
    patch = visual.patch_size[0]
    check_image_size(pixels, patch)  # a configuration need not tell the patch size
    visual.image_size = (pixels, pixels)
    visual.grid_size = (pixels // patch, pixels // patch)
    table = visual.positional_embedding.detach()
    # on the CPU, so that the result does not depend on the device
    state = {"visual.positional_embedding": table.cpu()}
    open_clip.model.resize_pos_embed(state, model)
    resized = state["visual.positional_embedding"].to(table.device)
    visual.positional_embedding = torch.nn.Parameter(resized, requires_grad=False)


def activation_of(model: torch.nn.Module) -> str:
    """The activation of a plain vision transformer of open_clip, "QuickGELU" or "GELU"."""
    return type(model.visual.transformer.resblocks[0].mlp.gelu).__name__


@torch.inference_mode()
def embed_texts(
    model: torch.nn.Module,
    tokenizer: Callable,
    texts: Iterable[str],
    device: torch.device | str,
    batch: int = 256,
    quiet: bool = False,
) -> dict[str, torch.Tensor]:
    """Unit-length embeddings of texts, each distinct text once: {text: float32 [D] on the CPU}. A
    text that is too long is cut by the tokenizer. quiet: without a progress bar."""
    texts = sorted(set(texts))  # sorted: every run makes the same batches
    embedded = {}
    for start in tqdm(range(0, len(texts), batch), "texts", unit="batch", delay=5, disable=quiet):
        part = texts[start : start + batch]
        # normalised in float32: bf16 has 8 bits, so a rounded length is off by up to 0.4 %
        features = model.encode_text(tokenizer(part).to(device)).float()
        embedded.update(zip(part, F.normalize(features, dim=-1).cpu(), strict=True))
    return embedded


def clip_settings(name: str, pretrained: str, model: torch.nn.Module) -> dict:
    """What the .json of an array says of CLIP, loaded by `load_clip`."""
    weights = local_weights(name, pretrained)
    return {
        "clip": plain_name(name),
        "pretrained": None if ":" in name else pretrained,
        "weights": weights and file_hash(weights),
        "activation": activation_of(model),
    }
