"""Small random pipelines of every family, saved as diffusers folders: what the tests prune."""

from __future__ import annotations

import atexit
import copy
import functools
import io
import pickle
import shutil
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from compressor import calibration, pipeline, recipe
from compressor.pipeline import Pipeline
from compressor.plugin import Schedule
from compressor.progress import Progress
from compressor.recipe import Model
from compressor.structure import Component, Trace, trace

diffusers: Any = import_module("diffusers")  # their classes are not exported in a way that type checkers see
transformers: Any = import_module("transformers")

torch.set_num_threads(1)  # faster on tensors of this size, and on a busy machine

PROMPTS = ("a red dog", "a cat", "the old house", "big tree", "blue sea", "a fish", "two birds", "rain")
SIDE = 16
"""Pixels of an image, either way; latents are half as large."""
CLIP_TOKENS = 16
TEXT_WIDTH = 32
FOLDERS: set[Path] = set()
"""That `folder` has made: nothing in them changes."""
_TRACES: dict[Path, Trace] = {}


def folder(kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a tiny pipeline, made at the first call in this process. Not to be changed.

    Args:
        kind: a key of `KINDS` or of `UNKNOWN`.
        dtype: of the saved weights.
    """
    return _folder(kind, dtype)


def save(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a tiny pipeline with the same random weights every time, and returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (KINDS | UNKNOWN)[kind]()
        for name, component in pipe.components.items():
            if name in ("transformer", "unet"):
                _enlarge(component)
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.save_pretrained(path, safe_serialization=True)
    return path


def load(kind: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    """A tiny pipeline on the CPU, to be changed: a copy of one that was loaded at the first call in this process."""
    return _Copies(*_kept(kind, dtype)).load()


def calibrate(
    loaded: Pipeline, texts: tuple[str, ...] = PROMPTS[:3], seed: int = 0, **options: Any
) -> calibration.Calibration:
    """A calibration of a loaded pipeline.

    `options` are a recipe's; if not given two steps, at both of which the network runs, and two prompts at a time.
    """
    given = {"steps": 2, "stride": 1, "batch": 2, "guidance": 3.0, "height": SIDE, "width": SIDE} | options
    checked = recipe.Calibration.model_validate({"prompts": list(texts), **given})
    return calibration.Calibration(loaded, traced(loaded), checked, texts, seed, quiet())


def no_workspace(groups: Sequence[calibration.Group]) -> int:
    """Of a pruner that takes nothing beside its moments."""
    return 0


def traced(loaded: Pipeline) -> Trace:
    """One forward of the network's meta-device twin at the size that the tests draw at, once for each of `folder`'s."""
    found = loaded.folder
    if found.path in _TRACES:
        return _TRACES[found.path]
    side = SIDE // found.vae_factor
    made = trace(found.twin(), found.family, height=side, width=side, sequence=found.text_tokens())
    if found.path in FOLDERS:
        _TRACES[found.path] = made
    return made


def component(loaded: Pipeline) -> Component:
    """All the layers of a loaded pipeline, for a pruner."""
    return Component(loaded.component_name, loaded.module, loaded.family, loaded.targets)


def schedule(steps: int) -> Schedule:
    """So many steps of no scheduler, for weightings that only count them."""
    return Schedule(tuple(float(i) for i in range(steps, 0, -1)))


def record_inputs(module: nn.Module, store: list[Tensor]) -> RemovableHandle:
    """From now on, adds the first argument of every forward to a list."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        store.append(args[0])

    return module.register_forward_pre_hook(hook)


def computes_alike(one: nn.Module, other: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether two networks with the same tensors compute the same, to the bit.

    Both are given the first one's, as how a CPU rounds may depend on where in memory a tensor begins.
    """
    tensors = dict((*one.named_parameters(), *one.named_buffers()))
    with torch.no_grad():
        found = [functional_call(each, tensors, kwargs={**inputs, "return_dict": False})[0] for each in (one, other)]
    return torch.equal(*found)


def quiet() -> Progress:
    """Progress that nobody sees."""
    return Progress(Console(file=io.StringIO()))


@functools.cache
def _folder(kind: str, dtype: torch.dtype) -> Path:
    path = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    FOLDERS.add(path / kind)
    return save(kind, path / kind, dtype)


class _Keeper(pickle.Pickler):
    """Writes a pipeline but for its tensors, its folder and its family, which it keeps: read again, that is a copy.

    As `copy.deepcopy` makes it, in a fourth of the time.
    """

    def __init__(self, file: io.BytesIO, first: Pipeline) -> None:
        super().__init__(file)
        self.first = first
        self.kept: dict[int, Any] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, Tensor) or obj is self.first.folder or obj is self.first.family:
            self.kept[id(obj)] = obj
            return id(obj)
        return None


class _Copies(pickle.Unpickler):
    """Reads what a `_Keeper` wrote: copies of its tensors, one each, and the folder and the family themselves."""

    def __init__(self, written: bytes, kept: dict[int, Any]) -> None:
        super().__init__(io.BytesIO(written))
        self.kept = kept
        self.copies = {at: obj for at, obj in kept.items() if not isinstance(obj, Tensor)}

    def persistent_load(self, pid: int) -> Any:
        return copy.deepcopy(self.kept[pid], self.copies)


@functools.cache
def _kept(kind: str, dtype: torch.dtype) -> tuple[bytes, dict[int, Any]]:
    file = io.BytesIO()
    keeper = _Keeper(file, pipeline.load(Model(source=str(folder(kind, dtype))), "cpu"))
    keeper.dump(keeper.first)
    return file.getvalue(), keeper.kept


def _enlarge(network: nn.Module) -> None:
    """Gives biases and zero-initialised layers values, so that every layer matters to the output."""
    for parameter in network.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


def sd3() -> Any:
    """SD3-medium in small: two blocks, no T5; with the qk-norm of SD3.5."""
    return _sd3()


def sd35() -> Any:
    """SD3.5-medium in small: the first of two blocks has a second attention over the image."""
    return _sd3(dual_attention_layers=(0,))


def _sd3(**settings: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        **settings,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=_clip(projected=True),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sd2() -> Any:
    """SD 2.1 in small: transformer blocks on the way down, in the middle and on the way up."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            steps_offset=1,
            clip_sample=False,
        ),
        vae=_vae(4),
        text_encoder=_clip(projected=False),
        tokenizer=_clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """SDXL in small: two text encoders, size conditioning, and two transformer blocks in a row."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        vae=_vae(4),
        text_encoder=_clip(projected=False),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_clip_tokenizer(),
    )


def flux() -> Any:
    """FLUX.1-dev in small: one double and two single blocks, guidance embedded, CLIP and T5."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(4),
        text_encoder=_clip(projected=False),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
    )


