"""What the names of real models mean: one row per pattern, with a parameter that needs it.

A row is asked about ONE dotted segment of a name, never about the whole text: `audio_to_video_attn`
must not be read as `attn` because it contains it. To teach the library a new name, add a row here
and nothing else; tests/unit/plan/test_name_rules.py checks that the example of every row is
labelled by that row, so a row that an earlier one hides is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SELF_ATTN, CROSS_ATTN, FFN, NORM, DEFAULT = "self_attn", "cross_attn", "ffn", "norm", "default"
MODULATION, EMBED, HEAD, CONV, FUSED = "modulation", "embed", "head", "conv", "fused"
ROUTER = "router"


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """One pattern and what it says about a segment that it finds."""

    pattern: re.Pattern[str]
    """Searched in a segment."""
    label: str
    """The component, or another meaning that the table gives it."""
    model: str
    """A census file of tests/census, or another public model."""
    example: str
    """A parameter of that model (or the class of a module) which this rule labels."""


class NameRules:
    """A table of rules, asked in order; the first one that hits a segment wins."""

    def __init__(self, *rules: NameRule):
        """Keep the rules and remember answers: a model of 48 equal blocks repeats its segments."""
        self.rules = rules
        self._known: dict[str, NameRule | None] = {}

    def first(self, segment: str) -> NameRule | None:
        """The first rule that finds its pattern in a segment, or None."""
        if segment not in self._known:
            hits = (rule for rule in self.rules if rule.pattern.search(segment))
            self._known[segment] = next(hits, None)
        return self._known[segment]

    def first_of(self, segments: Iterable[str]) -> NameRule | None:
        """The rule that hits the earliest segment of a path, or None."""
        for segment in segments:
            rule = self.first(segment)
            if rule is not None:
                return rule
        return None


def table(label: str, *rows: tuple[str, str, str]) -> NameRules:
    """Rules of one label, from rows of (pattern, model, example)."""
    rules = []
    for pattern, model, example in rows:
        rules.append(
            NameRule(pattern=re.compile(pattern), label=label, model=model, example=example)
        )
    return NameRules(*rules)


def is_attention(segment: str) -> bool:
    """Whether a segment names an attention module (`attn1`, `audio_attn2`, `SelfAttention`)."""
    return ATTENTION.first(segment) is not None


# Attention. These words also find the blocks (plan/stacks.py): a list of modules is a stack when
# two of its children hold one.

ATTENTION = table(
    SELF_ATTN,
    # A word of its own: `attn`, `attn1`, `audio_attn1`, `img_attn`, but not `attnpool`.
    (r"(^|_)attn\d*($|_)", "flux1_dev", "transformer_blocks.0.attn.to_q.weight"),
    # The same word in full; `attentions` is a UNet's list of transformers, see components.py.
    (r"(^|_)attentions?\d*($|_)", "z_image", "layers.0.attention.to_q.weight"),
    # Finds the block; the component is cross attention, which is asked first.
    (r"(^|_)crossattn\d*($|_)", "CodeT5+", "transformer.h.0.crossattn.qkv_proj.weight"),
    # Modules called like their class.
    (r"Attention$", "T5", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    # A projection that no module called attention holds.
    (r"^qkv$", "EfficientViT", "stages.2.op_list.1.context_module.main.qkv.conv.weight"),
)

# Cross attention: by the projection that owns the tensor, then by any segment above it.

CROSS_LEAF = table(
    CROSS_ATTN,
    # The text stream's projections in joint attention.
    (r"^add_\w+_proj$", "flux1_dev", "transformer_blocks.0.attn.add_q_proj.weight"),
    # The text stream's output projection.
    (r"^to_add_out$", "flux1_dev", "transformer_blocks.0.attn.to_add_out.weight"),
    # Diffusers' fused spelling of add_q_proj, add_k_proj and add_v_proj.
    (
        r"^to_added_\w+$",
        "Flux after fuse_qkv_projections",
        "transformer_blocks.0.attn.to_added_qkv.weight",
    ),
    # HiDream's text stream.
    (r"^to_(q|k|v|out)_t$", "HiDream", "double_stream_blocks.0.block.attn1.to_q_t.weight"),
)

CROSS = table(
    CROSS_ATTN,
    # The text stream's feed-forward goes with the text stream's attention.
    (r"(?i)^ff_context$", "flux1_dev", "transformer_blocks.0.ff_context.net.2.weight"),
    # The text stream of a double block.
    (r"(?i)^txt_attn", "Flux, original names", "double_blocks.0.txt_attn.qkv.weight"),
    # Diffusers' second attention of a block reads the prompt; SD 3.5's does not, see components.py.
    (r"(?i)(^|_)attn2$", "wan21_i2v_14b", "blocks.0.attn2.to_q.weight"),
    # Named as what it is; also `crossattn` and `cross_attn_image`.
    (
        r"(?i)(^|_)cross_?attn",
        "rfdetr_base",
        "transformer.decoder.layers.0.cross_attn.value_proj.weight",
    ),
    # The same in full, also inside a class name.
    (
        r"(?i)cross_?attention",
        "BLIP",
        "text_decoder.bert.encoder.layer.0.crossattention.self.query.weight",
    ),
    # A decoder that attends to its encoder; RT-DETR has it too.
    (r"(?i)^encoder_attn", "BART", "model.decoder.layers.0.encoder_attn.q_proj.weight"),
    # One modality attends to another.
    (r"(?i)_to_\w+_attn$", "ltx2_19b", "transformer_blocks.0.audio_to_video_attn.to_q.weight"),
    # T5's decoder attends to its encoder.
    (r"(?i)^EncDecAttention$", "T5", "decoder.block.0.layer.1.EncDecAttention.q.weight"),
    # Nn.TransformerDecoderLayer calls its attention to the memory so, beside self_attn.
    (r"(?i)^multihead_attn$", "DETR", "transformer.decoder.layers.0.multihead_attn.in_proj_weight"),
)

FUSED_LEAF = table(
    SELF_ATTN,
    # One matrix of attention and feed-forward: self attention unless `fused` is listed.
    (r"^to_qkv_mlp", "flux2_klein_4b", "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"),
)

# Feed-forward.

FEED_FORWARD = table(
    FFN,
    # Diffusers; LTX-2's `audio_ff`.
    (r"(^|_)ff$", "sd15", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight"),
    # Wan.
    (r"(^|_)ffn$", "wan21_i2v_14b", "blocks.0.ffn.net.2.weight"),
    # Language models and ViTs; `proj_mlp` of Flux, `img_mlp` of Qwen-Image.
    (r"(^|_)mlp$", "llama31_8b", "model.layers.0.mlp.down_proj.weight"),
    # Two of them in a block.
    (r"(^|_)mlps$", "LongCat-Flash", "model.layers.0.mlps.0.down_proj.weight"),
    # A second feed-forward before the attention.
    (r"(^|_)ff_in$", "Stable Video Diffusion", "temporal_transformer_blocks.0.ff_in.net.2.weight"),
    # The image's and the text's.
    (r"^ff_[it]$", "HiDream", "double_stream_blocks.0.block.ff_i.shared_experts.w1.weight"),
    # In full.
    (r"^feed_?forward", "z_image", "layers.0.feed_forward.w1.weight"),
    # T5's name of it.
    (r"^DenseReluDense$", "T5", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
    # The first of two matrices that share no module; the second is `output`.
    (r"^intermediate$", "BERT", "encoder.layer.0.intermediate.dense.weight"),
    # A gated feed-forward under a module of another name.
    (r"^(gate|up|down)_proj$", "Nemotron-H", "backbone.layers.1.mixer.up_proj.weight"),
    # Experts that stand in the block itself.
    (r"^experts$", "Gemma 4", "model.language_model.layers.0.experts.down_proj"),
    # Experts below a name of their own; their router is none of them, see below.
    (r"^block_sparse_moe$", "Mixtral", "layers.0.block_sparse_moe.experts.0.w1.weight"),
)

FFN_BESIDE_ATTENTION = table(
    FFN,
    # Torch's and DETR's decoder layers keep the two matrices in the block itself; without an
    # attention module beside them they are Flux's fused matrices.
    (r"^linear[12]$", "rfdetr_base", "transformer.decoder.layers.0.linear1.weight"),
    # Fairseq's spelling.
    (r"^fc[12]$", "BART", "model.decoder.layers.0.fc1.weight"),
    # The second matrix, after `intermediate`; `attention.output` is taken before.
    (r"^output$", "BERT", "encoder.layer.0.output.dense.weight"),
)

# What chooses among experts is no feed-forward: its rate decides which of them train at all.

ROUTERS = table(
    ROUTER,
    # Beside experts only, see components.py: a gated feed-forward may call its first matrix so.
    (r"^gate$", "Qwen3-MoE", "model.layers.0.mlp.gate.weight"),
    # Called as what it is.
    (r"^router$", "GPT-OSS", "model.layers.0.mlp.router.weight"),
    # Weighs the expert that every token takes.
    (r"^shared_expert_gate$", "Qwen2-MoE", "model.layers.0.mlp.shared_expert_gate.weight"),
)

# Norms.

NORM_CLASSES = table(
    NORM,
    # Classes of torch and their namesakes; AdaLayerNorm is a module with a matrix inside.
    (r"(?<!Ada)(Layer|RMS|Group|Batch|Instance)Norm(\dd)?$", "Llama", "LlamaRMSNorm"),
    # A class of the project's own that is called nothing else.
    (r"^Norm$", "convolutional detectors", "Norm"),
)

NORMS = table(
    NORM,
    # Anywhere in the segment (`norm_q`, `input_layernorm`), but not surface `normals`.
    (
        r"(?i)norm(?!als?(_|$))",
        "sd15",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight",
    ),
    # OpenAI's short form, also `ln_f` and CLIP's `ln_pre`.
    (r"(?i)^ln(_\w+|\d*)$", "GPT-2", "transformer.h.0.ln_1.weight"),
    # Batch norms of convolutional parts.
    (r"(?i)^bn\d*$", "rfdetr_base", "backbone.0.projector.stages.0.0.cv1.bn.weight"),
)

# Fine components: they count only where the user lists them in component_lr.

MODULATIONS = table(
    MODULATION,
    # Also `adaLN_modulation` of Z-Image.
    (r"(?i)modulation", "flux2_klein_4b", "double_stream_modulation_img.linear.weight"),
    # A bare parameter: the leaf itself is the word.
    (r"(?i)scale_shift", "wan21_i2v_14b", "blocks.0.scale_shift_table"),
    # Also LTX-2.3's `prompt_adaln`.
    (r"(?i)(^|_)ada_?ln", "pixart_sigma_1024", "adaln_single.linear.weight"),
    # Qwen-Image.
    (r"(?i)(^|_)mod$", "qwen_image", "transformer_blocks.0.img_mod.1.weight"),
    # Makes the modulation of all blocks; asked before `embedder` can claim it.
    (r"(?i)^time_proj$", "wan21_i2v_14b", "condition_embedder.time_proj.weight"),
    # LTX-2's gates between its two streams.
    (r"(?i)^av_cross_attn_\w+_gate$", "ltx2_19b", "av_cross_attn_video_a2v_gate.linear.weight"),
    # Chroma's network that makes the modulation.
    (r"(?i)^distilled_guidance_layer$", "chroma1_hd", "distilled_guidance_layer.in_proj.weight"),
)

HEADS = table(
    HEAD,
    # Outside blocks only; inside them it is no head.
    (r"^(audio_)?proj_out$", "flux1_dev", "proj_out.weight"),
    # A UNet's last convolution.
    (r"^conv_out$", "sd15", "conv_out.weight"),
    # Language models, and the heads of detectors.
    (r"_head$", "llama31_8b", "lm_head.weight"),
    # Classifiers; `heads` in torchvision.
    (r"^heads?$", "timm ViT", "head.weight"),
    # Transformers' image classifiers.
    (r"^classifier$", "ViT", "classifier.weight"),
    # Transformers' text classifiers.
    (r"^score$", "LlamaForSequenceClassification", "score.weight"),
    # DiT's name; Z-Image has one per patch size.
    (r"^(all_)?final_layer$", "z_image", "all_final_layer.2-1.linear.weight"),
)

EMBEDS = table(
    EMBED,
    # Patch, time, text and position embeddings.
    (r"(?i)embed", "flux1_dev", "x_embedder.weight"),
    # The projection into the model's width.
    (r"(?i)^(proj|conv|img|txt|x|audio_proj)_in$", "qwen_image", "img_in.weight"),
    # Learned tokens: pad, class, mask, register.
    (r"(?i)_tokens?$", "z_image", "x_pad_token"),
    # The prompt into the model's width.
    (r"(?i)^caption_projection$", "pixart_sigma_1024", "caption_projection.linear_1.weight"),
    # The same for LTX-2's audio stream.
    (r"(?i)^audio_caption", "ltx2_19b", "audio_caption_projection.linear_1.weight"),
    # T5's and GPT-2's token and position tables.
    (r"(?i)^(shared|wte|wpe)$", "T5", "shared.weight"),
)

CONVS = table(
    CONV,
    # Whatever is called a convolution.
    (r"conv", "rfdetr_base", "backbone.0.projector.stages.0.0.cv1.conv.weight"),
    # All of a residual block, its time projection too.
    (r"^resnets$", "sd15", "down_blocks.0.resnets.0.time_emb_proj.weight"),
    # Down- and upsamplers.
    (r"samplers$", "sd15", "down_blocks.0.downsamplers.0.conv.weight"),
)

# Names of stacks (plan/stacks.py). The examples hold no attention-named segment on purpose: the
# name of the container alone must do.

STACKS = table(
    "stack",
    # Diffusers, when only the feed-forwards are listed.
    (r"^transformer_blocks$", "flux1_dev", "transformer_blocks.0.ff.net.2.weight"),
    # Diffusers' second stack of Flux.
    (r"^single_transformer_blocks$", "flux1_dev", "single_transformer_blocks.0.proj_mlp.weight"),
    # The original repository.
    (r"^double_blocks$", "Flux, original names", "double_blocks.0.img_mlp.0.weight"),
    # Its blocks hold two fused matrices and no attention module.
    (r"^single_blocks$", "Flux, original names", "single_blocks.0.linear1.weight"),
    # The original repository.
    (r"^joint_blocks$", "SD 3, original names", "joint_blocks.0.x_block.mlp.fc1.weight"),
    # HiDream.
    (r"^double_stream_blocks$", "HiDream", "double_stream_blocks.0.block.ff_t.w1.weight"),
    # HiDream.
    (r"^single_stream_blocks$", "HiDream", "single_stream_blocks.0.block.ff_i.gate.weight"),
    # A UNet's stage without attention is a block too: the depth of all others depends on it.
    (r"^down_blocks$", "sd15", "down_blocks.0.resnets.0.conv1.weight"),
    # As down_blocks.
    (r"^up_blocks$", "sd15", "up_blocks.0.resnets.0.conv1.weight"),
    # CompVis' spelling of down_blocks.
    (r"^input_blocks$", "SD 1.5, original names", "input_blocks.1.0.in_layers.2.weight"),
    # CompVis' spelling of up_blocks.
    (r"^output_blocks$", "SD 1.5, original names", "output_blocks.1.0.in_layers.2.weight"),
    # The refiner of the prompt.
    (
        r"^refiner_blocks$",
        "hunyuan_video",
        "context_embedder.token_refiner.refiner_blocks.0.ff.net.2.weight",
    ),
    # The control branch.
    (r"^vace_blocks$", "Wan 2.1 VACE", "vace_blocks.0.ffn.net.2.weight"),
)

PLAIN_STACKS = table(
    "stack",
    # Wan, timm.
    (r"^blocks$", "wan21_i2v_14b", "blocks.0.ffn.net.2.weight"),
    # T5.
    (r"^block$", "T5", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
    # Language models.
    (r"^layers$", "llama31_8b", "model.layers.0.mlp.down_proj.weight"),
    # BERT and its heirs.
    (r"^layer$", "dinov2_base", "encoder.layer.0.mlp.fc1.weight"),
    # A ConvNeXt has no attention.
    (r"^stages$", "ConvNeXt", "stages.0.blocks.0.mlp.fc1.weight"),
    # GPT-2.
    (r"^h$", "GPT-2", "transformer.h.0.mlp.c_fc.weight"),
    # OpenAI's CLIP.
    (r"^resblocks$", "CLIP, original names", "transformer.resblocks.0.mlp.c_fc.weight"),
)

# Layer 0 of layer decay (plan/layer_decay.py), by convention: projects differ in what they count
# as an embedding. More tables are built from these there.

VIT_EMBEDDINGS = table(
    "layer 0",
    # Timm, detectron2.
    (r"^pos_embed", "timm ViT", "pos_embed"),
    # Timm, detectron2; Wan's patch_embedding.
    (r"^patch_embed", "timm ViT", "patch_embed.proj.weight"),
    # Transformers.
    (r"^position_embedding", "dinov2_base", "embeddings.position_embeddings"),
    # Transformers keep all of them below it.
    (r"^embeddings$", "dinov2_base", "embeddings.patch_embeddings.projection.bias"),
)

CLASS_TOKENS = table(
    "layer 0",
    # BEiT, MAE.
    (r"^cls_token$", "timm ViT", "cls_token"),
    # BEiT.
    (r"^mask_token$", "BEiT", "mask_token"),
)

REGISTER_TOKENS = table(
    "layer 0",
    # DINOv3's own repository.
    (r"^storage_tokens$", "DINOv3", "storage_tokens"),
    # DINOv2's own repository.
    (r"^register_tokens$", "DINOv2 with registers", "register_tokens"),
    # Timm.
    (r"^reg_token$", "timm ViT", "reg_token"),
)

TIMM_EMBEDDINGS = table(
    "layer 0",
    # Timm's group matcher, as the rows below.
    (r"^cls_token", "timm ViT", "cls_token"),
    # Registers.
    (r"reg_token", "timm ViT", "reg_token"),
    # Anywhere in the segment.
    (r"pos_embed", "timm ViT", "pos_embed"),
    # Anywhere in the segment.
    (r"patch_embed", "timm ViT", "patch_embed.proj.weight"),
    # The convolutions before the stages.
    (r"^(conv_)?stem", "ConvNeXt", "stem.0.weight"),
    # The norm before the blocks.
    (r"norm_pre", "timm CLIP ViT", "norm_pre.weight"),
    # Transformers, which timm has not.
    (r"^embeddings$", "dinov2_base", "embeddings.mask_token"),
)

FINAL_NORMS = table(
    "last layer",
    # Timm; norm_pre stands before the blocks.
    (r"^norm(?!_pre)", "timm ViT", "norm.weight"),
    # Transformers.
    (r"^layernorm", "dinov2_base", "layernorm.weight"),
)
