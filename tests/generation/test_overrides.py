"""Hooks, patched forwards and other classes in the decoder and the head take effect, as in a loop over the modules."""

from __future__ import annotations

import copy
import cProfile
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ospo_fast.errors import OspoError
from ospo_fast.generation import ImageGenerator
from ospo_fast.generation.decoder import InferenceDecoder
from ospo_fast.generation.module_decoder import ModuleDecoder
from ospo_fast.generation.overrides import find_override
from ospo_fast.generation.projections import PackedHead, head_projection, is_plain

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPT = "two blue squares and a red circle"


@pytest.fixture
def tiny(tiny: JanusUnifiedModel) -> JanusUnifiedModel:
    tiny.grid = (3, 4)  # short images: the loop has no cache
    return tiny


def codes(model: JanusUnifiedModel, generator: ImageGenerator | None = None) -> list[int]:
    found: Tensor = (generator or ImageGenerator(model)).generate(
        [PROMPT], seeds=[0], temperature=0, guidance_scale=1, output="codes", progress=False
    )
    return list(map(int, found[0]))


@torch.no_grad()
def loop(model: JanusUnifiedModel) -> list[int]:
    """Greedy codes by the modules themselves, without a cache."""
    x, found = model.embed_tokens(model.image_prompt(PROMPT)[None]), []
    for _ in range(model.grid[0] * model.grid[1]):
        hidden = model.decoder(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
        code = model.head(hidden).argmax(-1)
        found.append(int(code))
        x = torch.cat((x, model.embed_codes(code[:, None])), 1)
    return found


def change(value: Any) -> Any:
    """Scale all but the first half of the features of what a module returned."""
    if isinstance(value, Tensor):
        half = value.shape[-1] // 2
        return torch.cat((value[..., :half], -0.5 * value[..., half:]), -1)
    if isinstance(value, tuple):
        return (change(value[0]), *value[1:])
    value.last_hidden_state = change(value.last_hidden_state)
    return value


def part(model: JanusUnifiedModel, name: str) -> nn.Module:
    root, _, path = name.partition(".")
    return {"decoder": model.decoder, "head": model.head, "codes": model.module.model.generation_aligner}[
        root
    ].get_submodule(path)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def hook(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, y: change(y))
    yield
    handle.remove()


@contextmanager
def hook_with_kwargs(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, ___, y: change(y), with_kwargs=True)
    yield
    handle.remove()


@contextmanager
def pre_hook(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, given: change(given))
    yield
    handle.remove()


@contextmanager
def pre_hook_with_kwargs(module: nn.Module) -> Iterator[None]:
    def run(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        if given:
            return change(given), options
        name = next(iter(options))
        return given, {**options, name: change(options[name])}

    handle = module.register_forward_pre_hook(run, with_kwargs=True)
    yield
    handle.remove()


@contextmanager
def patch(module: nn.Module) -> Iterator[None]:
    forward = module.forward
    module.forward = lambda *given, **options: change(forward(*given, **options))  # type: ignore[method-assign]
    yield
    module.forward = forward  # type: ignore[method-assign]  # as users take a patch back: the attribute stays


@contextmanager
def patch_of_class(module: nn.Module) -> Iterator[None]:
    kind, forward = type(module), type(module).forward

    @functools.wraps(forward)
    def run(self: nn.Module, *given: Any, **options: Any) -> Any:
        return change(forward(self, *given, **options))

    with replaced(kind, "forward", run):
        yield


@contextmanager
def subclass(module: nn.Module) -> Iterator[None]:
    kind = type(module)

    def forward(self: nn.Module, *given: Any, **options: Any) -> Any:
        return change(kind.forward(self, *given, **options))

    module.__class__ = type(f"Own{kind.__name__}", (kind,), {"forward": forward})
    yield
    module.__class__ = kind


@contextmanager
def global_hook(module: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, y: change(y) if m is module else None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def global_pre_hook(module: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, x: change(x) if m is module else None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def accelerate_hook(module: nn.Module) -> Iterator[None]:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Change(ModelHook):  # type: ignore[misc]
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return change(output)

    add_hook_to_module(module, Change())
    yield
    remove_hook_from_module(module)


@contextmanager
def parametrization(module: nn.Module) -> Iterator[None]:
    class Change(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return change(weight)

    nn.utils.parametrize.register_parametrization(module, "weight", Change())
    yield
    nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


ANYWHERE = [
    "decoder", "decoder.layers.1", "decoder.layers.1.mlp", "decoder.layers.1.self_attn", "decoder.norm",
    "decoder.layers.1.input_layernorm", "decoder.layers.1.post_attention_layernorm", "decoder.layers.1.mlp.act_fn",
    "decoder.layers.1.mlp.down_proj", "decoder.layers.0.self_attn.k_proj", "decoder.rotary_emb", "decoder.embed_tokens",
    "head", "head.proj_out", "head.activation_fn", "head.vision_head", "codes", "codes.fc1",
]  # fmt: skip
PATCHES = ["decoder.layers.1", "decoder.layers.1.mlp", "decoder.norm", "decoder.layers.1.mlp.up_proj", "head"]
CASES = [
    *((hook, name) for name in ANYWHERE),
    *((patch, name) for name in (*PATCHES, "decoder.layers.1.self_attn", "head.vision_head")),
    *((patch_of_class, name) for name in PATCHES),
    *((subclass, name) for name in PATCHES),
    (hook_with_kwargs, "decoder.layers.1.self_attn"),
    *((pre_hook, name) for name in ("decoder.layers.1.mlp", "head.vision_head")),
    (pre_hook_with_kwargs, "decoder.layers.1.self_attn"),
    *((global_hook, name) for name in ("decoder.layers.1.mlp", "head.proj_out")),
    (global_pre_hook, "decoder.layers.1.mlp"),
    *((accelerate_hook, name) for name in ("decoder.layers.1.mlp", "head")),
    *((parametrization, name) for name in ("decoder.layers.1.mlp.up_proj", "head.vision_head")),
]


@pytest.mark.parametrize(("override", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_codes_are_those_of_a_loop_over_the_modules(
    tiny: JanusUnifiedModel, override: Callable[[nn.Module], Any], name: str
) -> None:
    generator = ImageGenerator(tiny)
    before = codes(tiny, generator)
    with override(part(tiny, name)):
        expected = loop(tiny)
        assert expected != before  # else the test would show nothing
        assert codes(tiny, generator) == expected
        assert isinstance(generator._engine.decoder, ModuleDecoder)  # type: ignore[union-attr]
    assert codes(tiny, generator) == before
    assert type(generator._engine.decoder) is InferenceDecoder  # type: ignore[union-attr]


@pytest.fixture
def own_attention() -> str:
    """A registered attention with a scale of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(*given: Any, **options: Any) -> Any:
        return sdpa_attention_forward(*given, **{**options, "scaling": 0.3 * options["scaling"]})

    AttentionInterface.register("own attention", attention)
    AttentionMaskInterface.register("own attention", sdpa_mask)
    AttentionInterface.register("own attention without masks", attention)
    return "own attention"


def test_attention_settings_and_functions_that_the_fused_decoder_does_not_compute(
    tiny: JanusUnifiedModel, own_attention: str
) -> None:
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb
    attention, config, before = tiny.decoder.layers[1].self_attn, tiny.decoder.config, codes(tiny)
    for context in (
        replaced(config, "_attn_implementation", own_attention),
        replaced(config, "_attn_implementation", own_attention + " without masks"),
        replaced(modeling_llama, "apply_rotary_pos_emb", lambda q, *given: rotate(0.3 * q, *given)),
        replaced(attention, "scaling", -9 * attention.scaling),
        replaced(config, "num_hidden_layers", 1),
    ):
        with context:
            expected = loop(tiny)
            assert expected != before
            assert find_override(tiny) is not None
            assert codes(tiny) == expected
    assert find_override(tiny) is None


def test_functions_that_the_package_kernels_made_modules_keep_the_fused_decoder(tiny: JanusUnifiedModel) -> None:
    """As it does on import of transformers. A kernel that takes the place of the function is set on the instance."""
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def module_of(function: Any) -> nn.Module:
        class Func(nn.Module):
            def forward(self, *given: Any, **options: Any) -> Any:
                return function(*given, **options)

        Func.__module__ = "kernels.layer.layer"
        return Func()

    own, other = module_of(rotate), module_of(lambda q, *given: rotate(0.3 * q, *given))
    with replaced(modeling_llama, "apply_rotary_pos_emb", own):
        assert find_override(tiny) is None
        own.forward = other.forward  # type: ignore[method-assign]
        assert "apply_rotary_pos_emb was replaced" in str(find_override(tiny))
        assert codes(tiny) == loop(tiny)
    with replaced(modeling_llama, "apply_rotary_pos_emb", other):
        assert "apply_rotary_pos_emb was replaced" in str(find_override(tiny))


def test_other_activations_run_by_their_modules(tiny: JanusUnifiedModel) -> None:
    before = codes(tiny)
    for layer in tiny.decoder.layers:
        layer.mlp.act_fn = nn.Tanh()
    assert loop(tiny) != before
    assert codes(tiny) == loop(tiny)
    assert find_override(tiny) == "layers.0.mlp.act_fn is a Tanh, expected SiLU"


def test_a_layer_that_was_made_to_skip_its_attention_is_honoured_and_one_that_ignores_the_cache_is_refused(
    tiny: JanusUnifiedModel,
) -> None:
    layer = tiny.decoder.layers[1]
    forward = layer.self_attn.forward

    def uncached(**given: Any) -> Any:
        return forward(**{name: value for name, value in given.items() if name not in ("cache", "past_key_values")})

    with replaced(layer, "forward", lambda x, **_: x):
        assert codes(tiny) == loop(tiny)
    with replaced(layer.self_attn, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)):
        assert codes(tiny) == loop(tiny)
    with (
        replaced(layer.self_attn, "forward", uncached),
        pytest.raises(OspoError, match="does not store its keys and values in the cache"),
    ):
        codes(tiny)


def test_layers_that_a_cache_cannot_tell_apart_are_refused(tiny: JanusUnifiedModel) -> None:
    tiny.decoder.layers = nn.ModuleList([tiny.decoder.layers[0], tiny.decoder.layers[0]])
    tiny.decoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(OspoError, match=r"have layer_idx \[0, 0\], expected different ones"):
        codes(tiny)


def test_removed_layers_keep_their_numbers(tiny: JanusUnifiedModel) -> None:
    tiny.decoder.layers = tiny.decoder.layers[1:]
    fused = codes(tiny)
    tiny.decoder.layers[0].register_forward_hook(lambda *_: None)
    assert codes(tiny) == fused == loop(tiny)


def test_hooks_of_libraries_that_change_nothing_keep_the_fused_decoder(tiny: JanusUnifiedModel) -> None:
    with torch.no_grad():
        tiny.decoder(inputs_embeds=torch.randn(1, 3, 64), output_hidden_states=True)
    tiny.module.enable_input_require_grads()
    assert tiny.decoder.layers[0]._forward_hooks
    assert tiny.decoder.embed_tokens._forward_hooks
    assert find_override(tiny) is None
    assert codes(tiny) == loop(tiny)

    def output_capturing_hook(*_: object) -> None:  # of the same name, but not of transformers
        """See the name."""

    output_capturing_hook.__module__ = "transformers.utils.output_capturing"
    tiny.decoder.norm.register_forward_hook(output_capturing_hook)
    assert "norm has a forward hook" in str(find_override(tiny))


def test_adapters_keep_the_fused_decoder_until_something_is_hooked_in_them(tiny: JanusUnifiedModel) -> None:
    import peft

    plain = codes(tiny)
    targets = r".*language_model.*(q_proj|down_proj)|.*generation_head\.vision_head"
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny.module, config)
    generator = ImageGenerator(tiny)
    adapted = codes(tiny, generator)
    assert adapted == loop(tiny) != plain
    engine = generator._engine
    assert find_override(tiny) is None
    with wrapped.disable_adapter():
        assert codes(tiny, generator) == plain
        assert generator._engine is not engine  # a captured step would have kept the adapter of the head
    handle = tiny.decoder.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda _, __, y: 9 * y)
    assert str(find_override(tiny)).startswith("layers.0.self_attn.q_proj.lora_A.default has a forward hook")
    assert codes(tiny, generator) == loop(tiny) != adapted
    handle.remove()
    assert codes(tiny, generator) == adapted


def test_modules_see_the_shapes_of_generate_and_no_padding_rows(tiny: JanusUnifiedModel) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {"mlp": [], "head": [], "codes": [], "embed": []}
    for name, module in (
        ("mlp", tiny.decoder.layers[0].mlp),
        ("head", tiny.head),
        ("codes", tiny.module.model.generation_aligner),
        ("embed", tiny.decoder.embed_tokens),
    ):
        module.register_forward_hook(lambda _, x, __, shapes=seen[name]: shapes.append(tuple(x[0].shape)))
    length = len(tiny.image_prompt(PROMPT))
    ImageGenerator(tiny).generate([PROMPT] * 2, seeds=[0, 1], output="codes", progress=False)
    # One unconditional prompt is run for both images.
    assert seen["embed"] == [(3, length)]
    assert seen["mlp"] == [(3, length, 64)] + [(4, 1, 64)] * 11
    assert seen["head"] == [(4, 64)] * 12
    assert {shape[:2] for shape in seen["codes"]} == {(2, 1)}


def test_the_cost_is_said_once_with_the_name_of_the_module(
    tiny: JanusUnifiedModel, caplog: pytest.LogCaptureFixture
) -> None:
    generator = ImageGenerator(tiny)
    with caplog.at_level(logging.WARNING):
        codes(tiny, generator)
        assert not caplog.records
        tiny.decoder.layers[1].mlp.register_forward_hook(change)
        for _ in range(2):
            tiny.decoder.norm.register_forward_hook(lambda *_: None)
            tiny.decoder.layers[1].mlp._forward_hooks.clear()
            codes(tiny, generator)
    (record,) = caplog.records
    assert record.getMessage().startswith("norm has a forward hook (")
    assert "slower" in record.getMessage()


def test_the_check_of_a_model_is_linear_in_its_layers(tiny: JanusUnifiedModel) -> None:
    """About 0.7 ms for 30 layers on an idle core. Function calls are counted, as times depend on the machine."""
    from transformers import LlamaConfig, LlamaModel

    calls = {}
    for layers in (15, 30):
        sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        tiny.decoder = LlamaModel(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()
        assert find_override(tiny) is None
        with cProfile.Profile() as profile:
            find_override(tiny)
        calls[layers] = sum(each.callcount for each in profile.getstats())
    assert calls[30] <= 2 * calls[15]
    assert calls[30] < 10_000


def test_patched_layers_are_not_fused(tiny: JanusUnifiedModel) -> None:
    """`InferenceDecoder` and the head call them, also where they are built by themselves."""
    assert is_plain(tiny.head.proj_out)
    with patch(tiny.head.proj_out):
        assert not is_plain(tiny.head.proj_out)
        assert not isinstance(head_projection(tiny.head, True), PackedHead)
    with hook(tiny.head.activation_fn):
        assert not isinstance(head_projection(tiny.head, True), PackedHead)
    assert isinstance(head_projection(tiny.head, True), PackedHead)
    layer = tiny.decoder.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(type("Quantized", (Tensor,), {})))
    assert not is_plain(layer)


def test_a_head_with_more_than_the_parts_of_its_class_runs_as_it_is(tiny: JanusUnifiedModel) -> None:
    head: Any = tiny.head
    norm = nn.LayerNorm(tiny.hidden_size)
    nn.init.normal_(norm.weight)
    tiny.head = nn.Sequential(OrderedDict([("norm", norm), *head.named_children()]))
    assert codes(tiny) == loop(tiny)


@pytest.mark.parametrize("change", ["scaling", "inv_freq", "attention_scaling", "model"])
def test_what_a_decoder_reads_once_is_read_again_after_a_change(tiny: JanusUnifiedModel, change: str) -> None:
    generator = ImageGenerator(tiny)
    before = codes(tiny, generator)
    decoder: Any = tiny.decoder
    with torch.no_grad():
        if change == "scaling":
            for layer in decoder.layers:
                layer.self_attn.scaling *= 9
        elif change == "inv_freq":
            decoder.rotary_emb.inv_freq.mul_(3)
        elif change == "attention_scaling":
            decoder.rotary_emb.attention_scaling = 3.0
        else:
            tiny.module.model = copy.deepcopy(tiny.module.model)
            for weight in tiny.decoder.parameters():
                weight.copy_(torch.randn_like(weight))
    assert codes(tiny, generator) == loop(tiny)
    assert codes(tiny, generator) != before


def test_attention_that_is_not_causal_is_refused(tiny: JanusUnifiedModel) -> None:
    generator = ImageGenerator(tiny)
    codes(tiny, generator)
    attention: Any = tiny.decoder.get_submodule("layers.1.self_attn")
    attention.is_causal = False
    for found in (generator, ImageGenerator(tiny)):
        with pytest.raises(OspoError, match="is_causal of the decoder is False"):
            codes(tiny, found)
    attention.register_forward_hook(lambda *_: None)
    with pytest.raises(OspoError, match="is_causal of the decoder is False"):
        codes(tiny, generator)