def pixart() -> Any:
    """PixArt-Sigma in small: cross-attention to T5, and one modulation for all blocks."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=_vae(4),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
    )


def auraflow() -> Any:
    """AuraFlow in small: one block over two streams, one over both in one."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=_vae(4),
        text_encoder=_t5("UMT5"),
        tokenizer=_t5_tokenizer(),
    )


def hunyuan() -> Any:
    """HunyuanDiT in small: CLIP's place is taken by a BERT, and skips join the first half to the second."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
    )
    bert = transformers.BertConfig(
        vocab_size=32, hidden_size=TEXT_WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=diffusers.DDPMScheduler(),
        vae=_vae(4),
        text_encoder=transformers.BertModel(bert),
        tokenizer=_t5_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sana() -> Any:
    """Sana in small: linear attention over the image, convolutions in place of feed-forwards, a causal text model."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=16,
    )
    return diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        text_encoder=_decoder("Gemma2", layers=1),  # the pipeline's own instructions make prompts long
        tokenizer=_t5_tokenizer(),
    )


def cogview4() -> Any:
    """CogView4 in small: one sequence of text and image."""
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return diffusers.CogView4Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
        vae=_vae(4),
        text_encoder=_decoder("Glm"),
        tokenizer=_t5_tokenizer(ends=True),
    )


def lumina2() -> Any:
    """Lumina-Image 2 in small."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(4),
        text_encoder=_decoder("Gemma2"),
        tokenizer=_t5_tokenizer(),
    )


UNKNOWN: dict[str, Callable[[], Any]] = {
    "pixart": pixart,
    "auraflow": auraflow,
    "hunyuan": hunyuan,
    "sana": sana,
    "cogview4": cogview4,
    "lumina2": lumina2,
}
"""Pipelines with a network that no family describes."""
KINDS: dict[str, Callable[[], Any]] = {"sd3": sd3, "sd35": sd35, "sd2": sd2, "sdxl": sdxl, "flux": flux}
FAMILY = {"sd3": "sd3", "sd35": "sd3", "sd2": "unet", "sdxl": "unet", "flux": "flux"}
NETWORK = {"sd3": "transformer", "sd35": "transformer", "sd2": "unet", "sdxl": "unet", "flux": "transformer"}


def _vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.0,
    )


def _clip(*, projected: bool) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    model = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return model(config)


def _clip_tokenizer() -> Any:
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {letter: i for i, letter in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)


def _t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _decoder(kind: str, layers: int = 2) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
    )
    return getattr(transformers, f"{kind}Model")(config)


def _t5_tokenizer(*, ends: bool = False) -> Any:
    """A token a letter; `ends` puts an end behind them, so that the empty prompt has a token, too."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *string.ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
